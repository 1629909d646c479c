"""Pickled weights: read where they are tensors alone, refused by name where they are anything else, and never run."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from paceline.errors import CheckpointError, UnsupportedModelError
from paceline.loading.bin_checkpoint import INDEX, SINGLE, read_state_dict
from paceline.loading.checkpoint import open_checkpoint
from paceline.loading.resolve import resolve

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.arange(4, dtype=torch.bfloat16),
    "c": torch.tensor(2.5, dtype=torch.float16),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in expected
    )


@pytest.mark.parametrize("file", [SINGLE, "model.pt", "weights.pth"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_reads_what_torch_saved(directory: Path, file: str, zipped: bool) -> None:
    torch.save(OrderedDict(TENSORS), directory / file, _use_new_zipfile_serialization=zipped)
    torch.save({"steps": 3}, directory / "optimizer.pt")  # training state beside it is no model
    checkpoint = open_checkpoint(resolve(str(directory)))
    assert checkpoint.nbytes == 24 + 8 + 2
    assert (checkpoint.shape("a"), checkpoint.dtype("b")) == ((2, 3), torch.bfloat16)
    read = {name: checkpoint.read(name) for name in checkpoint.names()}
    with pytest.raises(CheckpointError, match="tensor 'd' is missing"):
        checkpoint.read("d")
    checkpoint.close()
    assert same(read, TENSORS)
    assert (checkpoint.config, checkpoint.generation_config) == ({"model_type": "llama"}, {})


def test_a_whole_model_from_bin_equals_safetensors(directory: Path, tiny_model: Callable[..., Any]) -> None:
    from paceline.models.load import load_decoder
    from paceline.models.registry import read_decoder_config

    model = tiny_model("qwen2", tie_word_embeddings=True)
    model.save_pretrained(directory / "safe")
    (directory / "bin").mkdir()
    (directory / "bin" / "config.json").write_text((directory / "safe" / "config.json").read_text())
    state = model.state_dict()  # lm_head.weight is the embedding once more, of one storage
    names = sorted(state)
    weight_map = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(names)}
    for shard in sorted(set(weight_map.values())):
        torch.save({name: state[name] for name in names if weight_map[name] == shard}, directory / "bin" / shard)
    (directory / "bin" / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    decoders = []
    for kind in ("safe", "bin"):
        with open_checkpoint(resolve(str(directory / kind))) as checkpoint:
            config = read_decoder_config(checkpoint.config)
            decoders.append(load_decoder(checkpoint, config, dtype=torch.float32, quantize="int8"))
    safe, pickled = (decoder.state_dict() for decoder in decoders)
    assert safe.keys() == pickled.keys()
    assert all(torch.equal(safe[name], pickled[name]) for name in safe)
    hidden_TD = torch.randn(3, 64)
    assert torch.equal(decoders[0].logits(hidden_TD), decoders[1].logits(hidden_TD))


def test_two_names_of_one_storage_parameters_and_views(directory: Path) -> None:
    table = torch.arange(12.0).view(3, 4)
    saved = {"a": torch.nn.Parameter(table), "b": table, "t": table.T}
    torch.save(saved, directory / SINGLE)
    with open_checkpoint(resolve(str(directory))) as checkpoint:
        read = {name: checkpoint.read(name) for name in checkpoint.names()}
    assert same(read, {"a": table, "b": table, "t": table.T})
    assert not any(tensor.requires_grad for tensor in read.values())


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def save_zip(value: Any, file: Path) -> None:
    torch.save(value, file)


def save_legacy(value: Any, file: Path) -> None:
    torch.save(value, file, _use_new_zipfile_serialization=False)


def save_plain(value: Any, file: Path) -> None:
    file.write_bytes(pickle.dumps(value, protocol=2))


def save_plain_new(value: Any, file: Path) -> None:
    file.write_bytes(pickle.dumps(value, protocol=4))


@pytest.mark.parametrize("save", [save_zip, save_legacy, save_plain, save_plain_new])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(directory: Path, save: Callable[..., None]) -> None:
    marker = directory / "it-ran"
    save({"a": TENSORS["a"].tolist(), "evil": Malicious(marker)}, directory / SINGLE)
    with pytest.raises(UnsupportedModelError) as refused:
        open_checkpoint(resolve(str(directory)))
    message = str(refused.value)
    assert not marker.exists()
    assert "pytorch_model.bin: refused" in message
    assert "\n" not in message
    assert "convert it where its code can do no harm" in message
    assert save is save_plain_new or "it asks for 'posix.system'" in message


def test_a_pickled_module_is_refused_by_its_class(directory: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), directory / SINGLE)
    with pytest.raises(UnsupportedModelError, match=r"asks for 'torch\.nn\.modules\.linear\.Linear'"):
        open_checkpoint(resolve(str(directory)))


def test_the_command_that_converts_does(directory: Path) -> None:
    """Two names of one storage and a transposed view, which safetensors alone would refuse."""
    table = torch.arange(12.0).view(3, 4)
    torch.save({"a": table, "b": table, "t": table.T}, directory / SINGLE)
    code = directory / "code.bin"
    torch.save({"a": torch.nn.ReLU()}, code)
    with pytest.raises(UnsupportedModelError) as refused:
        read_state_dict(code)
    command = str(refused.value).split('python -c "')[1].removesuffix('"').replace("code.bin", SINGLE)
    subprocess.run([sys.executable, "-c", command], cwd=directory, check=True)
    with open_checkpoint(resolve(str(directory))) as checkpoint:
        assert same(
            {name: checkpoint.read(name) for name in checkpoint.names()}, {"a": table, "b": table, "t": table.T}
        )


@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_a_truncated_file_is_named(directory: Path, save: Callable[..., None]) -> None:
    file = directory / SINGLE
    save(TENSORS, file)
    data = file.read_bytes()
    within_a_name = data.find(b"OrderedDict") + 8
    for cut in (0, 1, 10, 40, within_a_name, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:cut])
        with pytest.raises((CheckpointError, UnsupportedModelError), match=r"pytorch_model\.bin: .*corrupt") as caught:
            read_state_dict(file)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([TENSORS["a"]], "holds a list, expected the model's state_dict"),
        ({"epoch": 3}, "its entry 'epoch' is a int, expected tensors by name"),
        ({"state_dict": dict(TENSORS)}, "its entry 'state_dict' is a dict"),
        ({3: TENSORS["a"]}, "its entry 3 is a Tensor"),
        ({"a": torch.eye(3).to_sparse()}, "tensor 'a' is sparse or quantised"),
    ],
)
def test_what_is_no_state_dict(directory: Path, value: Any, said: str) -> None:
    torch.save(value, directory / SINGLE)
    with pytest.raises(UnsupportedModelError, match=said):
        open_checkpoint(resolve(str(directory)))


def test_an_index_that_does_not_fit_its_shards(directory: Path) -> None:
    torch.save({"a": TENSORS["a"]}, directory / "one.bin")
    for weight_map, message in (
        ({"a": "one.bin", "b": "one.bin"}, f"tensor 'b' is missing, though {INDEX} lists it here"),
        ({"a": "one.bin", "b": "two.bin"}, "1 of 2 shards are missing, the first is two.bin"),
        ({"a": "../one.bin"}, "not a file of the directory"),
    ):
        (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(resolve(str(directory)))


def test_several_files_and_no_index(directory: Path) -> None:
    for name in ("one.pt", "two.pt"):
        torch.save(TENSORS, directory / name)
    with pytest.raises(CheckpointError, match=r"2 files of pickled weights \(one\.pt, two\.pt\).* leave the one"):
        open_checkpoint(resolve(str(directory)))


def test_safetensors_are_preferred_and_that_is_said(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({"a": TENSORS["a"]}, directory / "model.safetensors")
    (directory / SINGLE).write_bytes(b"never looked at")
    with caplog.at_level(logging.INFO), open_checkpoint(resolve(str(directory))) as checkpoint:
        assert list(checkpoint.names()) == ["a"]
    assert "reading the safetensors files; pytorch_model.bin beside them is not used" in caplog.text


def test_weights_packed_by_another_library_are_refused(directory: Path) -> None:
    (directory / "config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}')
    torch.save(TENSORS, directory / SINGLE)
    with pytest.raises(UnsupportedModelError, match="quantised \\(bitsandbytes\\)"):
        open_checkpoint(resolve(str(directory)))


def test_reading_holds_nothing_but_the_mapped_file(directory: Path) -> None:
    """16 tensors of 16 MB, all kept: they are views of the file, the process's own memory stays."""
    torch.save({f"t{i}": torch.zeros(4 << 20) for i in range(16)}, directory / SINGLE)
    code = """
import sys
from paceline.loading.checkpoint import open_checkpoint
from paceline.loading.resolve import resolve
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
before = anonymous()
with open_checkpoint(resolve(sys.argv[1])) as checkpoint:
    tensors = [checkpoint.read(name) for name in checkpoint.names()]
    assert not any(tensor.any() for tensor in tensors)
print(anonymous() - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    done = subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40 * 1024
