from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from safetensors.torch import save_file

from paceline.errors import CheckpointError, OutOfMemoryError, UsageError
from paceline.formats.int4 import Int4CPUWeight, Int4Weight
from paceline.formats.int8 import Int8Weight
from paceline.layers.linear import Linear
from paceline.loading.safetensors_checkpoint import SafetensorsCheckpoint
from paceline.loading.upload import read_into
from paceline.models import load
from paceline.models.load import load_decoder, settle_tied_head
from paceline.models.registry import read_decoder_config


@pytest.fixture
def config(llama_config):
    return read_decoder_config(llama_config)


def test_fused_weights_hold_their_parts_in_order(llama_checkpoint, config):
    checkpoint = llama_checkpoint()
    decoder = load_decoder(checkpoint, config, dtype=torch.float32)
    layer = "model.layers.1"
    qkv = torch.cat([checkpoint.tensors[f"{layer}.self_attn.{p}_proj.weight"] for p in "qkv"])
    gate_up = torch.cat([checkpoint.tensors[f"{layer}.mlp.{p}_proj.weight"] for p in ("gate", "up")])
    assert torch.equal(decoder.blocks[1].attention.qkv.weight.unpack(), qkv)
    assert torch.equal(decoder.blocks[1].mlp.gate_up.weight.unpack(), gate_up)


def test_every_tensor_is_read_once(llama_checkpoint, config):
    checkpoint = llama_checkpoint()
    load_decoder(checkpoint, config, dtype=torch.float32)
    assert sorted(checkpoint.reads) == sorted(checkpoint.tensors)


def test_missing_tensor_is_named(llama_checkpoint, config):
    checkpoint = llama_checkpoint()
    del checkpoint.tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' is missing.*\[48, 32\]"):
        load_decoder(checkpoint, config, dtype=torch.float32)


def test_wrong_shape_names_tensor_expected_and_found(llama_checkpoint, config):
    checkpoint = llama_checkpoint()
    # 24 + 24 rows would fill k and v's 16 + 16 beside a q of 16: each part is checked, not their sum.
    checkpoint.tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(24, 32)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\.self_attn\.k_proj\.weight'.*\[24, 32\].*\[16, 32\]"):
        load_decoder(checkpoint, config, dtype=torch.float32)


def test_extra_tensors_are_logged_once_and_inert_ones_not(llama_checkpoint, config, caplog):
    checkpoint = llama_checkpoint()
    checkpoint.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    with caplog.at_level(logging.WARNING):
        load_decoder(checkpoint, config, dtype=torch.float32)
        assert not caplog.records
        checkpoint.tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(48, 32)
        load_decoder(checkpoint, config, dtype=torch.float32)
    assert len(caplog.records) == 1
    assert "model.layers.2.mlp.up_proj.weight" in caplog.text


def test_tied_head_multiplies_by_the_embedding_and_ignores_a_stored_copy(llama_checkpoint, config, caplog):
    checkpoint = llama_checkpoint()
    with caplog.at_level(logging.WARNING):
        decoder = load_decoder(checkpoint, dataclasses.replace(config, tie_embeddings=True), dtype=torch.float32)
    assert torch.equal(decoder.head.weight.unpack(), checkpoint.tensors["model.embed_tokens.weight"])
    assert not caplog.records


def test_a_tied_head_that_differs_is_used_and_said(llama_checkpoint, config, caplog):
    """As transformers decides. An equal copy, in another dtype too, leaves them tied, and nothing is said."""
    tied = dataclasses.replace(config, tie_embeddings=True)
    checkpoint = llama_checkpoint()
    table = checkpoint.tensors["model.embed_tokens.weight"]
    with caplog.at_level(logging.INFO):
        for copy in (table.clone(), table):
            checkpoint.tensors["lm_head.weight"] = copy
            assert settle_tied_head(checkpoint, tied) is tied
        del checkpoint.tensors["lm_head.weight"]
        assert settle_tied_head(checkpoint, tied) is tied
        assert settle_tied_head(checkpoint, config) is config
        assert not caplog.records
        for other in (table + 1, table[:-1]):
            checkpoint.tensors["lm_head.weight"] = other
            assert settle_tied_head(checkpoint, tied) == config
    assert "'lm_head.weight' differs from 'model.embed_tokens.weight': it is used as it is, untied" in caplog.text
    checkpoint.tensors["lm_head.weight"] = table + 1
    decoder = load_decoder(checkpoint, settle_tied_head(checkpoint, tied), dtype=torch.float32)
    assert torch.equal(decoder.head.weight.unpack(), table + 1)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_vocabulary_that_is_not_the_tables_names_both(llama_checkpoint, config, name):
    checkpoint = llama_checkpoint()
    checkpoint.tensors[name] = torch.zeros(60, 32)
    with pytest.raises(CheckpointError, match=rf"'{name}' has 60 rows and config\.json's vocab_size is 64: download"):
        load_decoder(checkpoint, config, dtype=torch.float32)


def test_values_are_cast_and_owned(llama_checkpoint, config):
    checkpoint = llama_checkpoint()
    decoder = load_decoder(checkpoint, config, dtype=torch.bfloat16)
    table = checkpoint.tensors["model.embed_tokens.weight"]
    assert torch.equal(decoder.embedding.table_VD, table.bfloat16())
    same = load_decoder(checkpoint, config, dtype=torch.float32)
    table.zero_()  # as a mapped file that is replaced would
    assert same.embedding.table_VD.abs().sum() > 0


def test_quantize_names_the_format_of_every_linear(llama_checkpoint, config):
    dense = load_decoder(llama_checkpoint(), config, dtype=torch.float32)
    int8 = load_decoder(llama_checkpoint(), config, dtype=torch.float32, quantize="int8")
    pairs = [
        (module.weight, dict(int8.named_modules())[name].weight)
        for name, module in dense.named_modules()
        if isinstance(module, Linear)
    ]
    assert len(pairs) == 4 * config.num_layers + 1
    for kept, packed in pairs:
        assert packed.nbytes < kept.nbytes / 2
        assert torch.allclose(packed.unpack(), kept.unpack(), atol=0.02)
    with pytest.raises(UsageError, match="int9"):
        load_decoder(llama_checkpoint(), config, dtype=torch.float32, quantize="int9")


def test_int4_says_which_matrices_it_would_not_make_smaller(llama_checkpoint, config, caplog):
    with caplog.at_level(logging.WARNING):
        decoder = load_decoder(llama_checkpoint(), config, dtype=torch.float32, quantize="int4")
    # 32 and 48 columns: padded to 128 they take 80 bytes.
    assert {type(m.weight) for m in decoder.modules() if isinstance(m, Linear)} == {Int8Weight}
    told = [record.message for record in caplog.records]
    assert told == [
        "6 matrices are in int8, not int4 (blocks.0.attention.qkv, blocks.0.attention.out, blocks.0.mlp.gate_up, ...): "
        "padded to tiles a row of 32 values takes 80 bytes",
        "2 matrices are in int8, not int4 (blocks.0.mlp.down, blocks.1.mlp.down): "
        "padded to tiles a row of 48 values takes 80 bytes",
    ]


@pytest.mark.parametrize("tied", [False, True])
def test_int4s_head_is_int8(llama_checkpoint, llama_config, tied):
    config = read_decoder_config({**llama_config, "hidden_size": 128, "tie_word_embeddings": tied})
    checkpoint = llama_checkpoint(hidden=128)
    if tied:
        del checkpoint.tensors["lm_head.weight"]
    decoder = load_decoder(checkpoint, config, dtype=torch.bfloat16, quantize="int4")
    assert isinstance(decoder.head.weight, Int8Weight)
    for block in decoder.blocks:
        assert isinstance(block.attention.qkv.weight, Int4Weight | Int4CPUWeight)
        assert isinstance(block.mlp.gate_up.weight, Int4Weight | Int4CPUWeight)
        assert isinstance(block.mlp.down.weight, Int8Weight)  # of 48 columns


class Count:
    """A Progress that adds up."""

    total = seen = 0
    done_at: int | None = None

    def start(self, label: str, total_bytes: int) -> None:
        self.total = total_bytes

    def advance(self, n: int) -> None:
        self.seen += n

    def done(self) -> None:
        self.done_at = self.seen


def test_progress_counts_every_byte(llama_checkpoint, config):
    progress, checkpoint = Count(), llama_checkpoint()
    load_decoder(checkpoint, config, dtype=torch.float32, progress=progress)
    assert progress.total == progress.seen == progress.done_at == sum(t.nbytes for t in checkpoint.tensors.values())


def test_progress_is_done_also_after_a_failure(llama_checkpoint, config):
    progress, checkpoint = Count(), llama_checkpoint()
    del checkpoint.tensors["model.norm.weight"]
    with pytest.raises(CheckpointError):
        load_decoder(checkpoint, config, dtype=torch.float32, progress=progress)
    assert progress.done_at is not None


def test_logits_are_float32_in_every_dtype(llama_checkpoint, config):
    decoder = load_decoder(llama_checkpoint(), config, dtype=torch.bfloat16)
    assert decoder.logits(torch.randn(2, 32, dtype=torch.bfloat16)).dtype == torch.float32


class LateUpload:
    """loading/upload.py's Upload without a device: what it is to fill holds NaN until it is waited for."""

    def __init__(self, device, progress):
        self.added = []

    def add(self, span, target):
        target.fill_(float("nan"))
        self.added.append((span, target))

    def wait(self):
        while self.added:
            span, target = self.added.pop()
            with span.path.open("rb") as file:
                read_into(span.path, file.fileno(), span.offset, target.view(-1).view(torch.uint8))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.wait()


@pytest.mark.parametrize("quantize", [None, "int8", "int4", "fp8"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_values_that_come_late_are_waited_for(
    llama_checkpoint, config, held_tensors, tmp_path, monkeypatch, quantize, tied, stored
):
    (tmp_path / "config.json").write_text("{}")
    tensors = {name: values.to(stored) for name, values in llama_checkpoint().tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    config = dataclasses.replace(config, tie_embeddings=tied)

    def build():
        return held_tensors(load_decoder(checkpoint, config, dtype=torch.bfloat16, quantize=quantize))

    plain = build()
    monkeypatch.setattr(load, "upload_refusal", lambda device: None)
    monkeypatch.setattr(load, "Upload", LateUpload)
    monkeypatch.setattr(load, "FEWEST_BYTES", 100)
    late = build()
    assert len(plain) == len(late) > 10
    for found, expected in zip(late, plain, strict=True):
        if expected.is_mkldnn:
            found, expected = found.to_dense(), expected.to_dense()
        assert found.dtype == expected.dtype
        assert torch.equal(found.view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8))


def test_no_memory_left_names_the_tensor_and_how_far_it_came(llama_checkpoint, config):
    class Full(type(llama_checkpoint())):  # type: ignore[misc]
        def read(self, name):
            if name == "model.layers.1.mlp.up_proj.weight":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return super().read(name)

    with pytest.raises(OutOfMemoryError) as raised:
        load_decoder(Full(llama_checkpoint().tensors), config, dtype=torch.float32)
    message = str(raised.value)
    assert message.startswith("no memory is left on cpu for 'blocks.1.mlp.gate_up.weight', with 0.00 GiB of 0.00 GiB ")
    assert "quantization='int8'" in message
    assert "\n" not in message


def test_another_error_of_torchs_is_not_called_one_of_memory(llama_checkpoint, config):
    class Broken(type(llama_checkpoint())):  # type: ignore[misc]
        def read(self, name):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        load_decoder(Broken(llama_checkpoint().tensors), config, dtype=torch.float32)
