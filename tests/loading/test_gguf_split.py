from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.errors import CheckpointError, ModelNotFoundError
from paceline.loading.checkpoint import open_checkpoint
from paceline.loading.gguf import read_gguf
from paceline.loading.gguf_checkpoint import GGUFCheckpoint
from paceline.loading.gguf_split import first_part, parts_of, read_model
from paceline.loading.resolve import resolve


@pytest.fixture
def parts(tiny_model: Callable[..., Any], write_gguf: Callable[..., Path]) -> list[Path]:
    """A model of 30 tensors in three files."""
    first = write_gguf(tiny_model("llama"), "llama", split=10)
    found = sorted(first.parent.glob("*.gguf"))
    assert [path.name for path in found] == [f"llama-F32-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    return found


def test_any_part_and_the_directory_are_the_whole_model(
    parts: list[Path], tiny_model: Callable[..., Any], hub_tensors: Callable[..., dict[str, torch.Tensor]]
) -> None:
    state = hub_tensors(tiny_model("llama"))
    for name in (*parts, parts[0].parent):
        source = resolve(str(name))
        assert (source.kind, source.path) == ("gguf", parts[0])
    for part in parts:
        with GGUFCheckpoint(part) as checkpoint:
            assert checkpoint.nbytes == sum(tensor.nbytes for tensor in state.values())
            assert set(checkpoint.names()) == set(state)
            assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in state.items())
            assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_part_is_named(parts: list[Path], missing: int) -> None:
    parts[missing].unlink()
    left = parts[missing - 1]
    for attempt in (read_model, lambda path: resolve(str(path)), lambda path: resolve(str(path.parent))):
        with pytest.raises(
            CheckpointError, match=rf"{parts[missing].name}: this part .*{missing + 1} of 3\) is missing"
        ):
            attempt(left)


def test_two_models_in_a_directory_must_be_told_apart(parts: list[Path]) -> None:
    shutil.copy(parts[0], parts[0].with_name("other.gguf"))
    with pytest.raises(ModelNotFoundError, match=r"holds 2 GGUF models: name one of them, such as .*00001-of-00003"):
        resolve(str(parts[0].parent))


def test_parts_that_do_not_belong_together_are_refused(parts: list[Path], tmp_path: Path) -> None:
    third = parts[2].read_bytes()
    shutil.copy(parts[1], parts[2])
    with pytest.raises(CheckpointError, match=r"its name says part 3 of 3, its header 2 of 3: rename it back"):
        read_model(parts[0])
    # As a file of another split says it: the same number, other tensors.
    parts[2].write_bytes(third.replace(b"blk.2.", b"blk.0."))
    with pytest.raises(CheckpointError, match=r"is also in llama-F32-00001-of-00003\.gguf"):
        read_model(parts[0])


def test_the_count_of_tensors_is_checked(parts: list[Path]) -> None:
    count = len(read_model(parts[0]).tensors)
    key = b"split.tensors.count"
    raw = parts[0].read_bytes()
    at = raw.index(key) + len(key) + 4
    assert int.from_bytes(raw[at : at + 2], "little") == count
    parts[0].write_bytes(raw[:at] + (count + 1).to_bytes(2, "little") + raw[at + 2 :])
    with pytest.raises(CheckpointError, match=rf"the parts hold {count} tensors, not the {count + 1}"):
        read_model(parts[0])


def test_a_renamed_part_is_told_its_name(parts: list[Path]) -> None:
    renamed = parts[0].with_name("model.gguf")
    shutil.copy(parts[0], renamed)
    with pytest.raises(CheckpointError, match=r"part 1 of 3 of a split GGUF model, renamed: .*model-00001-of-00003"):
        open_checkpoint(resolve(str(renamed)))
    assert "split.count" in read_gguf(renamed).metadata


def test_names(tmp_path: Path) -> None:
    one, odd, fourth = (tmp_path / name for name in ("a.gguf", "a-00001-of-3.gguf", "a-00004-of-00003.gguf"))
    assert [parts_of(path) for path in (one, odd, fourth)] == [[one], [odd], [fourth]]
    two = [tmp_path / f"a-b-0000{number}-of-00002.gguf" for number in (1, 2)]
    assert parts_of(two[1]) == two
    with pytest.raises(CheckpointError, match=r"a-b-00001-of-00002\.gguf: this part"):
        first_part(two[1])
