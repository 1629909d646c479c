"""y = x w^T + b. On CPU through oneDNN with the weight laid out once, at load, in oneDNN's own blocks.

Measured on 2 threads (AMD EPYC, AVX-512), all linears of SmolLM2-135M in float32: one row 52 ms through F.linear,
25 ms packed; 16 rows 119 ms against 33 ms; 512 rows 829 ms against 560 ms. This file is the only one that touches
torch.ops.mkldnn, which is private: where an op is missing, F.linear takes over and the log says so (models/load.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

# The row count the layout is chosen for. 1 to 16 pick layouts 1.3 to 1.7x slower at every row count than 64 and up.
PACK_ROWS = 64

# What oneDNN calls what follows a product, and by which algorithm.
POST_OPS = {"none": ("none", ""), "relu": ("relu", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}

# In words, for kernels/choices.py.
PLAIN_LINEAR = "torch's F.linear"
UNPACKED = f"unpacked, then {PLAIN_LINEAR}"
TOO_SMALL = "the weight is too small to gain"


def linear_ref(x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(x_TK, weight_NK, bias_N)


def onednn_refusal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why oneDNN's packed linear cannot take such a weight; None when it can."""
    if device.type != "cpu":
        return f"device is {device.type}"
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this torch was built without oneDNN"
    if not has_onednn():
        return "this torch has no packed oneDNN linear"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"dtype is {dtype}"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no bf16 instructions"
    if min(shape) < 16:
        return TOO_SMALL
    return None


def has_onednn() -> bool:
    """Whether this torch has the operators that are used here."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def pack_onednn(weight_NK: torch.Tensor) -> torch.Tensor:
    """The weight in oneDNN's blocked layout: opaque to all but linear_onednn; `.to_dense()` undoes it."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NK.contiguous(), PACK_ROWS)
    return packed


def packed_bytes(rows: int, columns: int, itemsize: int) -> int:
    """Bytes of a packed weight. With AVX-512 a block is 64 rows by 64 bytes, and the last ones are padded; vocabularies
    of 50,257 gain 0.09 %, models whose sizes are multiples of 64 nothing."""
    return -(-rows // 64) * 64 * (-(-columns * itemsize // 64) * 64)


def linear_onednn(
    x_TK: torch.Tensor, packed_NK: torch.Tensor, bias_N: torch.Tensor | None = None, activation: str = "none"
) -> torch.Tensor:
    """`activation`: "none", "relu", "gelu" or "gelu_tanh", of the product before it is stored."""
    y_TN: torch.Tensor = onednn_operator()(x_TK, packed_NK, bias_N, *onednn_arguments(activation))
    return y_TN


def onednn_operator() -> Callable[..., Any]:
    """What linear_onednn calls, for a graph to call it itself."""
    return onednn_operators()[0]


def onednn_operators() -> list[Callable[..., Any]]:
    """The same in a list, which is empty where this torch has none."""
    return [torch.ops.mkldnn._linear_pointwise.default] if has_onednn() else []


def onednn_arguments(activation: str) -> tuple[str, list[Any], str]:
    """onednn_operator's arguments behind x, the packed weight and the bias."""
    post_op, algorithm = POST_OPS[activation]
    return post_op, [], algorithm
