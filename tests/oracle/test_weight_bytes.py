"""The memory formula against every family's loaded tensors."""

from __future__ import annotations

import pytest
import torch

from paceline import sizing
from paceline.formats import keeps_memory, resident_bytes
from paceline.models.load import load_decoder


@pytest.mark.parametrize("format", ["dense", "int8", "int4", "fp8"])
def test_a_loaded_model_holds_what_was_planned_to_the_byte(each_model, format, held_bytes):
    config, cpu, dtype = each_model.config, torch.device("cpu"), torch.float32
    quantize = None if format == "dense" else format
    decoder = load_decoder(each_model.checkpoint, config, dtype=dtype, quantize=quantize)
    planned = sizing.weight_bytes(
        config,
        dtype.itemsize,
        resident_bytes(format, dtype, cpu),
        tied_head_shares=keeps_memory(format, (config.vocab_size, config.hidden_size), dtype, cpu),
    )
    assert planned.total == held_bytes(decoder)
    images = ("vision", "visual", "multi_modal_projector")  # only the text part is loaded
    text = [p for name, p in each_model.hf.named_parameters() if not any(part in name for part in images)]
    assert sizing.num_parameters(config) == sum(p.numel() for p in text)
