"""A model over two GPUs: NCCL, the one-shot sum, and both inside CUDA graphs."""

from __future__ import annotations

import io
import json
import os
import signal
import time

import pytest
import torch

from paceline.errors import EngineError
from paceline.kernels.one_shot import one_shot_ref
from paceline.llm import LLM
from paceline.parallel.processes import Ranks
from paceline.sampling.params import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 515,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
PROMPTS = [[5, 9, 33, 12, 61, 7, 8], [5, 9, 33, 12, 61, 40], [1]]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=19, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=5, max_tokens=12, ignore_eos=True, n=2),
    SamplingParams(temperature=0, max_tokens=25, ignore_eos=True),
]

# Sums of many sizes and dtypes on two GPUs, plainly and from a graph: what each rank got, beside its part.
SUMS = """
import io
from dataclasses import replace
import torch
from torch._C._distributed_c10d import TCPStore
from paceline.config import ParallelConfig
from paceline.parallel.communicator import connect
from paceline.parallel.processes import failure_of
from paceline.parallel.split import Rank

def chained(communicator, device):
    # Sums of changing sizes, each of what the one before gave, with no wait on the host and ranks out of step; and the
    # same through NCCL. In float32 two ranks' sums are the same bits whoever adds them.
    found = []
    for one in (communicator, replace(communicator, inboxes=None)):
        x = torch.randn(65536, generator=torch.Generator(device).manual_seed(1), device=device)
        for step in range(3000):
            size = (2048, 65536, 4, 5000)[step % 4]
            if step % 500 == 250 * one.rank.index:
                torch.cuda._sleep(2_000_000)
            x[:size] = one.all_reduce(x[:size] * (0.45 + 0.11 * one.rank.index))
        found.append(x.cpu())
    return found

def main(connection):
    index, port = connection.recv()
    try:
        device = torch.device("cuda", index)
        store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        communicator = connect(Rank(index, ParallelConfig(2)), store, device)
        found = [communicator.inboxes is not None, *chained(communicator, device)]
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            for size in (7, 4096, 65536, 1 << 20):
                generator = torch.Generator(device).manual_seed(index)
                x = torch.randn(2, size, generator=generator, device=device).to(dtype)
                plain = communicator.all_reduce(x.clone())
                graph = torch.cuda.CUDAGraph()
                given = x.clone()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    summed = communicator.all_reduce(given.clone())
                for _ in range(3):
                    graph.replay()
                torch.cuda.synchronize()
                found.append((x.cpu(), plain.cpu(), summed.cpu()))
        # As bytes: a tensor is sent as a handle that only processes of one family open.
        saved = io.BytesIO()
        torch.save(found, saved)
        connection.send(saved.getvalue())
    except Exception as error:
        connection.send(failure_of(error))
    connection.recv()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def answers(model, **options):
    with LLM(model, load_format="dummy", skip_tokenizer_init=True, max_model_len=256, **options) as llm:
        return [[answer.token_ids for answer in one.outputs] for one in llm.generate(PROMPTS, PARAMS)]


@pytest.mark.parametrize(
    "split", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}, {"tensor_parallel_size": 2, "mode": "eager"}]
)
def test_two_gpus_choose_the_tokens_of_one_in_float32(model, split):
    assert answers(model, dtype="float32", **split) == answers(model, dtype="float32")


def test_half_precision_runs_as_graphs_on_both(model):
    with LLM(
        model, load_format="dummy", skip_tokenizer_init=True, max_model_len=256, dtype="bfloat16",
        tensor_parallel_size=2,
    ) as llm:  # fmt: skip
        chosen = {choice.operation: choice.kernel for choice in llm.choices(1)}
        assert chosen["launches"] == "one CUDA graph"
        assert chosen["sum of down over the ranks"].startswith("Triton, one-shot")
        assert len(llm.generate(PROMPTS, PARAMS)) == 3


def test_a_rank_killed_during_graphs_ends_the_run_within_seconds(model):
    with LLM(
        model, load_format="dummy", skip_tokenizer_init=True, max_model_len=512, dtype="bfloat16",
        tensor_parallel_size=2,
    ) as llm:  # fmt: skip
        stream = llm.stream([1, 2, 3], SamplingParams(temperature=0, max_tokens=500, ignore_eos=True))
        for _ in range(5):
            next(stream)
        os.kill(llm.model.ranks.pids[1], signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(EngineError, match="SIGKILL"):
            list(stream)
        assert time.monotonic() - began < 5


def test_sums_on_two_gpus_are_the_twins_and_the_same_on_both(tmp_path, monkeypatch):
    from torch._C._distributed_c10d import TCPStore

    (tmp_path / "sums_of_test.py").write_text(SUMS)
    monkeypatch.syspath_prepend(str(tmp_path))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = Ranks("sums_of_test:main", 2, {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"})
    try:
        ranks.send_each([(index, store.port) for index in range(2)])
        first, second = (torch.load(io.BytesIO(saved)) for saved in ranks.gather())
    finally:
        ranks.close()
    assert first[0], "the GPUs of one host map each other's memory"
    for one in (first[2], second[1], second[2]):
        assert torch.equal(one, first[1])
    for (x, plain, graphed), (y, other, other_graphed) in zip(first[3:], second[3:], strict=True):
        for one in (graphed, other, other_graphed):
            assert torch.equal(one, plain)
        eps = torch.finfo(x.dtype).eps
        torch.testing.assert_close(plain, one_shot_ref([x, y]), rtol=2 * eps, atol=2 * eps)
