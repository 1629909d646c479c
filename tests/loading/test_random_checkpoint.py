"""Random weights: of the true names and shapes, the same every time, and fit to be run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.errors import CheckpointError, UnsupportedModelError, UsageError
from paceline.llm import LLM
from paceline.loading.random_checkpoint import RandomCheckpoint
from paceline.sampling.params import SamplingParams

CONFIGS = Path(__file__).parents[1] / "models" / "configs"
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
}


def make(config: dict[str, Any] = TINY, **options: Any) -> RandomCheckpoint:
    return RandomCheckpoint(config, **{"dtype": torch.float32, **options})


@pytest.fixture
def random_llm(tmp_path: Path) -> Callable[..., LLM]:
    def build(config: dict[str, Any] = TINY, **options: Any) -> LLM:
        (tmp_path / "config.json").write_text(json.dumps(config))
        given = {"load_format": "dummy", "skip_tokenizer_init": True, "device": "cpu", **options}
        return LLM(str(tmp_path / "config.json"), **given)

    return build


def test_a_model_of_random_weights_is_made_without_torchs_compiler(tmp_path: Path) -> None:
    """Its import takes 5 s, and one operation too many on tensors without memory is enough for it."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    program = (
        "import sys; from paceline import LLM\n"
        "LLM(sys.argv[1], load_format='dummy', skip_tokenizer_init=True, device='cpu')\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "config.json")], check=True, timeout=120)


@pytest.mark.parametrize(
    "name", ["llama-3.1-8b", "smollm2-135m", "gpt2", "falcon-40b", "bloom-560m", "phi-3-mini-4k-instruct"]
)
def test_names_and_shapes_are_transformers_own(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    architecture = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        theirs = architecture(architecture.config_class(**{k: v for k, v in config.items() if k != "architectures"}))
    shapes = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    if config.get("tie_word_embeddings", True):
        shapes.pop("lm_head.weight", None)
    checkpoint = make(config)
    assert {key: checkpoint.shape(key) for key in checkpoint.names()} == shapes


def test_experts_have_a_tensor_each() -> None:
    """As Qwen3-30B-A3B's files have them; transformers 5 fuses them when it loads."""
    checkpoint = make(json.loads((CONFIGS / "qwen3-30b-a3b.json").read_text()))
    assert len(checkpoint.names()) == 18_867
    assert checkpoint.shape("model.layers.47.mlp.experts.127.down_proj.weight") == (2048, 768)
    assert checkpoint.shape("model.layers.0.mlp.gate.weight") == (128, 2048)


def test_a_tensor_is_a_function_of_seed_and_name() -> None:
    first, again, other = make(), make(), make(seed=1)
    names = sorted(first.names())
    values = {name: first.read(name) for name in names}
    for name in reversed(names):
        assert torch.equal(again.read(name), values[name])
        assert not torch.equal(other.read(name), values[name])
    same_shape = [values[f"model.layers.{layer}.self_attn.q_proj.weight"] for layer in range(3)]
    assert not torch.equal(same_shape[0], same_shape[1])
    assert len({tensor.data_ptr() for tensor in same_shape}) == 3


def test_it_says_what_it_holds() -> None:
    checkpoint = make(dtype=torch.bfloat16)
    values = [checkpoint.read(name) for name in checkpoint.names()]
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in values)
    assert {tensor.dtype for tensor in values} == {torch.bfloat16} == {checkpoint.dtype("lm_head.weight")}
    with pytest.raises(CheckpointError, match="has no tensor 'lm_tail'"):
        checkpoint.read("lm_tail")


def test_a_config_that_no_family_reads() -> None:
    with pytest.raises(UnsupportedModelError, match="unknown architecture 'MambaForCausalLM'"):
        make({"architectures": ["MambaForCausalLM"]})


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_logits_are_of_size_one_at_any_depth(dtype: str, random_llm: Callable[..., LLM]) -> None:
    for layers in (1, 40):
        with random_llm({**TINY, "num_hidden_layers": layers}, dtype=dtype) as llm:
            params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=256)
            (answer,) = llm.generate([[5, 6, 7]], params)
            assert answer.outputs[0].logprobs is not None
            logprobs = [entry.logprob for entry in answer.outputs[0].logprobs[0].values()]
            assert 0.5 < torch.tensor(logprobs).std() < 2


def test_a_dummy_generates_tokens_that_differ(random_llm: Callable[..., LLM], tmp_path: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)

    def tokens(**options: Any) -> tuple[int, ...]:
        with random_llm(**options) as llm:
            return tuple(llm.generate([[5, 6, 7]], params)[0].outputs[0].token_ids)

    first = tokens()
    assert len(set(first)) > 8
    assert tokens() == first
    assert tokens(seed=1) != first
    assert tokens(offload="disk", offload_dir=str(tmp_path)) == first


def test_every_weight_is_made_and_read(random_llm: Callable[..., LLM], held_bytes: Callable[[object], int]) -> None:
    with random_llm() as llm:
        constants = 16 * 4  # the rotary embedding's frequencies
        assert held_bytes(llm.model.engine.runner.model) == make().nbytes + constants


def test_what_is_refused(random_llm: Callable[..., LLM]) -> None:
    with pytest.raises(UsageError, match="unknown load_format 'dumy'; did you mean 'dummy'"):
        random_llm(load_format="dumy")
    with pytest.raises(UsageError, match="comes without a tokenizer: set skip_tokenizer_init=True"):
        random_llm(skip_tokenizer_init=False)
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM"):
        random_llm({"architectures": ["MambaForCausalLM"]})
