"""Attention of transformers' modules through our paged kernel, by transformers' attention interface.

transformers calls an attention function by its registered name, with one layer's module, queries, keys and values.
Two names are registered: PROBE writes down what each call of a forward asks for, once, at load; PAGED computes it over
the paged cache. The step's metadata hangs on the modules of its own model (`Port`) and not on the forward's keyword
arguments, since not every model hands those down to its attention.

Legend: T tokens of the step, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from paceline.errors import UnsupportedModelError
from paceline.inputs import AttentionMetadata, KVLayer
from paceline.kernels.attention import paged_attention
from paceline.kernels.kv_write import write_kv

PAGED = "paceline"
PROBE = "paceline_probe"
PORT = "paceline_port"  # the attribute under which a module finds its model's Port

# Arguments of an attention call that change nothing here: there is no dropout, no padding and no cache of theirs,
# positions were applied before the call, and the window is read from the mask, as transformers' own "eager" does.
INERT = frozenset(
    {
        *("dropout", "sliding_window", "position_ids", "cache_position", "position_embeddings", "use_cache"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "past_key_values"),
        *("layer_idx", "deterministic", "use_top_left_mask", "target_dtype", "implementation"),
    }
)

# The probe's masks hold one number: this plus the window, 0 for none (`describe_mask`). No mask that a model makes or
# changes itself is all of one such number, so that one is told from ours; and float32 keeps it exact.
MARK = 0.5
FULL, UNKNOWN = 0, -1
LONGEST_CONTEXT = 1 << 20  # how far masks are compared; no model's context is longer


@dataclass(frozen=True)
class AttentionCall:
    """What one attention call of a forward asks for; the n-th call is cache layer n. `window`: see config.KVGroup.
    `head_dim`: the larger of the keys' and the values' head sizes; the cache holds both padded to it."""

    module: nn.Module
    num_kv_heads: int
    head_dim: int
    window: int | None


@dataclass
class Step:
    """One forward over the paged cache, `done` of its attention calls computed."""

    attention: AttentionMetadata
    kv: Sequence[KVLayer]
    calls: Sequence[AttentionCall]
    done: int = 0


@dataclass
class Probing:
    """One forward that only writes down its attention calls."""

    calls: list[AttentionCall] = field(default_factory=list)


class Port:
    """Where the modules of one model find the forward that they are part of; None between forwards."""

    def __init__(self, model: nn.Module) -> None:
        self.current: Step | Probing | None = None
        for module in model.modules():
            setattr(module, PORT, self)


def register() -> None:
    """Make both names known to transformers. Only PROBE has masks: for PAGED transformers then builds none, and its
    [T, T] values would cost more than the attention itself."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PROBE, probe_attention)
    AttentionInterface.register(PAGED, attention)
    AttentionMaskInterface.register(PROBE, describe_mask)


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface over the paged cache: [1, H, T, D] and twice [1, K, T, D] -> [1, T, H, D]."""
    step = _current(module, Step)
    call = step.calls[step.done] if step.done < len(step.calls) else None
    if call is None or call.module is not module:
        raise UnsupportedModelError(f"{_name(module)} attends in another order than when the model was loaded")
    _refuse_others(module, attention_mask, others)
    kv = step.kv[step.done]
    step.done += 1
    key_dim, value_dim, dtype = query.shape[-1], value.shape[-1], query.dtype
    # One head size and the cache's dtype: zeros add nothing to q.k, and the values' are cut off again.
    q_THD, k_TKD, v_TKD = (
        F.pad(x[0].transpose(0, 1), (0, call.head_dim - x.shape[-1])).to(kv.k_HSD.dtype) for x in (query, key, value)
    )
    write_kv(k_TKD, v_TKD, kv, step.attention.groups[kv.group].slot_mapping_T)
    scale = key_dim**-0.5 if scaling is None else float(scaling)
    out_THD = paged_attention(q_THD.contiguous(), kv, step.attention, scale=scale, soft_cap=softcap)
    return out_THD[None, :, :, :value_dim].to(dtype).contiguous(), None


def probe_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The same interface: note the call, refuse what paged attention does not compute, and answer with zeros."""
    probing = _current(module, Probing)
    window = _read_mark(module, attention_mask)
    _refuse_others(module, None, others)
    if not getattr(module, "is_causal", True):
        raise UnsupportedModelError(f"{_name(module)} is not causal")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2] or key.shape[:3] != value.shape[:3]:
        raise UnsupportedModelError(f"{_name(module)} attends to other tokens than the text's own")
    head_dim = max(key.shape[-1], value.shape[-1])
    probing.calls.append(AttentionCall(module, key.shape[1], head_dim, window))
    return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None


def describe_mask(
    mask_function: Callable[..., torch.Tensor],
    batch_size: int,
    kv_length: int,
    config: Any,
    q_length: int | None = None,
    cache_position: torch.Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> torch.Tensor:
    """transformers' mask interface: [batch, 1, queries, keys], all of them MARK plus the window that was asked for."""
    queries = q_length if cache_position is None else cache_position.shape[0]
    longest = getattr(config, "max_position_embeddings", None) or LONGEST_CONTEXT
    window = read_window(mask_function, local_size, min(longest, LONGEST_CONTEXT))
    return torch.full((batch_size, 1, queries or kv_length, kv_length), window + MARK, device=device)


def read_window(mask_function: Callable[..., torch.Tensor], window: int | None, longest: int) -> int:
    """The window of a mask that transformers gives as a function of (batch, head, query, key): a number of tokens, FULL
    for none, UNKNOWN for a mask that is neither causal nor a sliding window, such as one in chunks.

    Compared over every key of the first queries, of those around the window's length and of the last: a window that is
    longer than the probe's prompt is seen too.
    """
    around = () if window is None else (window - 1, window, window + 1, 2 * window + 1)
    queries = torch.tensor(sorted({q for q in (0, 1, 2, 7, *around, longest - 1) if 0 <= q < longest}))[:, None]
    keys = torch.arange(longest)[None, :]
    zero = torch.zeros((), dtype=torch.int64)
    try:
        visible = mask_function(zero, zero, queries, keys).expand(queries.shape[0], longest)
    except (IndexError, RuntimeError, TypeError):  # it looks at the probe's own tokens
        return UNKNOWN
    causal = keys <= queries
    if torch.equal(visible, causal):
        return FULL
    if window is not None and torch.equal(visible, causal & (keys > queries - window)):
        return window
    return UNKNOWN


def _read_mark(module: nn.Module, mask: torch.Tensor | None) -> int | None:
    """The window that a probe's mask stands for."""
    if mask is None:
        raise UnsupportedModelError(f"{_name(module)} attends without a causal mask")
    mark = mask.flatten()[0].item() - MARK
    if mask.dtype != torch.float32 or not mark.is_integer() or mark < UNKNOWN or bool((mask != mark + MARK).any()):
        raise UnsupportedModelError(f"{_name(module)} adds a mask or a bias of its own to the attention scores")
    if mark == UNKNOWN:
        raise UnsupportedModelError(f"{_name(module)} has a mask that is neither causal nor a sliding window")
    return None if mark == FULL else int(mark)


def _refuse_others(module: nn.Module, mask: torch.Tensor | None, others: dict[str, Any]) -> None:
    for name, value in others.items():
        if name == "is_causal" and value is False:
            raise UnsupportedModelError(f"{_name(module)} is not causal")
        if name not in INERT and name != "is_causal" and value is not None:
            raise UnsupportedModelError(
                f"{_name(module)} gives its attention '{name}', which paceline does not compute"
            )
    if mask is not None:
        raise UnsupportedModelError(f"{_name(module)} adds a mask or a bias of its own to the attention scores")


def _current(module: nn.Module, kind: type[Any]) -> Any:
    port = getattr(module, PORT, None)
    current = None if port is None else port.current
    if not isinstance(current, kind):
        raise UnsupportedModelError(f"{_name(module)} attends outside of a forward of the model")
    return current


def _name(module: nn.Module) -> str:
    layer = getattr(module, "layer_idx", None)
    return type(module).__name__ + ("" if layer is None else f" of layer {layer}")
