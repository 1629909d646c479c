"""The buffers of a step of plain decodes (engine/decode_step.py): one value a row, in a table that travels as one copy.

Shapes: M rows, B blocks of the longest context, G groups of the cache, F fields, E of them one a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from paceline.config import KVGroup
from paceline.inputs import GroupMetadata
from paceline.sampling.static import RowParams

# Fields of 8 bytes a row, then those that each of the G groups has.
FIELDS = ("position", "length", "token", "previous", "greedy", "uniform", "temperature", "min_p", "top_k", "top_p")
GROUP_FIELDS = ("slot", "edit", "block")


@dataclass(frozen=True)
class Fields:
    """The host's values, a staging buffer or the device's copy: [F + E * G, M] of 8 bytes, and each field as what it
    is."""

    all: torch.Tensor
    position_M: torch.Tensor  # int64
    length_M: torch.Tensor  # int32
    token_M: torch.Tensor  # int64: known to the host, or PLACEHOLDER
    previous_M: torch.Tensor  # int64: the row of the last step that chose the token
    slots_GM: torch.Tensor  # int64; -1 where there is no request
    edits_GM: torch.Tensor  # int64, not by row: places of a group's block tables, flattened, that change with this step
    blocks_GM: torch.Tensor  # int32, what stands there from now on
    params: RowParams


def make_fields(num_groups: int, rows: int, device: torch.device, *, pin: bool = False) -> Fields:
    count = len(FIELDS) + len(GROUP_FIELDS) * num_groups
    table = torch.zeros((count, rows), dtype=torch.int64, device=device, pin_memory=pin)
    of = dict(zip(FIELDS, table, strict=False))
    slots_GM, edits_GM, blocks_GM = table[len(FIELDS) :].view(len(GROUP_FIELDS), num_groups, rows)
    params = RowParams(
        greedy_R=of["greedy"].view(torch.bool)[:rows],
        uniform_R=of["uniform"].view(torch.float64),
        temperature_R=of["temperature"].view(torch.float32)[:rows],
        min_p_R=of["min_p"].view(torch.float32)[:rows],
        top_k_R=of["top_k"],
        top_p_R=of["top_p"].view(torch.float64),
    )
    return Fields(
        table,
        of["position"],
        of["length"].view(torch.int32)[:rows],
        of["token"],
        of["previous"],
        slots_GM,
        edits_GM,
        blocks_GM.view(torch.int32)[:, :rows],
        params,
    )


def groups_of(
    kv_groups: Sequence[KVGroup], tables_GRB: torch.Tensor, slots_GT: torch.Tensor
) -> tuple[GroupMetadata, ...]:
    """What attention is given of a step whose block tables and slots lie in buffers."""
    return tuple(
        GroupMetadata(tables_RB, slots_T, group.window, ())
        for tables_RB, slots_T, group in zip(tables_GRB, slots_GT, kv_groups, strict=True)
    )


class Staging:
    """What one step sends and gets back, in host memory that the device copies by itself."""

    def __init__(self, num_groups: int, rows: int, blocks: int, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        self.fields = make_fields(num_groups, rows, torch.device("cpu"), pin=on_cuda)
        self.tables_GMB = torch.zeros((num_groups, rows, blocks), dtype=torch.int32, pin_memory=on_cuda)
        self.result = torch.zeros((2, rows), dtype=torch.int64, pin_memory=on_cuda)
        self.event = torch.cuda.Event() if on_cuda else None  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Until the device has done all that this buffer was last used for."""
        if self.event is not None:
            self.event.synchronize()
