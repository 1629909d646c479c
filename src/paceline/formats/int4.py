"""int4 weights, in groups of a row's columns: w = (q - 8) * scale + offset, q in 0..15. Round to nearest.

Asymmetric: of SmolLM2's linears, groups of 128, the relative error is 0.101 with an offset, 0.105 with an integer zero
point and 0.110 without either (an offset costs 1/8 bit a value). scale and offset are bfloat16: as exact as float16
here, and no group is too small for it.

Words for the GPU: the pair of columns i * group + 2j and i * group + 2j + 1 of a tile of four groups lies in nibbles i
and i + 4 of one word, so that one LOP3 makes it into two of bfloat16's 128 + q. The words of pairs j, j + 4, j + 8 and
j + 12 lie side by side: the matrix unit wants them all in one thread, whose load of 16 bytes they are (mma.m16n8k16:
thread t of a row's four has columns 2t, 2t + 1, 2t + 8, 2t + 9). Columns are padded to whole tiles.

Shapes: T tokens, N rows of a matrix, K columns, W words of a row, G groups of a row, P columns padded to tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn import functional as F

from paceline.formats.chunks import chunk_values, linear_unpacked, packing_chunks, row_chunks, unpacked_rows
from paceline.kernels.gemv import Planes
from paceline.kernels.linear import UNPACKED
from paceline.kernels.linear_int4 import int4_refusal, linear_int4, pack_plane, plane_block, unpack_plane
from paceline.kernels.unpack import unpack_planes, unpack_refusal

GROUP_SIZES = (128, 64, 32)
TILE_GROUPS = 4
# Above this many rows torch's int4 op loses to unpacking the weight and a dense product (one thread, bfloat16: from 85
# rows for 3,072 x 576, from 210 for 4,096 x 4,096).
MAX_PACKED_ROWS = 128
CHUNK_BYTES = 6  # held for a value of the chunk being unpacked: float32, the level, and the scales
PACKING_BYTES = 14  # and of the one being packed: float32, padded, less its offset, and some of the planes


def group_size_for(columns: int) -> int:
    """Of GROUP_SIZES the one whose padded tiles take the fewest bytes, the coarser of two that take the same."""
    return min(GROUP_SIZES, key=lambda size: _row_bytes(columns, size))


def refusal(rows: int, columns: int) -> str | None:
    """Why a matrix does not gain from this format over int8; None where it does."""
    nbytes = _row_bytes(columns, group_size_for(columns))
    if nbytes >= columns:
        return f"padded to tiles a row of {columns} values takes {nbytes} bytes"
    return None


@dataclass(frozen=True)
class Int4Weight:
    """In words, as the GPU's kernels read them."""

    words_NW: torch.Tensor  # int32
    scale_offset_NG2: torch.Tensor  # bfloat16
    group_size: int
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.words_NW.nbytes + self.scale_offset_NG2.nbytes

    @cached_property
    def planes(self) -> Planes:
        return Planes("int4", self.shape, self.words_NW, self.scale_offset_NG2, self.group_size)

    def matmul(self, x_TK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        return linear_unpacked(x_TK, self.shape, self._values, bias_N)

    def route(self, rows: int) -> tuple[str, str]:
        reason = int4_refusal(self.shape[0], self.words_NW.device) if self.words_NW.is_cpu else None
        return UNPACKED, reason or ""

    def unpack(self) -> torch.Tensor:
        return self._values(slice(0, self.shape[0]))

    def _values(self, rows: slice) -> torch.Tensor:
        if unpack_refusal(self.planes, self.dtype, self.words_NW.device) is None:
            return unpack_planes(self.planes, rows, self.dtype)
        words_NW = self.words_NW[rows]
        return _unpack(
            lambda chunk: unpack_words(words_NW[chunk], self.group_size),
            self.scale_offset_NG2[rows],
            self.group_size,
            self.shape[1],
            self.dtype,
        )


@dataclass(frozen=True)
class Int4CPUWeight:
    """In torch's layout for the CPU; the same numbers and as many bytes as Int4Weight."""

    plane: torch.Tensor  # uint8 [N, P / 2]
    scale_offset_GN2: torch.Tensor  # bfloat16
    group_size: int
    shape: tuple[int, int]
    dtype: torch.dtype
    planes: None = None

    @property
    def nbytes(self) -> int:
        return self.plane.nbytes + self.scale_offset_GN2.nbytes

    def matmul(self, x_TK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        if x_TK.shape[0] > MAX_PACKED_ROWS:
            return linear_unpacked(x_TK, self.shape, self._values, bias_N)
        padded_TP = F.pad(x_TK, (0, 2 * self.plane.shape[1] - self.shape[1]))
        y_TN = linear_int4(padded_TP, self.plane, self.scale_offset_GN2, self.group_size)
        return y_TN if bias_N is None else y_TN + bias_N

    def route(self, rows: int) -> tuple[str, str]:
        if rows > MAX_PACKED_ROWS:
            return UNPACKED, f"above {MAX_PACKED_ROWS} rows torch's int4 op is slower"
        return "torch's _weight_int4pack_mm_for_cpu", ""

    def unpack(self) -> torch.Tensor:
        return self._values(slice(0, self.shape[0]))

    def _values(self, rows: slice) -> torch.Tensor:
        block = plane_block()
        assert block is not None  # or pack() had not chosen this class
        plane = self.plane[rows]
        return _unpack(
            lambda chunk: unpack_plane(plane[chunk], block),
            self.scale_offset_GN2[:, rows].transpose(0, 1),
            self.group_size,
            self.shape[1],
            self.dtype,
        )


def pack(
    values_NK: torch.Tensor, *, group_size: int | None = None, symmetric: bool = False
) -> Int4Weight | Int4CPUWeight:
    """`group_size`: one of GROUP_SIZES, or None for the one that takes the fewest bytes."""
    shape, device = (values_NK.shape[0], values_NK.shape[1]), values_NK.device
    group_size = group_size or group_size_for(shape[1])
    padded = _padded(shape[1], group_size)
    on_cpu = int4_refusal(shape[0], device) is None
    scale_offset_NG2 = torch.empty(shape[0], padded // group_size, 2, dtype=torch.bfloat16, device=device)
    words_NW = torch.empty(shape[0], padded // 8, dtype=torch.int32, device=device)
    plane = words_NW.view(torch.uint8)  # as many bytes
    for rows in packing_chunks(shape[0], padded, device):
        q_NP, scale_offset_NG2[rows] = quantize(values_NK[rows], group_size, symmetric=symmetric)
        if on_cpu:
            plane[rows] = pack_plane(q_NP)
        else:
            words_NW[rows] = pack_words(q_NP, group_size)
    if on_cpu:
        scale_offset_GN2 = scale_offset_NG2.transpose(0, 1).contiguous()
        return Int4CPUWeight(plane, scale_offset_GN2, group_size, shape, values_NK.dtype)
    return Int4Weight(words_NW, scale_offset_NG2, group_size, shape, values_NK.dtype)


def quantize(values_NK: torch.Tensor, group_size: int, *, symmetric: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """q, uint8 [N, P], and scale and offset, bfloat16 [N, G, 2]; rounded to the nearest level that they give.

    The padding repeats the last column, so that it widens no group. Symmetric: the value of the largest magnitude is
    level -8, whose scale may be negative, and offsets are 0.
    """
    rows, columns = values_NK.shape
    padding = (0, _padded(columns, group_size) - columns)
    values_NGV = F.pad(values_NK.float()[None], padding, mode="replicate")[0].view(rows, -1, group_size)
    low_NG, high_NG = values_NGV.amin(2), values_NGV.amax(2)
    largest_NG = torch.where(-low_NG >= high_NG, low_NG, high_NG)
    scale_NG = largest_NG / -8 if symmetric else (high_NG - low_NG) / 15
    scale_NG = torch.where(scale_NG == 0, 1e-12, scale_NG).bfloat16()
    offset_NG = torch.zeros_like(scale_NG) if symmetric else (low_NG + 8 * scale_NG.float()).bfloat16()
    q_NGV = (values_NGV - offset_NG.float()[:, :, None]).div_(scale_NG.float()[:, :, None]).round_().add_(8)
    return q_NGV.clamp_(0, 15).to(torch.uint8).view(rows, -1), torch.stack([scale_NG, offset_NG], 2)


def pack_words(q_NP: torch.Tensor, group_size: int) -> torch.Tensor:
    """int32 [N, P / 8], in the layout at this file's head."""
    rows, columns = q_NP.shape
    pairs = q_NP.to(torch.int32).view(rows, -1, TILE_GROUPS, group_size // 32, 4, 4, 2).transpose(4, 5)
    words = torch.zeros(rows, pairs.shape[1], group_size // 32, 4, 4, dtype=torch.int32, device=q_NP.device)
    for plane in range(TILE_GROUPS):
        words |= pairs[:, :, plane, ..., 0] << 4 * plane
        words |= pairs[:, :, plane, ..., 1] << 4 * plane + 16
    return words.view(rows, columns // 8)


def unpack_words(words_NW: torch.Tensor, group_size: int) -> torch.Tensor:
    """The inverse of pack_words: uint8 [N, P]."""
    rows, words = words_NW.shape
    tiled = words_NW.view(rows, -1, group_size // 32, 4, 4).transpose(3, 4)
    shape = (rows, tiled.shape[1], TILE_GROUPS, *tiled.shape[2:], 2)
    q = torch.empty(shape, dtype=torch.uint8, device=words_NW.device)
    for plane in range(TILE_GROUPS):
        q[:, :, plane, ..., 0] = tiled >> 4 * plane & 15
        q[:, :, plane, ..., 1] = tiled >> 4 * plane + 16 & 15
    return q.view(rows, 8 * words)


def _unpack(
    levels: Callable[[slice], torch.Tensor],
    scale_offset_NG2: torch.Tensor,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(q - 8) * scale + offset in float32, rounded once, a chunk of rows at a time. `levels` gives q of some rows."""
    num_rows, groups = scale_offset_NG2.shape[:2]
    unpacked_NK = torch.empty((num_rows, columns), dtype=dtype, device=scale_offset_NG2.device)
    padded = groups * group_size
    for rows in row_chunks(num_rows, padded):
        values_NGV = levels(rows).to(torch.float32).view(-1, groups, group_size).sub_(8)
        scale, offset = scale_offset_NG2[rows].float()[..., None].unbind(2)
        values_NGV.mul_(scale).add_(offset)
        unpacked_NK[rows] = values_NGV.view(-1, padded)[:, :columns]
    return unpacked_NK


def stored_bytes(rows: int, columns: int, dtype: torch.dtype) -> int:
    return rows * _row_bytes(columns, group_size_for(columns))


def resident_bytes(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
    return stored_bytes(rows, columns, dtype)


def unpack_bytes(rows: int, columns: int, dtype: torch.dtype) -> int:
    padded = _padded(columns, group_size_for(columns))
    at_once = unpacked_rows(rows, columns)
    return at_once * columns * dtype.itemsize + chunk_values(at_once, padded) * CHUNK_BYTES


def packing_bytes(rows: int, columns: int, dtype: torch.dtype) -> int:
    return chunk_values(rows, _padded(columns, group_size_for(columns))) * PACKING_BYTES


def _row_bytes(columns: int, group_size: int) -> int:
    padded = _padded(columns, group_size)
    return padded // 2 + 4 * padded // group_size  # a scale and an offset of two bytes each


def _padded(columns: int, group_size: int) -> int:
    tile = TILE_GROUPS * group_size
    return -(-columns // tile) * tile
