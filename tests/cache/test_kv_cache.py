from __future__ import annotations

import torch

from paceline.cache.kv_cache import allocate_kv, copy_block
from paceline.config import KVGroup

GROUPS = (KVGroup("full", (1,), None, 2, 8), KVGroup("window", (0, 2), 4, 2, 8))


def test_each_layer_gets_its_groups_blocks():
    layers = allocate_kv(GROUPS, (5, 3), 4, dtype=torch.bfloat16, device="cpu")
    assert [layer.group for layer in layers] == [1, 0, 1]
    assert [tuple(layer.k_HSD.shape) for layer in layers] == [(2, 16, 8), (2, 24, 8), (2, 16, 8)]
    assert all(layer.v_HSD.dtype == torch.bfloat16 for layer in layers)
    assert not any(layer.k_HSD.any() or layer.v_HSD.any() for layer in layers)


def test_layers_share_no_memory():
    layers = allocate_kv(GROUPS, (2, 2), 4, dtype=torch.float32, device="cpu")
    for number, layer in enumerate(layers):
        layer.k_HSD.fill_(number + 1)
        layer.v_HSD.fill_(-number - 1)
    assert [layer.k_HSD.unique().tolist() for layer in layers] == [[1.0], [2.0], [3.0]]
    assert [layer.v_HSD.unique().tolist() for layer in layers] == [[-1.0], [-2.0], [-3.0]]


def test_copying_a_block_touches_its_group_alone():
    layers = allocate_kv(GROUPS, (3, 3), 4, dtype=torch.float32, device="cpu")
    for layer in layers:
        layer.k_HSD.normal_()
        layer.v_HSD.normal_()
    before = [(layer.k_HSD.clone(), layer.v_HSD.clone()) for layer in layers]
    copy_block(layers, 1, 1, 3, 4)
    for layer, (k, v) in zip(layers, before, strict=True):
        for now, then in ((layer.k_HSD, k), (layer.v_HSD, v)):
            assert torch.equal(now[:, :12], then[:, :12])
            assert torch.equal(now[:, 12:], then[:, 4:8] if layer.group == 1 else then[:, 12:])
