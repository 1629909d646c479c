"""A model over several processes, as a user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import Pipe

import pytest

from paceline.cli.app import main
from paceline.engine.rank import Facts, run_steps
from paceline.engine.ranks import compare
from paceline.engine.remote import RemoteRunner
from paceline.engine.step import ScheduledRequest, SchedulerOutput, StepOutput
from paceline.errors import EngineError, UsageError
from paceline.kernels import Choice
from paceline.llm import LLM
from paceline.planner.inference import plan
from paceline.sampling.params import SamplingParams

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 0.03,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
PROMPTS = [[5, 9, 33, 12, 61, 7, 8], [5, 9, 33, 12, 61, 40], [1]]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, logprobs=2, prompt_logprobs=1),
    SamplingParams(temperature=0.9, seed=5, max_tokens=12, ignore_eos=True, n=2),
    SamplingParams(use_beam_search=True, best_of=2, n=2, temperature=0, max_tokens=6, ignore_eos=True),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def load(model, **options):
    return LLM(
        model,
        load_format="dummy",
        skip_tokenizer_init=True,
        device="cpu",
        dtype="float32",
        max_model_len=64,
        kv_cache_gib=0.001,
        max_num_batched_tokens=8,
        max_num_seqs=4,
        **options,
    )


def answers(llm):
    outputs = llm.generate(PROMPTS, PARAMS)
    return [[tuple(answer.token_ids) for answer in output.outputs] for output in outputs], outputs


def test_two_processes_answer_as_one_and_one_that_dies_ends_the_run_with_its_reason(model):
    with load(model) as llm:
        expected, whole = answers(llm)
        figures = llm.stats()
    with load(model, tensor_parallel_size=2) as llm:
        pids = llm.model.ranks.pids
        found, outputs = answers(llm)
        assert found == expected
        for ours, theirs in zip(outputs[0].outputs[0].logprobs, whole[0].outputs[0].logprobs, strict=True):
            assert [one.logprob for one in ours.values()] == pytest.approx(
                [one.logprob for one in theirs.values()], abs=1e-4
            )
        assert len(outputs[0].prompt_logprobs) == len(whole[0].prompt_logprobs)
        assert llm.stats().kv_bytes_per_token == figures.kv_bytes_per_token / 2
        planned = plan(model, device="cpu", dtype="float32", max_model_len=64, tensor_parallel_size=2)
        assert llm.model.sizes.weights == planned.weights
        assert any("sum of down" in choice.operation for choice in llm.choices(1))
        stream = llm.stream([1, 2, 3], SamplingParams(temperature=0, max_tokens=50, ignore_eos=True))
        next(stream)
        os.kill(pids[1], signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(EngineError, match=r"rank 1 of 2 \(pid \d+\) was killed by SIGKILL"):
            list(stream)
        assert time.monotonic() - began < 5
        with pytest.raises(EngineError, match="rank 1 of 2"):
            llm.generate([1], SamplingParams(max_tokens=2))
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.slow
def test_four_processes_answer_as_one(model):
    with load(model) as llm:
        expected, _ = answers(llm)
    for sizes in ({"tensor_parallel_size": 4}, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}):
        with load(model, **sizes) as llm:
            assert answers(llm)[0] == expected


DRIVER = """
import sys, time
from paceline import LLM
llm = LLM(sys.argv[1], load_format="dummy", skip_tokenizer_init=True, device="cpu", dtype="float32", max_model_len=64,
          kv_cache_gib=0.001, tensor_parallel_size=2)
print(*llm.model.ranks.pids, flush=True)
time.sleep(100)
"""


def test_ranks_end_with_a_driver_that_is_killed(model):
    """Without a guard of __main__ in the script: ranks do not run it again."""
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, model], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    with driver.stdout:
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        assert len(pids) == 2
        driver.kill()
        driver.wait()
    deadline = time.monotonic() + 5
    while any(os.path.exists(f"/proc/{pid}") and not _zombie(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(not os.path.exists(f"/proc/{pid}") or _zombie(pid) for pid in pids)


def _zombie(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tensor_parallel_size": 3}, "3 does not divide the model's 4 attention heads"),
        ({"pipeline_parallel_size": 4}, "more than the model's 3 layers"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be at least 1"),
        ({"tensor_parallel_size": 2, "offload": "disk"}, "offload"),
        ({"tensor_parallel_size": 2, "deterministic": True}, "deterministic is of one device"),
    ],
)
def test_what_cannot_be_split_is_told_before_anything_starts(model, options, words, monkeypatch):
    monkeypatch.setattr("paceline.engine.ranks.Ranks", None)
    with pytest.raises(UsageError, match=words):
        load(model, **options)


def test_more_gpus_than_there_are_are_refused(model, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="needs 4 GPUs, and there are 1"):
        LLM(model, load_format="dummy", skip_tokenizer_init=True, device="cuda", tensor_parallel_size=2,
            pipeline_parallel_size=2)  # fmt: skip
    with pytest.raises(UsageError, match="is one device"):
        LLM(model, load_format="dummy", skip_tokenizer_init=True, device="cuda:0", tensor_parallel_size=2)


def fact(torch_version="2.11", device="cpu", memory=0):
    return Facts((("paceline", "1"), ("torch", torch_version)), device, memory)


def test_ranks_of_other_versions_are_refused_and_of_other_memory_told():
    assert compare([fact(), fact()]) == []
    with pytest.raises(EngineError, match=r"rank 1 runs torch 2.12 and rank 0 2.11"):
        compare([fact(), fact("2.12")])
    lines = compare([fact(device="big", memory=80 << 30), fact(device="small", memory=40 << 30)])
    assert "big, small" in lines[0]
    assert "40.00 GiB and 80.00 GiB" in lines[1]
    assert compare([fact(device="a", memory=85_000), fact(device="a", memory=85_001)]) == []


class Late:
    """A step of LateRunner's."""

    def __init__(self, index, done):
        self.index, self.done = index, done


class LateRunner:
    """Steps of two requests are done when launched, others when they are collected."""

    def __init__(self):
        self.launched = 0

    def launch(self, output):
        self.launched += 1
        return Late(self.launched, len(output.scheduled) != 1)

    def collect(self, launched):
        return StepOutput({"a": (launched.index,)})


def test_steps_ahead_come_back_in_order_whether_or_not_they_are_done():
    ours, theirs = Pipe()

    class Ranks:
        send, receive = staticmethod(ours.send), staticmethod(ours.recv)

    def serve():
        with pytest.raises(EOFError):
            run_steps(theirs, LateRunner(), 1, lambda rows: (Choice("x", "y"),), tells=True)

    thread = threading.Thread(target=serve)
    thread.start()
    runner = RemoteRunner(Ranks())
    row = ScheduledRequest("a", 0, (1,), 0, True, ((1,),))
    one, two = SchedulerOutput((row,)), SchedulerOutput((row, row))
    first = runner.launch(one)
    assert not first.done
    second = runner.launch(one)
    assert not second.done
    assert runner.collect(first).token_ids == {"a": (1,)}
    third = runner.launch(two)
    assert third.done
    assert [runner.collect(step).token_ids["a"] for step in (second, third)] == [(2,), (3,)]
    assert runner.choices(1) == (Choice("x", "y"),)
    ours.close()
    thread.join(5)
    assert not thread.is_alive()


def test_the_command_line_splits_too(tiny_directory, capsys):
    asked = ["generate", "--model", str(tiny_directory), "--device", "cpu", "--max-tokens", "2", "Hi"]
    assert main([*asked, "-tp", "4"]) == 2
    assert "tensor_parallel_size 4 does not divide the model's 2 attention heads" in capsys.readouterr().err
    assert main([*asked, "--pipeline-parallel-size", "3"]) == 2
    assert "more than the model's 2 layers" in capsys.readouterr().err
