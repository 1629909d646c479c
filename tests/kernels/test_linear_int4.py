from __future__ import annotations

import pytest
import torch

from paceline.kernels import linear_int4
from paceline.kernels.linear_int4 import int4_refusal, pack_plane, plane_block, unpack_plane

CPU = torch.device("cpu")


@pytest.fixture
def block():
    block = plane_block()
    if block is None:
        pytest.skip("this torch has no int4 op whose layout is known")
    return block


def test_the_layouts_of_x86_are_known():
    blocks = {"AVX512": 64, "AVX2": 32}
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in blocks:
        pytest.skip(f"{capability} has another layout")
    assert plane_block() == blocks[capability]


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("columns", [32, 96, 640])
def test_torchs_plane_gives_its_values_back(block, blocks, columns):
    q = torch.randint(0, 16, (blocks * block, columns), dtype=torch.uint8)
    plane = pack_plane(q)
    assert plane.nbytes == q.numel() // 2
    assert torch.equal(unpack_plane(plane, block), q)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_op_multiplies_by_level_less_8_times_scale_plus_offset(block, group_size):
    columns = 2 * group_size
    q = torch.randint(0, 16, (block, columns), dtype=torch.uint8)
    scale_offset = torch.rand(2, block, 2).add(0.5).bfloat16()
    x = torch.eye(columns)
    found = linear_int4.linear_int4(x, pack_plane(q), scale_offset, group_size)
    expected = torch.empty(columns, block)
    for k in range(columns):
        scale, offset = scale_offset[k // group_size].float().unbind(1)
        expected[k] = (q[:, k].float() - 8) * scale + offset
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-5)


def test_what_the_op_does_not_take_is_said(block, monkeypatch):
    assert int4_refusal(block, CPU) is None
    assert "multiple of" in str(int4_refusal(block + 1, CPU))
    assert "multiple of" in str(int4_refusal(0, CPU))
    assert int4_refusal(block, torch.device("cuda")) == "device is cuda"
    monkeypatch.setattr(linear_int4, "BLOCKS", (8,))
    plane_block.cache_clear()
    assert "layout" in str(int4_refusal(block, CPU))
    monkeypatch.undo()
    plane_block.cache_clear()
    assert plane_block() == block
