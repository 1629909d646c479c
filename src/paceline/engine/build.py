"""From a model's name to a running engine: resolve, read, check that it fits, load, plan the cache."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from logging import INFO, WARNING
from typing import Any

import torch

from paceline import sizing
from paceline.config import DecoderConfig, EngineConfig, KVGroup
from paceline.engine.decode_step import DecodeStep
from paceline.engine.device import available_bytes, pick_device, pick_dtype
from paceline.engine.engine import Engine
from paceline.engine.graphs import captured_decode, config_refusal, graph_refusal
from paceline.engine.load_options import LoadOptions
from paceline.engine.memory import CPU_CACHE_SHARE, CUDA_MEMORY_SHARE, Room, Sizes, divide
from paceline.engine.model_files import open_model, read_generation_config, read_tokenizer, stored_dtype
from paceline.engine.model_runner import ModelRunner
from paceline.engine.offload import offloaded_weights, open_stream, tell_speed
from paceline.engine.warm_up import compile_or_tell
from paceline.errors import OutOfMemoryError, UsageError, is_out_of_memory
from paceline.formats import stored_bytes
from paceline.formats.streamed import WeightStream
from paceline.kernels.choices import fallbacks
from paceline.kernels.gemv_launch import load_table
from paceline.kernels.gpu import gpu, untried_gpu
from paceline.loading.checkpoint import Checkpoint
from paceline.loading.progress import Progress
from paceline.loading.resolve import ModelSource
from paceline.log import get_logger
from paceline.models.deterministic import make_deterministic
from paceline.models.fallback import FallbackConfig, load_fallback, measure
from paceline.models.implementation import Implementation, choose_config, implementation_of
from paceline.models.load import load_decoder, settle_tied_head
from paceline.models.model import Model
from paceline.parallel.communicator import Communicator
from paceline.parallel.parts import RankSplit, join
from paceline.parallel.processes import Ranks
from paceline.parallel.split import held_by, local_config, local_groups
from paceline.phases import Phases
from paceline.sizing_cuda import workspace_bytes
from paceline.tokens.tokenizer import Tokenizer

log = get_logger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run. `phases`: seconds of each part of the loading, in order."""

    source: ModelSource
    config: DecoderConfig | FallbackConfig
    engine: Engine
    tokenizer: Tokenizer | None
    generation_config: Mapping[str, Any]
    num_blocks: tuple[int, ...]  # of each KV group
    dtype: torch.dtype
    device: torch.device
    step_weight_bytes: int  # weights that one decode step reads, of each device
    kv_bytes_per_token: int  # cache that one token of context takes, of each device
    phases: Mapping[str, float]
    stream: WeightStream | None  # that the weights come through, where they are offloaded
    sizes: Sizes | None  # what it was planned to take; None for transformers' modules
    load_peak: int  # bytes that were allocated on a CUDA device at most, until the weights were there
    ranks: Ranks | None = None  # the processes that hold it, where it is split

    @property
    def implementation(self) -> Implementation:
        """Whose modules run: "paceline"'s or "transformers"'."""
        return implementation_of(self.config)


@dataclass(frozen=True)
class _Weights:
    """A model on its device, and the cache that was planned for it."""

    config: DecoderConfig | FallbackConfig
    model: Model
    max_model_len: int
    num_blocks: tuple[int, ...]
    step_bytes: int  # of weights that one decode step reads
    stream: WeightStream | None = None
    sizes: Sizes | None = None  # of a decoder
    all_have_room: Callable[[int], bool] | None = None  # of a rank (engine/model_runner.py)


def load_model(
    options: LoadOptions,
    progress: Progress | None = None,
    phases: Phases | None = None,
    *,
    warm: bool = True,
    source: ModelSource | None = None,
) -> LoadedModel:
    """Load a model and build its engine. `phases` may be watched meanwhile. Without `warm`, what is compiled and
    captured is left to a WarmUp. `source`: where its files were found before.

    Raises PacelineError's children, before loading where that can be told.
    """
    try:
        return _load(options, progress, Phases() if phases is None else phases, warm, source=source)
    except Exception as error:
        if not is_out_of_memory(error) and not isinstance(error, OutOfMemoryError):
            raise
        message = str(error).partition("\n")[0]
        if not isinstance(error, OutOfMemoryError):
            message = f"{options.model} was not loaded: {message}; set kv_cache_gib, or a smaller max_num_seqs"
    # Out here the error is gone, and with its traceback all that was loaded: a smaller setting can be tried at once.
    gc.collect()
    torch.cuda.empty_cache()
    raise OutOfMemoryError(message)


def load_part(options: LoadOptions, communicator: Communicator) -> LoadedModel:
    """The part of one rank, whose engine lends its configuration and runner only: the driver schedules (rank.py)."""
    return _load(options, None, Phases(), warm=True, communicator=communicator)


def _load(
    options: LoadOptions,
    progress: Progress | None,
    phases: Phases,
    warm: bool,
    communicator: Communicator | None = None,
    source: ModelSource | None = None,
) -> LoadedModel:
    with phases.time("device"):
        device = pick_device(options.device)
        available_bytes(device)  # CUDA's context, where there is none yet
    with phases.time("resolve"):
        source, opened = open_model(options, device, progress, source)
    with opened as checkpoint:
        with phases.time("tokenizer"):
            tokenizer = read_tokenizer(options, source, checkpoint)
        config = choose_config(checkpoint.config, options.model_impl)
        if tokenizer is not None:
            tokenizer = tokenizer.for_vocabulary(config.vocab_size)
        dtype = pick_dtype(options.dtype, stored_dtype(checkpoint), device)
        with phases.time("weights"):
            if isinstance(config, FallbackConfig):
                weights = _load_fallback(config, checkpoint, options, dtype, device, progress)
            else:
                weights = _load_decoder(config, checkpoint, options, dtype, device, progress, communicator)
        generation_config = read_generation_config(options, checkpoint)
    load_peak = 0
    if device.type == "cuda":
        load_peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.empty_cache()  # what casting and quantising held
    if warm and options.mode == "compile":
        with phases.time("compile"):
            compile_or_tell(weights.model)
    if device.type == "cuda":
        with phases.time("kernels"):
            gpu(device)  # imports Triton and tries it
    if options.deterministic:
        make_deterministic(weights.model)
    _tell_fallbacks(weights, options)
    with phases.time("cache"):
        engine, decode = _engine_in_memory(weights, options)
    if warm and decode is not None:
        decode.prepare(phases)
    if weights.stream is not None:
        tell_speed(weights.stream, weights.step_bytes)
    return LoadedModel(
        source=source,
        config=weights.config,
        engine=engine,
        tokenizer=tokenizer,
        generation_config=generation_config,
        num_blocks=weights.num_blocks,
        dtype=dtype,
        device=device,
        step_weight_bytes=weights.step_bytes,
        kv_bytes_per_token=sum(sizing.kv_bytes_per_token(g, dtype.itemsize) for g in weights.model.kv_groups),
        phases=phases.seconds,
        stream=weights.stream,
        sizes=weights.sizes,
        load_peak=load_peak,
    )


def _load_decoder(
    config: DecoderConfig,
    checkpoint: Checkpoint,
    options: LoadOptions,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None,
    communicator: Communicator | None,
) -> _Weights:
    config = settle_tied_head(checkpoint, config)
    own, groups, held = config, config.kv_groups, None  # what this process holds of it
    if communicator is not None:
        rank = communicator.rank
        own, groups, held = local_config(config, rank), local_groups(config, rank), held_by(config, rank)
    sizes = _sizes(own, held, checkpoint, options, dtype, device)
    stream = None
    if options.offload is None:
        room = _room(sizes.weights.total, sizes.beside, options, dtype, device, loading=sizes.loading)
    else:  # read a piece at a time
        weights = offloaded_weights(config, sizes.format, dtype)
        room = _room(weights.resident, sizes.beside, options, dtype, device)
        free = room.free(_shortest(options))
        stream = open_stream(weights.streamed, options.offload, options.offload_dir, device=device, free=free)
        room = replace(room, nbytes=room.nbytes - stream.buffer_bytes)
    max_model_len, num_blocks = _plan_cache(groups, config.max_position, options, room, dtype)
    if communicator is not None:  # what fits everywhere
        max_model_len, *blocks = communicator.agree((max_model_len, *num_blocks), device)
        num_blocks = tuple(blocks)
    config, own = config.with_context(max_model_len), own.with_context(max_model_len)
    try:
        decoder = load_decoder(
            checkpoint,
            config,
            dtype=dtype,
            device=device,
            quantize=options.quantization,
            stream=stream,
            progress=progress,
            split=None if communicator is None else RankSplit(communicator),
        )
    except BaseException:
        if stream is not None:
            stream.close()  # its file and its thread
        raise
    step_bytes = sizing.step_weight_bytes(own, dtype.itemsize, stored_bytes(sizes.format, dtype), held=held)
    sizes = replace(sizes, config=own)
    if communicator is None:
        return _Weights(config, decoder, max_model_len, num_blocks, step_bytes, stream, sizes)
    model, have_room = join(decoder, config, communicator), partial(_all_have_room, communicator, sizes)
    return _Weights(config, model, max_model_len, num_blocks, step_bytes, stream, sizes, have_room)


def _all_have_room(communicator: Communicator, sizes: Sizes, rows: int) -> bool:
    """Whether every rank can allocate what a decode of so many rows computes in: found before any waits for another."""
    try:
        torch.empty(sizes.graph_step(rows), dtype=torch.uint8, device=sizes.device)
        fits = True
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    return bool(communicator.agree([fits], sizes.device)[0])


def _load_fallback(
    config: FallbackConfig,
    checkpoint: Checkpoint,
    options: LoadOptions,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None,
) -> _Weights:
    for name in ("quantization", "offload"):
        if getattr(options, name) is not None:
            raise UsageError(
                f"{name}={getattr(options, name)!r} needs a model that paceline defines itself, and "
                f"{config.architecture} runs through transformers' modules: leave it out"
            )
    tokens, rows = options.scheduler.max_num_batched_tokens, options.scheduler.max_num_seqs
    sizes = measure(config, dtype)
    step = sizes.activations(config, tokens, rows) + sizing.logprob_workspace_bytes(config.vocab_size, tokens)
    step += _workspace(device)
    room = _room(sizes.weights, lambda context: step, options, dtype, device)
    model = load_fallback(checkpoint, config, dtype=dtype, device=device, progress=progress)
    # Only the loaded model says what cache it needs: its layers are asked, not its configuration.
    max_model_len, num_blocks = _plan_cache(model.kv_groups, config.max_position, options, room, dtype)
    return _Weights(config, model, max_model_len, num_blocks, sizes.step_weights)


def _sizes(
    config: DecoderConfig,
    held: sizing.Held | None,
    checkpoint: Checkpoint,
    options: LoadOptions,
    dtype: torch.dtype,
    device: torch.device,
) -> Sizes:
    on_cuda, stored = device.type == "cuda", stored_dtype(checkpoint)
    streamed = options.offload is not None
    read_here = options.load_format == "dummy" or (on_cuda and stored != dtype)
    return Sizes(
        config,
        dtype,
        options.quantization or "dense",
        device,
        options.scheduler,
        options.cache.block_size,
        graphs=on_cuda
        and options.parallel.pipeline == 1
        and config_refusal(mode=options.step_mode, streamed=streamed) is None,
        workspace=_workspace(device),
        # Of a matrix that is cut all of it is there first.
        read_bytes=stored.itemsize * options.parallel.tensor if read_here and not streamed else 0,
        held=held,
    )


def _workspace(device: torch.device) -> int:
    return workspace_bytes(untried_gpu(device).capability) if device.type == "cuda" else 0


def _room(
    weights: int,
    step_bytes: Callable[[int], int],
    options: LoadOptions,
    dtype: torch.dtype,
    device: torch.device,
    *,
    loading: int = 0,
) -> Room:
    """Memory beside the weights, of which loading them takes `loading` first. Raises OutOfMemoryError, before anything
    is loaded, where none is left."""
    available = available_bytes(device)
    if device.type == "cuda":
        available = int(available * CUDA_MEMORY_SHARE)
    else:
        available //= options.parallel.world_size  # ranks share the host
    if options.memory_gib is not None:
        available = min(available, int(options.memory_gib * sizing.GIB))
    room = Room(
        available - weights,
        step_bytes,
        cache_share=CPU_CACHE_SHARE if device.type == "cpu" and options.memory_gib is None else 1.0,
        cache_bytes=None if options.kv_cache_gib is None else int(options.kv_cache_gib * sizing.GIB),
    )
    step = step_bytes(_shortest(options))
    if room.nbytes <= max(step, loading):
        what = (
            f"{sizing.gib(loading)} more while they are loaded" if loading > step else f"{sizing.gib(step)} for a step"
        )
        raise OutOfMemoryError(
            f"{options.model} needs {sizing.gib(weights)} for weights and {what} in {str(dtype)[6:]}, and "
            f"{sizing.gib(available)} are available on {device}: use a narrower dtype, quantization='int8', "
            "a smaller max_num_batched_tokens or max_model_len, offload='auto' or a smaller model"
        )
    return room


def _shortest(options: LoadOptions) -> int:
    """The shortest context that would do: what the user asks for, else a block."""
    return options.max_model_len or options.cache.block_size


def _plan_cache(
    groups: Sequence[KVGroup], max_position: int, options: LoadOptions, room: Room, dtype: torch.dtype
) -> tuple[int, tuple[int, ...]]:
    """max_model_len, and the blocks of each KV group."""
    wanted = options.max_model_len or max_position
    if wanted > max_position:
        raise UsageError(f"max_model_len {wanted} is more than the {max_position} positions this model was trained for")
    if options.cache.num_blocks is not None:
        return wanted, (options.cache.num_blocks,) * len(groups)
    context, plan = divide(
        groups,
        room,
        options.cache,
        options.scheduler,
        bytes_per_value=dtype.itemsize,
        longest=wanted,
        shorten=options.max_model_len is None,
    )
    budget, free = room.budget(context), room.free(context)
    if budget > free:
        raise OutOfMemoryError(
            f"a cache of {options.kv_cache_gib:g} GiB does not fit: {sizing.gib(free)} are left by weights and steps"
        )
    if plan.num_tokens < context or plan.nbytes > budget:
        raise OutOfMemoryError(
            f"one context of {context} tokens does not fit the cache: {sizing.gib(budget)} hold {plan.num_tokens}; "
            "lower max_model_len or raise kv_cache_gib"
        )
    log.info("cache: %s for %d tokens of context", sizing.gib(plan.nbytes), plan.num_tokens)
    if context < wanted:
        log.warning(
            "max_model_len lowered from the model's %d to %d, what %s of cache hold; set kv_cache_gib for more",
            wanted,
            context,
            sizing.gib(budget),
        )
    return context, plan.num_blocks


def _tell_fallbacks(weights: _Weights, options: LoadOptions) -> None:
    """On a GPU, what our kernels do not run. On a CPU there is nothing better.

    Raises UsageError for a table of launches that is none: now, not in a request.
    """
    model = weights.model
    if model.device.type == "cuda":
        load_table(gpu(model.device).name)
        asked_for = options.offload is not None or model.dtype == torch.float32
        for line in fallbacks(model.choices(1)):
            log.log(INFO if asked_for else WARNING, "%s", line)


def _engine_in_memory(weights: _Weights, options: LoadOptions) -> tuple[Engine, DecodeStep | None]:
    try:
        return _build_engine(weights, options)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        model = weights.model
        nbytes = sizing.cache_bytes(model.kv_groups, weights.num_blocks, options.cache.block_size, model.dtype.itemsize)
        raise OutOfMemoryError(
            f"no memory is left on {model.device} for a cache of {sizing.gib(nbytes)} beside the weights: another "
            "process may have taken what was free; set kv_cache_gib, or a smaller max_model_len or max_num_seqs"
        ) from error


def _build_engine(weights: _Weights, options: LoadOptions) -> tuple[Engine, DecodeStep | None]:
    model = weights.model
    refusal = graph_refusal(model, mode=options.step_mode, streamed=weights.stream is not None)
    if refusal is not None:
        expected = options.step_mode == "eager" or (options.mode != "graph" and model.device.type == "cpu")
        log.log(INFO if expected else WARNING, "decodes run without CUDA graphs: %s", refusal)
    depth = options.async_depth
    if depth is None:
        depth = 0 if refusal is not None or options.speculative is not None else 1
    engine_config = EngineConfig(
        max_model_len=weights.max_model_len,
        seed=options.seed,
        cache=replace(options.cache, num_blocks=weights.num_blocks[0]),
        scheduler=options.scheduler,
        speculative=options.speculative,
        async_depth=depth,
        mode=options.step_mode,
    )
    reserve = 0 if weights.sizes is None else weights.sizes.graph_reserve
    # Deterministic attention takes decodes as it takes prompts, and their number is not bounded by a graph's. Over
    # several devices prompts' graphs were not tried.
    prompts = weights.all_have_room is None and not options.deterministic
    captured = partial(captured_decode, model, engine_config, reserve, prompts=prompts)
    decode = None if refusal is not None else captured
    runner = ModelRunner(
        model,
        weights.num_blocks,
        options.cache.block_size,
        decode,
        deterministic=options.deterministic,
        all_have_room=weights.all_have_room,
    )
    return Engine(engine_config, model.kv_groups, weights.num_blocks, runner), runner.decode
