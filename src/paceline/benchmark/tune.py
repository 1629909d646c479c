"""Which launch of the GEMV kernels is fastest for each linear of a model on this GPU, measured once for a table.

Each launch is timed as a decode runs it: in a CUDA graph, one product after the other, over more copies of the weight
than the cache holds, so that every value comes from memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from statistics import median

import torch

from paceline.config import DecoderConfig
from paceline.errors import EngineError, UsageError
from paceline.formats import head_format, matrix_format, pack
from paceline.formats.int4 import group_size_for
from paceline.kernels.gemv import Epilogue, Planes, gemv
from paceline.kernels.gemv_launch import Launch, Product, candidates
from paceline.kernels.gpu import gpu, triton_refusal
from paceline.log import get_logger
from paceline.sizing import layer_matrices

log = get_logger(__name__)

ROUNDS = 7  # a figure is their median
MOST_COPIES = 512
MOST_PROCESSES = 16  # that compile: each has a context on the GPU, some 0.5 GB
COMPILED_ROWS = 256  # of a weight, where its kernel is compiled ahead


@dataclass(frozen=True)
class Linear:
    """A linear of a model. `gated`: gate and up, whose halves one kernel multiplies."""

    product: Product
    gated: bool


@dataclass(frozen=True)
class Tuned:
    """The fastest launch, and the seconds of a product by it and by the rule (None where that one fails here)."""

    product: Product
    launch: Launch
    seconds: float
    rule_seconds: float | None


Time = Callable[[Linear, Launch], float]


def linears(config: DecoderConfig, formats: Sequence[str], rows: Sequence[int]) -> list[Linear]:
    """The distinct ones of a model whose weights are in any of `formats`, for so many rows of x (launch_rows')."""
    found: dict[Linear, None] = {}
    for format in formats:
        shapes = [(m.rows, m.columns, matrix_format(format, m.rows, m.columns)) for m in layer_matrices(config)]
        shapes.append((config.vocab_size, config.hidden_size, head_format(format)))
        for outputs, inputs, stored in shapes:
            gated = config.mlp.gated and (outputs, inputs) == (2 * config.mlp.intermediate_size, config.hidden_size)
            for count in rows:
                group = group_size_for(inputs) if stored == "int4" else 0
                found[Linear(Product(stored, (outputs, inputs), count, group), gated)] = None
    return list(found)


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """Raises UsageError where there is nothing to tune."""
    refusal = triton_refusal(device, dtype)
    if refusal is not None:
        raise UsageError(f"nothing to tune: Triton's kernels do not run here ({refusal})")


def kernels(wanted: Iterable[Linear], processors: int) -> list[tuple[Linear, Launch]]:
    """The distinct ones that `tune` will time. Triton compiles for K and for what 16 divides, not for N: all weights
    of so many columns share a kernel, here one of COMPILED_ROWS rows."""
    found: dict[tuple[Linear, Launch], None] = {}
    for linear in wanted:
        outputs, inputs = linear.product.shape
        shape = (COMPILED_ROWS if outputs % 32 == 0 else outputs, inputs)
        for launch in candidates(linear.product, processors):
            found[replace(linear, product=replace(linear.product, shape=shape)), launch] = None
    return list(found)


def compile_ahead(wanted: Iterable[Linear], processors: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compiles what `tune` will time, a process a core, so that it finds everything in Triton's cache. What fails here
    is told when it is timed."""
    jobs = kernels(wanted, processors)
    workers = min(len(jobs), os.cpu_count() or 1, MOST_PROCESSES)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool, suppress(BrokenProcessPool):
        for done in [pool.submit(_compile, *job, dtype, device) for job in jobs]:
            done.result()


def _compile(linear: Linear, launch: Launch, dtype: torch.dtype, device: torch.device) -> None:
    with suppress(Exception):
        product = linear.product
        _multiply(linear, _like_x(product, dtype, device), _packed(product, dtype, device), launch)
        torch.cuda.synchronize()


def tune(wanted: Iterable[Linear], processors: int, time: Time) -> Iterator[Tuned]:
    """The fastest candidate for each. A launch that fails, for want of registers or shared memory, is passed over.

    Raises EngineError where every one fails.
    """
    for linear in wanted:
        seconds: dict[Launch, float] = {}
        errors: list[str] = []
        launches = candidates(linear.product, processors)
        for launch in launches:
            try:
                seconds[launch] = time(linear, launch)
            except Exception as error:  # whatever a compiler or a driver raises
                errors.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
                log.debug("%s %s: %s", linear.product, launch, errors[-1])
        if not seconds:
            raise EngineError(f"no launch of {linear.product} runs here: {errors[0]}")
        best = min(seconds, key=lambda launch: seconds[launch])
        yield Tuned(linear.product, best, seconds[best], seconds.get(launches[0]))


def time_on(device: torch.device, dtype: torch.dtype) -> Time:
    """Seconds of one product on a GPU. The copies of a weight are made once for all its launches."""
    held: dict[Linear, list[Planes]] = {}

    def time(linear: Linear, launch: Launch) -> float:
        if linear not in held:
            held.clear()
            held[linear] = _copies(linear.product, dtype, device)
        x_TK = _like_x(linear.product, dtype, device)
        return _seconds(held[linear], lambda planes: _multiply(linear, x_TK, planes, launch))

    return time


def _like_x(product: Product, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(product.rows, product.shape[1], dtype=dtype, device=device)


def _multiply(linear: Linear, x_TK: torch.Tensor, planes: Planes, launch: Launch) -> torch.Tensor:
    epilogue = Epilogue(activation="silu", gated=True) if linear.gated else Epilogue()
    return gemv(x_TK, planes, epilogue=epilogue, launch=launch)


def _packed(product: Product, dtype: torch.dtype, device: torch.device) -> Planes:
    weight = pack(torch.randn(product.shape, dtype=dtype, device=device), product.format, dtype=dtype, device=device)
    if weight.planes is None:
        raise EngineError(f"{product}: its columns are no whole words")
    return weight.planes


def _copies(product: Product, dtype: torch.dtype, device: torch.device) -> list[Planes]:
    planes = _packed(product, dtype, device)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = min(MOST_COPIES, max(2, -(-4 * cache // planes.values.nbytes)))

    def copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.clone()

    return [replace(planes, values=planes.values.clone(), scale=copy(planes.scale)) for _ in range(count)]


def _seconds(weights: Sequence[Planes], multiply: Callable[[Planes], torch.Tensor]) -> float:
    multiply(weights[0])  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for planes in weights:
            multiply(planes)
    graph.replay()
    times: list[float] = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(weights))
    return median(times)


def device_of(name: str) -> tuple[str, int]:
    """The name that a table bears, and the multiprocessors, of a device that `check_device` has passed."""
    found = gpu(torch.device(name))
    return found.name, found.processors
