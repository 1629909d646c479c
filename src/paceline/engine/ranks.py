"""Load a model over several devices: one process each, and an engine on the driver that schedules for all of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch._C._distributed_c10d import TCPStore

from paceline import sizing
from paceline.config import DecoderConfig
from paceline.engine.build import LoadedModel
from paceline.engine.device import pick_device
from paceline.engine.engine import Engine
from paceline.engine.load_options import LoadOptions
from paceline.engine.model_files import open_model, read_generation_config, read_tokenizer
from paceline.engine.rank import Facts, Job, Part, rank_options
from paceline.engine.remote import RemoteRunner
from paceline.errors import EngineError, UsageError
from paceline.loading.progress import Progress
from paceline.log import get_logger
from paceline.models.implementation import choose_config
from paceline.parallel.processes import Ranks
from paceline.parallel.split import Rank, split_refusal
from paceline.phases import Phases

log = get_logger(__name__)

ENTRY = "paceline.engine.rank:main"
# NVLink's multicast needs a fabric manager that not every machine lets a process use.
ENVIRONMENT = {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
UNEVEN_MEMORY = 0.02  # of the largest: GPUs of one kind differ by less


def load_ranks(options: LoadOptions, progress: Progress | None = None, phases: Phases | None = None) -> LoadedModel:
    """Load a model over `options.parallel.world_size` devices of this machine. `phases` may be watched meanwhile.

    Raises as build.load_model; UsageError where the model does not divide or devices lack, EngineError where a rank
    dies.
    """
    phases = Phases() if phases is None else phases
    device = _device(options)
    with phases.time("resolve"):
        source, opened = open_model(options, device, progress)
    with opened as checkpoint:
        config = choose_config(checkpoint.config, options.model_impl)
        _check_split(config, options)
        with phases.time("tokenizer"):
            tokenizer = read_tokenizer(options, source, checkpoint)
        if tokenizer is not None:
            tokenizer = tokenizer.for_vocabulary(config.vocab_size)
        generation_config = read_generation_config(options, checkpoint)
    model = options.model if source.kind == "dummy" else str(source.path)
    ranks = Ranks(ENTRY, options.parallel.world_size, ENVIRONMENT)
    try:
        parts = _start(ranks, options, model, device, phases)
        part = parts[0]
        engine = Engine(part.engine_config, part.config.kv_groups, part.num_blocks, RemoteRunner(ranks))
    except BaseException:
        ranks.close()
        raise
    return LoadedModel(
        source=source,
        config=part.config,
        engine=engine,
        tokenizer=tokenizer,
        generation_config=generation_config,
        num_blocks=part.num_blocks,
        dtype=part.dtype,
        device=device,
        step_weight_bytes=max(one.step_weight_bytes for one in parts),
        kv_bytes_per_token=max(one.kv_bytes_per_token for one in parts),
        phases=phases.seconds,
        stream=None,
        sizes=part.sizes,
        load_peak=max(one.load_peak for one in parts),
        ranks=ranks,
    )


def _start(ranks: Ranks, options: LoadOptions, model: str, device: torch.device, phases: Phases) -> list[Part]:
    parallel = options.parallel
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = max(1, torch.get_num_threads() // parallel.world_size)
    level = logging.getLogger("paceline").getEffectiveLevel()
    members = [Rank(index, parallel) for index in range(parallel.world_size)]
    with phases.time("ranks"):
        ranks.send_each(
            [Job(rank, rank_options(options, model, device, rank), store.port, threads, level) for rank in members]
        )
        for line in compare(ranks.gather()):
            log.warning("%s", line)
        ranks.send("go")
    with phases.time("weights"):
        parts: list[Part] = ranks.gather()
    del phases.seconds["weights"]  # it was more than these: the ranks have told each of their phases
    for name, seconds in parts[0].phases.items():
        phases.seconds.setdefault(name, seconds)
    return parts


def compare(found: Sequence[Facts]) -> list[str]:
    """What differs between the ranks and may. Raises EngineError for what must not: versions."""
    first, lines = found[0], []
    for index, one in enumerate(found):
        for (name, version), (_, expected) in zip(one.versions, first.versions, strict=True):
            if version != expected:
                raise EngineError(
                    f"rank {index} runs {name} {version} and rank 0 {expected}: start all ranks in one environment"
                )
    names = sorted({one.device for one in found if one.memory})
    if len(names) > 1:
        lines.append(f"the ranks' devices differ ({', '.join(names)}): every step waits for the slowest")
    least, most = min(one.memory for one in found), max(one.memory for one in found)
    if least < most * (1 - UNEVEN_MEMORY):
        lines.append(
            f"the ranks' devices have between {sizing.gib(least)} and {sizing.gib(most)} of memory: the least decides "
            "the cache"
        )
    return lines


def _device(options: LoadOptions) -> torch.device:
    """The kind of device; a rank's own is that of its number."""
    device, count = pick_device(options.device), options.parallel.world_size
    if device.type == "cuda" and device.index is not None:
        raise UsageError(f"device '{options.device}' is one device and the model is split over {count}: use 'cuda'")
    if device.type == "cuda" and torch.cuda.device_count() < count:
        raise UsageError(
            f"tensor_parallel_size {options.parallel.tensor} x pipeline_parallel_size {options.parallel.pipeline} "
            f"needs {count} GPUs, and there are {torch.cuda.device_count()}"
        )
    return device


def _check_split(config: object, options: LoadOptions) -> None:
    if not isinstance(config, DecoderConfig):
        raise UsageError(
            "tensor_parallel_size and pipeline_parallel_size need a model that paceline defines itself, and this one "
            "runs through transformers' modules: leave them out"
        )
    refusal = split_refusal(config, options.parallel)
    if refusal is not None:
        raise UsageError(refusal)
