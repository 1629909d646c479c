"""What a server does behind its first requests: torch.compile in a thread, a CUDA graph for each size and kind of step.

Until then steps run kernel by kernel, uncompiled. `LLM` does the first of it at load instead, as a program that waits
for its answers gains nothing from an early start.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

from paceline.engine.decode_step import DecodeStep
from paceline.engine.graphs import graph_rows
from paceline.errors import is_out_of_memory
from paceline.log import get_logger
from paceline.models.compile import compile_model
from paceline.models.decoder import Decoder
from paceline.models.model import Model
from paceline.phases import Phases
from paceline.sampling.static import KINDS

log = get_logger(__name__)


class WarmUp:
    """The pieces that are left, one a call of `step`, which belongs to the engine's thread and to moments in which it
    has no request. `phases` gets the seconds of each."""

    def __init__(self, phases: Phases, decode: DecodeStep | None = None, compiles: Model | None = None) -> None:
        """`decode`: whose graphs are to be captured; `compiles`: the model to compile, which begins at once."""
        self._pieces: Iterator[Callable[[], None]] = iter(()) if decode is None else _captures(decode, phases)
        self._next = next(self._pieces, None)
        if compiles is not None:
            # A daemon: a compiler cannot be stopped, and must not keep the process.
            threading.Thread(target=_compile, args=(compiles, phases), name="paceline-compile", daemon=True).start()

    @property
    def over(self) -> bool:
        """Whether no piece is left for `step`."""
        return self._next is None

    def step(self) -> None:
        if self._next is None:
            return
        try:
            self._next()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning("no memory is left to capture more steps: the larger ones run kernel by kernel")
            self._pieces = iter(())
        self._next = next(self._pieces, None)


def _captures(decode: DecodeStep, phases: Phases) -> Iterator[Callable[[], None]]:
    """The smallest steps first: they are the first to be needed."""
    for rows in sorted({graph_rows(count) for count in range(1, decode.max_rows + 1)}):
        for kind in KINDS:
            yield partial(decode.prepare, phases, rows, kind)
    if decode.prompts is not None:
        for form in decode.prompts.forms:
            yield partial(decode.prompts.prepare, phases, form)


def _compile(model: Model, phases: Phases) -> None:
    with phases.time("compile"):
        compile_or_tell(model)


def compile_or_tell(model: Model) -> None:
    """Compile what can be; say why, where nothing can."""
    refusal = "it runs through transformers' own modules"
    if isinstance(model, Decoder):
        start = time.perf_counter()
        failure = compile_model(model, model.dtype, model.device)
        if failure is None:
            log.info("compiled norms and activations in %.1f s", time.perf_counter() - start)
            return
        refusal = f"torch.compile does not work here: {failure}"
    log.warning("mode='compile': %s; the model runs uncompiled", refusal)
