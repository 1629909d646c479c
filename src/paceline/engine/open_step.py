"""A step being put together, and how much of it prompts may take. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from paceline.engine.request import Request
from paceline.engine.step import BlockCopy, Branch, NewRequest, ScheduledRequest
from paceline.sizing import SMALL_STEP


def prompt_budget(most: int, running: Iterable[Request], waiting: Iterable[Request]) -> int:
    """How many of the next step's `most` tokens may be prompts'.

    A step with prompts makes all that decode wait for it. So it is a small one, unless there is nobody to wait, or more
    prompts wait than one step could take: then large steps, which compute more tokens a second, answer sooner. Small is
    512: an H100 computes some 300 tokens while it reads a 16-bit model's weights, so that still smaller steps would
    take no less time; 2,048 take four times as long as a decode.
    """
    if not any(request.num_uncomputed_tokens == 1 for request in running):
        return most
    num_waiting = 0
    for request in waiting:
        num_waiting += request.num_uncomputed_tokens
        if num_waiting > most:
            return most
    return min(most, SMALL_STEP)


class OpenStep:
    """What is left of the budgets, and what was scheduled. `prompt_budget`: of `budget`, at most for prompts."""

    def __init__(self, budget: int, prompt_budget: int) -> None:
        self.budget = budget
        self.prompt_budget = prompt_budget
        self.scheduled: list[ScheduledRequest] = []
        self.held: list[Request] = []  # parallel to `scheduled`
        self.starts: dict[str, int] = {}  # the first position that a request computes in this step
        self.new: list[NewRequest] = []
        self.copies: list[BlockCopy] = []
        self.branches: list[Branch] = []
        self.preempted = False

    @property
    def has_room(self) -> bool:
        """Whether another prompt may begin in it."""
        return self.budget > 0 and self.prompt_budget > 0

    def put(self, request: Request, scheduled: ScheduledRequest) -> None:
        """A request's share, or that of one of its beams."""
        num_tokens = len(scheduled.token_ids)
        self.scheduled.append(scheduled)
        self.held.append(request)
        self.budget -= num_tokens
        if num_tokens > 1 + scheduled.num_drafts or not scheduled.samples:
            self.prompt_budget -= num_tokens
        request.num_in_flight += 1
