"""The loop of an engine that generates: requests go to its scheduler, and what a step changed to their clients."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from paceline.engine.engine import Engine, EngineRequest, answer_ids
from paceline.engine.warm_up import WarmUp
from paceline.errors import UsageError
from paceline.serve.admission import QueueLimits
from paceline.serve.client import EngineCounters, GenerateRequest, ModelInfo
from paceline.serve.loop import Loop, Port
from paceline.serve.messages import Accepted, Encode, EndAnswer, Event, Load, StepEvents, Submit, event_of


@dataclass
class _Running:
    """A request that was accepted. `answers`: the engine's ids of those that have not ended, and their places."""

    client: bytes
    request: GenerateRequest
    answers: dict[str, int]
    queue_seconds: float | None = None  # to be told with the next update


class EngineLoop(Loop):
    """The loop of an engine that generates."""

    def __init__(self, engine: Engine, info: ModelInfo, limits: QueueLimits, port: Port, warm_up: WarmUp) -> None:
        super().__init__(info, limits, port, warm_up)
        self._engine = engine
        self._requests: dict[str, _Running] = {}
        self._owners: dict[str, str] = {}  # an engine's id of an answer -> its request's
        self._num_generated = 0

    @property
    def _has_work(self) -> bool:
        return self._engine.has_work

    def _requests_of(self, client: bytes) -> Iterable[str]:
        return (name for name, one in self._requests.items() if one.client == client)

    # --------------------------------------------------------------------------------------------- messages

    def _take(self, client: bytes, message: Submit | Encode) -> None:
        if isinstance(message, Encode):
            raise UsageError(f"{self._info.model} generates and is no encoder")
        self._port.send(client, self._submit(client, message))

    def _submit(self, client: bytes, message: Submit) -> Accepted:
        request, resumed = message.request, message.sent is not None
        if request.request_id in self._owners:
            raise UsageError(f"request id '{request.request_id}' is in use by an unfinished request: choose another")
        length = len(request.prompt_token_ids)
        if not resumed:
            free = self._engine.config.scheduler.max_num_seqs - self._engine.scheduler.num_running
            self._waiting.check(length, free)
        params = request.params if message.seed is None else replace(request.params, seed=message.seed)
        engine_request = EngineRequest(
            request.request_id,
            request.prompt_token_ids,
            params,
            request.eos_token_ids,
            request.bad_words_token_ids,
            request.namespace,
            message.sent or (),
        )
        seed = self._engine.add_request(engine_request)
        ended = set() if message.sent is None else {i for i, tokens in enumerate(message.sent) if tokens is None}
        answers = {
            answer_id: index
            for index, answer_id in enumerate(answer_ids(request.request_id, params))
            if index not in ended
        }
        self._requests[request.request_id] = _Running(client, request, answers)
        self._owners.update(dict.fromkeys({request.request_id, *answers}, request.request_id))
        self._waiting.join(request.request_id, length)
        if not resumed:
            self._num_requests += 1
            self._num_prompt_tokens += length
        return Accepted(request.request_id, message.number, seed)

    def _end_answer(self, message: EndAnswer) -> None:
        running = self._requests.get(message.request_id)
        if running is None:
            return
        for answer_id, index in list(running.answers.items()):
            if index == message.index:
                self._engine.finish(answer_id, "stop")
                self._forget_answer(message.request_id, answer_id)

    def _abort(self, request_id: str) -> None:
        running = self._requests.get(request_id)
        if running is not None:
            for answer_id in [request_id, *running.answers]:
                self._engine.abort(answer_id)
            for answer_id in list(running.answers):
                self._forget_answer(request_id, answer_id)

    def _forget_answer(self, request_id: str, answer_id: str) -> None:
        running = self._requests[request_id]
        del running.answers[answer_id]
        if answer_id != request_id:
            del self._owners[answer_id]
        if not running.answers:
            del self._requests[request_id]
            del self._owners[request_id]
            self._waiting.leave(request_id)

    # ------------------------------------------------------------------------------------------------ a step

    def _step(self) -> None:
        began = time.monotonic()
        updates = self._engine.step()
        self.last_step = time.monotonic()
        for engine_id in self._engine.scheduler.admitted:
            request_id = self._owners.get(engine_id)
            seconds = None if request_id is None else self._waiting.start(request_id, began)
            if request_id is not None and seconds is not None:
                self._requests[request_id].queue_seconds = seconds
        events: defaultdict[bytes, list[Event]] = defaultdict(list)
        for update in updates:
            request_id = self._owners.get(update.request_id)
            running = None if request_id is None else self._requests.get(request_id)
            if request_id is None or running is None or update.request_id not in running.answers:
                continue  # ended between its step and its update
            index = running.answers[update.request_id]
            queue_seconds, running.queue_seconds = running.queue_seconds, None
            events[running.client].append(event_of(request_id, index, update, queue_seconds))
            self._num_generated += len(update.new_token_ids)
            if update.finish_reason is not None:
                self._forget_answer(request_id, update.request_id)
        self._num_steps += 1
        for client, batch in events.items():
            self._port.send(client, StepEvents(batch))

    def _measure(self) -> Load:
        stats = self._engine.scheduler.stats
        cache = stats.cache
        return Load(
            running=len(self._requests) - len(self._waiting),
            waiting=len(self._waiting),
            waiting_tokens=self._waiting.num_tokens,
            kv_usage=sum(cache.used_blocks) / sum(cache.total_blocks),
            counters=EngineCounters(
                steps=self._num_steps,
                requests=self._num_requests,
                prompt_tokens=self._num_prompt_tokens,
                generation_tokens=self._num_generated,
                preemptions=stats.num_preemptions,
                prefix_query_tokens=cache.prefix_query_tokens,
                prefix_hit_tokens=cache.prefix_hit_tokens,
                draft_tokens=stats.num_drafts,
                accepted_draft_tokens=stats.num_accepted_drafts,
            ),
        )
