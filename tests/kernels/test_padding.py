"""Padding left out and put back, against the plain twins: in Triton's interpreter on a CPU, else on the GPU."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch

from paceline.kernels.flash_attention import flash_attention, packed_attention
from paceline.kernels.padding import (
    count_places,
    count_places_ref,
    pack,
    pack_ref,
    plan_packing,
    plan_packing_ref,
    unpack,
    unpack_ref,
)

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []  # so that `make test-gpu` has them


def make_mask(B, S, device):
    """Of tokens on the left, on the right, anywhere; the third sequence has none."""
    generator = torch.Generator().manual_seed(B * S)
    lens = torch.randint(0, S + 1, (B, 1), generator=generator)
    mask = torch.arange(S) < lens
    mask[1::4] = mask[1::4].flip(1)
    mask[2::4] = False
    mask[3::4] = torch.rand(mask[3::4].shape, generator=generator) < 0.5
    return mask.to(device)


@pytest.mark.parametrize(("B", "S"), [(1, 1), (5, 7), (3, 4100), (3, 0), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
@pytest.mark.parametrize("spare", [-3, 0, 5])
def test_the_plan_is_its_twins(triton_device, B, S, dtype, spare):
    """Also with a bound that is too small, where tokens are dropped and nothing else is written."""
    wide = torch.ones(B, S + 3, dtype=dtype, device=triton_device)
    mask = wide[:, 1 : S + 1]
    mask[:] = make_mask(B, S, triton_device).to(dtype)
    bound = max(0, int((mask != 0).sum()) + spare)
    found, expected = plan_packing(mask, bound), plan_packing_ref(mask, bound)
    for ours, right in zip(astuple(found), astuple(expected), strict=True):
        assert torch.equal(ours, right)


@pytest.mark.parametrize(("B", "S"), [(1, 1), (5, 7), (3, 4100), (3, 0), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_the_tokens_are_counted(triton_device, B, S, dtype):
    """Of a mask inside a wider one; what is not 0 counts once."""
    wide = torch.ones(B, S + 3, dtype=dtype, device=triton_device)
    mask = wide[:, 1 : S + 1]
    mask[:] = make_mask(B, S, triton_device).to(dtype) * 2
    assert count_places(mask) == count_places_ref(mask)


@pytest.mark.parametrize("channels", [1, 40, 1500])
def test_rows_go_and_come_back(triton_device, channels):
    mask = make_mask(5, 9, triton_device)
    packing = plan_packing(mask, int(mask.sum()) + 3)
    wide = torch.randn(5, 11, channels + 4, device=triton_device)
    x = wide[:, 1:-1, 2:-2]
    packed = pack(x, packing)
    assert torch.equal(packed, pack_ref(x, packing))
    assert not packed[-3:].any()
    back = unpack(packed, packing)
    assert torch.equal(back, unpack_ref(packed, packing))
    assert torch.equal(back, x * mask[:, :, None])
    assert torch.equal(unpack(packed[:, ::1], packing), back)


def test_attention_without_padding_is_attention_with_it(triton_device):
    torch.manual_seed(0)
    mask = make_mask(5, 9, triton_device)
    packing = plan_packing(mask, 45)
    qkv = torch.randn(5, 9, 3 * 32, device=triton_device)
    packed = pack(qkv, packing).view(45, 3, 2, 16)
    found = unpack(packed_attention(*packed.unbind(1), packing.starts_B, scale=0.25).flatten(1), packing)
    padded = flash_attention(*qkv.view(5, 9, 3, 2, 16).unbind(2), scale=0.25, mask_BL=mask)
    torch.testing.assert_close(found, padded.flatten(2) * mask[:, :, None])


def test_nothing_gives_nothing(triton_device):
    packing = plan_packing(torch.zeros(2, 3, dtype=torch.bool, device=triton_device), 0)
    assert pack(torch.ones(2, 3, 4, device=triton_device), packing).shape == (0, 4)
    assert not unpack(torch.ones(0, 4, device=triton_device), packing).any()


@pytest.mark.gpu
def test_a_graph_holds_it():
    mask = make_mask(5, 9, "cuda")
    x = torch.randn(5, 9, 40, device="cuda")

    def run():
        packing = plan_packing(mask, 45)
        return unpack(pack(x, packing), packing)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    mask.copy_(make_mask(5, 9, "cuda").flip(1))
    graph.replay()
    assert torch.equal(y, x * mask[:, :, None])
