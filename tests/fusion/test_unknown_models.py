"""Models that nothing here was written for: transformers' architectures sorted by name, every 40th. Each is optimised,
or left alone with a reason; none gives another result. `pytest -m slow -s` prints what docs/optimize.md tells."""

from __future__ import annotations

import copy
import inspect
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import paceline
from paceline.fusion import report

EVERY = 40
# What makes a configuration small, under the names that configurations have for it.
SIZES = {
    ("hidden_size", "d_model", "dim", "n_embd", "embed_dim", "emb_dim", "model_dim", "word_embed_proj_dim"): 64,
    ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "n_layer", "n_layers", "depth"): 2,
    ("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads", "n_head", "n_heads", "num_heads"): 4,
    ("num_key_value_heads",): 2,
    ("head_dim", "d_kv"): 16,
    ("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "ffn_dim", "n_inner", "hidden_dim"): 128,
    ("moe_intermediate_size", "shared_expert_intermediate_size"): 32,
    ("num_experts", "num_local_experts", "n_routed_experts"): 4,
    ("num_experts_per_tok", "num_experts_per_token"): 2,
    ("n_group", "topk_group"): 1,
    ("rotary_dim",): 16,
    ("num_mel_bins", "input_feat_size"): 16,
    ("vocab_size",): 200,
    ("image_size",): 32,
    ("patch_size",): 8,
    ("pad_token_id",): 0,
    ("bos_token_id",): 1,
    ("eos_token_id",): 2,
}


def names() -> list[str]:
    transformers = pytest.importorskip("transformers")
    return sorted(transformers.models.auto.modeling_auto.MODEL_MAPPING_NAMES)[::EVERY]


def made_small(config: Any) -> Any:
    for known, size in SIZES.items():
        for name in known:
            if isinstance(getattr(config, name, None), int):
                setattr(config, name, size)
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(getattr(config, "layer_types", None), list) and isinstance(layers, int):
        config.layer_types = config.layer_types[:layers]
    for part in vars(config).values():
        if hasattr(part, "to_dict") and hasattr(part, "model_type"):
            made_small(part)
    return config


def tiny(name: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = made_small(transformers.AutoConfig.for_model(name))
    model: nn.Module = transformers.AutoModel.from_config(config)
    if sum(parameter.numel() for parameter in model.parameters()) > 50e6:
        raise ValueError("its configuration has other words for its sizes: it stays large")
    return model.eval()


def inputs_for(model: nn.Module, batch: int, length: int) -> dict[str, torch.Tensor]:
    takes = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(3, 150, (batch, length), generator=generator)
    config = model.config
    size = getattr(getattr(config, "vision_config", config), "image_size", 32)
    size = size if isinstance(size, int) else 32
    known = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "decoder_input_ids": ids,
        "pixel_values": torch.randn(batch, 3, size, size, generator=generator),
        "input_values": torch.randn(batch, 1, 64 * length, generator=generator),
        "input_features": torch.randn(batch, 4 * length, getattr(config, "num_mel_bins", 16), generator=generator),
    }
    main = getattr(model, "main_input_name", "input_ids")
    if main in ("pixel_values", "input_values", "input_features"):
        known = {main: known[main]}
    return {name: value for name, value in known.items() if name in takes}


def milliseconds(model: nn.Module, call: dict[str, torch.Tensor]) -> float:
    times = []
    with torch.inference_mode():
        model(**call)
        for _ in range(15):
            start = time.perf_counter()
            model(**call)
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", names())
def test_unknown_model(name: str, assert_as_exact: Callable[..., None], tensors_of: Callable[..., Any]) -> None:
    try:
        model = tiny(name)
        calls = [inputs_for(model, *shape) for shape in ((2, 24), (3, 17))]
        own = copy.deepcopy(model)
        with torch.no_grad():
            results = [own(**copy.deepcopy(call)) for call in calls]
        assert tensors_of(results)
    except Exception as error:
        reason = str(error).strip().splitlines()[:1]
        pytest.skip(f"{name} was not made tiny: {type(error).__name__}: {' '.join(reason)[:150]}")
    paceline.optimize(model)
    for call, wanted in zip(calls, results, strict=True):
        with torch.no_grad():
            found = model(**copy.deepcopy(call))
            widened = {key: value.double() if value.is_floating_point() else value for key, value in call.items()}
            try:
                exact = copy.deepcopy(own).double()(**widened)
            except Exception:  # not in float64: then it must be as the model's own, closely
                exact = wanted
        for ours, theirs in zip(*map(tensors_of, (found, wanted)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        if exact is not wanted:
            assert_as_exact(found, wanted, exact)
    told = report(model)
    print(
        f"\n{name}: own {milliseconds(own, calls[0]):.2f} ms, optimised {milliseconds(model, calls[0]):.2f} ms; {told}"
    )
    assert told.replaced or told.eager or any(graph.refused or graph.left for graph in told.graphs)
