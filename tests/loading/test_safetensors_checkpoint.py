from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from paceline.errors import CheckpointError, PacelineError, UnsupportedModelError
from paceline.loading.checkpoint import open_checkpoint
from paceline.loading.resolve import resolve
from paceline.loading.safetensors_checkpoint import INDEX, SINGLE, read_header

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.arange(4, dtype=torch.bfloat16),
    "c": torch.tensor(2.5, dtype=torch.float16),
}


def write_directory(path: Path, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    save_file(TENSORS, path / SINGLE)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard_size", ["10KB", "5GB"])
def test_reads_what_transformers_saved(
    dtype: torch.dtype, shard_size: str, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_model("qwen2", tie_word_embeddings=True).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / INDEX).exists() == (shard_size == "10KB")
    state = model.state_dict()
    with open_checkpoint(resolve(str(tmp_path))) as checkpoint:
        assert set(state) - set(checkpoint.names()) == {"lm_head.weight"}  # tied, so it is stored once
        for name in checkpoint.names():
            assert torch.equal(checkpoint.read(name), state[name])
            assert (checkpoint.shape(name), checkpoint.dtype(name)) == (tuple(state[name].shape), dtype)
        assert checkpoint.nbytes == sum(state[name].nbytes for name in checkpoint.names())
        assert checkpoint.config["hidden_size"] == 64
        assert checkpoint.generation_config.keys() >= {"transformers_version"}


def test_scalars_mixed_dtypes_and_tensors_outliving_close(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(resolve(str(write_directory(tmp_path / "m"))))
    read = {name: checkpoint.read(name) for name in checkpoint.names()}
    checkpoint.close()
    assert checkpoint.generation_config == {}
    for name, tensor in TENSORS.items():
        assert torch.equal(read[name], tensor)
        assert read[name].dtype == tensor.dtype
    with pytest.raises(CheckpointError, match="tensor 'd' is missing"):
        checkpoint.read("d")


def test_every_truncation_is_named_with_both_sizes(tmp_path: Path) -> None:
    file = write_directory(tmp_path / "m") / SINGLE
    data = file.read_bytes()
    for cut in range(len(data)):
        file.write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match="download it again") as caught:
            read_header(file)
        assert str(cut) in str(caught.value)
        assert str(file) in str(caught.value)
    file.write_bytes(data + b"x")
    with pytest.raises(CheckpointError, match=f"longer .* {len(data) + 1} bytes, expected {len(data)}"):
        read_header(file)


def test_offsets_that_do_not_fit_the_shape(tmp_path: Path) -> None:
    header = json.dumps({"t": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    file = tmp_path / SINGLE
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=r"'t' of shape \[3\] and dtype F32 needs 12 bytes, its header gives 8"):
        read_header(file)


@settings(max_examples=200, deadline=None)
@given(choice=st.data())
def test_flipped_header_bytes_raise_nothing_but_our_errors(
    tmp_path_factory: pytest.TempPathFactory, choice: Any
) -> None:
    file = tmp_path_factory.mktemp("flip") / SINGLE
    save_file(TENSORS, file)
    data = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(choice.draw(st.integers(1, 4))):
        data[choice.draw(st.integers(0, header - 1))] = choice.draw(st.integers(0, 255))
    file.write_bytes(data)
    with contextlib.suppress(PacelineError):
        assert all(entry.nbytes <= len(data) for entry in read_header(file).values())


def sharded(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    save_file({"a": TENSORS["a"]}, path / "one.safetensors")
    save_file({"b": TENSORS["b"]}, path / "two.safetensors")
    write_index(path, {"a": "one.safetensors", "b": "two.safetensors"})
    return path


def write_index(path: Path, weight_map: Any) -> None:
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_that_does_not_fit_its_shards(tmp_path: Path) -> None:
    path = sharded(tmp_path / "m")
    assert set(open_checkpoint(resolve(str(path))).names()) == {"a", "b"}
    for weight_map, message in (
        ({"a": "one.safetensors", "c": "two.safetensors"}, "tensor 'c' is missing, though"),
        ({"a": "one.safetensors", "b": "three.safetensors"}, "1 of 2 shards are missing, the first is three"),
        ({"a": "../m/one.safetensors"}, "not a file of the directory"),
        ({"a": 3}, "not a file of the directory"),
        ([], "no 'weight_map'"),
    ):
        write_index(path, weight_map)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(resolve(str(path)))
    (path / INDEX).unlink()
    with pytest.raises(CheckpointError, match="2 safetensors files but no"):
        open_checkpoint(resolve(str(path)))


def test_directories_that_are_no_checkpoint(tmp_path: Path) -> None:
    source = resolve(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        open_checkpoint(source)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="holds a list"):
        open_checkpoint(source)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        open_checkpoint(source)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no weights \(expected model\.safetensors"):
        open_checkpoint(source)
    write_directory(tmp_path, quantization_config={"quant_method": "gptq"})
    with pytest.raises(UnsupportedModelError, match="quantised \\(gptq\\)"):
        open_checkpoint(source)


def test_reading_holds_nothing_but_the_mapped_file(tmp_path: Path) -> None:
    """16 tensors of 16 MB, read one by one, all kept: they are views of the file, the process's own memory stays."""
    (tmp_path / "config.json").write_text("{}")
    save_file({f"t{i}": torch.zeros(4 << 20) for i in range(16)}, tmp_path / SINGLE)
    code = """
import sys
from paceline.loading.checkpoint import open_checkpoint
from paceline.loading.resolve import resolve
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
with open_checkpoint(resolve(sys.argv[1])) as checkpoint:
    before = anonymous()
    tensors = [checkpoint.read(name) for name in checkpoint.names()]
    assert not any(tensor.any() for tensor in tensors)
print(anonymous() - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40 * 1024
