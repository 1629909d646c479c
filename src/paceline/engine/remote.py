"""The model runner of a model that several processes share, on the driver's side.

Every rank runs each step and chooses the same tokens; the first one tells them. The scheduler, text and tokenizer are
the driver's, which has no device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from paceline.engine.step import SchedulerOutput, StepOutput
from paceline.engine.wire import Sender
from paceline.kernels.choices import Choice
from paceline.parallel.processes import Ranks


class RemoteStep:
    """A step that was sent. `done`: whether its results are there with its launch; asks the first rank."""

    def __init__(self, runner: RemoteRunner) -> None:
        self._runner = runner

    @property
    def done(self) -> bool:
        return self._runner.is_done(self)


class RemoteRunner:
    """What engine.Engine needs of a runner. The first rank answers each step with whether it was done when it was
    launched, and with results in the order of the steps, as engine/rank.py collects them."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._sender = Sender()
        self._asked: deque[RemoteStep] = deque()  # whose launch was not answered
        self._done: dict[RemoteStep, bool] = {}
        self._results: deque[StepOutput] = deque()

    def launch(self, output: SchedulerOutput) -> RemoteStep:
        """Send one step. Raises EngineError where a rank has died."""
        self.ranks.send(("step", self._sender.encode(output)))
        step = RemoteStep(self)
        self._asked.append(step)
        return step

    def collect(self, step: RemoteStep) -> StepOutput:
        """The results of the oldest step that was not collected; waits for them."""
        while not self._results:
            self._take()
        self._done.pop(step, None)
        return self._results.popleft()

    def is_done(self, step: RemoteStep) -> bool:
        while step not in self._done:
            self._take()
        return self._done[step]

    def choices(self, rows: int) -> Sequence[Choice]:
        """The first rank's (kernels/choices.py). Between steps only."""
        self.ranks.send(("choices", rows))
        found: Sequence[Choice] = self.ranks.receive()
        return found

    def _take(self) -> None:
        message = self.ranks.receive()
        if isinstance(message, StepOutput):
            self._results.append(message)
        else:
            self._done[self._asked.popleft()] = message
