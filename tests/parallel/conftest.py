"""Ranks as threads of one process, over gloo: what each computes is what its process would."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from paceline.config import ParallelConfig
from paceline.parallel.communicator import Communicator
from paceline.parallel.split import Rank

SIZES = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 0.03,
    "tie_word_embeddings": False,
}


def config(architecture: str, model_type: str, **more: Any) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": model_type, **SIZES, **more}


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": config("LlamaForCausalLM", "llama", rope_theta=100.0),
    "llama-mqa": config("LlamaForCausalLM", "llama", rope_theta=100.0, num_key_value_heads=1, tie_word_embeddings=True),
    "llama-bias": config("LlamaForCausalLM", "llama", rope_theta=100.0, attention_bias=True, mlp_bias=True),
    "qwen3": config("Qwen3ForCausalLM", "qwen3", rope_theta=100.0, head_dim=16),
    "gemma2": config(
        "Gemma2ForCausalLM",
        "gemma2",
        rope_theta=100.0,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=6,
        hidden_activation="gelu_pytorch_tanh",
        tie_word_embeddings=True,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        num_hidden_layers=4,
    ),
    "mixtral": config("MixtralForCausalLM", "mixtral", rope_theta=100.0, num_local_experts=5, num_experts_per_tok=2),
    "qwen3-moe-mixed": config(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        rope_theta=100.0,
        head_dim=16,
        moe_intermediate_size=40,
        num_experts=5,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=2,
        mlp_only_layers=[],
    ),
    "falcon": {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "vocab_size": 67,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
        "parallel_attn": True,
        "bias": False,
        "alibi": False,
        "max_position_embeddings": 256,
        "layer_norm_epsilon": 0.03,
    },
    "bloom": {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "vocab_size": 67,
        "hidden_size": 64,
        "n_layer": 3,
        "n_head": 4,
        "layer_norm_epsilon": 0.03,
        "seq_length": 256,
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": 67,
        "n_embd": 48,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 256,
        "n_ctx": 256,
        "layer_norm_epsilon": 0.03,
        "activation_function": "gelu_new",
    },
    "phi3": config("Phi3ForCausalLM", "phi3", rope_theta=100.0, pad_token_id=0),
    "opt": {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": 67,
        "hidden_size": 48,
        "word_embed_proj_dim": 48,
        "ffn_dim": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "activation_function": "relu",
        "do_layer_norm_before": True,
    },
}


@pytest.fixture(scope="session")
def configs() -> dict[str, dict[str, Any]]:
    """config.json of small models, by what is special about them."""
    return CONFIGS


RunRanks = Callable[[ParallelConfig, Callable[[Communicator], Any]], list[Any]]


@pytest.fixture(scope="session")
def run_ranks() -> RunRanks:
    """Call a function on every rank at once, each in a thread with groups of its own; what each returns, in order. The
    first rank's error is raised."""

    def run(parallel: ParallelConfig, work: Callable[[Communicator], Any]) -> list[Any]:
        store = dist.HashStore()
        results: list[Any] = [None] * parallel.world_size
        errors: list[BaseException] = []

        def group(name: str, index: int, count: int) -> dist.ProcessGroup:
            return dist.ProcessGroupGloo(dist.PrefixStore(name, store), index, count, timedelta(seconds=20))

        def rank_thread(index: int) -> None:
            rank = Rank(index, parallel)
            try:
                world = group("world", index, parallel.world_size)
                shards = group(f"stage {rank.stage}", rank.tensor, parallel.tensor)
                stages = group(f"shard {rank.tensor}", rank.stage, parallel.pipeline)
                results[index] = work(Communicator(rank, world, shards, stages))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=rank_thread, args=(i,), daemon=True) for i in range(parallel.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        if errors:
            raise errors[0]
        assert not any(thread.is_alive() for thread in threads), "a rank hangs"
        return results

    return run
