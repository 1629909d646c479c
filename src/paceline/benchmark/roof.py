"""The least time that a batch of requests can take on a device: what it must read, and what it must compute.

Each step reads all weights; a generated token reads its context's keys and values; a token multiplies with each weight
once, at two operations. A phase (prompts, then decodes) cannot be quicker than its bytes at the device's bandwidth nor
than its operations at the device's rate. Attention's own operations and activations are left out, and so is what a
mixture of experts reads beyond one stream's: the bound is below what any engine can do, never above.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from paceline import sizing
from paceline.benchmark.mbu import mean_context_bytes
from paceline.benchmark.throughput import Work
from paceline.formats import stored_bytes
from paceline.models.registry import read_decoder_config

PROBE_SIZE = {"cpu": 1024, "cuda": 8192}  # rows and columns of the matrices that are multiplied
_PASSES = 5


@dataclass(frozen=True)
class Costs:
    """Of a model: bytes of all weights, as stored, and of the keys and values of a context; weights as numbers."""

    config: Mapping[str, Any]
    dtype: torch.dtype
    step_weight_bytes: int

    @property
    def values(self) -> int:
        dense = stored_bytes("dense", self.dtype)
        size = self.dtype.itemsize
        return sizing.step_weight_bytes(read_decoder_config(self.config), size, dense) // size

    def context_bytes(self, first_context: int, num_steps: int) -> int:
        """Read by `num_steps` decodes of one request, of which the first attends to `first_context` tokens."""
        if num_steps == 0:
            return 0
        groups = read_decoder_config(self.config).kv_groups
        return num_steps * mean_context_bytes(groups, first_context, num_steps, self.dtype.itemsize)


def work_of(costs: Costs, lengths: Sequence[tuple[int, int]], *, shared: int, streams: int, step_tokens: int) -> Work:
    """Of requests with (prompt, answer) tokens, `shared` tokens of whose prompts need not be computed; at most
    `streams` decode at once, and a step holds `step_tokens` tokens. The first token of each comes with its prompt."""
    prompt_tokens = sum(prompt for prompt, _ in lengths) - shared
    decoded = [(prompt, answer - 1) for prompt, answer in lengths]
    tokens = sum(steps for _, steps in decoded)
    # No fewer steps than the longest answer has, nor than give each step its fill.
    steps = max(max((steps for _, steps in decoded), default=0), -(-tokens // streams))
    contexts: dict[tuple[int, int], int] = {}
    kv_bytes = 0
    for one in decoded:
        if one not in contexts:
            contexts[one] = costs.context_bytes(one[0] + 1, one[1])
        kv_bytes += contexts[one]
    return Work(
        prompt_bytes=-(-prompt_tokens // step_tokens) * costs.step_weight_bytes,
        prompt_operations=2 * costs.values * prompt_tokens,
        decode_bytes=steps * costs.step_weight_bytes + kv_bytes,
        decode_operations=2 * costs.values * tokens,
    )


def read_operations(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product, the best of a few."""
    size = PROBE_SIZE.get(device.type, PROBE_SIZE["cpu"])
    a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    best = float("inf")
    for _ in range(_PASSES + 1):  # the first loads the kernel
        wait()
        start = time.perf_counter()
        a @ b
        wait()
        best = min(best, time.perf_counter() - start)
    return float(2 * size**3 / best)
