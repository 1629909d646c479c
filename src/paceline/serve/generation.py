"""A request in the engine, and its answers as they grow: from `submit` to RequestState, in one place for all routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence

from paceline.engine.output import Answer, RequestState
from paceline.errors import EngineError
from paceline.sampling.params import NO_TOKEN_LEFT
from paceline.serve.client import EngineClient, GenerateRequest, RequestStream
from paceline.serve.errors import ApiError, bad_request, unavailable
from paceline.serve.metrics import Metrics
from paceline.serve.protocol.common import Usage, usage
from paceline.serve.tasks import cancel, run_together
from paceline.serve.tracing import PromptTrace


class Generation:
    """One prompt's answers. `submit` hands it to the engine; then iterate over it, once, and `close` it whatever came.

    Each value of the iteration is the index of an answer of `state` that has grown. A failed answer ends it with
    EngineError, an engine that took the request back (it drains, or is ending) with ApiError 503.
    """

    def __init__(self, request: GenerateRequest, state: RequestState, metrics: Metrics) -> None:
        self.request = request
        self.state = state
        self._metrics = metrics
        self._timer = metrics.request(request.params, len(request.prompt_token_ids))
        self.trace: PromptTrace | None = None  # told once, at the end
        self._client: EngineClient | None = None
        self._stream: RequestStream | None = None

    async def submit(self, client: EngineClient) -> None:
        """Raises what EngineClient.submit raises."""
        self._client = client
        self._stream = await client.submit(self.request)

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> int:
        stream, client = self._stream, self._client
        assert stream is not None, "submit comes first"
        assert client is not None
        state = self.state
        if state.finished:
            raise StopAsyncIteration
        async for update in stream:
            answer = state.answers[update.index]
            if answer.finish_reason is not None:
                continue  # its stop string was found after this update had left the engine
            before = len(answer.token_ids)
            stop = state.apply(update.index, update.update)
            if stop is not None:
                await client.end_answer(state.request_id, update.index)
            self._timer.update(update.index, len(answer.token_ids) - before, update.queue_seconds)
            self._tell_end(answer)
            return update.index
        raise _cut_short()

    def _tell_end(self, answer: Answer) -> None:
        if answer.finish_reason is None:
            return
        self._timer.finished(answer.finish_reason)
        if answer.error == NO_TOKEN_LEFT:
            raise bad_request(answer.error, code="no_token_left")
        if answer.error is not None:
            raise EngineError(answer.error)
        if answer.finish_reason == "abort":
            raise _cut_short()
        if self.state.finished:
            self._timer.done()

    async def close(self) -> None:
        """Give the engine's part back at once: a request that runs is aborted."""
        if self._stream is not None:
            await self._stream.aclose()
            if not self.state.finished:
                self._timer.finished("abort")
        if self.trace is not None:
            self.trace.end(self.state, self._timer.times)
            self.trace = None

    async def run(self) -> None:
        """To its end."""
        async for _ in self:
            pass


def _cut_short() -> ApiError:
    return unavailable("the server is ending: the answer was cut short", "shutting_down")


async def submit_all(client: EngineClient, generations: Sequence[Generation]) -> None:
    """All or none: what the engine took is given back where it refuses one."""
    try:
        for generation in generations:
            await generation.submit(client)
    except BaseException:
        await close_all(generations)
        raise


async def close_all(generations: Sequence[Generation]) -> None:
    for generation in generations:
        await generation.close()


async def run_all(generations: Sequence[Generation]) -> None:
    """All to their ends, side by side; the first failure ends the others."""
    try:
        await run_together(generation.run() for generation in generations)
    finally:
        await close_all(generations)


async def grow_all(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, int], None]:
    """The index of each generation that has grown, and of its answer, as they grow; the first failure is raised."""
    if len(generations) == 1:
        async for answer in generations[0]:
            yield 0, answer
        return
    news: asyncio.Queue[tuple[int, int] | BaseException | None] = asyncio.Queue()

    async def watch(index: int) -> None:
        try:
            async for answer in generations[index]:
                news.put_nowait((index, answer))
            news.put_nowait(None)
        except Exception as error:
            news.put_nowait(error)

    tasks = [asyncio.ensure_future(watch(index)) for index in range(len(generations))]
    try:
        left = len(tasks)
        while left:
            grown = await news.get()
            if isinstance(grown, BaseException):
                raise grown
            if grown is None:
                left -= 1
            else:
                yield grown
    finally:
        await cancel(*tasks)


def usage_of(generations: Sequence[Generation]) -> Usage:
    """Prompts count once each, answers all that were generated: those of best_of that are not returned, too."""
    prompts = sum(len(g.state.prompt_token_ids) for g in generations)
    echoed = sum(len(g.state.prompt_token_ids) * len(g.state.answers) for g in generations if g.state.params.echo)
    generated = sum(len(answer.token_ids) for g in generations for answer in g.state.answers) - echoed
    return usage(prompts, generated, sum(g.state.num_cached_tokens for g in generations))


def now() -> int:
    return int(time.time())
