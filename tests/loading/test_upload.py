from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from paceline.errors import CheckpointError
from paceline.loading.safetensors_checkpoint import SafetensorsCheckpoint
from paceline.loading.upload import read_into, upload_refusal


def test_a_span_is_where_the_values_lie(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([True]), "c": torch.arange(5, dtype=torch.bfloat16)}
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "model.safetensors")
    with SafetensorsCheckpoint(tmp_path) as checkpoint:
        for name, values in tensors.items():
            span = checkpoint.span(name)
            assert span is not None
            assert span.nbytes == values.nbytes
            found = torch.empty(span.nbytes, dtype=torch.uint8)
            with span.path.open("rb") as file:
                read_into(span.path, file.fileno(), span.offset, found)
            assert torch.equal(found.view(values.dtype).view(values.shape), values)


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    with path.open("rb") as file, pytest.raises(CheckpointError, match=rf"{path}: ended early at byte 5: .* download"):
        read_into(path, file.fileno(), 2, torch.empty(4, dtype=torch.uint8))
    closed = os.open(path, os.O_WRONLY)
    with pytest.raises(CheckpointError, match=rf"{path}: cannot be read \(Bad file"):
        read_into(path, closed, 0, torch.empty(4, dtype=torch.uint8))
    os.close(closed)


def test_only_a_cuda_device_is_uploaded_to() -> None:
    assert upload_refusal(torch.device("cpu")) == "device is cpu"
    if hasattr(os, "preadv"):
        assert upload_refusal(torch.device("cuda")) is None
