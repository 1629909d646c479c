"""int4: rounding, the word layout, and products against the values that the packed weight stands for."""

from __future__ import annotations

import pytest
import torch

from paceline import formats
from paceline.formats import chunks, int4
from paceline.formats.int4 import GROUP_SIZES, MAX_PACKED_ROWS, Int4CPUWeight, Int4Weight, pack, quantize
from paceline.kernels.linear_int4 import int4_refusal

CPU = torch.device("cpu")
SHAPES = [(64, 576), (128, 1024), (33, 70), (1, 300), (64, 33)]  # torch's op takes only those of 64 or 128 rows
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODES = [(size, symmetric) for size in GROUP_SIZES for symmetric in (False, True)]


@pytest.fixture
def words(monkeypatch):
    """As on a device without torch's CPU op."""
    monkeypatch.setattr(int4, "int4_refusal", lambda rows, device: "not here")


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("group_size", "symmetric"), MODES)
def test_every_value_is_rounded_to_its_nearest_level(shape, group_size, symmetric):
    values = torch.randn(shape)
    found = pack(values, group_size=group_size, symmetric=symmetric).unpack()
    _, scale_offset_NG2 = quantize(values, group_size, symmetric=symmetric)
    scale, offset = scale_offset_NG2.float()[:, torch.arange(shape[1]) // group_size].unbind(2)
    levels = scale[..., None] * torch.arange(-8, 8) + offset[..., None]
    nearest = (levels - values[..., None]).abs().amin(-1)
    torch.testing.assert_close((found - values).abs(), nearest, rtol=0, atol=1e-5)
    # The levels span the group, up to what rounding scale and offset to bfloat16 moves them; symmetric ones end one
    # level early on the side that is not the largest.
    reach = (0.5 + 16 * 2**-8 + (0.5 if symmetric else 0)) * scale.abs() + 2**-8 * offset.abs()
    assert (nearest <= reach).all()


@pytest.mark.parametrize(
    ("group_size", "symmetric", "expected"),
    [(32, False, 0.0785), (64, False, 0.0897), (128, False, 0.1000), (32, True, 0.0861), (128, True, 0.1037)],
)
def test_the_error_on_a_normal_distribution(group_size, symmetric, expected):
    values = torch.randn(512, 1024, generator=torch.Generator().manual_seed(1))
    found = error(pack(values, group_size=group_size, symmetric=symmetric).unpack(), values)
    assert found == pytest.approx(expected, rel=0.01)


def test_padding_widens_no_group():
    values = torch.rand(64, 40) + 1
    _, scale_offset_NG2 = quantize(values, 32)
    last = values[:, 32:]
    assert torch.equal(scale_offset_NG2[:, 1, 0], ((last.amax(1) - last.amin(1)) / 15).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_layouts_hold_the_same_numbers(monkeypatch, shape, dtype):
    values = torch.randn(shape).to(dtype)
    first = pack(values)
    assert isinstance(first, Int4CPUWeight) == (int4_refusal(shape[0], CPU) is None)
    monkeypatch.setattr(int4, "int4_refusal", lambda rows, device: "not here")
    second = pack(values)
    assert isinstance(second, Int4Weight)
    assert torch.equal(first.unpack(), second.unpack())
    assert first.unpack().dtype == dtype
    assert first.nbytes == second.nbytes == int4.stored_bytes(*shape, dtype)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_a_word_holds_pairs_of_neighbours_of_four_groups(group_size):
    q = torch.randint(0, 16, (3, 8 * group_size), dtype=torch.uint8)
    words = int4.pack_words(q, group_size)
    assert words.shape == (3, group_size)
    tile, thread, place = 1, 3, 2
    word = int(words[2, tile * group_size // 2 + 4 * thread + place]) & 0xFFFFFFFF
    for i in range(4):
        column = tile * 4 * group_size + i * group_size + 2 * (4 * place + thread)
        assert word >> 4 * i & 15 == q[2, column]
        assert word >> 4 * (i + 4) & 15 == q[2, column + 1]
    assert torch.equal(int4.unpack_words(words, group_size), q)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [0, 1, 3, MAX_PACKED_ROWS, MAX_PACKED_ROWS + 1])
def test_products_are_those_of_the_unpacked_weight(shape, rows, dtype):
    """In float64; the packed op computes in bfloat16 whatever the dtype."""
    x, bias = torch.randn(rows, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    weight = formats.pack(torch.randn(shape), "int4", dtype=dtype, device="cpu")
    exact = x.double() @ weight.unpack().double().T + bias.double()
    found = weight.matmul(x, bias)
    assert found.dtype == dtype
    assert found.shape == exact.shape
    if rows:
        assert error(found, exact) < 2**-7


@pytest.mark.parametrize("rows", [1, MAX_PACKED_ROWS + 1])
def test_symmetric_and_chosen_groups_multiply_too(rows):
    values, x = torch.randn(64, 192), torch.randn(rows, 192)
    for group_size, symmetric in MODES:
        weight = pack(values, group_size=group_size, symmetric=symmetric)
        assert error(weight.matmul(x), x.double() @ weight.unpack().double().T) < 2**-7


def test_symmetric_offsets_are_0(words):
    symmetric = pack(torch.randn(8, 512), symmetric=True)
    assert not symmetric.scale_offset_NG2[..., 1].any()
    again = pack(symmetric.unpack(), symmetric=True)
    assert torch.equal(symmetric.unpack(), again.unpack())  # what is on the grid stays on it


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, 3.0, -0.02])
def test_constant_groups_stay_constant(value, symmetric):
    values = torch.full((64, 128), value)
    found = pack(values, symmetric=symmetric).unpack()
    torch.testing.assert_close(found, values, rtol=2**-8, atol=0)


def test_an_offset_halves_the_error_of_one_sided_groups():
    values = torch.rand(64, 256) + 1
    assert error(pack(values).unpack(), values) < 0.5 * error(pack(values, symmetric=True).unpack(), values)


def test_many_chunks_are_as_one(monkeypatch):
    values = torch.randn(200, 256)
    whole = pack(values)
    monkeypatch.setattr(chunks, "CHUNK_VALUES", 64 * 256)
    parts = pack(values)
    assert torch.equal(parts.unpack(), whole.unpack())


def test_the_group_is_the_one_that_takes_the_fewest_bytes():
    """128 columns a group where tiles of 512 fit; 576 columns are 4.5 tiles of 128, but 5 tiles of groups of 32."""
    assert {k: int4.group_size_for(k) for k in (4096, 14336, 11008, 576, 1536)} == {
        4096: 128,
        14336: 128,
        11008: 128,
        576: 32,
        1536: 128,
    }
    assert int4.stored_bytes(10, 4096, torch.bfloat16) == 10 * (4096 // 2 + 32 * 4)
    assert int4.stored_bytes(10, 576, torch.bfloat16) == 10 * (640 // 2 + 20 * 4)


def test_what_does_not_gain_is_int8():
    assert formats.matrix_format("int4", 64, 576) == "int4"
    assert formats.matrix_format("int4", 64, 70) == "int8"
    assert "row of 70 values takes 80 bytes" in str(formats.refusal("int4", 64, 70))
    assert formats.matrix_format("fp8", 64, 70) == "fp8"
    assert formats.head_format("int4") == "int8"
    assert formats.head_format("fp8") == "fp8"


def test_the_output_head_counts_as_int8():
    sizes = formats.stored_bytes("int4", torch.bfloat16)
    assert sizes.head(1000, 512) == 1000 * (512 + 4)
    assert sizes.layers(1000, 512) == 1000 * (256 + 16)
    assert sizes.layers(1000, 70) == 1000 * (70 + 4)
