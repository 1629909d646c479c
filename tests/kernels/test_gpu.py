"""What launches are chosen by, told of GPUs that are not here."""

from __future__ import annotations

import pytest
import torch

from paceline.kernels import gpu as module
from paceline.kernels.gpu import GPU, gpu, triton_refusal, try_triton

CPU = torch.device("cpu")
HOPPER = GPU("NVIDIA H100", 132, (9, 0))
ADA = GPU("NVIDIA L4", 58, (8, 9))
AMPERE = GPU("NVIDIA A100", 108, (8, 0))
TURING = GPU("NVIDIA T4", 40, (7, 5))
AMD = GPU("AMD Instinct MI300X", 304)
BROKEN = GPU("NVIDIA H100", 132, (9, 0), triton="Triton is not installed")


def test_the_interpreter_has_no_dependent_launch_and_no_ptx():
    found = gpu(CPU)
    assert (found.name, found.dependent, found.ptx) == ("interpreter", False, False)


@pytest.mark.parametrize(
    ("found", "dependent", "ptx", "bf16", "fp8"),
    [
        (HOPPER, True, True, True, True),
        (ADA, False, True, True, True),
        (AMPERE, False, True, True, False),
        (TURING, False, True, False, False),
        (AMD, False, False, True, True),
    ],
)
def test_what_a_gpu_has(found, dependent, ptx, bf16, fp8):
    assert (found.dependent, found.ptx, found.bf16, found.fp8) == (dependent, ptx, bf16, fp8)


def test_an_older_gpu_runs_the_kernels_in_float16_and_says_why_not_in_bfloat16():
    assert TURING.refusal(torch.float16) is None
    assert TURING.refusal(torch.bfloat16) == "compute capability 7.5 has no bfloat16"


@pytest.mark.parametrize("found", [HOPPER, ADA, AMPERE, AMD], ids=lambda found: found.name)
def test_the_others_run_them_in_every_dtype(found):
    assert [found.refusal(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)] == [None] * 3


def test_where_triton_does_not_run_no_dtype_does():
    assert BROKEN.refusal(torch.float16) == BROKEN.refusal(torch.bfloat16) == "Triton is not installed"


def test_no_kernel_runs_on_a_cpu():
    assert triton_refusal(CPU, torch.float32) == "device is cpu"


def test_a_missing_triton_is_told(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert try_triton(CPU) == "Triton is not installed"


def test_what_triton_raises_is_the_reason_on_one_line(monkeypatch):
    import paceline.kernels.smallest_triton as smallest

    def run(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler.\n  Please specify via CC environment variable.")

    monkeypatch.setattr(smallest, "run_smallest", run)
    assert try_triton(CPU) == (
        "Triton does not run here: RuntimeError: Failed to find C compiler. Please specify via CC environment variable."
    )


def test_where_it_runs_there_is_nothing_to_tell():
    """In the interpreter here (tests/kernels/conftest.py)."""
    assert try_triton(CPU) is None


@pytest.mark.gpu
def test_on_this_gpu_it_runs():
    assert gpu(torch.device("cuda")).triton is None


@pytest.mark.parametrize("found", [ADA, AMPERE], ids=lambda found: found.name)
def test_fp8_is_multiplied_with_and_without_loads_of_it(found, monkeypatch):
    """What a GPU without them would run, here in the interpreter."""
    from paceline.formats.fp8 import pack
    from paceline.kernels import gemv as host

    if torch.cuda.is_available():
        pytest.skip("the interpreter takes the place of the GPUs that are told of")
    monkeypatch.setattr(host, "gpu", lambda device: found)
    asked: list[int] = []
    choose = host.choose_launch
    monkeypatch.setattr(
        host, "choose_launch", lambda product, *rest: asked.append(product.rows) or choose(product, *rest)
    )
    torch.manual_seed(0)
    weight, x_TK = pack(torch.randn(40, 96, dtype=torch.float16)), torch.randn(1, 96, dtype=torch.float16)
    planes = weight.planes
    assert planes is not None
    y_TN = host.gemv(x_TK, planes)
    assert asked == [1 if found.fp8 else 16]
    assert (y_TN - weight.matmul(x_TK)).norm() < 1e-3 * weight.matmul(x_TK).norm()
