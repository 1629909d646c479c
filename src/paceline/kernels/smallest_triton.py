"""The smallest kernel, to see whether Triton runs. This module imports Triton: import it where Triton is."""

# Triton kernels have no annotations: mypy checks what is around them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def smallest(out_ptr):
    tl.store(out_ptr, 1)


def run_smallest(device: torch.device) -> torch.Tensor:
    """A 1 that the kernel has written, int32. Raises whatever Triton raises where it cannot run."""
    out = torch.zeros(1, dtype=torch.int32, device=device)
    smallest[(1,)](out)
    return out
