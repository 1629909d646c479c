from __future__ import annotations

import pytest
import torch

from paceline.loading.rules import Layout, Stored, WeightRule, stored_names

RULES = (
    WeightRule("embed.weight", ("model.embed_tokens.weight",)),
    WeightRule("layers.{i}.qkv.weight", tuple(f"model.layers.{{i}}.{p}_proj.weight" for p in "qkv")),
    WeightRule("layers.{i}.experts.{e}.up", ("model.layers.{i}.experts.{e}.w3",), layers=(1,)),
)


def test_rules_name_every_layer_and_expert():
    names = stored_names(RULES, 3, 2)
    assert names["embed.weight"] == Stored(("model.embed_tokens.weight",))
    assert names["layers.2.qkv.weight"].names == tuple(f"model.layers.2.{p}_proj.weight" for p in "qkv")
    assert names["layers.1.experts.1.up"].names == ("model.layers.1.experts.1.w3",)
    assert len(names) == 1 + 3 + 2


def test_what_cannot_be_a_rule_is_refused():
    with pytest.raises(ValueError, match="two weight rules"):
        stored_names((*RULES, RULES[0]), 1)
    for ours, theirs in (("layers.{i}.a", ("model.a",)), ("a", ()), ("layers.{i}.{e}", ("model.{i}",))):
        with pytest.raises(ValueError, match="all names hold"):
            WeightRule(ours, theirs)


def test_a_transposed_tensor_is_turned_and_a_vector_left():
    values = torch.arange(6).view(2, 3)
    layout = Layout(transposed=True)
    assert torch.equal(layout.ours(values), values.T)
    assert layout.stored_shape((3, 2)) == (2, 3)
    assert torch.equal(layout.ours(values[0]), values[0])


@pytest.mark.parametrize("tail", [(), (5,)])
def test_rows_that_lie_by_key_head_are_sorted(tail):
    kv_heads, queries, dim = 3, 2, 4
    q = torch.randn(kv_heads * queries * dim, *tail)
    k, v = torch.randn(2, kv_heads * dim, *tail)
    rows = [
        part
        for head in range(kv_heads)
        for part in (
            q[head * queries * dim : (head + 1) * queries * dim],
            k[head * dim : (head + 1) * dim],
            v[head * dim : (head + 1) * dim],
        )
    ]
    assert torch.equal(Layout(kv_groups=(kv_heads, queries)).ours(torch.cat(rows)), torch.cat((q, k, v)))


def test_one_key_head_is_stored_in_our_order():
    """Falcon 7B and StarCoder: with a single key head "by key head" is all queries, the key, the value."""
    rows = torch.randn(6 * 4, 3)
    assert torch.equal(Layout(kv_groups=(1, 4)).ours(rows), rows)


def test_rows_by_key_head_have_the_shape_of_ours():
    assert Layout(kv_groups=(3, 2)).stored_shape((48, 5)) == (48, 5)
    assert Layout(kv_groups=(3, 2)).ours(torch.zeros(48, 5)).shape == (48, 5)
