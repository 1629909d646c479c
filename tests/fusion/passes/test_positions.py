"""Beginnings of constants, on BERT's embeddings and by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import paceline
from paceline.fusion import report


class Embeddings(nn.Module):
    """BERT's, as transformers spells them."""

    def __init__(self, positions: int = 12) -> None:
        super().__init__()
        self.words, self.types, self.positions = nn.Embedding(50, 32), nn.Embedding(2, 32), nn.Embedding(12, 32)
        self.register_buffer("position_ids", torch.arange(positions)[None])
        self.register_buffer("type_ids", torch.zeros(1, positions, dtype=torch.long))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        batch, length = ids.shape
        places = self.position_ids[:, :length]
        types = torch.gather(self.type_ids, dim=1, index=places).expand(batch, length)
        return self.words(ids) + self.types(types) + self.positions(places)


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(length))


def optimised(model: nn.Module) -> tuple[nn.Module, Any]:
    made = paceline.optimize(model.eval())
    made(ids(2, 5))
    return made, report(made).graphs[0]


def test_embeddings_are_one_look_up_and_a_sum() -> None:
    torch.manual_seed(0)
    model, graph = optimised(Embeddings())
    assert graph.refused is None
    assert graph.replaced["beginning of a constant"] == 2
    for shape in [(2, 5), (3, 12), (4, 2)]:
        wanted = type(model).forward(model, ids(*shape))
        torch.testing.assert_close(model(ids(*shape)), wanted)


def test_a_table_that_is_written_to_is_noticed() -> None:
    torch.manual_seed(0)
    model, _ = optimised(Embeddings())
    for table in (model.positions.weight, model.types.weight):  # type: ignore[union-attr]
        with torch.no_grad():
            table += 1  # type: ignore[operator]
        torch.testing.assert_close(model(ids(2, 5)), type(model).forward(model, ids(2, 5)))
    model.position_ids.copy_(model.position_ids.flip(-1))  # type: ignore[operator]
    torch.testing.assert_close(model(ids(2, 5)), type(model).forward(model, ids(2, 5)))


def test_more_positions_than_the_table_has_rows() -> None:
    torch.manual_seed(0)
    model, graph = optimised(Embeddings(positions=20))
    assert graph.refused is None
    torch.testing.assert_close(model(ids(2, 12)), type(model).forward(model, ids(2, 12)))


def test_a_sum_that_is_used_itself_too(rewritten: Callable[..., Any]) -> None:
    def both(x: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        part = table[:, : x.shape[1]]
        first = x + part
        return first * 2, part + first

    table = torch.randn(1, 9, generator=torch.Generator().manual_seed(0))
    graph = rewritten(both, (torch.randn(3, 4),), (torch.randn(5, 9),), table=table)
    assert graph.replaced["beginning of a constant"] == 2
