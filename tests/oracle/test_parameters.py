"""The formula of sizing.py against the parameters of transformers' models."""

from __future__ import annotations

from paceline.models.multimodal import OTHER_PARTS
from paceline.sizing import num_parameters


def test_parameters_are_those_of_transformers(each_model):
    text = {n: p for n, p in each_model.hf.named_parameters() if not n.startswith(OTHER_PARTS)}
    assert num_parameters(each_model.config) == sum(parameter.numel() for parameter in text.values())
