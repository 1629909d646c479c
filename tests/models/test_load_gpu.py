"""Loading onto a CUDA device through loading/upload.py: the same values as by plain copies, whatever is stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from paceline.errors import CheckpointError
from paceline.loading import upload
from paceline.loading.random_checkpoint import RandomCheckpoint
from paceline.loading.safetensors_checkpoint import SafetensorsCheckpoint
from paceline.models import load
from paceline.models.registry import read_decoder_config

pytestmark = pytest.mark.gpu

GPT2 = {"architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
NEOX = {
    "architectures": ["GPTNeoXForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "hidden_act": "gelu",
    "rotary_pct": 0.25,
    "use_parallel_residual": True,
}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "FEWEST_BYTES", 100)
    monkeypatch.setattr(upload, "CHUNK_BYTES", 1000)  # no tensor's size: chunks end within rows and values


@pytest.fixture
def configs(llama_config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`transposed` and `grouped`: families whose layout is not ours."""
    common = {"vocab_size": 96, "torch_dtype": "bfloat16"}
    return {
        "llama": llama_config,
        "tied": {**llama_config, "tie_word_embeddings": True},
        "transposed": {**GPT2, **common, "model_type": "gpt2"},
        "grouped": {**NEOX, **common, "model_type": "gpt_neox"},
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[[dict[str, Any], torch.dtype], Path]:
    """A directory with the config's random weights, stored in a dtype."""

    def make(config: dict[str, Any], dtype: torch.dtype) -> Path:
        checkpoint = RandomCheckpoint(config, dtype=dtype)
        (tmp_path / "config.json").write_text("{}")
        save_file({name: checkpoint.read(name) for name in checkpoint.names()}, tmp_path / "model.safetensors")
        return tmp_path

    return make


class Count:
    """A Progress that adds up."""

    total = seen = 0

    def start(self, label: str, total_bytes: int) -> None:
        self.total = total_bytes

    def advance(self, n: int) -> None:
        self.seen += n

    def done(self) -> None:
        pass


@pytest.mark.parametrize("name", ["llama", "tied", "transposed", "grouped"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("quantize", [None, "int8", "int4", "fp8"])
def test_the_values_are_those_of_plain_copies(configs, write, held_tensors, monkeypatch, name, stored, quantize):
    config = read_decoder_config(configs[name])
    checkpoint, count, added = SafetensorsCheckpoint(write(configs[name], stored)), Count(), []
    add = upload.Upload.add
    monkeypatch.setattr(upload.Upload, "add", lambda self, span, target: (added.append(span), add(self, span, target)))

    def build() -> list[torch.Tensor]:
        return held_tensors(
            load.load_decoder(
                checkpoint, config, dtype=torch.bfloat16, device="cuda", quantize=quantize, progress=count
            )
        )

    uploaded = build()
    assert len(added) >= 4 * config.num_layers + 1
    assert count.seen == count.total
    monkeypatch.setattr(load, "upload_refusal", lambda device: "the twin is asked for")
    plain = build()
    assert len(uploaded) == len(plain) > 4 * config.num_layers
    for found, expected in zip(uploaded, plain, strict=True):
        assert torch.equal(found.view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8))


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(range(250)) * 100)
    whole, cut = (torch.zeros(size, dtype=torch.uint8, device="cuda") for size in (25_000, 26_000))
    with upload.Upload(torch.device("cuda"), Count()) as transfer:
        transfer.add(upload.FileSpan(path, 0, 25_000), whole)
    assert whole[-1] == 249
    with (
        pytest.raises(CheckpointError, match=r"x\.safetensors: ended early at byte 25000"),
        upload.Upload(torch.device("cuda"), Count()) as transfer,
    ):
        transfer.add(upload.FileSpan(path, 0, 26_000), cut)
    with (
        pytest.raises(CheckpointError, match=r"y\.safetensors: cannot be read \(No such file"),
        upload.Upload(torch.device("cuda"), Count()) as transfer,
    ):
        transfer.add(upload.FileSpan(tmp_path / "y.safetensors", 0, 1000), cut)
    assert torch.ones(3, device="cuda").sum().item() == 3
