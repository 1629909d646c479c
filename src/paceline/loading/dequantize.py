"""GGUF blocks to values: one vectorised function a tensor type, exact (bitwise) against the format's definition.

A block holds 32 consecutive elements of a row. d and m are fp16, q are small integers; in float32:
Q8_0 = d, 32 int8: d*q.   Q4_0 = d, 16 bytes: d*(q-8).   Q4_1 = d, m, 16 bytes: d*q + m.
In the 4-bit types byte j holds element j in its low nibble and element j + 16 in its high one.

Legend: N blocks, B bytes of a block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# Blocks decoded at once: 1,024 x 32 floats are 128 KiB, which stay in the second-level cache between the passes, and
# just few enough for torch to run every pass on the calling thread. SmolLM2 takes 0.33 s so, on one core. With 8,192
# blocks on two threads it takes 0.31 s on an idle machine, but 8 to 40 s on a busy one: 3,600 barriers wait for a core.
CHUNK = 1024


def dequantize(raw: torch.Tensor, type_name: str) -> torch.Tensor:
    """Values of `raw` (uint8 [rows, bytes of a row]): float32, or for F32, F16 and BF16 a view in the stored dtype."""
    if type_name in DENSE:
        return raw.view(DENSE[type_name])
    nbytes, decode = QUANTIZED[type_name]
    blocks_NB = raw.reshape(-1, nbytes)
    values = torch.empty(blocks_NB.shape[0], 32)
    for start in range(0, blocks_NB.shape[0], CHUNK):
        decode(blocks_NB[start : start + CHUNK], values[start : start + CHUNK])
    return values.view(raw.shape[0], -1)


def _halves(blocks_NB: torch.Tensor, start: int) -> torch.Tensor:
    """The fp16 at byte `start` of each block, as float32 [N, 1]."""
    return blocks_NB[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed_NB: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    out[:, :16] = packed_NB & 15
    out[:, 16:] = packed_NB >> 4
    return out


def _q8_0(blocks_NB: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(blocks_NB[:, 2:].view(torch.int8)).mul_(_halves(blocks_NB, 0))


def _q4_0(blocks_NB: torch.Tensor, out: torch.Tensor) -> None:
    _nibbles(blocks_NB[:, 2:], out).sub_(8).mul_(_halves(blocks_NB, 0))


def _q4_1(blocks_NB: torch.Tensor, out: torch.Tensor) -> None:
    # A product and a sum, each rounded: a fused multiply-add would differ in the last bit.
    _nibbles(blocks_NB[:, 4:], out).mul_(_halves(blocks_NB, 0)).add_(_halves(blocks_NB, 2))


DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Type -> bytes of a block of 32, and its decoder.
QUANTIZED: dict[str, tuple[int, Callable[[torch.Tensor, torch.Tensor], None]]] = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q8_0": (34, _q8_0),
}


def value_dtype(type_name: str) -> torch.dtype | None:
    """The dtype that dequantize() gives for a type, or None where this version cannot read it."""
    if type_name in QUANTIZED:
        return torch.float32
    return DENSE.get(type_name)
