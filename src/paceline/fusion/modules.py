"""What fusion asks of a model's modules, which it never changes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sized
from typing import Any

import torch
from torch import nn


def own_forward(model: nn.Module) -> Callable[..., Any]:
    """The forward that the model's class gives it, whatever was set on the instance."""
    bound: Callable[..., Any] = inspect.getattr_static(type(model), "forward").__get__(model, type(model))
    return bound


def unsupported(model: nn.Module, *, converted: bool) -> str | None:
    """Why nothing of a model may be captured. `converted`: a copy of it in another dtype would be."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return "a part of it is a torch.jit module, which cannot be looked into"
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if any(device.type == "meta" for device in devices):
        return "it has weights on the meta device"
    if len(devices) > 1:
        return f"its weights are on several devices ({', '.join(sorted(map(str, devices)))})"
    if converted and "forward" in vars(model) and getattr(vars(model)["forward"], "replaced", None) is not None:
        return "its forward was set on the instance, which a copy in another dtype cannot have"
    return None


def hooks(model: nn.Module) -> list[dict[Any, Any]]:
    """Where the model's modules keep their forward hooks."""
    return [one for module in model.modules() for one in (module._forward_hooks, module._forward_pre_hooks)]


def module_state(model: nn.Module) -> list[tuple[Any, int]]:
    """All that the modules hold beside the contents of tensors, with the sizes of what has one."""
    held: list[Any] = []
    for module in model.modules():
        held += [*vars(module).values(), *module._parameters.values(), *module._buffers.values()]
    return [(value, len(value) if _is_counted(value) else 0) for value in held]


def changed_state(before: list[tuple[Any, int]], after: list[tuple[Any, int]]) -> bool:
    if len(before) != len(after):
        return True
    return any(a is not b or x != y for (a, x), (b, y) in zip(before, after, strict=True))


def _is_counted(value: Any) -> bool:
    return isinstance(value, Sized) and not isinstance(value, (torch.Tensor, nn.Module))
