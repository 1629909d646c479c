from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.errors import CheckpointError
from paceline.loading.gguf import GGUFFile, read_gguf

METADATA = {
    "a.u8": (200, "UINT8"),
    "a.i8": (-100, "INT8"),
    "a.u16": (60000, "UINT16"),
    "a.i16": (-30000, "INT16"),
    "a.u32": (4_000_000_000, "UINT32"),
    "a.i32": (-2_000_000_000, "INT32"),
    "a.u64": (2**63 + 1, "UINT64"),
    "a.i64": (-(2**62), "INT64"),
    "a.f32": (0.5, "FLOAT32"),
    "a.f64": (1e-300, "FLOAT64"),
    "a.bool": (True, "BOOL"),
    "a.text": ("héllo \U0001f30a", "STRING"),
}


def write_small(path: Path) -> bytes:
    writer = gguf.GGUFWriter(path, "llama")
    for key, (value, kind) in METADATA.items():
        writer.add_key_value(key, value, gguf.GGUFValueType[kind])
    writer.add_array("a.strings", ["", "x", "日本"])
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.bools", [True, False])
    writer.add_tensor("one", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("two", np.arange(34, dtype=np.uint8).reshape(1, 34), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return path, write_small(path)


def test_reads_every_value_type_and_the_tensor_table(small: tuple[Path, bytes]) -> None:
    path, data = small
    file = read_gguf(path)
    assert file.version == 3
    for key, (value, _) in METADATA.items():
        assert file.metadata[key] == value
    assert file.metadata["a.bool"] is True
    assert file.metadata["a.strings"] == ["", "x", "日本"]
    assert file.metadata["a.ints"] == [1, -2, 3]
    assert file.metadata["a.bools"] == [True, False]
    one, two = file.tensors["one"], file.tensors["two"]
    assert (one.type.name, one.shape, one.nbytes) == ("F32", (2, 3), 24)
    assert (two.type.name, two.shape, two.nbytes) == ("Q8_0", (1, 32), 34)
    assert np.frombuffer(data, np.float32, 6, one.offset).tolist() == [0, 1, 2, 3, 4, 5]
    assert data[two.offset : two.offset + 34] == bytes(range(34))


def header(*parts: bytes, tensors: int = 0, pairs: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + b"".join(parts)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ARRAY_OF = struct.pack("<I", 9)
BAD: dict[str, tuple[bytes, str]] = {
    "not gguf": (b"PK\x03\x04" + bytes(60), "not a GGUF file"),
    "empty": (b"", "not a GGUF file"),
    "too new": (header(bytes(9), version=4), "version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "tensors beyond the file": (header(tensors=2**60), "table of tensors and keys needs"),
    "pairs beyond the file": (header(pairs=2**60), "table of tensors and keys needs"),
    "long key": (header(struct.pack("<Q", 2**63) + bytes(30), pairs=1), "truncated or corrupt"),
    "array beyond the file": (
        header(text(b"k") + ARRAY_OF + struct.pack("<IQ", 10, 2**61) + bytes(40), pairs=1),
        "'k' needs",
    ),
    "strings beyond the file": (
        header(text(b"k") + ARRAY_OF + struct.pack("<IQ", 8, 3) + struct.pack("<Q", 2**62) + bytes(40), pairs=1),
        "'k' needs",
    ),
    "last string beyond the file": (
        header(text(b"k") + ARRAY_OF + struct.pack("<IQ", 8, 1) + struct.pack("<Q", 99) + bytes(40), pairs=1),
        "'k' needs",
    ),
    "arrays in arrays without end": (
        header(text(b"k") + ARRAY_OF + struct.pack("<IQ", 9, 1) * 10 + bytes(40), pairs=1),
        "nests arrays",
    ),
    "unknown value type": (header(text(b"k") + struct.pack("<I", 13) + bytes(40), pairs=1), "unknown value type 13"),
    "key twice": (header((text(b"k") + struct.pack("<IB", 0, 1)) * 2, pairs=2), "twice"),
    "not UTF-8": (header(text(b"\xff\xfe") + bytes(40), pairs=1), "not UTF-8"),
    "odd alignment": (header(text(b"general.alignment") + struct.pack("<II", 4, 24), pairs=1), "power of two"),
    "no dimensions": (header(tensor(b"t", ()) + bytes(99), tensors=1), "0 dimensions"),
    "many dimensions": (header(tensor(b"t", (1,) * 9) + bytes(99), tensors=1), "9 dimensions"),
    "zero dimension": (header(tensor(b"t", (0,)) + bytes(99), tensors=1), "impossible shape"),
    "broken block": (header(tensor(b"t", (31,), kind=2) + bytes(99), tensors=1), "impossible shape"),
    "unknown tensor type": (header(tensor(b"t", (32,), kind=4) + bytes(99), tensors=1), "unknown type 4"),
    "huge tensor": (header(tensor(b"t", (2**40, 2**40)) + bytes(99), tensors=1), "tensor 't' needs"),
    "offset off the grid": (header(tensor(b"t", (1,), offset=4) + bytes(99), tensors=1), "not a multiple of 32"),
    "tensor twice": (header(tensor(b"t", (1,)) * 2 + bytes(99), tensors=2), "twice"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_a_bad_file_is_a_checkpoint_error_that_says_why(name: str, tmp_path: Path) -> None:
    data, message = BAD[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_directory_are_checkpoint_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_gguf(path)


def parse(path: Path, data: bytes) -> GGUFFile | None:
    path.write_bytes(data)
    try:
        return read_gguf(path)
    except CheckpointError:
        return None


@settings(max_examples=150, deadline=None)
@given(choice=st.data())
def test_every_truncation_is_refused(small: tuple[Path, bytes], choice: Any) -> None:
    path, data = small
    file = read_gguf(path)
    end = max(info.offset + info.nbytes for info in file.tensors.values())
    cut = choice.draw(st.integers(0, end - 1))
    assert parse(path.with_name("cut.gguf"), data[:cut]) is None


@settings(max_examples=300, deadline=None)
@given(choice=st.data())
def test_flipped_bytes_never_crash_nor_allocate_without_bound(small: tuple[Path, bytes], choice: Any) -> None:
    path, data = small
    changed = bytearray(data)
    for _ in range(choice.draw(st.integers(1, 6))):
        changed[choice.draw(st.integers(0, len(data) - 1))] = choice.draw(st.integers(0, 255))
    tracemalloc.start()
    file = parse(path.with_name("flipped.gguf"), bytes(changed))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * len(data)
    if file is not None:
        assert all(0 <= info.offset <= len(data) - info.nbytes for info in file.tensors.values())
