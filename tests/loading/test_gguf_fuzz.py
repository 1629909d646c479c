"""Corrupt models of K-quants, in one file and in three: an error that says what is wrong, or values; never a crash."""

from __future__ import annotations

from pathlib import Path
from random import Random

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.errors import CheckpointError, UnsupportedModelError
from paceline.loading.gguf import read_gguf
from paceline.loading.gguf_checkpoint import GGUFCheckpoint

HIDDEN, HEADS = 256, 4
TENSORS = {
    "token_embd.weight": ("Q6_K", 8),
    "output_norm.weight": ("F32", 1),
    "blk.0.attn_norm.weight": ("F32", 1),
    "blk.0.attn_q.weight": ("Q4_K", 256),
    "blk.0.attn_k.weight": ("Q5_K", 128),
    "blk.0.attn_k.bias": ("F32", 1),
    "blk.0.attn_v.weight": ("Q3_K", 128),
    "blk.0.attn_output.weight": ("Q2_K", 256),
    "blk.0.ffn_norm.weight": ("F32", 1),
    "blk.0.ffn_gate.weight": ("IQ4_XS", 4),
    "blk.0.ffn_up.weight": ("IQ4_NL", 4),
    "blk.0.ffn_down.weight": ("Q5_0", 4),
    "rope_freqs.weight": ("F32", 1),
}


def write_model(path: Path, split: int = 0) -> list[Path]:
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_eos_token_id(2)
    generator = np.random.default_rng(5)
    for name, (type_name, rows) in TENSORS.items():
        kind = gguf.GGMLQuantizationType[type_name]
        elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
        if type_name == "F32":
            width = {"rope_freqs.weight": HIDDEN // HEADS // 2, "blk.0.attn_k.bias": 128}.get(name, HIDDEN)
            writer.add_tensor(name, np.ones(width, np.float32))
        else:
            raw = generator.integers(0, 256, (rows, HIDDEN // elements * nbytes), dtype=np.uint8)
            writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob(f"{path.stem}*.gguf"))


@pytest.fixture(scope="module", params=[0, 5], ids=["one file", "three parts"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, bytes, int]]:
    """Each part, its bytes, and where its header ends."""
    paths = write_model(tmp_path_factory.mktemp("gguf") / "model.gguf", request.param)
    assert len(paths) == (3 if request.param else 1)
    with GGUFCheckpoint(paths[0]) as checkpoint:
        assert len([checkpoint.read(name) for name in checkpoint.names()]) == len(TENSORS) - 1
        assert checkpoint.shape("model.layers.0.self_attn.q_proj.weight") == (256, 256)
    starts = [min(info.offset for info in read_gguf(path).tensors.values()) for path in paths]
    return [(path, path.read_bytes(), start) for path, start in zip(paths, starts, strict=True)]


def attempt(path: Path) -> None:
    """Open and read everything."""
    with GGUFCheckpoint(path) as checkpoint:
        for name in checkpoint.names():
            values = checkpoint.read(name)
            assert (tuple(values.shape), values.dtype) == (checkpoint.shape(name), checkpoint.dtype(name))
        assert isinstance(checkpoint.config["vocab_size"], int)


@settings(max_examples=300, deadline=None)
@given(random=st.randoms(use_true_random=True))
def test_flipped_bytes_of_a_header_are_an_error_or_a_model(
    model: list[tuple[Path, bytes, int]], random: Random
) -> None:
    path, data, start = random.choice(model)
    changed = bytearray(data)
    for _ in range(random.randint(1, 4)):
        changed[random.randrange(start)] = random.choice((0, 1, 255, random.randrange(256)))
    path.write_bytes(bytes(changed))
    message = ""
    try:
        attempt(model[0][0])
    except (CheckpointError, UnsupportedModelError) as error:
        message = str(error)
    finally:
        path.write_bytes(data)
    assert "\n" not in message


@settings(max_examples=100, deadline=None)
@given(random=st.randoms(use_true_random=True))
def test_a_truncated_part_is_refused(model: list[tuple[Path, bytes, int]], random: Random) -> None:
    path, data, _ = random.choice(model)
    end = max(info.offset + info.nbytes for info in read_gguf(path).tensors.values())
    path.write_bytes(data[: random.randrange(end)])
    try:
        with pytest.raises(CheckpointError, match=r"truncated or corrupt|not a GGUF file"):
            attempt(model[0][0])
    finally:
        path.write_bytes(data)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_bytes_are_values(model: list[tuple[Path, bytes, int]], seed: int) -> None:
    """Blocks have no checksum: whatever they hold is a number, perhaps not a finite one."""
    path, data, start = model[-1]
    noise = np.random.default_rng(seed).integers(0, 256, len(data) - start, dtype=np.uint8).tobytes()
    path.write_bytes(data[:start] + noise)
    try:
        if any(info.name == "rope_freqs.weight" for info in read_gguf(path).tensors.values()):
            with pytest.raises(UnsupportedModelError, match=r"rope_freqs\.weight do not follow"):
                attempt(model[0][0])
        else:
            attempt(model[0][0])
    finally:
        path.write_bytes(data)
