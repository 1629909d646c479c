"""What a family of models is: the architectures it reads, how their config.json becomes a DecoderConfig, and under
which names their tensors are stored. No forward: models/decoder.py has the only one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from paceline.config import DecoderConfig
from paceline.loading.rules import WeightRule
from paceline.models.decoder import Block, Parts
from paceline.models.hf_config import HFConfig


@dataclass(frozen=True)
class Family:
    """`block` is the escape hatch: a family whose layers no DecoderConfig describes supplies its own."""

    name: str
    architectures: tuple[str, ...]
    decoder_config: Callable[[HFConfig], DecoderConfig]
    weight_rules: Callable[[DecoderConfig], tuple[WeightRule, ...]]
    block: Callable[[DecoderConfig, int, Parts], nn.Module] = Block


def hugging_face_rules(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """The names that Llama brought and most families kept, for the tensors that `config` says there are."""
    layer, attention, mlp = "model.layers.{i}.", "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."
    rules = [WeightRule("embedding.weight", ("model.embed_tokens.weight",))]

    def linear(ours: str, theirs: tuple[str, ...], bias: bool) -> None:
        rules.append(WeightRule(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs)))
        if bias:
            rules.append(WeightRule(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs)))

    def norm(ours: str, theirs: str) -> None:
        rules.append(WeightRule(f"{ours}.weight", (f"{theirs}.weight",)))

    norm("blocks.{i}.attention_norm", f"{layer}input_layernorm")
    qkv = tuple(f"{attention}{name}_proj" for name in "qkv")
    linear("blocks.{i}.attention.qkv", qkv, config.attention.qkv_bias)
    linear("blocks.{i}.attention.out", (f"{attention}o_proj",), config.attention.out_bias)
    if config.attention.qk_norm:
        norm("blocks.{i}.attention.q_norm", f"{attention}q_norm")
        norm("blocks.{i}.attention.k_norm", f"{attention}k_norm")
    if config.residual.post_norms:
        norm("blocks.{i}.post_attention_norm", f"{layer}post_attention_layernorm")
        norm("blocks.{i}.mlp_norm", f"{layer}pre_feedforward_layernorm")
        norm("blocks.{i}.post_mlp_norm", f"{layer}post_feedforward_layernorm")
    else:  # here Hugging Face's "post attention" norm is the one before the MLP
        norm("blocks.{i}.mlp_norm", f"{layer}post_attention_layernorm")
    linear("blocks.{i}.mlp.gate_up", (f"{mlp}gate_proj", f"{mlp}up_proj"), config.mlp.bias)
    linear("blocks.{i}.mlp.down", (f"{mlp}down_proj",), config.mlp.bias)
    norm("norm", "model.norm")
    if not config.tie_embeddings:
        linear("head", ("lm_head",), False)
    return tuple(rules)
