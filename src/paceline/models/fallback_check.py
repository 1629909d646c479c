"""The check that every fallback model passes when it is loaded: a prompt in pieces, against transformers' own forward.

Two short prompts run together over a small paged cache, once whole and once in pieces, and their logits are compared
with those of transformers' own attention ("eager") over the whole prompts. A model that keeps a state other than keys
and values, that looks at its neighbours in the batch, or whose attention is not what it told is off by as much as the
logits themselves. It costs five forwards of a few tokens.

Legend: P prompts, T tokens of one of them, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from paceline.errors import UnsupportedModelError
from paceline.inputs import KVLayer, ModelInputs
from paceline.kernels.attention_plan import build_attention

if TYPE_CHECKING:
    from paceline.models.fallback import FallbackConfig, TransformersModel

PROMPTS, LENGTH = 2, 7
WHOLE = ((7, 7),)
PIECES = ((4, 2), (2, 4), (1, 1))  # tokens of each prompt in each step: unaligned chunks, then a decode
BLOCK_SIZE = 4
# The error allowed, as a share of the logits' norm. float32: rounding gives 1e-6 to 1e-5, so the worst row counts. Half
# precision: rounding gives 1e-2, and where it turns an expert's choice one row may be far off, so the median counts.
TOLERANCE_FLOAT32 = 1e-3
TOLERANCE_HALF = 0.1


def check_tokens(config: FallbackConfig, device: torch.device) -> torch.Tensor:
    """[P, T]: tokens from all over the vocabulary, none of which the configuration gives a meaning, as to padding."""
    values = {**config.hf.to_dict(), **config.text.to_dict()}
    named = [value for key, value in values.items() if key.endswith(("token_id", "token_index"))]
    special = {token for value in named for token in (value if isinstance(value, list) else [value])}
    plain = [token for token in range(config.vocab_size) if token not in special]
    count = PROMPTS * LENGTH
    chosen = [plain[(i * 5 + 2) % count * len(plain) // count] for i in range(count)]
    return torch.tensor(chosen, device=device).view(PROMPTS, LENGTH)


def eager_logits(hf: Any, tokens_PT: torch.Tensor) -> torch.Tensor:
    """[P, T, V] float32 of transformers' own forward and attention, all tokens at once, without a cache."""
    hf.set_attn_implementation("eager")
    logits_PTV: torch.Tensor = hf(input_ids=tokens_PT, use_cache=False).logits.float()
    return logits_PTV


def check_forward(model: TransformersModel, tokens_PT: torch.Tensor, expected_PTV: torch.Tensor) -> None:
    """Raises UnsupportedModelError, with the errors, where paged logits differ from `expected_PTV`."""
    single = model.dtype in (torch.float32, torch.float64)
    tolerance = TOLERANCE_FLOAT32 if single else TOLERANCE_HALF
    errors = []
    for steps in (WHOLE, PIECES):
        found_PTV = _paged_logits(model, tokens_PT, steps)
        errors_PT = (found_PTV - expected_PTV).norm(dim=-1) / expected_PTV.norm(dim=-1).clamp(min=1e-20)
        errors.append((errors_PT.max() if single else errors_PT.median()).item())
    if not max(errors) <= tolerance:  # NaN too
        raise UnsupportedModelError(
            f"its logits for {LENGTH} tokens are off by {errors[0]:.2g} of their norm over a paged cache, and by "
            f"{errors[1]:.2g} in pieces ({tolerance:g} is allowed): it keeps or reads more than keys and values"
        )


def _paged_logits(model: TransformersModel, tokens_PT: torch.Tensor, steps: Sequence[Sequence[int]]) -> torch.Tensor:
    """[P, T, V] float32, `steps[i][p]` tokens of prompt p in the i-th forward."""
    blocks = -(-LENGTH // BLOCK_SIZE)
    tables = [[1 + p * blocks + i for i in range(blocks)] for p in range(PROMPTS)]
    kv = _small_cache(model, 1 + PROMPTS * blocks)
    done = [0] * PROMPTS
    logits_PTV: list[list[torch.Tensor]] = [[] for _ in range(PROMPTS)]
    for counts in steps:
        ends = [start + count for start, count in zip(done, counts, strict=True)]
        tokens_T = torch.cat([tokens_PT[p, done[p] : ends[p]] for p in range(PROMPTS)])
        positions_T = torch.cat([torch.arange(done[p], ends[p]) for p in range(PROMPTS)]).to(tokens_T.device)
        attention = build_attention(
            [sum(counts[:p]) for p in range(PROMPTS + 1)],
            ends,
            [tables] * len(model.kv_groups),
            [group.window for group in model.kv_groups],
            block_size=BLOCK_SIZE,
            device=tokens_T.device,
        )
        logits_TV = model.logits(model(ModelInputs(tokens_T, positions_T, attention), kv))
        for rows, part in zip(logits_PTV, torch.split(logits_TV, list(counts)), strict=True):
            rows.append(part)
        done = ends
    return torch.stack([torch.cat(rows) for rows in logits_PTV])


def _small_cache(model: TransformersModel, num_blocks: int) -> list[KVLayer]:
    group_of = {layer: index for index, group in enumerate(model.kv_groups) for layer in group.layers}
    layers = []
    for layer, call in enumerate(model.calls):
        shape = (call.num_kv_heads, num_blocks * BLOCK_SIZE, call.head_dim)
        k_HSD, v_HSD = (torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in "kv")
        layers.append(KVLayer(k_HSD, v_HSD, group_of[layer]))
    return layers
