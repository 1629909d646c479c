"""The loop of an engine that encodes: each step takes texts of the requests that wait, one of each in turn, up to the
token budget, and runs those of like length together.

So a request of thousands of texts does not stand before one of a single text, and requests of many clients share
batches.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from paceline.config import SchedulerConfig
from paceline.encoders.batching import batches
from paceline.encoders.encoder import Encoder, not_finite
from paceline.encoders.inputs import Tokens
from paceline.encoders.results import Rows
from paceline.errors import EngineError, PromptTooLongError, UsageError, is_out_of_memory
from paceline.serve.admission import QueueLimits
from paceline.serve.client import EncodeRequest, EngineCounters, ModelInfo
from paceline.serve.failures import failure_of
from paceline.serve.loop import Loop, Port
from paceline.serve.messages import Encode, Encoded, EndAnswer, Load, Refused, Submit


@dataclass
class _Job:
    """A request that was accepted. `waiting`: the places of texts that no step has taken, the longest last. `left`:
    texts without a row."""

    client: bytes
    number: int
    request: EncodeRequest
    waiting: list[int]
    rows: Rows
    left: int
    queue_seconds: float = 0.0


class EncoderLoop(Loop):
    """`scheduler`: the token budget of a step, and the most texts."""

    def __init__(
        self, encoder: Encoder, scheduler: SchedulerConfig, info: ModelInfo, limits: QueueLimits, port: Port
    ) -> None:
        super().__init__(info, limits, port)
        self._encoder = encoder
        self._scheduler = scheduler
        self._jobs: dict[str, _Job] = {}
        self._turns: deque[_Job] = deque()  # those that have texts waiting, the next one first

    @property
    def _has_work(self) -> bool:
        return bool(self._jobs)

    def _requests_of(self, client: bytes) -> Iterable[str]:
        return (name for name, job in self._jobs.items() if job.client == client)

    def _take(self, client: bytes, message: Submit | Encode) -> None:
        request = message.request
        if not isinstance(message, Encode) or not isinstance(request, EncodeRequest):
            raise UsageError(f"{self._info.model} is an encoder and generates nothing")
        if request.request_id in self._jobs:
            raise UsageError(f"request id '{request.request_id}' is in use by an unfinished request: choose another")
        lengths = [len(text.ids) for text in request.texts]
        if max(lengths) > self._info.max_model_len:
            raise PromptTooLongError(f"a text has {max(lengths)} tokens, the model reads {self._info.max_model_len}")
        if not message.resumed:
            started = len(self._jobs) - len(self._waiting)
            self._waiting.check(request.num_tokens, max(0, self._scheduler.max_num_seqs - started))
            self._num_requests += 1
            self._num_prompt_tokens += request.num_tokens
        rows: Rows = np.empty((len(lengths), self._encoder.info.size), np.float32)
        waiting = sorted(range(len(lengths)), key=lengths.__getitem__)
        job = _Job(client, message.number, request, waiting, rows, len(lengths))
        self._jobs[request.request_id] = job
        self._turns.append(job)
        self._waiting.join(request.request_id, request.num_tokens)

    def _end_answer(self, message: EndAnswer) -> None:
        """Of a request that is answered whole there is none."""

    def _abort(self, request_id: str) -> None:
        if self._jobs.pop(request_id, None) is not None:
            self._waiting.leave(request_id)

    # ------------------------------------------------------------------------------------------------ a step

    def _step(self) -> None:
        began = time.monotonic()
        taken = self._next_texts(began)
        texts = [job.request.texts[place] for job, place in taken]
        scheduler = self._scheduler
        for batch in batches(
            [len(text.ids) for text in texts], scheduler.max_num_batched_tokens, scheduler.max_num_seqs
        ):
            for index, row in zip(batch, self._rows([texts[index] for index in batch]), strict=True):
                self._finish(*taken[index], row)
        self.last_step = time.monotonic()
        self._num_steps += 1

    def _next_texts(self, now: float) -> list[tuple[_Job, int]]:
        """The texts of a step, as jobs and places: one of each job in turn, the longest first."""
        taken: list[tuple[_Job, int]] = []
        num_tokens = 0
        while self._turns and len(taken) < self._scheduler.max_num_seqs:
            job = self._turns[0]
            if self._jobs.get(job.request.request_id) is not job:  # it was aborted, or has failed
                self._turns.popleft()
                continue
            length = len(job.request.texts[job.waiting[-1]].ids)
            if taken and num_tokens + length > self._scheduler.max_num_batched_tokens:
                break
            self._turns.popleft()
            taken.append((job, job.waiting.pop()))
            num_tokens += length
            if job.waiting:
                self._turns.append(job)
            waited = self._waiting.start(job.request.request_id, now)
            if waited is not None:
                job.queue_seconds = waited
        return taken

    def _rows(self, texts: list[Tokens]) -> list[Rows | EngineError]:
        """A row or an error each. Where memory lacks, a batch is halved: one text fails alone."""
        try:
            return list(self._encoder.run(texts))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        if len(texts) == 1:
            return [EngineError(f"a text of {len(texts[0].ids)} tokens takes more memory than there is")]
        half = len(texts) // 2
        return [*self._rows(texts[:half]), *self._rows(texts[half:])]

    def _finish(self, job: _Job, place: int, row: Rows | EngineError) -> None:
        request_id = job.request.request_id
        if self._jobs.get(request_id) is not job:
            return  # it has failed by another of its texts
        if not isinstance(row, EngineError) and not np.isfinite(row).all():
            row = not_finite(self._encoder, place)
        if isinstance(row, EngineError):
            del self._jobs[request_id]
            self._port.send(job.client, Refused(request_id, job.number, failure_of(row)))
            return
        job.rows[place] = row
        job.left -= 1
        if not job.left:
            del self._jobs[request_id]
            self._port.send(job.client, Encoded(request_id, job.number, job.rows.tobytes(), job.queue_seconds))

    def _measure(self) -> Load:
        return Load(
            running=len(self._jobs) - len(self._waiting),
            waiting=len(self._waiting),
            waiting_tokens=self._waiting.num_tokens,
            counters=EngineCounters(
                steps=self._num_steps, requests=self._num_requests, prompt_tokens=self._num_prompt_tokens
            ),
        )
