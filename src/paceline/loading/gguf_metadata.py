"""A GGUF file's metadata, read with checks: a missing, mistyped or unknown key is named, never passed over."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from paceline.errors import CheckpointError, UnsupportedModelError
from paceline.loading.gguf_names import ARCHITECTURES
from paceline.log import get_logger

log = get_logger(__name__)

FLOAT32_MAX = 3.4028234663852886e38

# Keys that change the result where they hold another value than these: refused in an architecture that asks not.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_shared_count": (0,),
    "final_logit_softcapping": (0.0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "use_parallel_residual": (False,),
}
# Keys that change no logit.
INERT = frozenset({"expert_used_count", "pooling_type", "rope.scaling.finetuned", "tensor_data_layout", "vocab_size"})


class Metadata:
    """The keys of one architecture, without its name before them. It remembers which were asked for: see check()."""

    def __init__(self, path: object, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values
        self.asked: set[str] = set()
        self.architecture: str = self._typed("general.architecture", str, None)
        if self.architecture not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"{path}: GGUF architecture {self.architecture[:40]!r} is not supported "
                f"(known: {', '.join(ARCHITECTURES)}); use the model's safetensors files"
            )

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value: int = self._typed(self._key(key), int, default)
        if value < least:
            raise CheckpointError(f"{self.path}: metadata key '{self._key(key)}' is {value}, expected at least {least}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """The shortest decimal that is the stored float32: 9.999999747e-06 is 1e-05 again, as in config.json."""
        value: float = self._typed(self._key(key), float, default)
        if not abs(value) <= FLOAT32_MAX:
            raise CheckpointError(f"{self.path}: metadata key '{self._key(key)}' is {value}, expected a finite float32")
        return shortest_float32(value)

    def text(self, key: str, default: str) -> str:
        value: str = self._typed(self._key(key), str, default)
        return value

    def flag(self, key: str, default: bool) -> bool:
        value: bool = self._typed(self._key(key), bool, default)
        return value

    def flags(self, key: str, default: list[bool]) -> list[bool]:
        """As many as `default` has."""
        value: list[bool] = self._typed(self._key(key), list, default)
        if len(value) != len(default) or any(not isinstance(flag, bool) for flag in value):
            raise CheckpointError(
                f"{self.path}: metadata key '{self._key(key)}' is {str(value)[:40]!r}, expected {len(default)} booleans"
            )
        return value

    def has(self, key: str) -> bool:
        return self._key(key) in self.values

    def check(self) -> None:
        """Judge the keys nobody asked for: refuse those known to change the result, log those unknown.

        Raises UnsupportedModelError naming the key and its value.
        """
        prefix, unheard = f"{self.architecture}.", []
        for full in sorted(self.values.keys() - self.asked):
            key, value = full.removeprefix(prefix), self.values[full]
            if full == key or key in INERT:
                continue
            if key not in NEUTRAL:
                unheard.append(full)
            elif value not in NEUTRAL[key]:
                raise UnsupportedModelError(
                    f"{self.path}: metadata key '{full}' is {str(value)[:40]!r}, which paceline does not implement for "
                    "this architecture; use the model's safetensors files"
                )
        if unheard:
            log.warning(
                "%s has keys that paceline does not know and ignores: %s", self.path, ", ".join(map(repr, unheard))
            )

    def _key(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def _typed(self, key: str, kind: type, default: Any) -> Any:
        self.asked.add(key)
        value = self.values.get(key, default)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            found = "is missing" if key not in self.values else f"is {str(value)[:40]!r}"
            raise CheckpointError(f"{self.path}: metadata key '{key}' {found}, expected one {kind.__name__}")
        return value


def shortest_float32(value: float) -> float:
    """The decimal with the fewest digits that rounds to the same float32."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value
