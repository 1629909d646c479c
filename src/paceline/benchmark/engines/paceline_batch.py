"""Many requests at once through paceline's public face: one call of LLM.generate, as a user's script makes it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from paceline.benchmark.protocol import LAST, PROMPT
from paceline.benchmark.throughput import BatchJob
from paceline.benchmark.throughput_worker import BatchSubject
from paceline.benchmark.workload import Ask
from paceline.llm import LLM
from paceline.sampling.params import SamplingParams


def build(job: BatchJob, device: torch.device) -> BatchSubject:
    """With its defaults, prefix caching too; raises what LLM raises."""
    longest = max(PROMPT + LAST if job.batches else 0, 0 if job.workload is None else job.workload.longest)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(dict(job.config)))
        llm = LLM(
            str(path),
            load_format="dummy",
            model_impl="paceline",
            skip_tokenizer_init=True,
            dtype=job.dtype,
            device=str(device),
            mode=job.mode,
            quantization=None if job.weight_format == "dense" else job.weight_format,
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
