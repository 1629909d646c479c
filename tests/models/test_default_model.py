"""Real weights: SmolLM2 from its GGUF, through our reader and decoder, against transformers reading the same file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from paceline import reference
from paceline.inputs import KVLayer, ModelInputs
from paceline.kernels.attention_plan import build_attention
from paceline.loading.gguf_checkpoint import GGUFCheckpoint
from paceline.models.load import load_decoder
from paceline.models.registry import read_decoder_config

# "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n" in SmolLM2's tokens.
PROMPT = [1, 4093, 198, 4898, 314, 260, 6376, 4461, 47, 2, 198, 1, 520, 9531, 198]


@pytest.mark.default_model
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@torch.inference_mode()
def test_smollm2_logits_are_those_of_transformers(default_model_gguf: Path, relative_error):
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(
        default_model_gguf.parent, gguf_file=default_model_gguf.name, dtype=torch.float32
    )
    expected = hf(torch.tensor([PROMPT])).logits[0].clone()
    del hf
    with GGUFCheckpoint(default_model_gguf) as checkpoint:
        config = read_decoder_config(checkpoint.config)
        oracle = reference.load(checkpoint, config)
        assert relative_error(reference.forward(oracle, PROMPT, reference.Cache()), expected) <= 1e-4
        del oracle
        decoder = load_decoder(checkpoint, config, dtype=torch.float32)
    a, n = config.attention, len(PROMPT)
    kv = [KVLayer(*torch.zeros(2, a.num_kv_heads, 32, a.head_dim), 0) for _ in range(config.num_layers)]
    attention = build_attention([0, n], [n], [[[1]]], [None], block_size=16)
    found = decoder.logits(decoder(ModelInputs(torch.tensor(PROMPT), torch.arange(n), attention), kv))
    assert relative_error(found, expected) <= 1e-4
