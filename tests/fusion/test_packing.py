"""Which tokens of a padded batch are packed together, and that they come back to their places."""

from __future__ import annotations

import pytest
import torch

from paceline.fusion.packing import count_tokens, pack, packing, unpack

MASKS = {
    "right": [[1, 1, 1], [1, 0, 0]],
    "left": [[0, 1, 1], [0, 0, 1]],
    "inside": [[1, 0, 1], [1, 1, 0]],
    "no token": [[0, 0, 0], [0, 0, 0]],
}


@pytest.mark.parametrize("name", MASKS)
def test_tokens_come_back_to_their_places_and_padding_is_zero(name: str) -> None:
    mask = torch.tensor(MASKS[name])
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    packed = packing(mask, x, count_tokens(mask))
    assert not packed.full
    assert torch.equal(pack(x, packed), x[mask.bool()])
    assert torch.equal(unpack(pack(x, packed), packed), x * mask[..., None])


def test_without_padding_nothing_is_moved() -> None:
    mask, x = torch.ones(2, 3, dtype=torch.long), torch.randn(2, 3, 4)
    packed = packing(mask, x, count_tokens(mask))
    assert packed.full
    assert pack(x, packed).data_ptr() == unpack(pack(x, packed), packed).data_ptr() == x.data_ptr()


def test_a_mask_of_another_form_leaves_nothing_out() -> None:
    mask, x = torch.tensor([[1, 1, 0]]), torch.randn(2, 3, 4)
    packed = packing(mask, x, count_tokens(mask))
    assert not packed.full
    assert torch.equal(pack(x, packed), x.flatten(0, 1))
