"""Attention of a sentence's beams over the sentence's keys, without a copy of them a beam.

Shapes: R rows (batch x beams), B sentences, G beams of one, H heads, S positions of the encoder, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class SharedKeys(TorchFunctionMode):
    """While it is on, scaled_dot_product_attention takes keys with fewer rows than queries."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].shape[0] != args[1].shape[0]:
            return attention_of_shared_keys(*args, **kwargs)
        return func(*args, **kwargs)


def attention_of_shared_keys(
    q_RH1D: torch.Tensor,
    k_BHSD: torch.Tensor,
    v_BHSD: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """[R, H, 1, D]: the rows of a sentence are queries of one attention. The mask may have a row for all, or R, of
    which those of a sentence are alike."""
    rows, heads, _, dim = q_RH1D.shape
    sentences = k_BHSD.shape[0]
    q_BHGD = q_RH1D.reshape(sentences, rows // sentences, heads, dim).transpose(1, 2)
    if attn_mask is not None and attn_mask.shape[0] == rows:
        attn_mask = attn_mask[:: rows // sentences]
    out_BHGD = F.scaled_dot_product_attention(q_BHGD, k_BHSD, v_BHSD, attn_mask=attn_mask, **kwargs)
    return out_BHGD.transpose(1, 2).reshape(rows, heads, 1, out_BHGD.shape[3])
