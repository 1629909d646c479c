"""The calls of `LLM` that need an encoder: texts in, vLLM's outputs out, in this process."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from paceline.config import SchedulerConfig
from paceline.encoders import results
from paceline.encoders.inputs import Text, TextReader, Tokens, pair_up
from paceline.encoders.load import LoadedEncoder
from paceline.encoders.results import Rows
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
        results.check_embeds(self._info)
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
        pairs = pair_up(one, other)
        scores, ids = self._scores(pairs, truncate)
        return [
            ScoringRequestOutput(self._new_id("score"), ScoringOutput(score), tokens)
            for score, tokens in zip(scores, ids, strict=True)
        ]

    def rerank(
        self, query: str, documents: Sequence[str], top_n: int | None, truncate: int | None
    ) -> list[RankedDocument]:
        if not isinstance(query, str) or isinstance(documents, str):
            raise UsageError("rerank takes one query and a list of documents")
        scores, _ = self._scores(pair_up(query, documents), truncate)
        return [RankedDocument(place, scores[place], documents[place]) for place in results.best_first(scores, top_n)]

    def _scores(self, pairs: list[tuple[str, str]], truncate: int | None) -> tuple[list[float], list[Sequence[int]]]:
        """The score and the tokens of each pair."""
        results.check_scores(self._info)
        if self._info.is_cross_encoder:
            read = self._reader.pairs(pairs, truncate)
            return results.cross_scores(self._run(read), self._info), [one.ids for one in read]
        # A query that stands against many documents is embedded once.
        places = {text: place for place, text in enumerate(dict.fromkeys(itertools.chain(*pairs)))}
        read = self._reader.texts(list(places), truncate)
        rows = self._run(read)
        left, right = ([places[pair[side]] for pair in pairs] for side in (0, 1))
        ids = [read[one].ids + read[other].ids for one, other in zip(left, right, strict=True)]
        return results.cosines(rows[left], rows[right]), list(ids)

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
