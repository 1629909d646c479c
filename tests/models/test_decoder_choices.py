"""What a whole model tells of its kernels on a GPU that is not here."""

from __future__ import annotations

import pytest
import torch

from paceline.kernels import Choice, explain
from paceline.kernels import gpu as module
from paceline.kernels.gpu import GPU
from paceline.models.load import load_decoder
from paceline.models.registry import read_decoder_config


@pytest.fixture
def decoder(llama_config, llama_checkpoint, monkeypatch):
    """Two layers in float16, which a CPU keeps as plain matrices, said to be on a Hopper."""
    monkeypatch.setattr(module, "gpu", lambda device: GPU("NVIDIA H100", 132, (9, 0)))
    decoder = load_decoder(llama_checkpoint(), read_decoder_config(llama_config), dtype=torch.float16)
    decoder.device = torch.device("cuda")
    return decoder


GEMV = "Triton GEMV, what follows included"


def test_one_row_of_a_small_model(decoder):
    """Its norms but the last are inside the products."""
    assert explain(decoder) == (
        Choice("embedding, rotary angles", "Triton, one kernel"),
        Choice("norm", "in the product after it", count=4),
        Choice("qkv 64 x 32, 16 bits a value", GEMV, count=2),
        Choice("rotary, KV write", "in the attention's kernel", count=2),
        Choice("attention, 4 heads, 2 kv heads of 8", "Triton split-KV decode", count=2),
        Choice("attention of prompts", "Triton, all chunks in one launch", count=2),
        Choice("out 32 x 32, 16 bits a value", GEMV, count=2),
        Choice("gate_up 96 x 32, 16 bits a value", GEMV, count=2),
        Choice("down 32 x 48, 16 bits a value", GEMV, count=2),
        Choice("rms norm", "Triton, a row a program"),
        Choice("head 64 x 32, 16 bits a value", GEMV),
    )


def test_of_several_rows_the_norms_are_kernels_of_their_own(decoder):
    found = {one.operation: one for one in explain(decoder, rows=2)}
    assert found["rms norm"].count == 5
    assert "norm" not in found


def test_more_rows_than_the_kernel_takes_go_through_torch(decoder):
    (reason,) = {one.reason for one in explain(decoder, rows=65) if one.reason}
    assert reason == "65 rows, and the kernel takes 64"
