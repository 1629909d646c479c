"""A decoding step in which nothing moves, so that a CUDA graph can hold it: the token, its position, masks, keys and
values lie in buffers, and a step attends to the whole length of its cache, masked past its position.

Shapes: R rows, S positions of the encoder, L capacity, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from paceline.fusion.generate.cache import DecodeCache
from paceline.fusion.generate.transformers_names import can_be_fixed
from paceline.fusion.graph import stamp

WARM_UP = 3  # runs before a capture: kernels are compiled and chosen in them


def captures(model: Any) -> bool:
    """Whether steps of the model are captured."""
    return model.device.type == "cuda" and can_be_fixed(model)


class FixedStep:
    """The step of one model over one cache. `inputs`: the forward's, but for those that a step sets."""

    def __init__(self, model: Any, cache: DecodeCache, inputs: Mapping[str, Any], names: Mapping[str, str]) -> None:
        positions = cache.positions
        self.model, self.cache, self.names = model, cache, names
        self.inputs = {name: _without_values(value, cache) for name, value in inputs.items()}
        self.tokens_R1 = positions.own_RL.new_zeros(positions.rows, 1)
        self.columns_L = torch.arange(positions.capacity, device=self.tokens_R1.device)
        self.shown_RL = torch.ones(positions.rows, positions.capacity, dtype=torch.bool, device=self.tokens_R1.device)
        self.encoder_shown_RS = self.shown_RL.new_ones(positions.rows, cache.encoder_length) if cache.cross else None
        self.position_ids_R1: torch.Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits_RV: torch.Tensor | None = None

    @staticmethod
    def key(model: Any, cache: DecodeCache, position_ids: object) -> Hashable:
        """What a captured step depends on besides the cache's kind."""
        weights = tuple((tensor.dtype, stamp(tensor)) for tensor in (*model.parameters(), *model.buffers()))
        layers: list[Any] = [*cache.own, *cache.cross]
        buffers = tuple((layer.keys.data_ptr(), layer.values.data_ptr(), layer.keys.shape) for layer in layers)
        return weights, buffers, position_ids is None

    def begin(
        self,
        mask_RP: torch.Tensor | None,
        encoder_mask_RS: torch.Tensor | None,
        position_ids_R1: torch.Tensor | None,
    ) -> None:
        """A new generation: masks of its prompt and of the encoder's positions, and the prompt's last position ids."""
        self.shown_RL.fill_(True)
        if mask_RP is not None:
            self.shown_RL[:, : mask_RP.shape[1]] = mask_RP.bool()
        if self.encoder_shown_RS is not None:
            encoded = self.cache.encoded
            self.encoder_shown_RS[:, :encoded] = True if encoder_mask_RS is None else encoder_mask_RS.bool()
            self.encoder_shown_RS[:, encoded:] = False
        self.position_ids_R1 = _kept(self.position_ids_R1, position_ids_R1)

    def __call__(self, tokens_R: torch.Tensor) -> torch.Tensor:
        """Logits of the token after `tokens`, float32 [R, V]."""
        self.tokens_R1.copy_(tokens_R[:, None])
        if self.position_ids_R1 is not None:
            self.position_ids_R1.add_(1)
        if tokens_R.device.type != "cuda":
            return self._forward()
        if self.graph is None:
            self._capture()
        assert self.graph is not None
        assert self.logits_RV is not None
        self.graph.replay()
        return self.logits_RV.clone()

    def _forward(self) -> torch.Tensor:
        shown_RL = self.shown_RL & (self.columns_L <= self.cache.positions.next_1)
        arguments = {
            **self.inputs,
            self.names["tokens"]: self.tokens_R1,
            self.names["mask"]: shown_RL[:, None, None, :],
            "past_key_values": self.cache.of_model,
        }
        if self.encoder_shown_RS is not None:
            arguments["attention_mask"] = self.encoder_shown_RS[:, None, None, :]
        if self.position_ids_R1 is not None:
            arguments["position_ids"] = self.position_ids_R1
        outputs = self.model(**arguments, use_cache=True, return_dict=True)
        return outputs.logits[:, -1].float()  # type: ignore[no-any-return]

    def _capture(self) -> None:
        """Runs before the capture write what the capture's own run writes: keys of the same token at its place."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may generate at the same time: their calls are none of this capture's.
        capturing: AbstractContextManager[None] = torch.cuda.graph(graph, capture_error_mode="thread_local")
        with capturing:
            self.logits_RV = self._forward()
        self.graph = graph


def _kept(held: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor | None:
    """The values of `new`, where a graph has learnt to find them."""
    if held is None or new is None:
        return None if new is None else new.clone()
    return held.copy_(new)


def _without_values(value: Any, cache: DecodeCache) -> Any:
    """An encoder's outputs tell a step no more than their shape: their keys and values are in the cache."""
    hidden = getattr(value, "last_hidden_state", None)
    if hidden is None:
        return value
    rows, _, size = hidden.shape
    return type(value)(last_hidden_state=hidden.new_zeros(()).expand(rows, cache.encoder_length, size))
