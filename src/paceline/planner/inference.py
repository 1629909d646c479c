"""What running a model takes, what fits into a device's memory, and the bandwidth bound on its speed.

Every size comes from sizing.py, which the engine allocates by. Nothing is loaded: the model is described by its
config.json and the headers of its weights (loading/description.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from paceline import sizing
from paceline.benchmark.bandwidth import read_bandwidth
from paceline.config import CacheConfig, DecoderConfig, ParallelConfig, SchedulerConfig
from paceline.engine.device import DTYPES, available_bytes, pick_device, pick_dtype
from paceline.engine.graphs import config_refusal
from paceline.engine.memory import CPU_CACHE_SHARE, CUDA_MEMORY_SHARE, Room, Sizes, divide
from paceline.errors import UnsupportedModelError, UsageError
from paceline.formats import FORMATS, stored_bytes
from paceline.kernels.gpu import gpu
from paceline.loading.description import Description, describe
from paceline.models.registry import read_decoder_config
from paceline.parallel.split import Rank, held_by, local_config, split_refusal
from paceline.planner.devices import find_gpu, parse_bytes, recognise_gpu
from paceline.registry import lookup, refuse_unknown_keys
from paceline.sizing_cuda import workspace_bytes

BATCHES = (1, 4, 16, 64, 256)
FIRST_CONTEXT = 1024
MOST_REQUESTS = 1 << 16  # where the search for the largest batch ends


@dataclass(frozen=True)
class PlanOptions:
    """As LLM's options of the same names, and the device planned for: this machine's `device`; a `gpu` of
    planner/devices.py; or `memory` ("24GiB" or bytes, all of it for the model). `bandwidth`: bytes a second that it
    reads; None takes the data sheet's; `measure` reads this machine's memory for 0.15 s. `tensor_parallel_size`: over
    how many such devices the model is split; the plan is of one of them."""

    dtype: str = "auto"
    quantization: str | None = None
    device: str = "auto"
    gpu: str | None = None
    memory: str | int | None = None
    bandwidth: float | None = None
    measure: bool = False
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    kv_cache_gib: float | None = None
    tensor_parallel_size: int = 1
    revision: str | None = None
    hf_token: str | None = None
    download_dir: str | None = None

    def __post_init__(self) -> None:
        if self.quantization is not None:
            lookup({name: None for name in FORMATS if name != "dense"}, "quantization", self.quantization)
        for name in ("max_model_len", "block_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        for name in ("bandwidth", "kv_cache_gib"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} must be greater than 0, got {value}")
        if self.bandwidth is not None and self.measure:
            raise UsageError("bandwidth and measure contradict each other: give one of them")
        if self.gpu is not None and self.memory is not None:
            raise UsageError("gpu and memory both say how much memory there is: give one of them")
        if self.measure and self.gpu is not None:
            raise UsageError("measure reads this machine's memory, not that of another GPU: give bandwidth, or no gpu")
        SchedulerConfig(self.max_num_seqs, self.max_num_batched_tokens)  # checks both
        ParallelConfig(self.tensor_parallel_size)


@dataclass(frozen=True)
class Figure:
    """A number and where it is from."""

    value: float
    source: str


@dataclass(frozen=True)
class GroupPlan:
    """The cache of the layers that see the same context. `window`: tokens, None for all of it."""

    name: str
    num_layers: int
    window: int | None
    bytes_per_token: int
    num_blocks: int
    nbytes: int


@dataclass(frozen=True)
class Fit:
    """`batch` requests of `context` tokens each: bytes of everything, and whether they fit."""

    batch: int
    context: int
    nbytes: int
    fits: bool


@dataclass(frozen=True)
class Speed:
    """The bound on a decode step of `batch` requests of `context` tokens: what it reads, over the bandwidth."""

    batch: int
    context: int
    nbytes: int
    tokens_per_second: float  # of all requests together


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes, lengths in tokens, all of each of `num_devices` devices but for `num_parameters` and `stored`:
    values of each dtype in the checkpoint, by its headers.

    `loading`: beside the weights while they are loaded; given back before there is a cache. `decode_buffers`,
    `graph_pool`, `blas_workspace`: of CUDA graphs and of cuBLAS. `cache`: what the engine would allocate within
    `memory`, and `max_model_len` the longest context that it holds. `total`: weights, and what running, or loading if
    that is more, holds beside them; `fits`: whether `memory` holds it. Of `contexts` and BATCHES:
    `grid`, `speeds`, `largest_batch` as (context, requests) and `longest_context` as (batch, tokens), 0 for none.
    """

    model: str
    source: str
    architecture: str
    num_devices: int
    num_parameters: int
    stored: dict[str, int]
    dtype: str
    weight_format: str
    weights: sizing.WeightBytes
    loading: int
    activations: int
    logprob_workspace: int
    decode_buffers: int
    graph_pool: int
    blas_workspace: int
    memory: Figure
    cache: tuple[GroupPlan, ...]
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    total: int
    fits: bool
    contexts: tuple[int, ...]
    grid: tuple[Fit, ...]
    largest_batch: tuple[tuple[int, int], ...]
    longest_context: tuple[tuple[int, int], ...]
    bandwidth: Figure | None
    speeds: tuple[Speed, ...]


def plan(model: str, **options: Any) -> Plan:
    """What running `model` takes and what fits. `model`: an alias, a hub id (only its config.json and headers are
    fetched), a directory, a GGUF file or a config.json; the options are PlanOptions's fields.

    Raises UsageError for an option that cannot be right, UnsupportedModelError for a model that no family describes,
    and what loading.description.describe raises.
    """
    refuse_unknown_keys("option", options, [field.name for field in fields(PlanOptions)])
    asked = PlanOptions(**options)
    description = describe(model, revision=asked.revision, token=asked.hf_token, download_dir=asked.download_dir)
    return _plan(description, read_family_config(description.config), asked)


def read_family_config(hf_config: Mapping[str, Any]) -> DecoderConfig:
    """As models.registry.read_decoder_config, whose error also says that planning needs a family: a model that runs
    through transformers' modules says what cache it takes only once it is loaded."""
    try:
        return read_decoder_config(hf_config)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{error}; only models that a family of paceline reads can be planned") from error


@dataclass(frozen=True)
class _Planned:
    """One model's sizes as the engine takes them, for any number of requests."""

    sizes: Sizes
    options: PlanOptions

    def of(self, batch: int) -> Sizes:
        """With steps of so many requests: every running one needs a token a step."""
        tokens = max(self.options.max_num_batched_tokens, batch)
        return replace(self.sizes, scheduler=SchedulerConfig(batch, tokens))

    def divide(self, memory: Figure, longest: int, cache_share: float) -> tuple[int, sizing.CachePlan]:
        """The context that the engine would run with, and the cache that it would allocate."""
        options, sizes = self.options, self.sizes
        room = Room(
            int(memory.value) - sizes.weights.total,
            sizes.beside,
            cache_share,
            None if options.kv_cache_gib is None else int(options.kv_cache_gib * sizing.GIB),
        )
        return divide(
            sizes.config.kv_groups,
            room,
            CacheConfig(options.block_size),
            sizes.scheduler,
            bytes_per_value=sizes.dtype.itemsize,
            longest=longest,
            shorten=options.max_model_len is None,
        )

    def total(self, batch: int, context: int) -> int:
        """Bytes of everything for `batch` requests of `context` tokens each."""
        size, groups, sizes = self.options.block_size, self.sizes.config.kv_groups, self.of(batch)
        tokens = batch * -(-context // size) * size
        step_tokens = sizes.scheduler.max_num_batched_tokens
        blocks = sizing.blocks_needed(groups, tokens, num_seqs=batch, block_size=size, step_tokens=step_tokens)
        cache = sizing.cache_bytes(groups, blocks, size, sizes.dtype.itemsize)
        return sizes.weights.total + max(sizes.loading, sizes.beside(context) + cache)

    def fit(self, batch: int, context: int, memory: Figure) -> Fit:
        nbytes = self.total(batch, context)
        return Fit(batch, context, nbytes, nbytes <= memory.value)

    def largest_batch(self, context: int, memory: Figure) -> int:
        return _largest(lambda batch: self.total(batch, context) <= memory.value, MOST_REQUESTS)

    def longest_context(self, batch: int, longest: int, memory: Figure) -> int:
        return _largest(lambda context: self.total(batch, context) <= memory.value, longest)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest n in 1..most that fits, where whatever is smaller than one that fits does too; 0 if none does."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _plan(description: Description, config: DecoderConfig, options: PlanOptions) -> Plan:
    longest = options.max_model_len or config.max_position
    if longest > config.max_position:
        raise UsageError(
            f"max_model_len {longest} is more than the {config.max_position} positions this model was trained for"
        )
    here = options.gpu is None and options.memory is None
    device = pick_device(options.device) if here else torch.device("cuda")
    dtype = _dtype(description, options, device)
    sizes = _sizes(config.with_context(longest), description, options, dtype, device)
    planned = _Planned(sizes, options)
    memory = _memory(options, device)
    share = CPU_CACHE_SHARE if here and device.type == "cpu" else 1.0
    context, cache = planned.divide(memory, longest, share)
    contexts = _contexts(longest)
    bandwidth = _bandwidth(options, device)
    total = sizes.weights.total + max(sizes.loading, sizes.beside(context) + cache.nbytes)
    return Plan(
        model=description.name,
        source=description.note,
        architecture=str(description.config["architectures"][0]),
        num_devices=options.tensor_parallel_size,
        num_parameters=sizing.num_parameters(config),
        stored=dict(description.stored),
        dtype=str(dtype).removeprefix("torch."),
        weight_format=options.quantization or "dense",
        weights=sizes.weights,
        loading=sizes.loading,
        activations=sizes.step(context),
        logprob_workspace=sizes.logprobs,
        decode_buffers=sizes.buffers(context),
        graph_pool=sizes.graph_pool,
        blas_workspace=sizes.workspace,
        memory=memory,
        cache=_groups(sizes.config, cache, dtype.itemsize),
        max_model_len=context,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        total=total,
        fits=total <= memory.value and cache.num_tokens >= context,
        contexts=contexts,
        grid=tuple(planned.fit(batch, context, memory) for batch in BATCHES for context in contexts),
        largest_batch=tuple((c, planned.largest_batch(c, memory)) for c in contexts),
        longest_context=tuple((b, planned.longest_context(b, longest, memory)) for b in BATCHES),
        bandwidth=bandwidth,
        speeds=() if bandwidth is None else _speeds(sizes, contexts, bandwidth),
    )


def _sizes(
    config: DecoderConfig, description: Description, options: PlanOptions, dtype: torch.dtype, device: torch.device
) -> Sizes:
    on_cuda = device.type == "cuda"
    rank = _largest_rank(config, options)
    stored = DTYPES.get(description.stored_dtype, dtype)  # a quantised GGUF file is cast on the host
    return Sizes(
        local_config(config, rank),
        dtype,
        options.quantization or "dense",
        device,
        SchedulerConfig(options.max_num_seqs, options.max_num_batched_tokens),
        options.block_size,
        graphs=on_cuda and config_refusal() is None,
        workspace=workspace_bytes(_capability(options, device)) if on_cuda else 0,
        read_bytes=stored.itemsize * rank.parallel.tensor if on_cuda and stored != dtype else 0,
        held=held_by(config, rank),
    )


def _largest_rank(config: DecoderConfig, options: PlanOptions) -> Rank:
    """The first: of biases and of the vocabulary it has no less than any other. Raises UsageError where the model
    cannot be split so."""
    parallel = ParallelConfig(options.tensor_parallel_size)
    refusal = split_refusal(config, parallel)
    if refusal is not None:
        raise UsageError(refusal)
    return Rank(0, parallel)


def _capability(options: PlanOptions, device: torch.device) -> tuple[int, int] | None:
    """None where it is not known: a GPU of so much memory."""
    if options.gpu is not None:
        return find_gpu(options.gpu).capability
    return gpu(device).capability if options.memory is None else None


def _dtype(description: Description, options: PlanOptions, device: torch.device) -> torch.dtype:
    """As the engine picks it (engine/device.py). A GPU that is not here is taken to compute bfloat16."""
    stored = lookup(DTYPES, "dtype of the checkpoint", description.stored_dtype)
    if options.dtype == "auto" and options.gpu is not None:
        return torch.bfloat16 if stored == torch.float32 else stored
    if options.dtype == "auto" and options.memory is not None:
        return stored
    return pick_dtype(options.dtype, stored, device)


def _memory(options: PlanOptions, device: torch.device) -> Figure:
    """Bytes that paceline may use."""
    if options.memory is not None:
        return Figure(parse_bytes(options.memory, "memory"), "as given")
    if options.gpu is not None:
        gpu = find_gpu(options.gpu)
        share = int(gpu.memory_gib * sizing.GIB * CUDA_MEMORY_SHARE)
        return Figure(share, f"{CUDA_MEMORY_SHARE:.0%} of {gpu.memory_gib} GiB, {gpu.source}")
    available = available_bytes(device)
    if device.type == "cuda":
        return Figure(int(available * CUDA_MEMORY_SHARE), f"{CUDA_MEMORY_SHARE:.0%} of what is free on {device}")
    return Figure(available, "what is available on this machine")


def _bandwidth(options: PlanOptions, device: torch.device) -> Figure | None:
    if options.bandwidth is not None:
        return Figure(options.bandwidth, "as given")
    if options.gpu is not None:
        gpu = find_gpu(options.gpu)
        return Figure(gpu.bandwidth, gpu.source)
    if options.measure:
        device = pick_device(options.device)
        return Figure(read_bandwidth(device), f"measured on {device}")
    if options.memory is None and device.type == "cuda":
        known = recognise_gpu(torch.cuda.get_device_name(device))
        return known and Figure(known[1].bandwidth, known[1].source)
    return None


def _contexts(longest: int) -> tuple[int, ...]:
    """1k, 4k, 16k ... and the longest."""
    contexts = []
    context = FIRST_CONTEXT
    while context < longest:
        contexts.append(context)
        context *= 4
    return (*contexts, longest)


def _groups(config: DecoderConfig, cache: sizing.CachePlan, bytes_per_value: int) -> tuple[GroupPlan, ...]:
    return tuple(
        GroupPlan(
            group.name,
            len(group.layers),
            group.window,
            sizing.kv_bytes_per_token(group, bytes_per_value),
            count,
            sizing.cache_bytes([group], [count], cache.block_size, bytes_per_value),
        )
        for group, count in zip(config.kv_groups, cache.num_blocks, strict=True)
    )


def _speeds(sizes: Sizes, contexts: Sequence[int], bandwidth: Figure) -> tuple[Speed, ...]:
    """Weights once a step, and the keys and values that each request sees; devices that share them read at once."""
    config, dtype = sizes.config, sizes.dtype
    matrix_bytes = stored_bytes(sizes.format, dtype)
    speeds = []
    for batch in BATCHES:
        weights = sizing.step_weight_bytes(config, dtype.itemsize, matrix_bytes, batch, sizes.held)
        for context in contexts:
            nbytes = weights + batch * sizing.context_bytes(config.kv_groups, context, dtype.itemsize)
            speeds.append(Speed(batch, context, nbytes, batch * bandwidth.value / nbytes))
    return tuple(speeds)
