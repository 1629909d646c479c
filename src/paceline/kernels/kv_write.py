"""Write the step's keys and values into the paged cache."""

from __future__ import annotations

import torch

from paceline.inputs import KVLayer


def write_kv(k_THD: torch.Tensor, v_THD: torch.Tensor, kv: KVLayer, slot_mapping_T: torch.Tensor) -> None:
    """Token t's keys and values of every head go to slot `slot_mapping_T[t]`; slots of one step are distinct."""
    kv.k_HSD.index_copy_(1, slot_mapping_T, k_THD.transpose(0, 1))
    kv.v_HSD.index_copy_(1, slot_mapping_T, v_THD.transpose(0, 1))


def write_kv_ref(k_THD: torch.Tensor, v_THD: torch.Tensor, kv: KVLayer, slot_mapping_T: torch.Tensor) -> None:
    """The same, one token at a time."""
    for t, slot in enumerate(slot_mapping_T.tolist()):
        kv.k_HSD[:, slot] = k_THD[t]
        kv.v_HSD[:, slot] = v_THD[t]
