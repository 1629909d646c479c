"""What may be asked of a model that is loaded, checked where it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from paceline.config import (
    LOAD_FORMATS,
    MODEL_IMPLS,
    OFFLOADS,
    QUANTIZATIONS,
    STREAMED,
    CacheConfig,
    Mode,
    ParallelConfig,
    SchedulerConfig,
    SpeculativeConfig,
    check_mode,
)
from paceline.errors import UsageError
from paceline.registry import unknown

if TYPE_CHECKING:  # a server's API process knows these options and no torch
    import torch


@dataclass(frozen=True)
class LoadOptions:
    """What to load and how. `model`: a hub id, a directory, a GGUF file or an alias. `tokenizer`: the same, where
    it is not the model's own. `generation_config`: "auto" takes the model's sampling defaults, "none" does not.
    `kv_cache_gib`: the cache's size; None takes what scheduler limits can use, within a share of free memory.
    `memory_gib`: what weights, cache and activations may take on the device together; None: what is free there.
    `offload`: "auto", "host" or "disk" keeps the matrices there and streams them (engine/offload.py).
    `model_impl`: "paceline", "transformers", or "auto", the first of them that runs the model.
    `mode`: as in EngineConfig. `async_depth`: steps that the host runs ahead; None is 1 with graphs, unless drafts wait
    for tokens, else 0. `parallel`: over how many devices the model is split, each of which may take `memory_gib` and
    holds a cache of `kv_cache_gib`. `load_format`: "dummy" makes random weights of the model's shape instead of
    reading any; `seed` is theirs too. `deterministic`: a request's numbers are the same to the bit, whatever else runs
    and however it is cut into steps (models/deterministic.py); on one device only."""

    model: str
    tokenizer: str | None = None
    revision: str | None = None
    dtype: str | torch.dtype = "auto"
    device: str = "auto"
    quantization: str | None = None
    max_model_len: int | None = None
    kv_cache_gib: float | None = None
    memory_gib: float | None = None
    offload: str | None = None
    offload_dir: str | None = None
    seed: int = 0
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    speculative: SpeculativeConfig | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    async_depth: int | None = None
    mode: Mode = "auto"
    skip_tokenizer_init: bool = False
    chat_template: str | None = None
    generation_config: str = "auto"
    hf_token: str | None = None
    download_dir: str | None = None
    model_impl: str = "auto"
    load_format: str = "auto"
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.model_impl not in MODEL_IMPLS:
            raise UsageError(unknown("model_impl", self.model_impl, MODEL_IMPLS))
        check_mode(self.mode)
        if self.load_format not in LOAD_FORMATS:
            raise UsageError(unknown("load_format", self.load_format, LOAD_FORMATS))
        if self.load_format == "dummy" and not self.skip_tokenizer_init and self.tokenizer is None:
            raise UsageError(
                "load_format='dummy' comes without a tokenizer: set skip_tokenizer_init=True, or name one in tokenizer"
            )
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise UsageError(unknown("quantization", self.quantization, QUANTIZATIONS))
        if self.generation_config not in ("auto", "none"):
            raise UsageError(f"generation_config must be 'auto' or 'none', got {self.generation_config!r}")
        for name in ("kv_cache_gib", "memory_gib"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} must be greater than 0, got {value}")
        if self.offload is not None and self.offload not in OFFLOADS:
            raise UsageError(f"offload must be one of {', '.join(OFFLOADS)}, got {self.offload!r}")
        if self.offload is not None and (self.quantization or "dense") not in STREAMED:
            raise UsageError(
                f"offload cannot stream {self.quantization} weights, only those of {', '.join(STREAMED)}: use "
                "quantization='int8'"
            )
        if self.deterministic:
            self._check_deterministic()
        if self.parallel.world_size > 1:
            self._check_split()
        if self.offload_dir is not None and self.offload is None:
            raise UsageError("offload_dir is given and offload is not: set offload='disk'")

    @property
    def step_mode(self) -> Mode:
        """The mode that the steps have: deterministic ones are not captured, since no graph holds such kernels yet."""
        return "eager" if self.deterministic else self.mode

    def _check_split(self) -> None:
        if self.deterministic:
            raise UsageError(
                "deterministic is of one device, because how ranks add up depends on a step's size: leave it out, or "
                "do not split the model"
            )
        if self.offload is not None:
            raise UsageError(f"offload={self.offload!r} streams to one device: leave it out, or do not split the model")

    def _check_deterministic(self) -> None:
        if self.mode in ("graph", "compile"):
            raise UsageError(
                f"deterministic runs plainly, without graphs and torch.compile: leave out mode={self.mode!r}"
            )
        if self.offload is not None:
            raise UsageError(
                "deterministic multiplies a few rows at a time, and would stream the weights for each: "
                "leave out offload"
            )
