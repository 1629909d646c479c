"""What a family of models is: the architectures it reads, how their config.json becomes a DecoderConfig, and under
which names their tensors are stored. No forward: models/decoder.py has the only one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from paceline.config import DecoderConfig
from paceline.loading.rules import Layout, Stored, WeightRule
from paceline.models.decoder import Block, Parts
from paceline.models.hf_config import HFConfig

Names = Mapping[str, str | tuple[str, ...] | Stored]
"""Our name of a module -> the checkpoint's: one, several that we fuse, or one stored in another layout. Names of a
layer's modules leave out "blocks.{i}." here and hold "{i}" there; an expert's hold "{e}" in both."""


@dataclass(frozen=True)
class Family:
    """`names`: of every module that a config of this family can have; those that it has not are ignored. `prefix`
    begins the names of all tensors but the head's. `block` is the escape hatch: a family whose layers no DecoderConfig
    describes supplies its own."""

    name: str
    architectures: tuple[str, ...]
    decoder_config: Callable[[HFConfig], DecoderConfig]
    names: Callable[[DecoderConfig], Names]
    prefix: str = "model."
    block: Callable[[DecoderConfig, int, Parts], nn.Module] = Block

    def weight_rules(self, config: DecoderConfig) -> tuple[WeightRule, ...]:
        """Where each tensor of the decoder that `config` describes is stored."""
        names, rules = self.names(config), []
        for module in modules(config):
            theirs = names[module.name]
            stored = theirs if isinstance(theirs, Stored) else Stored((theirs,) if isinstance(theirs, str) else theirs)
            ours = f"blocks.{{i}}.{module.name}" if "{i}" in stored.names[0] else module.name
            for kind in ("weight", "bias") if module.bias else ("weight",):
                parts = tuple(f"{name}.{kind}" for name in stored.names)
                rules.append(WeightRule(f"{ours}.{kind}", parts, stored.layout, module.layers))
        return tuple(rules)


@dataclass(frozen=True)
class Module:
    """A module that has a weight: `layers` those that have it, None for all layers or for a module outside them."""

    name: str
    bias: bool = False
    layers: tuple[int, ...] | None = None


def modules(config: DecoderConfig) -> list[Module]:
    """Every module with a weight of the decoder that `config` describes (models/decoder.py builds just these)."""
    a, r, m, norm = config.attention, config.residual, config.mlp, config.norm.bias
    found = [Module("embedding"), Module("norm", norm)]
    found += [Module("positions")] * (config.learned_position_offset is not None)
    found += [Module("embedding_norm", norm)] * config.embedding_norm
    found += [Module("head")] * (not config.tie_embeddings)
    found += [Module("attention.qkv", a.qkv_bias), Module("attention.out", a.out_bias)]
    found += [Module("attention.q_norm"), Module("attention.k_norm")] * (a.qk_norm is not None)
    found += [Module("attention_norm", norm)] * r.pre_norms
    found += [Module("mlp_norm", norm)] * (r.pre_norms and not r.shared_norm)
    found += [Module("post_attention_norm", norm), Module("post_mlp_norm", norm)] * r.post_norms
    dense = tuple(layer for layer in range(config.num_layers) if not config.is_moe(layer))
    if dense:
        layers = None if config.moe is None else dense
        found += [Module("mlp.gate_up" if m.gated else "mlp.up", m.bias, layers), Module("mlp.down", m.bias, layers)]
    if config.moe is not None:
        experts = ("mlp.router", "mlp.experts.{e}.gate_up", "mlp.experts.{e}.down")
        found += [Module(name, False, config.moe.layers) for name in experts]
    return found


def by_key_head(name: str, config: DecoderConfig) -> Stored:
    """A fused q, k and v whose rows lie by key head: its queries, then itself, then its value."""
    a = config.attention
    return Stored((name,), Layout(kv_groups=(a.num_kv_heads, a.num_heads // a.num_kv_heads)))


def hugging_face_names(config: DecoderConfig) -> dict[str, str | tuple[str, ...] | Stored]:
    """The names that Llama brought and most families kept."""
    layer = "model.layers.{i}."
    # Where there are two norms a half, Hugging Face calls the MLP's first one "pre feedforward"; where there is one,
    # the norm before the MLP is "post attention".
    sandwich = config.residual.pre_norms and config.residual.post_norms
    return {
        "embedding": "model.embed_tokens",
        "attention_norm": f"{layer}input_layernorm",
        "attention.qkv": tuple(f"{layer}self_attn.{name}_proj" for name in "qkv"),
        "attention.q_norm": f"{layer}self_attn.q_norm",
        "attention.k_norm": f"{layer}self_attn.k_norm",
        "attention.out": f"{layer}self_attn.o_proj",
        "post_attention_norm": f"{layer}post_attention_layernorm",
        "mlp_norm": f"{layer}{'pre_feedforward' if sandwich else 'post_attention'}_layernorm",
        "mlp.gate_up": (f"{layer}mlp.gate_proj", f"{layer}mlp.up_proj"),
        "mlp.down": f"{layer}mlp.down_proj",
        "mlp.router": f"{layer}mlp.gate",
        "mlp.experts.{e}.gate_up": (f"{layer}mlp.experts.{{e}}.gate_proj", f"{layer}mlp.experts.{{e}}.up_proj"),
        "mlp.experts.{e}.down": f"{layer}mlp.experts.{{e}}.down_proj",
        "post_mlp_norm": f"{layer}post_feedforward_layernorm",
        "norm": "model.norm",
        "head": "lm_head",
    }
