"""What a user gets back, shaped as vLLM's `RequestOutput`. Plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from paceline.sampling.logprobs import TokenLogprobs


@dataclass(frozen=True)
class Logprob:
    """One candidate token at one position. `rank` from 1; None where it was not computed."""

    logprob: float
    rank: int | None
    decoded_token: str | None


@dataclass(frozen=True)
class CompletionOutput:
    """One of a request's n answers. `finish_reason`: "stop", "length", "abort", "error", or None while it runs.
    `stop_reason`: the stop string or stop token id that ended it, None for the model's own end.
    `logprobs`: a mapping a token, token id -> Logprob, the chosen token's included; None unless asked for.
    With `echo`, text, token_ids and logprobs begin with the prompt's (the first token's log probability is None).
    `cumulative_logprob`: the sum of the generated tokens' raw log probabilities; None unless `logprobs` or a rank ask.
    `score`: what answers of beam search or best_of are ranked by, a summed log probability over
    length ** length_penalty. A beam's sum is that after penalties and masks; best_of's is `cumulative_logprob`."""

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None = None
    logprobs: Sequence[Mapping[int, Logprob] | None] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    score: float | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestMetrics:
    """Wall-clock times in seconds, on time.perf_counter's clock."""

    arrival_time: float
    first_token_time: float | None = None
    last_token_time: float | None = None

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass(frozen=True)
class RequestOutput:
    """A request's prompt and answers. From `stream` each value carries only what is new in `outputs`.

    `prompt_logprobs`: a mapping a prompt token, token id -> Logprob, that token's included, and None for the first,
    which nothing precedes; None unless asked for. From `stream` the first value has it, the later ones None.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    outputs: Sequence[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0
    prompt_logprobs: Sequence[Mapping[int, Logprob] | None] | None = None


def decoded_logprobs(entry: TokenLogprobs, tokens: Mapping[int, str] | None) -> dict[int, Logprob]:
    """token id -> Logprob of one position: the likeliest ones in order, then the chosen token if it is not there."""

    def decoded(token_id: int) -> str | None:
        return None if tokens is None else tokens[token_id]

    result = {
        token_id: Logprob(value, rank, decoded(token_id))
        for rank, (token_id, value) in enumerate(entry.top.items(), start=1)
    }
    result[entry.token_id] = Logprob(entry.logprob, entry.rank, decoded(entry.token_id))
    return result


@dataclass(frozen=True)
class EmbeddingOutput:
    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """vLLM's name for the number of dimensions."""
        return len(self.embedding)


@dataclass(frozen=True)
class EmbeddingRequestOutput:
    """A text's embedding. `prompt_token_ids`: what the model read, special tokens included."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: Sequence[int]
    finished: bool = True


@dataclass(frozen=True)
class ClassificationOutput:
    """`probs`: a probability a class, in the checkpoint's order; `label`: the likeliest one's name."""

    probs: list[float]
    label: str

    @property
    def num_classes(self) -> int:
        return len(self.probs)


@dataclass(frozen=True)
class ClassificationRequestOutput:
    request_id: str
    outputs: ClassificationOutput
    prompt_token_ids: Sequence[int]
    finished: bool = True


@dataclass(frozen=True)
class ScoringOutput:
    score: float


@dataclass(frozen=True)
class ScoringRequestOutput:
    """How well two texts go together. `prompt_token_ids`: of a cross-encoder's pair; of two texts that are embedded,
    the one's and then the other's."""

    request_id: str
    outputs: ScoringOutput
    prompt_token_ids: Sequence[int]
    finished: bool = True


@dataclass(frozen=True)
class RankedDocument:
    """One of the documents that were ranked: its place among those given, and its score."""

    index: int
    score: float
    document: str
