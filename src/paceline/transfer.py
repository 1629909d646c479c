"""Values on their way to the device."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch


def send(values: npt.NDArray[Any], device: torch.device | str) -> torch.Tensor:
    """The values on `device`. The host goes on at once: through pinned memory CUDA copies by itself, where from any
    other torch waits for all that the device has been given to do. On a CPU the tensor shares the array's memory."""
    host = torch.from_numpy(values)
    if torch.device(device).type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
