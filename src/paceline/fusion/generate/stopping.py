"""Whether a loop may end, read without holding the device up."""

from __future__ import annotations

import torch


class StopFlag:
    """A flag that each step sets on the device and the host reads: at once, or where it may be late, one step later, so
    that the host never waits for the step that it has just launched. What that one step more did is surplus."""

    def __init__(self, late: bool) -> None:
        self.late = late
        self.told: list[tuple[torch.Tensor, torch.cuda.Event | None]] = []
        self.ended_early = False

    def tell(self, flag: torch.Tensor) -> None:
        if not self.late:
            self.told = [(flag, None)]
            return
        copy = torch.empty((), dtype=torch.bool, pin_memory=flag.is_cuda)
        copy.copy_(flag, non_blocking=True)
        event = None
        if flag.is_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self.told = [*self.told[-1:], (copy, event)]

    def heard(self) -> bool:
        """Whether a step that has been told of ended the loop."""
        if self.late and len(self.told) < 2:
            return False
        flag, event = self.told[0]
        if event is not None:
            event.synchronize()
        self.ended_early = bool(flag)
        return self.ended_early

    def surplus(self) -> int:
        """Steps done past the one that ended the loop: call it when the loop has ended."""
        return int(self.late and self.ended_early)
