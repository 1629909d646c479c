"""Which row a row reads at each position."""

from __future__ import annotations

import pytest
import torch

from paceline.fusion.generate.cache import Positions


@pytest.mark.parametrize("fixed", [False, True])
def test_rows_read_what_those_wrote_that_they_descend_from(fixed: bool) -> None:
    positions = Positions(4, 64, torch.device("cpu"), fixed, True)
    buffer_RLHD = torch.zeros(4, 64, 1, 1)
    for _ in range(2):  # a second generation starts from its own rows again
        buffer_RLHD[:, 0, 0, 0] = torch.arange(4.0)
        positions.begin(1)
        texts = [[row] for row in range(4)]
        for step, parents in enumerate([[1, 1, 3, 2], [0, 0, 2, 2], [1, 0, 3, 3]]):
            positions.follow(torch.tensor(parents))
            new = [10 * (step + 1) + row for row in range(4)]
            texts = [[*texts[parent], token] for parent, token in zip(parents, new, strict=True)]
            positions.write(buffer_RLHD, torch.tensor(new, dtype=torch.float32).view(4, 1, 1, 1))
            positions.advance()
            read = positions.read(buffer_RLHD, positions.past)[:, 0, :, 0]
            assert read.int().tolist() == texts
