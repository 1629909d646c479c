"""GGUF blocks to values, exact (bitwise) against the format's definition: scale * level - shift.

A block holds 32 consecutive elements of a row, a super-block 256. d and m are fp16, q small integers; in float32:

    Q8_0  d, 32 int8: d*q                              Q4_0  d, 16 bytes: d*(q-8)    Q4_1  d, m, 16 bytes: d*q + m
    Q5_0  d, 4 bytes of fifth bits, 16: d*(q-16)       Q5_1  d, m, 4, 16: d*q + m    IQ4_NL  d, 16: d*TABLE[q]

In these byte j holds element j in its low nibble and element j + 16 in its high one; the i-th of the 32 fifth bits
belongs to element i. The super-blocks' scales s and minima t are integers themselves, one a sub-block of 16 or 32:

    Q2_K  16 bytes of (s, t) nibbles, 64, d, m         d*s*q - m*t, 16 elements a sub-block
    Q3_K  32 bytes of third bits, 64, 12 of s, d       d*(s-32)*q, q from -4 to 3, 16 a sub-block
    Q4_K  d, m, 12 bytes of (s, t), 128                d*s*q - m*t, 32 a sub-block
    Q5_K  d, m, 12 of (s, t), 32 of fifth bits, 128    as Q4_K
    Q6_K  128, 64 of bits 5 and 6, 16 int8 s, d        d*s*(q-32), 16 a sub-block
    IQ4_XS  d, 2 and 4 bytes of s, 128                 d*(s-32)*TABLE[q], 32 a sub-block

Legend: N blocks, B bytes of a block, S sub-blocks of a block (1 where it has none), E elements of a sub-block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from paceline.loading.gguf import BlockType

# Elements decoded at once: 32,768 floats are 128 KiB, which stay in the second-level cache between the passes, and
# just few enough for torch to run every pass on the calling thread. SmolLM2 takes 0.33 s so, on one core. With eight
# times as many on two threads it takes 0.31 s on an idle machine, but 8 to 40 s on a busy one: 3,600 barriers wait.
CHUNK = 32768
# Chunks whose scales are unpacked together: unpacking them is a dozen tiny operations, and chunk by chunk half the time
# of Q4_K. On one core, into memory that was touched before: 300 MB of Q4_K a second (150 with 1 here), 285 of Q6_K.
CHUNKS_OF_SCALES = 16
# IQ4_NL's 16 levels, in units of the scale.
LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

_LEVELS = torch.tensor(LEVELS, dtype=torch.float32)
_BITS = torch.arange(8, dtype=torch.uint8)
_PAIRS_OF_BITS = torch.arange(0, 8, 2, dtype=torch.uint8)


@dataclass(frozen=True)
class Decoder:
    """`scales`: of blocks [N, B] the scale and the shift (None for 0) of each sub-block, float32 [N, S].
    `levels`: writes what the scale multiplies into float32 [N, elements of a block]."""

    scales: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
    levels: Callable[[torch.Tensor, torch.Tensor], object]


def dequantize(raw: torch.Tensor, kind: BlockType) -> torch.Tensor:
    """Values of `raw` (uint8 [rows, bytes of a row]): float32, or for F32, F16 and BF16 a view in the stored dtype."""
    if kind.name in DENSE:
        return raw.view(DENSE[kind.name])
    decoder = QUANTIZED[kind.name]
    blocks_NB = raw.reshape(-1, kind.nbytes)
    values = torch.empty(blocks_NB.shape[0], kind.elements)
    count = CHUNK // kind.elements
    group = CHUNKS_OF_SCALES * count
    for start in range(0, blocks_NB.shape[0], group):
        _decode(decoder, blocks_NB[start : start + group], values[start : start + group], count)
    return values.view(raw.shape[0], -1)


def _decode(decoder: Decoder, blocks_NB: torch.Tensor, values: torch.Tensor, count: int) -> None:
    scales, shifts = decoder.scales(blocks_NB)
    for start in range(0, blocks_NB.shape[0], count):
        out = values[start : start + count]
        decoder.levels(blocks_NB[start : start + count], out)
        out_NSE = out.view(out.shape[0], scales.shape[1], -1)
        out_NSE.mul_(scales[start : start + count, :, None])
        if shifts is not None:
            # A product and a difference, each rounded: a fused multiply-add would differ in the last bit.
            out_NSE.sub_(shifts[start : start + count, :, None])


def value_dtype(type_name: str) -> torch.dtype | None:
    """The dtype that dequantize() gives for a type, or None where this version cannot read it."""
    if type_name in QUANTIZED:
        return torch.float32
    return DENSE.get(type_name)


# --------------------------------------------------------------------------------------------- scales


def _half(blocks_NB: torch.Tensor, start: int) -> torch.Tensor:
    """The fp16 at byte `start` of each block, as float32 [N, 1]."""
    return blocks_NB[:, start : start + 2].contiguous().view(torch.float16).float()


def _one_scale(blocks_NB: torch.Tensor) -> tuple[torch.Tensor, None]:
    return _half(blocks_NB, 0), None


def _scale_and_minimum(blocks_NB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _half(blocks_NB, 0), -_half(blocks_NB, 2)


def _q2_k_scales(blocks_NB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    packed = blocks_NB[:, :16]
    return _half(blocks_NB, 80) * (packed & 15), _half(blocks_NB, 82) * (packed >> 4)


def _q3_k_scales(blocks_NB: torch.Tensor) -> tuple[torch.Tensor, None]:
    """Low nibbles in 8 bytes, then the pairs above them in 4: the lowest pair of each byte first."""
    packed = blocks_NB[:, 96:108]
    low = torch.cat((packed[:, :8] & 15, packed[:, :8] >> 4), 1)
    high = (packed[:, None, 8:] >> _PAIRS_OF_BITS[:, None]) & 3
    return (low | high.view(-1, 16) << 4).float().sub_(32).mul_(_half(blocks_NB, 108)), None


def _q4_k_scales(blocks_NB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """12 bytes: scales 0 to 3 are the low 6 bits of bytes 0 to 3, minima those of bytes 4 to 7; of the other four the
    low nibbles share bytes 8 to 11 (scales below, minima above), and the top pairs of the bytes before complete them.
    """
    scales, minima, low = blocks_NB[:, 4:8], blocks_NB[:, 8:12], blocks_NB[:, 12:16]
    scales = torch.cat((scales & 63, (low & 15) | scales >> 6 << 4), 1)
    minima = torch.cat((minima & 63, (low >> 4) | minima >> 6 << 4), 1)
    return _half(blocks_NB, 0) * scales, _half(blocks_NB, 2) * minima


def _q6_k_scales(blocks_NB: torch.Tensor) -> tuple[torch.Tensor, None]:
    return _half(blocks_NB, 208) * blocks_NB[:, 192:208].view(torch.int8), None


def _iq4_xs_scales(blocks_NB: torch.Tensor) -> tuple[torch.Tensor, None]:
    low = torch.stack((blocks_NB[:, 4:8] & 15, blocks_NB[:, 4:8] >> 4), 2).view(-1, 8)
    high = (blocks_NB[:, 2:4, None] >> _PAIRS_OF_BITS) & 3
    return (low | high.view(-1, 8) << 4).float().sub_(32).mul_(_half(blocks_NB, 0)), None


# --------------------------------------------------------------------------------------------- levels


def _nibbles(packed_NB: torch.Tensor, width: int, out: torch.Tensor) -> torch.Tensor:
    """Of each run of `width` bytes the low nibbles, then the high ones. Returns `out`."""
    packed = packed_NB.view(packed_NB.shape[0], -1, width)
    runs = out.view(packed.shape[0], -1, 2, width)
    runs[:, :, 0] = packed & 15
    runs[:, :, 1] = packed >> 4
    return out


def _bits(packed_NB: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """One bit of each of the bytes, the lowest first: all bytes' lowest bits, then all their next, as out's shape."""
    return ((packed_NB[:, None] >> _BITS[:, None]) & 1).view_as(out)


def _pairs(packed_NB: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """64 bytes as 256 numbers of two bits: of each run of 32 bytes the lowest pairs first, then the next."""
    return ((packed_NB.view(-1, 2, 1, 32) >> _PAIRS_OF_BITS[:, None]) & 3).view_as(out)


def _five_bits(packed_NB: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Blocks of 32: 4 bytes of fifth bits, then 16 of nibbles."""
    fifth = (packed_NB[:, :4, None] >> _BITS) & 1
    return _nibbles(packed_NB[:, 4:], 16, out).add_(fifth.view_as(out), alpha=16)


def _q5_k_levels(blocks_NB: torch.Tensor, out: torch.Tensor) -> None:
    _nibbles(blocks_NB[:, 48:], 32, out).add_(_bits(blocks_NB[:, 16:48], out), alpha=16)


def _q3_k_levels(blocks_NB: torch.Tensor, out: torch.Tensor) -> None:
    # The third bit is set where 4 is not subtracted.
    out.copy_(_pairs(blocks_NB[:, 32:96], out)).add_(_bits(blocks_NB[:, :32], out), alpha=4).sub_(4)


def _q6_k_levels(blocks_NB: torch.Tensor, out: torch.Tensor) -> None:
    _nibbles(blocks_NB[:, :128], 64, out).add_(_pairs(blocks_NB[:, 128:192], out), alpha=16).sub_(32)


def _from_table(packed_NB: torch.Tensor, out: torch.Tensor) -> None:
    packed = packed_NB.view(packed_NB.shape[0], -1, 16)
    index = torch.cat((packed & 15, packed >> 4), 2).int()
    torch.index_select(_LEVELS, 0, index.view(-1), out=out.view(-1))


DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTIZED = {
    "Q4_0": Decoder(_one_scale, lambda blocks, out: _nibbles(blocks[:, 2:], 16, out).sub_(8)),
    "Q4_1": Decoder(_scale_and_minimum, lambda blocks, out: _nibbles(blocks[:, 4:], 16, out)),
    "Q5_0": Decoder(_one_scale, lambda blocks, out: _five_bits(blocks[:, 2:], out).sub_(16)),
    "Q5_1": Decoder(_scale_and_minimum, lambda blocks, out: _five_bits(blocks[:, 4:], out)),
    "Q8_0": Decoder(_one_scale, lambda blocks, out: out.copy_(blocks[:, 2:].view(torch.int8))),
    "Q2_K": Decoder(_q2_k_scales, lambda blocks, out: out.copy_(_pairs(blocks[:, 16:80], out))),
    "Q3_K": Decoder(_q3_k_scales, _q3_k_levels),
    "Q4_K": Decoder(_q4_k_scales, lambda blocks, out: _nibbles(blocks[:, 16:], 32, out)),
    "Q5_K": Decoder(_q4_k_scales, _q5_k_levels),
    "Q6_K": Decoder(_q6_k_scales, _q6_k_levels),
    "IQ4_NL": Decoder(_one_scale, lambda blocks, out: _from_table(blocks[:, 2:], out)),
    "IQ4_XS": Decoder(_iq4_xs_scales, lambda blocks, out: _from_table(blocks[:, 8:], out)),
}
