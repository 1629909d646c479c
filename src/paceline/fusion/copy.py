"""A model computed in another dtype, with a copy of its weights; the model's own stay as they are."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from paceline.fusion.graph import stamp


class CopiedWeights:
    """`model`: a copy of the given one, not optimised, whose floating-point weights are in `dtype`."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._dtype = dtype
        own = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        # Through the memo each weight is converted once, and shared weights stay shared.
        with torch.inference_mode(False):  # an inference tensor could not be copied to anew
            memo: dict[int, Any] = {key: _converted(tensor, dtype) for key, tensor in own.items()}
        self._pairs = [(tensor, memo[key]) for key, tensor in own.items()]
        optimised = vars(model).pop("forward")
        try:
            self.model = copy.deepcopy(model, memo)
        finally:
            vars(model)["forward"] = optimised
        self._stamps = [stamp(tensor) for tensor, _ in self._pairs]

    def refresh(self) -> None:
        """Copy anew what was written to since."""
        for index, (own, copied) in enumerate(self._pairs):
            now = stamp(own)
            if now != self._stamps[index]:
                with torch.no_grad():
                    copied.copy_(own)
                self._stamps[index] = now

    def converted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, floating-point tensors in the copy's dtype."""
        converted: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
            torch.Tensor, self._cast, (args, kwargs)
        )
        return converted

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor


def _converted(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    made = tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made
