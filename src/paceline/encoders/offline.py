"""The calls of `LLM` that need an encoder: texts in, vLLM's outputs out, in this process."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from paceline.config import SchedulerConfig
from paceline.encoders import results
from paceline.encoders.inputs import Text, TextReader, Tokens
from paceline.encoders.load import LoadedEncoder
from paceline.encoders.results import Rows
from paceline.encoders.scoring import pair_up, read_pairs
from paceline.engine.prompts import is_one_prompt
from paceline.errors import UsageError
from paceline.outputs import (
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    RankedDocument,
    ScoringOutput,
    ScoringRequestOutput,
)


class OfflineEncoder:
    """See the methods of `LLM` that have the same names."""

    def __init__(self, loaded: LoadedEncoder, scheduler: SchedulerConfig) -> None:
        self.loaded = loaded
        self._scheduler = scheduler
        self._info = loaded.encoder.info
        self._ids = itertools.count()

    def embed(
        self, texts: Text | Sequence[Text], truncate: int | None, dimensions: int | None, normalize: bool | None
    ) -> list[EmbeddingRequestOutput]:
        results.check_embeds(self._info, dimensions)
        read = self._reader.texts(_many(texts), truncate)
        rows_ND = results.embeddings(self._run(read), self._info, dimensions=dimensions, normalize=normalize)
        return [
            EmbeddingRequestOutput(self._new_id("embed"), EmbeddingOutput(row), one.ids)
            for one, row in zip(read, rows_ND.tolist(), strict=True)
        ]

    def classify(self, texts: Text | Sequence[Text], truncate: int | None) -> list[ClassificationRequestOutput]:
        results.check_classifies(self._info)
        read = self._reader.texts(_many(texts), truncate)
        rows_ND = results.probabilities(self._run(read), self._info)
        labels = [self._info.labels[place] for place in rows_ND.argmax(-1)]
        return [
            ClassificationRequestOutput(self._new_id("classify"), ClassificationOutput(row, label), one.ids)
            for one, row, label in zip(read, rows_ND.tolist(), labels, strict=True)
        ]

    def score(
        self, one: str | Sequence[str], other: str | Sequence[str], truncate: int | None
    ) -> list[ScoringRequestOutput]:
        scoring = read_pairs(self._reader, self._info, pair_up(one, other), truncate)
        return [
            ScoringRequestOutput(self._new_id("score"), ScoringOutput(score), scoring.token_ids(pair))
            for pair, score in enumerate(scoring.scores(self._run(scoring.texts)))
        ]

    def rerank(
        self, query: str, documents: Sequence[str], top_n: int | None, truncate: int | None
    ) -> list[RankedDocument]:
        if not isinstance(query, str) or isinstance(documents, str):
            raise UsageError("rerank takes one query and a list of documents")
        results.check_top_n(top_n)
        scoring = read_pairs(self._reader, self._info, pair_up(query, documents), truncate)
        scores = scoring.scores(self._run(scoring.texts))
        return [RankedDocument(place, scores[place], documents[place]) for place in results.best_first(scores, top_n)]

    def _run(self, texts: list[Tokens]) -> Rows:
        scheduler = self._scheduler
        return self.loaded.encoder.run_all(
            texts, max_tokens=scheduler.max_num_batched_tokens, max_texts=scheduler.max_num_seqs
        )

    @property
    def _reader(self) -> TextReader:
        if self.loaded.tokenizer is None:
            raise UsageError("this LLM has no tokenizer (skip_tokenizer_init): encoders need one")
        return TextReader(self._info, self.loaded.tokenizer)

    def _new_id(self, prefix: str) -> str:
        return f"{prefix}-{next(self._ids)}"


def _many(texts: Text | Sequence[Text]) -> list[Text]:
    return [texts] if is_one_prompt(texts) else list(texts)  # type: ignore[list-item, arg-type]
