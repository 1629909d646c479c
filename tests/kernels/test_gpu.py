"""What launches are chosen by, where there is no GPU."""

from __future__ import annotations

import torch

from paceline.kernels import gpu as module
from paceline.kernels.gpu import gpu, triton_refusal


def test_the_interpreter_has_no_dependent_launch_and_no_ptx():
    found = gpu(torch.device("cpu"))
    assert (found.name, found.dependent, found.ptx) == ("interpreter", False, False)


def test_refusals_say_why(monkeypatch):
    assert triton_refusal(torch.device("cpu")) == "device is cpu"
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert triton_refusal(torch.device("cuda")) == "triton is not installed"
