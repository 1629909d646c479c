"""Models larger than the memory they may take."""

from __future__ import annotations

import gc
import logging
import threading
from pathlib import Path

import pytest
import torch

from paceline import sizing
from paceline.engine import offload
from paceline.errors import CheckpointError, OutOfMemoryError, UsageError
from paceline.formats.stores import DiskStore
from paceline.llm import LLM
from paceline.sampling.params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
PROMPTS = [[5, 6, 7], [100, 101, 102, 103, 104], [9]]
LIMITS = {"max_num_seqs": 3, "max_num_batched_tokens": 16, "max_model_len": 32, "block_size": 4}


@pytest.fixture(scope="module")
def three_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 3-layer Llama of 13.6 MB in float32, of which 12.5 MB are the layers."""
    import transformers

    directory = tmp_path_factory.mktemp("three")
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=4
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def load(directory: Path, **options) -> LLM:
    return LLM(str(directory), device="cpu", skip_tokenizer_init=True, **LIMITS, **options)


def tokens(llm: LLM) -> list[tuple[int, ...]]:
    return [tuple(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, GREEDY)]


def held_bytes(llm: LLM) -> int:
    """Bytes of every tensor of the model and its cache, and the stream's buffers."""
    model = llm.model
    found = [t for m in model.engine.runner.model.modules() for t in vars(m).values() if isinstance(t, torch.Tensor)]
    biases = [m.bias_N for m in model.engine.runner.model.modules() if getattr(m, "bias_N", None) is not None]
    cache = [t for layer in model.engine.runner.kv for t in (layer.k_HSD, layer.v_HSD)]
    return sum(t.nbytes for t in found + biases + cache) + model.stream.buffer_bytes


def test_a_model_eight_times_the_memory_gives_the_same_tokens(three_layers, tmp_path, caplog):
    with load(three_layers) as whole:
        expected = tokens(whole)
        nbytes = whole.model.step_weight_bytes + 512 * 256 * 4
    budget = nbytes // 8
    with pytest.raises(OutOfMemoryError, match="offload='auto'"):
        load(three_layers, memory_gib=budget / sizing.GIB)
    with load(three_layers, memory_gib=budget / sizing.GIB, offload="auto", offload_dir=str(tmp_path)) as llm:
        assert tokens(llm) == expected
        assert held_bytes(llm) <= budget
        assert llm.model.stream.store.nbytes == pytest.approx(nbytes, rel=0.01)
    told = next(record.message for record in caplog.records if record.message.startswith("offload: every step"))
    assert "GiB from disk, measured at" in told
    assert "what the system caches of the file" in told
    assert "tokens/s for one request" in told


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_quantised_weights_can_be_offloaded(three_layers, tmp_path, quantization):
    with load(three_layers, quantization=quantization) as whole:
        expected = tokens(whole)
    with load(three_layers, quantization=quantization, offload="disk", offload_dir=str(tmp_path)) as llm:
        assert tokens(llm) == expected
        assert llm.model.stream.store.nbytes < 0.4 * 13.6e6


def test_too_little_memory_even_for_that_is_named(three_layers, tmp_path):
    with pytest.raises(OutOfMemoryError, match=r"max_num_batched_tokens|raise the memory limit|max_model_len"):
        load(three_layers, memory_gib=2e-4, offload="disk", offload_dir=str(tmp_path))


def test_a_load_that_fails_leaves_no_thread_behind(three_layers, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise CheckpointError("tensor 'x' is missing")

    monkeypatch.setattr("paceline.models.load.CheckpointParts.linear", fail)
    with pytest.raises(CheckpointError, match="'x' is missing"):
        load(three_layers, offload="disk", offload_dir=str(tmp_path))
    gc.collect()  # an open file would warn here, and a warning is an error
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("paceline-offload")]


def test_options_that_contradict_are_named(three_layers):
    with pytest.raises(UsageError, match="'sky'"):
        load(three_layers, offload="sky")
    with pytest.raises(UsageError, match="set offload='disk'"):
        load(three_layers, offload_dir="/tmp")
    with pytest.raises(UsageError, match="memory_gib must be greater than 0"):
        load(three_layers, memory_gib=0.0)
    with pytest.raises(UsageError, match="where a model on the CPU has them anyway"):
        load(three_layers, offload="host")


def test_a_full_disk_is_told_before_anything_is_written(three_layers, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OutOfMemoryError, match="name another offload_dir"):
        load(three_layers, offload="disk", offload_dir=str(tmp_path))


def test_a_gpu_takes_host_memory_while_there_is_room(monkeypatch, tmp_path):
    monkeypatch.setattr(offload, "HostStore", lambda capacity, pinned: ("host", capacity, pinned))  # needs a GPU
    cuda = torch.device("cuda")
    assert offload.open_store("auto", None, 10**6, cuda) == ("host", 10**6, True)
    monkeypatch.setattr(offload, "available_bytes", lambda device: 10**6)
    store = offload.open_store("auto", str(tmp_path), 10**6, cuda)
    assert isinstance(store, DiskStore)
    store.close()
    with pytest.raises(OutOfMemoryError, match="use offload='disk'"):
        offload.open_store("host", None, 10**6, cuda)


@pytest.fixture(autouse=True)
def _log_reaches_caplog(caplog):
    caplog.set_level(logging.INFO)
