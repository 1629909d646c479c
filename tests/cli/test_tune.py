"""`paceline tune` without a GPU; on one: tests/benchmark/test_tune.py."""

from __future__ import annotations

import pytest
import torch

from paceline.cli.app import main


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is something to tune")
def test_without_a_gpu_it_is_one_line(capsys):
    assert main(["tune", "smollm2-135m"]) == 2
    error = capsys.readouterr().err
    assert error == "error: nothing to tune: Triton's kernels do not run here (device is cpu)\n"
