"""What each pass brings, measured: the captured graphs run with none of the passes, with the first, with the first two,
and so on, on the inputs of one call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from paceline.errors import UsageError
from paceline.fusion.capture import CapturedGraph, difference
from paceline.fusion.optimize import optimised_of
from paceline.fusion.passes import STAGES

OWN, CAPTURED, CALL = "the model's own forward", "as captured", "called through the model"


@dataclass(frozen=True)
class Stage:
    """`milliseconds`: the median of a call. `error`: of its results against the captured graphs', the largest of a row
    relative to the rows' usual length; None where it was not compared."""

    name: str
    milliseconds: float
    error: float | None = None


def measure_stages(model: nn.Module, *args: Any, repeats: int = 20, **kwargs: Any) -> list[Stage]:
    """Of an optimised model, on these inputs: its own forward, the captured graphs, the same with ever more passes, and
    the whole as a caller has it, with Dynamo's guards. A pass that changes nothing is left out. Raises UsageError where
    the call does not run captured graphs."""
    optimised = optimised_of(model)
    with torch.inference_mode():
        model(*args, **kwargs)
        calls = optimised.record(args, kwargs)
        if not calls:
            raise UsageError(f"this call of {type(model).__name__} runs no captured graph: {optimised.report}")
        stages = [Stage(OWN, _median(lambda: optimised.original(*args, **kwargs), repeats))]
        expected = [graph.with_passes(0).forward(*inputs) for graph, inputs in calls]
        before: list[str] = []
        for count in range(len(STAGES) + 1):
            runs = [graph.with_passes(count) for graph, _ in calls]
            code = [run.code for run in runs]
            if code == before:
                continue
            before = code
            found = [
                difference(wanted, run.forward(*inputs))
                for wanted, run, (_, inputs) in zip(expected, runs, calls, strict=True)
            ]
            error = None if None in found else max(value for value in found if value is not None)
            stages.append(Stage(_name(count), _median(_all(runs, calls), repeats), error))
        stages.append(Stage(CALL, _median(lambda: model(*args, **kwargs), repeats)))
    return stages


def _name(count: int) -> str:
    return CAPTURED if count == 0 else STAGES[count - 1].__module__.rpartition(".")[2].replace("_", " ")


def _all(runs: list[fx.GraphModule], calls: list[tuple[CapturedGraph, list[Any]]]) -> Callable[[], None]:
    def run_all() -> None:
        for run, (_, inputs) in zip(runs, calls, strict=True):
            run.forward(*inputs)

    return run_all


def _median(function: Callable[[], Any], repeats: int) -> float:
    """Milliseconds."""
    function()
    return statistics.median(timed(function) for _ in range(repeats)) * 1e3


def timed(function: Callable[[], Any]) -> float:
    """Seconds that a call takes, with all that it leaves to a GPU."""
    _synchronize()
    start = time.perf_counter()
    function()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
