"""The token embedding.

Shapes: T tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import torch
from torch import nn

from paceline.formats.streamed import StreamedTable


class Embedding(nn.Module):
    """Rows of `table_VD`, times `scale` (Gemma: sqrt(hidden size)).

    The scale is rounded to the table's dtype first, as the models were trained: in bfloat16 Gemma's sqrt(3072) =
    55.4256 becomes 55.5.
    """

    def __init__(self, table_VD: torch.Tensor | StreamedTable, scale: float = 1.0) -> None:
        super().__init__()
        self.table_VD = table_VD
        self.scale = torch.tensor(scale, dtype=table_VD.dtype).item()

    def forward(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        table_VD = self.table_VD
        if isinstance(table_VD, StreamedTable):
            x_TD = table_VD.rows(token_ids_T)
        else:
            x_TD = table_VD.index_select(0, token_ids_T)
        return x_TD if self.scale == 1.0 else x_TD * self.scale

    def extra_repr(self) -> str:
        rows, columns = self.table_VD.shape
        return f"{rows} x {columns}, scale={self.scale}"
