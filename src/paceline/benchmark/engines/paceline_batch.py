"""Many requests at once through paceline's public face: one call of LLM.generate, as a user's script makes it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paceline.benchmark.engines.random_llm import random_llm
from paceline.benchmark.protocol import LAST, PROMPT
from paceline.benchmark.throughput import BatchJob
from paceline.benchmark.throughput_worker import BatchSubject
from paceline.benchmark.workload import Ask
from paceline.sampling.params import SamplingParams


def build(job: BatchJob, device: torch.device) -> BatchSubject:
    """With its defaults, prefix caching too; raises what LLM raises."""
    longest = max(PROMPT + LAST if job.batches else 0, 0 if job.workload is None else job.workload.longest)
    llm = random_llm(
        job.config,
        job.weight_format,
        device,
        dtype=job.dtype,
        mode=job.mode,
        max_model_len=longest,
        max_num_seqs=max(job.streams, *job.batches, 1),
        max_num_batched_tokens=job.step_tokens,
    )

    def generate(asks: Sequence[Ask]) -> list[list[int]]:
        params = [SamplingParams(temperature=0.0, max_tokens=ask.num_tokens, ignore_eos=True) for ask in asks]
        outputs = llm.generate([list(ask.prompt) for ask in asks], params)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return BatchSubject(
        generate,
        None,
        dtype=str(llm.model.dtype).removeprefix("torch."),
        step_weight_bytes=llm.stats().step_weight_bytes,
    )
