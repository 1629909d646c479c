"""`paceline tune` without a GPU, and on one."""

from __future__ import annotations

import pytest
import torch

from paceline.cli.app import main


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is something to tune")
def test_without_a_gpu_it_is_one_line(capsys):
    assert main(["tune", "smollm2-135m"]) == 2
    error = capsys.readouterr().err
    assert error == "error: nothing to tune: Triton's kernels do not run here (device is cpu)\n"


@pytest.mark.gpu
def test_on_a_gpu_a_table_is_written_that_is_then_used(tmp_path, monkeypatch, capsys):
    from paceline.kernels.gemv_launch import Product, load_table, read_table

    path = tmp_path / "table.json"
    assert main(["tune", "smollm2-135m", "--quantize", "int8", "--out", str(path)]) == 0
    name, table = read_table(path)
    assert name == torch.cuda.get_device_name()
    assert Product("int8", (960, 576), 1) in table
    assert "int8 960 x 576" in capsys.readouterr().out
    monkeypatch.setenv("PACELINE_TUNED", str(path))
    load_table.cache_clear()
    assert load_table(name)[Product("int8", (960, 576), 1)] == table[Product("int8", (960, 576), 1)]
    load_table.cache_clear()
