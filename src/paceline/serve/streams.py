"""The client's side of its requests: who waits for what, and what each has got. Belongs to one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import Callable
from types import TracebackType
from weakref import WeakValueDictionary

from paceline.errors import EngineDeadError, PacelineError, UsageError
from paceline.serve.client import AnswerUpdate, EncodeRequest, Encoding, GenerateRequest
from paceline.serve.failures import error_of
from paceline.serve.messages import (
    Abort,
    Accepted,
    Encode,
    Encoded,
    EndAnswer,
    Event,
    Refused,
    StepEvents,
    Submit,
    ToEngine,
    update_of,
)

MAX_RESUMES = 1  # a request that runs while two engines die is likely their death: it may not take a third one


class Stream:
    """One request: the RequestStream that its caller reads, and what is needed to go on with it elsewhere.

    `sent`: the tokens that each answer has got, None once it has ended.
    """

    def __init__(self, number: int, request: GenerateRequest, table: StreamTable) -> None:
        self.number = number
        self.request = request
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.seed: int | None = None
        self.sent: list[list[int] | None] = [[] for _ in range(request.params.num_answers)]
        self._num_open = len(self.sent)  # that have not ended
        self.num_resumes = 0
        self._table = table
        self._updates: deque[AnswerUpdate] = deque()
        self._is_accepted = False
        self._error: PacelineError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more is to come."""
        return self._error is not None or not self._num_open

    def resumption(self) -> Submit:
        """What goes on with the request from the tokens that it has got."""
        beams = self.request.params.use_beam_search
        sent = tuple(None if tokens is None else () if beams else tuple(tokens) for tokens in self.sent)
        return Submit(self.number, self.request, self.seed, sent)

    def accept(self, seed: int) -> None:
        self.seed = seed
        self._is_accepted = True
        if not self.accepted.done():
            self.accepted.set_result(None)

    def deliver(self, event: Event) -> None:
        if not self._is_accepted:
            return  # of a request that had the same id, and was aborted
        tokens = self.sent[event.index]
        if tokens is None:
            return  # it was ended here while the step ran
        tokens.extend(event.token_ids)
        if event.details is not None and event.details.finish_reason is not None:
            self._close(event.index)
        self._updates.append(update_of(event))
        self._wake()

    def end_answer(self, index: int) -> bool:
        """End it here: what has arrived of it and was not read is dropped. False if the engine has ended it already."""
        self._updates = deque(one for one in self._updates if one.index != index)
        if not 0 <= index < len(self.sent) or self.sent[index] is None:
            return False
        self._close(index)
        self._wake()
        return True

    def end(self, error: PacelineError | None = None) -> None:
        """End all that has not ended. The reader gets what has arrived and then the error; without one, nothing."""
        if error is None:
            self._updates.clear()
        elif not self.ended:
            self._error = error
        self.sent, self._num_open = [None] * len(self.sent), 0
        if not self.accepted.done():
            self.accepted.set_exception(error or EngineDeadError("the request was aborted before it was accepted"))
            self.accepted.exception()  # told to whoever waits; if nobody does, that is no mistake
        self._wake()

    def _close(self, index: int) -> None:
        self.sent[index] = None
        self._num_open -= 1

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # ------------------------------------------------------------------------------------------- RequestStream

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> AnswerUpdate:
        while not self._updates:
            if self._error is not None:
                raise self._error
            if self.ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._updates.popleft()

    async def aclose(self) -> None:
        self._table.abort(self.request.request_id)

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


class PendingEncoding:
    """One request to an encoder: answered whole, so what has to be kept of it is the request."""

    def __init__(self, number: int, request: EncodeRequest) -> None:
        self.number = number
        self.request = request
        self.result: asyncio.Future[Encoding] = asyncio.get_running_loop().create_future()
        self.num_resumes = 0

    def resumption(self) -> Encode:
        return Encode(self.number, self.request, resumed=True)

    def deliver(self, message: Encoded) -> None:
        if not self.result.done():
            self.result.set_result(Encoding(message.rows, message.queue_seconds))

    def end(self, error: PacelineError | None = None) -> None:
        if not self.result.done():
            self.result.set_exception(error or EngineDeadError("the request was aborted"))
            self.result.exception()  # as in Stream.end


class StreamTable:
    """The requests of one client that have not ended. `send` hands a message to the engine, and never blocks."""

    def __init__(self, send: Callable[[ToEngine], None]) -> None:
        self._send = send
        self._numbers = itertools.count()
        self._streams: dict[str, Stream | PendingEncoding] = {}
        self._unread: WeakValueDictionary[str, Stream] = WeakValueDictionary()  # those that ended too, while read
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._streams)

    async def submit(self, request: GenerateRequest) -> Stream:
        """Send a request and wait until it is accepted. Raises what the engine refuses it with."""
        self._check_new(request.request_id)
        stream = Stream(next(self._numbers), request, self)
        self._streams[request.request_id] = self._unread[request.request_id] = stream
        self._send(Submit(stream.number, request))
        try:
            await stream.accepted
        except asyncio.CancelledError:
            self.abort(request.request_id)
            raise
        return stream

    async def encode(self, request: EncodeRequest) -> Encoding:
        """Send a request to an encoder and wait for its answer. Raises what it is refused with."""
        self._check_new(request.request_id)
        pending = PendingEncoding(next(self._numbers), request)
        self._streams[request.request_id] = pending
        self._send(Encode(pending.number, request))
        try:
            return await pending.result
        except asyncio.CancelledError:
            self.abort(request.request_id)
            raise

    def _check_new(self, request_id: str) -> None:
        if request_id in self._streams:
            raise UsageError(f"request id '{request_id}' is in use by an unfinished request: choose another")

    def receive(self, message: Accepted | Refused | StepEvents | Encoded) -> None:
        match message:
            case StepEvents():
                for event in message.events:
                    stream = self._streams.get(event.request_id)
                    if isinstance(stream, Stream):
                        stream.deliver(event)
                        self._drop_if_ended(stream)
            case Accepted():
                stream = self._streams.get(message.request_id)
                if isinstance(stream, Stream) and stream.number == message.number:
                    stream.accept(message.seed)
            case Encoded():
                pending = self._streams.get(message.request_id)
                if isinstance(pending, PendingEncoding) and pending.number == message.number:
                    del self._streams[message.request_id]
                    pending.deliver(message)
                    self._changed.set()
            case Refused():
                refused = self._streams.get(message.request_id)
                if refused is not None and refused.number == message.number:
                    del self._streams[message.request_id]
                    refused.end(error_of(message.failure))
                    self._changed.set()

    def end_answer(self, request_id: str, index: int) -> None:
        stream = self._unread.get(request_id)
        if stream is not None and stream.end_answer(index):
            self._send(EndAnswer(request_id, index))
            self._drop_if_ended(stream)

    def abort(self, request_id: str) -> None:
        stream = self._unread.get(request_id) or self._streams.get(request_id)
        if stream is not None:
            stream.end()
        if self._streams.pop(request_id, None) is not None:
            self._send(Abort(request_id))
            self._changed.set()

    def fail_all(self, error: PacelineError) -> None:
        """No engine will finish them."""
        for stream in self._streams.values():
            stream.end(error)
        self._streams.clear()
        self._changed.set()

    def resume_all(self) -> None:
        """Hand every request to a new engine; one that was resumed before fails."""
        for request_id, stream in list(self._streams.items()):
            if stream.num_resumes >= MAX_RESUMES:
                del self._streams[request_id]
                stream.end(EngineDeadError(f"the engine died {MAX_RESUMES + 1} times while request '{request_id}' ran"))
                self._changed.set()
            else:
                stream.num_resumes += 1
                self._send(stream.resumption())

    async def drain(self, timeout: float) -> None:
        """Wait until no request is left, so many seconds at most; then abort the rest."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._until_empty(), timeout)
        for stream in self._streams.values():
            stream.end(EngineDeadError("the server shuts down"))
            self._send(Abort(stream.request.request_id))
        self._streams.clear()

    async def _until_empty(self) -> None:
        while self._streams:
            self._changed.clear()
            await self._changed.wait()

    def _drop_if_ended(self, stream: Stream) -> None:
        if stream.ended:
            del self._streams[stream.request.request_id]
            self._changed.set()
