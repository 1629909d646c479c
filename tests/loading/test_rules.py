from __future__ import annotations

import pytest

from paceline.loading.rules import WeightRule, forward_names, inverse

RULES = (
    WeightRule("embed.weight", ("model.embed_tokens.weight",)),
    WeightRule("layers.{i}.qkv.weight", tuple(f"model.layers.{{i}}.{p}_proj.weight" for p in "qkv")),
    WeightRule("layers.{i}.o.weight", ("model.layers.{i}.o_proj.weight",)),
)


def test_round_trip_names_every_tensor_of_every_layer() -> None:
    names = forward_names(RULES, 3)
    assert len(names) == 1 + 2 * 3
    assert names["layers.2.qkv.weight"] == tuple(f"model.layers.2.{p}_proj.weight" for p in "qkv")
    parts = inverse(names)
    assert len(parts) == 1 + 4 * 3
    for theirs, (ours, part) in parts.items():
        assert names[ours][part] == theirs
    assert parts["model.layers.1.v_proj.weight"] == ("layers.1.qkv.weight", 2)


def test_ambiguous_rules_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two weight rules make 'embed\.weight'"):
        forward_names((*RULES, RULES[0]), 1)
    with pytest.raises(ValueError, match="used by"):
        inverse(forward_names((*RULES, WeightRule("head.weight", ("model.embed_tokens.weight",))), 1))
    with pytest.raises(ValueError, match="all names hold"):
        WeightRule("layers.{i}.a", ("model.a",))
    with pytest.raises(ValueError, match="at least one"):
        WeightRule("a", ())
