"""Streamed weights against the same values in memory, and the stream's order, buffers and end."""

from __future__ import annotations

import pytest
import torch

from paceline.errors import CheckpointError, OutOfMemoryError
from paceline.formats import pack
from paceline.formats.stores import DiskStore, HostStore
from paceline.formats.streamed import (
    AHEAD,
    StreamedTable,
    WeightStream,
    stream_matrix,
    stream_table,
)

CPU = torch.device("cpu")
STORES = {"disk": DiskStore, "host": lambda directory: HostStore(1 << 20, pinned=False)}


@pytest.fixture(params=STORES)
def stream(request, tmp_path):
    made = WeightStream(STORES[request.param](tmp_path), 1000, CPU)
    yield made
    made.close()


def add(stream, values, dtype=torch.float32, format="dense"):
    return stream_matrix(stream, values.split(7), tuple(values.shape), dtype=dtype, format=format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ["dense", "int8", "fp8"])
def test_a_streamed_product_is_that_of_the_packed_weight(stream, dtype, format):
    values, x, bias = torch.randn(45, 32), torch.randn(3, 32).to(dtype), torch.randn(45).to(dtype)
    others = [add(stream, torch.randn(20, 16), dtype) for _ in range(3)]
    streamed = add(stream, values, dtype, format)
    whole = pack(values, format, dtype=dtype, device="cpu")
    assert len(streamed.slices) > 1
    for _ in range(2):
        for other in others:
            other.matmul(torch.randn(2, 16).to(dtype))
        tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
        assert torch.allclose(streamed.matmul(x, bias), whole.matmul(x, bias), rtol=tolerance, atol=tolerance)
        assert torch.equal(streamed.unpack(), whole.unpack())
    assert streamed.nbytes == whole.nbytes
    assert streamed.shape == whole.shape


def test_slices_come_in_any_order(stream):
    values = [torch.full((10, 20), float(i)) for i in range(9)]
    weights = [add(stream, value) for value in values]
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        i = int(torch.randint(9, (1,), generator=generator))
        assert torch.equal(weights[i].unpack(), values[i])


def test_two_slices_are_on_their_way_while_one_is_in_use(stream):
    for i in range(6):
        add(stream, torch.full((10, 20), float(i)))
    started = []
    start = stream._start
    stream._start = lambda index: (started.append(index), start(index))[1]
    for index in range(6):
        stream.fetch(index)
        assert [i for i, _, _ in stream._coming] == [(index + 1) % 6, (index + 2) % 6]
    assert started == [0, 1, 2, 3, 4, 5, 0, 1]  # each once: nothing was guessed wrong


def test_a_path_that_skips_slices_is_learnt(stream):
    """As a mixture of experts does, whose tokens mostly take the way of the token before."""
    for i in range(6):
        add(stream, torch.full((10, 20), float(i)))
    for _ in range(2):
        for index in (0, 2, 5):
            stream.fetch(index)
    stream.fetch(0)
    assert [i for i, _, _ in stream._coming] == [2, 5]


def test_the_stream_holds_its_buffers_and_no_more(stream):
    add(stream, torch.randn(300, 20))
    assert stream.buffer_bytes == sum(slot.buffer.nbytes for slot in stream._slots) == (1 + AHEAD) * 1000
    assert all(slot.staging is slot.buffer for slot in stream._slots)


@pytest.mark.parametrize("format", ["dense", "int8", "fp8"])
def test_a_table_is_read_by_rows_and_shared_with_the_head(stream, format):
    values = torch.randn(50, 16)
    table = StreamedTable(stream.store, stream.store.append(values), (50, 16), torch.float32, CPU)
    assert torch.equal(table.rows(torch.tensor([3, 49, 0, 3])), values[[3, 49, 0, 3]])
    before = stream.store.nbytes
    head = stream_table(stream, table, format=format)
    assert torch.equal(head.unpack(), pack(values, format, dtype=torch.float32, device="cpu").unpack())
    assert stream.store.nbytes - before == (0 if format == "dense" else 50 * 16)


def test_a_row_wider_than_a_slice_is_refused(stream):
    with pytest.raises(OutOfMemoryError, match="does not fit the 1000 bytes"):
        add(stream, torch.randn(3, 300))


def test_a_file_that_was_cut_is_named(tmp_path):
    stream = WeightStream(DiskStore(tmp_path), 1000, CPU)
    weight = add(stream, torch.randn(30, 20))
    stream.store._file.truncate(100)
    with pytest.raises(CheckpointError, match="ended early"):
        weight.unpack()
    stream.close()


def test_the_file_leaves_nothing_behind(tmp_path):
    stream = WeightStream(DiskStore(tmp_path), 1000, CPU)
    add(stream, torch.randn(30, 20))
    assert list(tmp_path.iterdir()) == []  # it never had a name
    assert stream.measure() > 0
    stream.close()
