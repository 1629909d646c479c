"""Model bandwidth utilisation (MBU): the bytes a generation had to read, over what the device could have read.

Bytes a step = every weight once + the keys and values of every token attended to. Activations, the sampler and
re-reads are left out on purpose: they are not work the model needs, so they count as time lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paceline.config import KVGroup
from paceline.sizing import context_bytes


@dataclass(frozen=True)
class DecodeFigures:
    """Speed of one stream's decode, the first token (prefill) left out. Bytes, seconds, tokens a second."""

    num_tokens: int
    seconds: float
    bytes_moved: int
    bandwidth: float  # bytes a second that the device reads, from bandwidth.read_bandwidth

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def bytes_per_second(self) -> float:
        return self.bytes_moved / self.seconds

    @property
    def mbu(self) -> float:
        """1.0 means every byte arrived as fast as the probe read."""
        return self.bytes_per_second / self.bandwidth


def decode_bytes(
    *, weight_bytes: int, kv_bytes_per_token: int, num_steps: int, first_context: int, num_tokens: int
) -> int:
    """Bytes that decoding one stream must read.

    `weight_bytes`: read once a step (an embedding table that is only indexed does not count).
    `kv_bytes_per_token`: keys and values of one token, all layers.
    `num_steps`: forward passes; fewer than `num_tokens` when drafts were accepted.
    `first_context`: tokens that the first of these steps attends to, its own included.
    """
    last_context = first_context + max(num_tokens - 1, 0)
    mean_context = (first_context + last_context) / 2
    return num_steps * weight_bytes + round(num_steps * mean_context * kv_bytes_per_token)


def mean_context_bytes(groups: Sequence[KVGroup], first_context: int, num_steps: int, bytes_per_value: int) -> int:
    """Bytes of keys and values that a step of one stream reads, on average over `num_steps` steps of which the first
    attends to `first_context` tokens; of a windowed layer, its window's."""
    contexts = range(first_context, first_context + num_steps)
    return round(sum(context_bytes(groups, context, bytes_per_value) for context in contexts) / num_steps)
