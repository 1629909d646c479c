"""Keys and values of a generation in buffers that are written once and never moved.

transformers' own cache concatenates each layer's keys at every step, and a beam search copies all of them once more to
follow its beams, those of the encoder's positions too. Here a step writes its position into buffers of the generation's
whole length; which row of them a beam reads at each position stands in a table (`sources`), so following beams is a
gather of that table's rows. Keys of the encoder's positions are the same for all beams of a sentence and stay.

A cache that is `fixed` can be read by a captured step: nothing of it moves, a step attends to the whole length of its
buffers, those of the encoder's positions too, and where it writes stands on the device. One that is not reads what is
written and no more.

Shapes: R rows (batch x beams), B sentences, H heads, P prompt, N positions read, L capacity, S positions of the
encoder, D head dim.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F

from paceline.fusion.generate.transformers_names import Cache, CacheLayerMixin, DynamicCache, EncoderDecoderCache

CAPACITY = 64  # buffers are as long as the next multiple of it, so that generations of like lengths share them, and
# with them a captured step
KEPT = 4  # caches that nobody uses and that are kept


def rounded(positions: int) -> int:
    return -(-positions // CAPACITY) * CAPACITY


class Positions:
    """What rows hold: `past` positions, and where each lies. `sources`: by row and position, a row of all buffers taken
    as [R * L, ...]; None where each row reads its own, as all do without beams."""

    def __init__(self, rows: int, capacity: int, device: torch.device, fixed: bool, beams: bool) -> None:
        self.rows, self.capacity, self.fixed = rows, capacity, fixed
        self.past = 0
        self.next_1 = torch.zeros(1, dtype=torch.int64, device=device)  # `past` on the device, of a fixed cache
        self.first_R1 = torch.arange(0, rows * capacity, capacity, device=device)[:, None]
        self.own_RL = self.first_R1 + torch.arange(capacity, device=device)
        self.sources_RL = self.own_RL.clone() if beams else None

    def begin(self, past: int) -> None:
        self.past = past
        self.next_1.fill_(past)
        if self.sources_RL is not None:
            self.sources_RL.copy_(self.own_RL)

    def advance(self) -> None:
        self.past += 1
        self.next_1.add_(1)

    def follow(self, parents_R: torch.Tensor) -> None:
        """Row r goes on from what row parents[r] has read so far; what it writes next is its own."""
        assert self.sources_RL is not None
        self.sources_RL.copy_(self.sources_RL.index_select(0, parents_R))
        self.sources_RL[:, self.past] = self.own_RL[:, self.past]

    def write(self, buffer_RLHD: torch.Tensor, new_RH1D: torch.Tensor) -> None:
        if self.fixed:
            buffer_RLHD.index_copy_(1, self.next_1, new_RH1D.transpose(1, 2))
        else:
            # A slice, since Dynamo captures anew for each number that is an index.
            buffer_RLHD[:, self.past : self.past + 1] = new_RH1D.transpose(1, 2)

    def read(self, buffer_RLHD: torch.Tensor, positions: int) -> torch.Tensor:
        """[R, H, N, D]: what the first positions of each row hold."""
        if self.sources_RL is None:
            return buffer_RLHD[:, :positions].transpose(1, 2)
        rows, capacity, heads, dim = buffer_RLHD.shape
        held = F.embedding(self.sources_RL[:, :positions], buffer_RLHD.view(rows * capacity, heads * dim))
        return held.view(rows, positions, heads, dim).transpose(1, 2)


class SelfAttentionLayer(CacheLayerMixin):  # type: ignore[misc]
    """A decoder layer's own positions, behind transformers' interface. `keys`, `values`: the buffers [R, L, H, D]."""

    is_sliding = False
    keys: Any  # a tensor once something is loaded
    values: Any

    def __init__(self, positions: Positions) -> None:
        super().__init__()
        self.positions = positions

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        """`load` makes the buffers."""

    def load(self, keys_BHPD: torch.Tensor, values_BHPD: torch.Tensor) -> None:
        """Takes the prompt's keys and values for all rows of each sentence."""
        self.keys = self._loaded(self.keys, keys_BHPD)
        self.values = self._loaded(self.values, values_BHPD)

    def _loaded(self, buffer: torch.Tensor | None, prompt_BHPD: torch.Tensor) -> torch.Tensor:
        positions = self.positions
        sentences, heads, prompt, dim = prompt_BHPD.shape
        shape = (positions.rows, positions.capacity, heads, dim)
        if buffer is None or buffer.shape != shape or buffer.dtype != prompt_BHPD.dtype:
            buffer = prompt_BHPD.new_empty(shape)
        if positions.fixed:
            buffer.zero_()  # a step reads, with weight 0, what no step has written: 0 * NaN were NaN
        per_sentence = buffer.view(sentences, -1, *shape[1:])
        per_sentence[:, :, :prompt] = prompt_BHPD.transpose(1, 2)[:, None]
        return buffer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        positions = self.positions
        end = positions.capacity if positions.fixed else positions.past + 1
        positions.write(self.keys, key_states)
        positions.write(self.values, value_states)
        return positions.read(self.keys, end), positions.read(self.values, end)

    def get_seq_length(self, *args: Any) -> int | torch.Tensor:
        return self.positions.next_1[0] if self.positions.fixed else self.positions.past

    def get_mask_sizes(self, new: int | torch.Tensor) -> tuple[int, int]:
        """(positions attended to, the first one's number); `new` is one position."""
        return (self.positions.capacity if self.positions.fixed else self.positions.past + 1), 0

    def get_max_length(self) -> int:
        return self.positions.capacity

    get_max_cache_shape = get_max_length  # its name before transformers 5


class CrossAttentionLayer(CacheLayerMixin):  # type: ignore[misc]
    """A decoder layer's keys and values of the encoder's positions, [B or R, H, S, D]: computed once."""

    is_sliding = False
    keys: Any  # a tensor once something is loaded
    values: Any

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        """`load` takes what there is."""

    def load(self, keys_BHSD: torch.Tensor, values_BHSD: torch.Tensor, times: int, length: int | None) -> None:
        """`times`: rows that each sentence gets. `length`: of buffers that are to stay where they are, the rest 0."""
        self.keys = self._loaded(self.keys, keys_BHSD, times, length)
        self.values = self._loaded(self.values, values_BHSD, times, length)

    def _loaded(
        self, held: torch.Tensor | None, new_BHSD: torch.Tensor, times: int, length: int | None
    ) -> torch.Tensor:
        if times > 1:
            new_BHSD = new_BHSD.repeat_interleave(times, dim=0)
        if length is None:
            return new_BHSD.contiguous()
        rows, heads, positions, dim = new_BHSD.shape
        shape = (rows, heads, length, dim)
        if held is None or held.shape != shape or held.dtype != new_BHSD.dtype:
            held = new_BHSD.new_empty(shape)
        held[:, :, :positions] = new_BHSD
        held[:, :, positions:] = 0
        return held

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("the encoder's positions are computed with the prompt")

    def get_seq_length(self, *args: Any) -> int:
        return int(self.keys.shape[2])

    def get_mask_sizes(self, new: int | torch.Tensor) -> tuple[int, int]:
        return self.get_seq_length(), 0

    def get_max_length(self) -> int:
        return self.get_seq_length()

    get_max_cache_shape = get_max_length


Kind = tuple[int, int, torch.device, bool, bool]  # what Positions are made of, in their order


class DecodeCache:
    """A generation's cache. `of_model`: as transformers' models take it, once something is loaded. `step`: what was
    captured over its buffers (step.py)."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.inference = torch.is_inference_mode_enabled()  # its tensors can be written to in that mode alone
        self.positions = Positions(*kind)
        self.own: list[SelfAttentionLayer] = []
        self.cross: list[CrossAttentionLayer] = []
        self.encoded = self.encoder_length = 0  # positions of the encoder, and of fixed buffers of them
        self.of_model: Any = None
        self.step: Any = None

    def load(self, prompt: Any, length: int, shared: bool, masked: bool) -> None:
        """Takes what a prompt of `length` tokens left in a cache of transformers, a row a sentence. `shared`: rows of a
        sentence share its keys of the encoder's positions. `masked`: the model can be told which of those count."""
        encoder_decoder = isinstance(prompt, EncoderDecoderCache)
        own = prompt.self_attention_cache if encoder_decoder else prompt
        cross = prompt.cross_attention_cache.layers if encoder_decoder else []
        if self.of_model is None:
            self.own = [SelfAttentionLayer(self.positions) for _ in own.layers]
            self.cross = [CrossAttentionLayer() for _ in cross]
        for layer, given in zip(self.own, own.layers, strict=True):
            layer.load(given.keys[:, :, :length], given.values[:, :, :length])
        self.encoded = cross[0].keys.shape[2] if cross else 0
        self.encoder_length = rounded(self.encoded) if masked else self.encoded
        for layer, given in zip(self.cross, cross, strict=True):
            times = 1 if shared else self.positions.rows // given.keys.shape[0]
            layer.load(given.keys, given.values, times, self.encoder_length if self.positions.fixed else None)
        self.positions.begin(length)
        if self.of_model is None:
            self.of_model = Cache(layers=self.own)
            if encoder_decoder:
                self.of_model = EncoderDecoderCache(self.of_model, Cache(layers=self.cross))

    def exported(self) -> Any:
        """The cache as transformers would have returned it: of its classes, whose `update` copies, and with a row of
        the encoder's positions for each beam."""
        positions, own, cross = self.positions, DynamicCache(), DynamicCache()
        for index, layer in enumerate(self.own):
            held = (positions.read(buffer, positions.past) for buffer in (layer.keys, layer.values))
            own.update(*held, index)
        for index, layer in enumerate(self.cross):
            times = positions.rows // layer.keys.shape[0]
            held = (each[:, :, : self.encoded].repeat_interleave(times, dim=0) for each in (layer.keys, layer.values))
            cross.update(*held, index)
        return EncoderDecoderCache(own, cross) if self.cross else own


class Pool:
    """Caches of one model that no generation uses. Taking and giving is safe from several threads: each has one of its
    own. `plain`: the model takes neither fixed buffers nor shared keys; `shared_before`: it has taken the latter."""

    def __init__(self) -> None:
        self.plain = self.shared_before = False
        self.free: list[DecodeCache] = []
        self.lock = threading.Lock()

    def take(self, rows: int, positions: int, device: torch.device, fixed: bool, beams: bool) -> DecodeCache:
        kind = (rows, rounded(positions), device, fixed, beams)
        with self.lock:
            for index, cache in enumerate(self.free):
                if cache.kind == kind and cache.inference == torch.is_inference_mode_enabled():
                    return self.free.pop(index)
        return DecodeCache(kind)

    def give(self, cache: DecodeCache) -> None:
        with self.lock:
            self.free = [cache, *self.free][:KEPT]
