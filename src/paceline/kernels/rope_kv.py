"""Between the projection and the attention, in one Triton kernel: norm of queries and keys (Henry et al., 2020), their
rotary embedding (Su et al., 2021, half-split), and the write of keys and values into the paged cache.

Legend: T tokens, H query heads, K key/value heads, X = H + 2 K, D head size, F rotated elements of a head.

The plain twins are rms_norm or layer_norm (kernels/norm.py), apply_rotary (kernels/rotary.py) and write_kv
(kernels/kv_write.py), one after the other. Here everything between load and store is float32: one rounding, not four.
The kernel is in kernels/rope_kv_triton.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from paceline.inputs import KVLayer
from paceline.kernels.gpu import gpu, launch_options, triton_refusal

# Tokens of a program, however many there are: a norm sums in the same order in every step. Of a prompt of 2,048 tokens
# and the 48 heads of an 8B, programs of one token take 119 us on an H100, where 50 MB read and written take 17.
TILE = 16


@dataclass(frozen=True)
class QKNorm:
    """A norm of queries and keys: its weights are [D] where each head has its own norm, [H * D] and [K * D] where all
    heads of a token are normed together."""

    kind: Literal["rms", "layer"]
    eps: float
    q_weight: torch.Tensor
    k_weight: torch.Tensor


def rope_refusal(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernel cannot take queries, keys and values of `dtype`, in a cache of the same; None when it can."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtype is {dtype}"
    return triton_refusal(device, dtype)


def rope_and_write_kv(
    qkv_TXD: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    kv: KVLayer,
    slot_mapping_T: torch.Tensor,
    norm: QKNorm | None = None,
) -> torch.Tensor:
    """The queries, normed and turned, as [T, H, D]; keys, likewise, and values go to `slot_mapping_T` (int64).

    `qkv_TXD`: queries, keys and values of each token side by side, its last dimension contiguous. `rotary`: (cos, sin)
    [T, F] as apply_rotary takes them, the first half of sin negated; None for a layer without. A negative slot is an
    unused row of a captured step: nothing is written for it.

    On compute capability 9.0 and up it starts while the kernel before it on the stream still runs, and waits for that
    one's end before it reads or writes anything.
    """
    # Triton is optional, and its interpreter is chosen by the environment when this is first imported.
    import triton

    from paceline.kernels.rope_kv_triton import rope_and_write

    tokens, all_heads, dim = qkv_TXD.shape
    kv_heads = kv.k_HSD.shape[0]
    heads = all_heads - 2 * kv_heads
    q_THD = torch.empty((tokens, heads, dim), dtype=qkv_TXD.dtype, device=qkv_TXD.device)
    if tokens == 0:
        return q_THD
    cos_TF, sin_TF = (None, None) if rotary is None else (rotary[0].contiguous(), rotary[1].contiguous())
    together = norm is not None and norm.q_weight.numel() != dim
    dependent = gpu(qkv_TXD.device).dependent
    rope_and_write[(all_heads, -(-tokens // TILE))](
        qkv_TXD,
        cos_TF,
        sin_TF,
        None if norm is None else norm.q_weight,
        None if norm is None else norm.k_weight,
        slot_mapping_T,
        q_THD,
        kv.k_HSD,
        kv.v_HSD,
        tokens,
        0.0 if norm is None else norm.eps,
        qkv_TXD.stride(0),
        qkv_TXD.stride(1),
        kv.k_HSD.stride(0),
        kv.v_HSD.stride(0),
        H=heads,
        K=kv_heads,
        D=dim,
        D_TILE=triton.next_power_of_2(dim),
        F=0 if cos_TF is None else cos_TF.shape[-1],
        CENTRED=norm is not None and norm.kind == "layer",
        TOGETHER=together,
        N=TILE,
        DEPENDENT=dependent,
        num_warps=4,
        **launch_options(dependent),
    )
    return q_THD
