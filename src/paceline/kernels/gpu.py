"""What a launch of a Triton kernel depends on, besides its shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec

import torch


@dataclass(frozen=True)
class GPU:
    """`capability`: NVIDIA's compute capability; None for AMD. `triton`: why Triton does not run there; None where it
    does."""

    name: str
    processors: int  # multiprocessors
    capability: tuple[int, int] | None = None
    triton: str | None = None

    @property
    def dependent(self) -> bool:
        """Has programmatic dependent launch."""
        return self.capability is not None and self.capability >= (9, 0)

    @property
    def ptx(self) -> bool:
        """Takes PTX between Triton's operations."""
        return self.capability is not None

    @property
    def bf16(self) -> bool:
        """Computes in bfloat16. NVIDIA's since Ampere; AMD's that torch still runs on all do."""
        return self.capability is None or self.capability >= (8, 0)

    @property
    def fp8(self) -> bool:
        """Triton loads float8_e4m3fn there: since Ada, and on AMD."""
        return self.capability is None or self.capability >= (8, 9)

    @property
    def narrow_products(self) -> bool:
        """Triton has its matrix unit multiply by 8 columns: NVIDIA's since Ampere."""
        return self.capability is not None and self.capability >= (8, 0)

    def refusal(self, dtype: torch.dtype) -> str | None:
        """Why none of our kernels runs there in `dtype`; None where they do."""
        if self.triton is not None:
            return self.triton
        if dtype == torch.bfloat16 and not self.bf16:
            assert self.capability is not None
            return "compute capability {}.{} has no bfloat16".format(*self.capability)
        return None


# In place of a GPU for the interpreter: 8 processors, so that small tests split their work too.
INTERPRETER = GPU("interpreter", 8)


@cache
def gpu(device: torch.device) -> GPU:
    """INTERPRETER for a device that is none. Triton is imported and tried: 0.5 s, the first time."""
    found = untried_gpu(device)
    return found if device.type != "cuda" else replace(found, triton=try_triton(device))


@cache
def untried_gpu(device: torch.device) -> GPU:
    """The same by what the driver tells: as if Triton ran."""
    if device.type != "cuda":
        return INTERPRETER
    found = torch.cuda.get_device_properties(device)
    capability = (found.major, found.minor) if torch.version.hip is None else None
    return GPU(found.name, found.multi_processor_count, capability)


def launch_options(dependent: bool) -> dict[str, bool]:
    """What Triton must be told of a launch that may start while its predecessor runs; of others it knows no such
    option everywhere."""
    return {"launch_pdl": True} if dependent else {}


def as_bytes(flags: torch.Tensor | None) -> torch.Tensor | None:
    """Booleans as Triton loads them."""
    return flags.view(torch.uint8) if flags is not None and flags.dtype == torch.bool else flags


def triton_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel runs there in `dtype`; None when one can."""
    return f"device is {device.type}" if device.type != "cuda" else gpu(device).refusal(dtype)


def try_triton(device: torch.device) -> str | None:
    """Why Triton does not run on `device`, found by running its smallest kernel: a missing C compiler, a driver too old
    or a GPU that it does not know each raise something else. None where it runs."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    try:
        from paceline.kernels.smallest_triton import run_smallest

        run_smallest(device)
    except Exception as error:  # whatever a compiler or a driver raises
        return f"Triton does not run here: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None
