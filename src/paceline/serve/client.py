"""What the API process sees of an engine, wherever it runs: `EngineClient`. Token ids only; text is the API's own.

`InProcessClient` (serve/in_process.py) runs the engine in a thread, `ZmqClient` (serve/zmq_client.py) in a process of
its own that is watched and restarted. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any, Literal, Protocol

import msgspec

from paceline.encoders.description import EncoderInfo
from paceline.encoders.inputs import Tokens
from paceline.engine.step import RequestUpdate
from paceline.sampling.params import SamplingParams

EngineState = Literal["starting", "ready", "stalled", "restarting", "draining", "dead", "closed"]


class GenerateRequest(msgspec.Struct, frozen=True):
    """A request as the engine takes it. The caller has checked the prompt and the parameters against the vocabulary and
    the context (engine/prompts.py), and made `request_id` unique among those that run. `priority` is the parameters'.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    namespace: str = ""  # separates prefix caches: a tenant's salt


class EncodeRequest(msgspec.Struct, frozen=True):
    """Sequences for an encoder, at least one; the caller has checked them (encoders/inputs.py)."""

    request_id: str
    texts: tuple[Tokens, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(text.ids) for text in self.texts)


class Encoding(msgspec.Struct, frozen=True):
    """An encoder's answer. `rows`: native float32, a row of `EncoderInfo.size` values a text, as the model gives them
    (encoders/results.py makes embeddings, scores and probabilities of them). `queue_seconds`: before its first step."""

    rows: bytes
    queue_seconds: float


class AnswerUpdate(msgspec.Struct, frozen=True):
    """One answer's share of one engine step: what `RequestState.apply(index, update)` takes.

    `queue_seconds`: how long the request waited in the engine for its first step, in its first update; later ones, and
    those of other answers, have None.
    """

    index: int
    update: RequestUpdate
    queue_seconds: float | None = None


class ModelInfo(msgspec.Struct, frozen=True):
    """The model that an engine has loaded. `phases`: seconds of each part of its start, in order. `encoder`: what it is
    if it is an encoder; None for one that generates."""

    model: str  # as it was asked for
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    dtype: str  # "bfloat16"
    device: str  # "cuda:0"
    quantization: str | None
    generation_config: Mapping[str, Any]  # the model's sampling defaults, for `sampling.params.with_defaults`
    num_kv_tokens: int  # tokens that the cache holds
    phases: Mapping[str, float]
    encoder: EncoderInfo | None = None


class Transfer(msgspec.Struct, frozen=True):
    """A long read or download that is going on."""

    label: str
    total_bytes: int
    done_bytes: int


class Startup(msgspec.Struct, frozen=True):
    """How far a start is: seconds of the phases that are over, the one that runs, and its bytes. Compiling and
    capturing may go on behind the first requests; `phase` is None once nothing is left."""

    phases: Mapping[str, float] = {}
    phase: str | None = None
    transfer: Transfer | None = None


class EngineCounters(msgspec.Struct, frozen=True):
    """Totals since the client's start, restarts of the engine included."""

    steps: int = 0
    requests: int = 0  # accepted
    prompt_tokens: int = 0  # of accepted requests
    generation_tokens: int = 0
    preemptions: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0


class EngineStatus(msgspec.Struct, frozen=True):
    """The engine as last heard of. Cheap and never blocks.

    `alive`: a process is there, or one is being started; false means that none will come back by itself. `ready`: a
    request would be taken and worked on: loaded, heard of lately, and stepping if it has work. `last_step_age`: seconds
    since the last step ended, None before the first. `kv_usage`: share of the cache's blocks that requests hold, from 0
    to 1. `reason`: why it is not ready, in a line.
    """

    state: EngineState
    alive: bool
    ready: bool
    startup: Startup = Startup()
    last_step_age: float | None = None
    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    kv_usage: float = 0.0
    restarts: int = 0
    counters: EngineCounters = EngineCounters()
    reason: str | None = None


class RequestStream(Protocol):
    """A request that was accepted. Ends after the update that finishes its last answer.

    `__anext__` raises EngineDeadError where the engine died and the request could not be resumed. Leaving it early
    (`aclose`, or the end of `async with`) aborts the request within a step; both may be called twice.
    """

    def __aiter__(self) -> AsyncIterator[AnswerUpdate]: ...

    async def __anext__(self) -> AnswerUpdate: ...

    async def aclose(self) -> None: ...

    async def __aenter__(self) -> RequestStream: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class EngineClient(Protocol):
    """An engine. All methods belong to one event loop."""

    async def start(self) -> None:
        """Load the model; returns once the engine is ready. `status()` tells of the start meanwhile. Raises the errors
        of `load_model`, or EngineDeadError where its process ended without one."""

    async def close(self, drain_timeout: float = 0.0) -> None:
        """Take no more requests, let those that run finish for so many seconds, abort the rest, end the engine.
        Cancelling a `start` that is going on is allowed. May be called twice."""

    @property
    def info(self) -> ModelInfo:
        """Raises EngineDeadError before the first start is over."""

    async def submit(self, request: GenerateRequest) -> RequestStream:
        """Hand a request to the engine; returns when it is accepted, before its first token. Cancelling aborts.

        Raises QueueFullError (`retry_after`, seconds) where too many requests or tokens wait, PromptTooLongError where
        the cache could never hold it, UsageError for what the engine refuses, EngineDeadError where no engine takes it:
        loading, stalled, restarting, draining or gone.
        """

    async def encode(self, request: EncodeRequest) -> Encoding:
        """What an encoder makes of the texts, once all are done. Cancelling aborts: what has not begun never will.

        Raises as `submit`, and EngineError where a text's values are not finite or take too much memory.
        """

    async def end_answer(self, request_id: str, index: int) -> None:
        """End one answer whose text is complete (a stop string). No further update of it is given; the stream ends
        with the last answer. Unknown ids and answers that have ended are ignored."""

    async def abort(self, request_id: str) -> None:
        """End a request. Its stream ends without a further update. Unknown and finished ids are ignored."""

    def status(self) -> EngineStatus: ...
