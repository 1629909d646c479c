"""The start of a step in one Triton kernel: the tokens' rows of the embedding table, and the cosines and sines of their
positions (Su et al., 2021).

Shapes: T tokens, V vocabulary, M hidden size, F rotated elements of a head.

The plain twins are layers/embedding.py and layers/rotary.py, eight small kernels of torch. The kernel is in
kernels/embed_triton.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paceline.kernels.gpu import gpu, launch_options, triton_refusal

BLOCK = 1024  # elements of a row that a program copies


@dataclass(frozen=True)
class Angles:
    """What a position is multiplied by, float32 [F], the first half negative, so that the sines' is; and what cosines
    and sines are multiplied by."""

    frequencies_F: torch.Tensor
    length: float = 1.0


def embed_refusal(table_VM: torch.Tensor) -> str | None:
    """Why the kernel cannot read such a table; None when it can."""
    return triton_refusal(table_VM.device, table_VM.dtype)


def embed(
    token_ids_T: torch.Tensor,
    positions_T: torch.Tensor,
    table_VM: torch.Tensor,
    scale: float = 1.0,
    angles: Angles | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """The tokens' rows times `scale`, [T, M], and (cos, sin), [T, F] each, of their positions times the frequencies,
    all in the table's dtype. The angles are float32, as in layers/rotary.py. ids and positions are int64; an id
    outside of the table is not looked for.

    On compute capability 9.0 and up it starts while the kernel before it on the stream still runs, but lets its
    successors start only when that one is done: whatever they read early, of what was written before this step, is
    there.
    """
    # Triton is optional, and its interpreter is chosen by the environment when this is first imported.
    import triton

    from paceline.kernels.embed_triton import embed_kernel

    T, M = token_ids_T.shape[0], table_VM.shape[1]
    x_TM = table_VM.new_empty((T, M))
    F = 0 if angles is None else angles.frequencies_F.shape[0]
    cos_TF, sin_TF = (table_VM.new_empty((T, F)) for _ in range(2))
    blocks = triton.cdiv(M, BLOCK)
    dependent = gpu(table_VM.device).dependent
    if T:
        embed_kernel[(T, blocks + (angles is not None))](
            token_ids_T,
            positions_T,
            table_VM,
            None if angles is None else angles.frequencies_F,
            x_TM,
            cos_TF,
            sin_TF,
            scale,
            1.0 if angles is None else angles.length,
            table_VM.stride(0),
            BLOCKS=blocks,
            M=M,
            BLOCK=BLOCK,
            F=F,
            F_TILE=triton.next_power_of_2(max(F, 1)),
            DEPENDENT=dependent,
            num_warps=4,
            **launch_options(dependent),
        )
    return x_TM, None if angles is None else (cos_TF, sin_TF)
