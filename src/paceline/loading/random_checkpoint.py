"""A checkpoint without files: every tensor that a config.json's model has, filled with seeded random values.

What speed and memory are measured with where no weights are at hand: an 8 B model is made on a GPU in a second or two,
where reading its 16 GB takes far longer.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from paceline.config import DecoderConfig
from paceline.errors import CheckpointError
from paceline.formats.dense import DenseWeight
from paceline.layers.linear import Linear
from paceline.loading.rules import stored_names
from paceline.models.decoder import Decoder
from paceline.models.registry import family_of, read_decoder_config

BIAS_STD = 0.02
NORM_STD = 0.1  # around 1


@dataclass(frozen=True)
class _Tensor:
    """`shape`: as stored. Its values are drawn from the normal distribution of this `mean` and `std`."""

    shape: tuple[int, ...]
    mean: float
    std: float


class RandomCheckpoint:
    """A Checkpoint of `config` (a config.json, parsed), stored in `dtype` on `device`.

    A tensor is a function of `seed` and its name alone, on devices of one kind: the order of reading changes nothing.
    Matrices are scaled by their columns, so that every layer's output has about the size of its input and the logits
    are of size 1 at any depth. Raises UnsupportedModelError for a config that no family reads.
    """

    def __init__(
        self, config: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
    ) -> None:
        self.config = dict(config)
        self.generation_config: dict[str, Any] = {}
        self._dtype = dtype
        self._device = torch.device(device)
        self._seed = seed
        self._tensors = _tensors(read_decoder_config(config))
        self.nbytes = sum(math.prod(tensor.shape) for tensor in self._tensors.values()) * dtype.itemsize

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def dtype(self, name: str) -> torch.dtype:
        self._tensor(name)
        return self._dtype

    def read(self, name: str) -> torch.Tensor:
        """New memory at each call; the same values each time."""
        tensor = self._tensor(name)
        # One number of 32 bits: of a larger seed the CPU's generator drops the rest.
        seed = zlib.crc32(f"{self._seed} {name}".encode())
        generator = torch.Generator(self._device).manual_seed(seed)
        values = torch.empty(tensor.shape, dtype=self._dtype, device=self._device)
        return values.normal_(tensor.mean, tensor.std, generator=generator)

    def span(self, name: str) -> None:
        return None

    def close(self) -> None:
        pass

    def __enter__(self) -> RandomCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def _tensor(self, name: str) -> _Tensor:
        if name not in self._tensors:
            raise CheckpointError(f"the model that this config.json describes has no tensor '{name}'")
        return self._tensors[name]


def _tensors(config: DecoderConfig) -> dict[str, _Tensor]:
    """Hugging Face's name -> the tensor, for all that the decoder of `config` asks for."""
    family = family_of(config)
    recorder = _Recorder()
    Decoder(config, recorder, family.block)
    experts = 0 if config.moe is None else config.moe.num_experts
    found: dict[str, _Tensor] = {}
    for ours, stored in stored_names(family.weight_rules(config), config.num_layers, experts).items():
        rows, rest = recorder.shapes[ours]
        if len(stored.names) == 1:  # stored fused
            rows = (sum(rows),)
        mean, std = 0.0, BIAS_STD
        if rest:
            std = rest[0] ** -0.5
        elif ours.endswith(".weight"):
            mean, std = 1.0, NORM_STD
        for name, count in zip(stored.names, rows, strict=True):
            found[name] = _Tensor(stored.layout.stored_shape((count, *rest)), mean, std)
    return found


class _Recorder:
    """A decoder's Parts that take no memory: they note what is asked for. `shapes`: our name -> the rows of the parts
    that make it, and the other dimensions."""

    dtype = torch.float32
    device = torch.device("meta")

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        return self._note(name, (shape[0],), shape[1:])

    def linear(self, name: str, rows: tuple[int, ...], columns: int, *, bias: bool = False) -> Linear:
        bias_N = self._note(f"{name}.bias", rows, ()) if bias else None
        return Linear(DenseWeight(self._note(f"{name}.weight", rows, (columns,))), bias_N)

    def table(self, name: str, rows: int, columns: int) -> torch.Tensor:
        return self._note(name, (rows,), (columns,))

    def tied(self, table_VD: Any) -> Linear:
        return Linear(DenseWeight(table_VD))

    def _note(self, name: str, rows: tuple[int, ...], rest: tuple[int, ...]) -> torch.Tensor:
        self.shapes[name] = (rows, rest)
        return torch.empty((sum(rows), *rest), dtype=self.dtype, device=self.device)
