from __future__ import annotations

import pytest
import torch

from paceline.engine import device as module
from paceline.engine.device import auto_dtype, available_bytes, pick_device, pick_dtype
from paceline.errors import UsageError
from paceline.host import total_memory
from paceline.kernels.gpu import GPU

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("name", "message"), [("gpu", "unknown device 'gpu'"), ("mps", "not supported")])
def test_an_unknown_device_is_refused(name, message):
    with pytest.raises(UsageError, match=message):
        pick_device(name)


def test_a_device_that_is_not_there_is_named():
    count = torch.cuda.device_count()
    with pytest.raises(UsageError, match=f"'cuda:{count}' is not there"):
        pick_device(f"cuda:{count}")


def test_auto_is_cuda_where_there_is_one():
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_auto_keeps_what_is_stored_on_cpu(stored):
    assert pick_dtype("auto", stored, CPU) == stored


def test_float16_runs_as_float32_on_cpu_and_says_so(caplog):
    with caplog.at_level("INFO", "paceline"):
        assert pick_dtype("auto", torch.float16, CPU) == torch.float32
    assert "float16" in caplog.text


@pytest.mark.parametrize(
    ("stored", "with_bf16", "without"),
    [
        (torch.float32, torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.bfloat16, torch.float16),
        (torch.float16, torch.float16, torch.float16),
    ],
)
def test_auto_on_cuda_takes_float16_where_the_gpu_has_no_bfloat16(stored, with_bf16, without):
    assert auto_dtype(stored, "cuda", bf16=True) == with_bf16
    assert auto_dtype(stored, "cuda", bf16=False) == without


def test_a_bfloat16_model_on_such_a_gpu_is_told(caplog, monkeypatch):
    monkeypatch.setattr(module, "untried_gpu", lambda device: GPU("NVIDIA T4", 40, (7, 5)))
    assert pick_dtype("auto", torch.bfloat16, CUDA) == torch.float16
    assert caplog.messages == [
        "the checkpoint is bfloat16; running in float16, since NVIDIA T4 has no bfloat16; values above 65,504 overflow"
    ]


def test_an_asked_dtype_is_taken_by_any_of_its_names():
    assert pick_dtype("bf16", torch.float32, CPU) == pick_dtype(torch.bfloat16, torch.float32, CUDA) == torch.bfloat16
    with pytest.raises(UsageError, match="did you mean 'float32'"):
        pick_dtype("float23", torch.float32, CPU)


def test_available_on_cpu_is_the_hosts():
    assert 0 < available_bytes(CPU) <= total_memory()
