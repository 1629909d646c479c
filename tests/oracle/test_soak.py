"""Requests at random times into a cache that holds a part of them, for minutes: invariants hold after every step, each
answer is what its prompt gets alone, and memory does not grow. 20 minutes on a CPU, 8 on a GPU, or as many as
PACELINE_SOAK_MINUTES says.
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest
import torch

from paceline import LLM, SamplingParams
from paceline.engine.engine import EngineRequest, answer_ids

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "torch_dtype": "float32",
}
PROMPTS, LONGEST_PROMPT, LONGEST_ANSWER = 40, 120, 48
BLOCKS = 60  # of 16 tokens: six of the longest requests
MOST_WAITING = 40
TIE = 1e-4  # of a log probability, in float32: what two orders of a sum may decide


@pytest.mark.slow
def test_soak(tmp_path: Path) -> None:
    on_gpu = torch.cuda.is_available()
    seconds = 60 * float(os.environ.get("PACELINE_SOAK_MINUTES", 8 if on_gpu else 20))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    llm = LLM(
        str(tmp_path / "config.json"),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_num_seqs=16,
        max_num_batched_tokens=128,
        num_blocks=BLOCKS,
        dtype="float32",
    )
    engine, draw = llm.model.engine, random.Random(7)
    shared = [draw.randrange(1, 512) for _ in range(40)]
    prompts = []
    for index in range(PROMPTS):
        own = [draw.randrange(1, 512) for _ in range(draw.randrange(1, LONGEST_PROMPT - 40))]
        prompts.append(tuple(shared[: draw.randrange(40)] + own if index % 2 else own))
    greedy = SamplingParams(temperature=0.0, max_tokens=LONGEST_ANSWER, ignore_eos=True)
    alone = [tuple(llm.generate([list(prompt)], greedy)[0].outputs[0].token_ids) for prompt in prompts]

    def held() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return torch.cuda.memory_allocated() if on_gpu else pages * os.sysconf("SC_PAGESIZE")

    asked: dict[str, tuple[int, int]] = {}  # greedy requests: their prompt, and how many tokens
    tokens: dict[str, list[int]] = {}
    different: dict[tuple[int, int], int] = {}  # (prompt, place) -> the token there that is not the lone answer's
    arrivals = ended = aborted = 0
    start, memory_halfway = time.monotonic(), None
    while (age := time.monotonic() - start) < seconds or engine.has_work:
        waiting = engine.scheduler.num_waiting
        while age < seconds and waiting < MOST_WAITING and draw.random() < 0.6:
            prompt, count = draw.randrange(PROMPTS), draw.randrange(1, LONGEST_ANSWER + 1)
            name, kind = f"{arrivals}", draw.random()
            params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
            if kind < 0.2:  # sampled, in several answers that share the prompt's blocks
                params = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=count, n=3, ignore_eos=True)
            else:
                asked[name] = prompt, count
            engine.add_request(EngineRequest(name, prompts[prompt], params))
            tokens.update({answer: [] for answer in answer_ids(name, params)})
            arrivals, waiting = arrivals + 1, waiting + 1
        if tokens and draw.random() < 0.02:
            name = draw.choice(list(tokens))
            engine.abort(name)
            del tokens[name]
            aborted += 1
        for update in engine.step():
            assert update.error is None, update.error
            if update.request_id not in tokens:
                continue  # aborted while its step was on its way
            tokens[update.request_id].extend(update.new_token_ids)
            if update.finish_reason is None:
                continue
            assert update.finish_reason == "length"
            found = tokens.pop(update.request_id)
            ended += 1
            if update.request_id in asked:
                prompt, count = asked.pop(update.request_id)
                assert len(found) == count
                place = next(
                    (i for i, pair in enumerate(zip(found, alone[prompt], strict=False)) if len(set(pair)) > 1), None
                )
                if place is not None:
                    different[prompt, place] = found[place]
        engine.scheduler.check_invariants()
        if memory_halfway is None and age > seconds / 2:
            memory_halfway = held()  # by then a CPU's libraries keep as many compiled products as they ever do
    stats = engine.scheduler.stats
    counted = f"{arrivals} requests, {ended} answers, {aborted} aborted, {stats.num_preemptions} preemptions"
    print(f"{counted}, {held():,} bytes, {len(different)} ties")
    assert not tokens
    assert set(stats.cache.used_blocks) == {0}
    assert stats.num_preemptions > ended / 100
    assert stats.cache.prefix_hit_tokens > 0
    assert memory_halfway is not None
    assert held() < 1.05 * memory_halfway
    for (prompt, place), token in different.items():
        params = SamplingParams(temperature=0.0, max_tokens=place + 1, ignore_eos=True, logprobs=-1)
        (lone,) = llm.generate([list(prompts[prompt])], params)[0].outputs
        likely = lone.logprobs[place]
        gap = likely[alone[prompt][place]].logprob - likely[token].logprob
        assert gap < TIE, f"token {place} of prompt {prompt}: {token}, not {alone[prompt][place]}, {gap} less likely"
