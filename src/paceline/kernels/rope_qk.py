"""Norm of queries and keys by head (Henry et al., 2020) and their rotary embedding (Su et al., 2021, half-split) in one
Triton kernel, which reads them where their projection wrote them: for attention without a paged cache, whose kernel is
kernels/rope_kv.py's.

Legend: B sequences of S tokens, H query heads, K key heads, D head size, F rotated elements of a head.

The plain twins are rms_norm or layer_norm (kernels/norm.py) and apply_rotary (kernels/rotary.py), one after the other.
Here everything between load and store is float32. The kernel is in kernels/rope_qk_triton.py.
"""

from __future__ import annotations

import torch

from paceline.kernels.gpu import gpu, launch_options
from paceline.kernels.rope_kv import TILE, QKNorm


def rope_qk(
    q_BSHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    cos_BSF: torch.Tensor,
    sin_BSF: torch.Tensor,
    norm: QKNorm | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both normed, if `norm` (of heads by themselves) is given, and turned; contiguous. Any strides but the last, which
    is 1; cos and sin, the first half of it negated, have the same.

    On compute capability 9.0 and up it starts while the kernel before it on the stream still runs, and waits for that
    one's end before it reads or writes anything.
    """
    # Triton is optional, and its interpreter is chosen by the environment when this is first imported.
    import triton

    from paceline.kernels.rope_qk_triton import rope_qk_kernel

    B, S, H, D = q_BSHD.shape
    K = k_BSKD.shape[2]
    out = q_BSHD.new_empty(q_BSHD.shape), k_BSKD.new_empty(k_BSKD.shape)
    if B * S == 0:
        return out
    dependent = gpu(q_BSHD.device).dependent
    rope_qk_kernel[(H + K, -(-B * S // TILE))](
        q_BSHD,
        k_BSKD,
        cos_BSF,
        sin_BSF,
        None if norm is None else norm.q_weight,
        None if norm is None else norm.k_weight,
        *out,
        B * S,
        S,
        0.0 if norm is None else norm.eps,
        *q_BSHD.stride()[:3],
        *k_BSKD.stride()[:3],
        *cos_BSF.stride()[:2],
        H=H,
        K=K,
        D=D,
        D_TILE=triton.next_power_of_2(D),
        F=cos_BSF.shape[-1],
        CENTRED=norm is not None and norm.kind == "layer",
        N=TILE,
        DEPENDENT=dependent,
        num_warps=4,
        **launch_options(dependent),
    )
    return out
