"""transformers' own `generate` over batches padded on the left: what its users do with many prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paceline.benchmark.engines.transformers_generate import load
from paceline.benchmark.throughput import BatchJob
from paceline.benchmark.throughput_worker import BatchSubject
from paceline.benchmark.workload import Ask


def build(job: BatchJob, device: torch.device) -> BatchSubject:
    """Eager, with its default cache. Raises UsageError where transformers is not installed."""
    model, version, step_weight_bytes = load(job.config, job.dtype, device)

    def generate(asks: Sequence[Ask]) -> list[list[int]]:
        """So many at a time as may run at once, those of like lengths together, as its batch ends with its longest."""
        order = sorted(range(len(asks)), key=lambda index: (asks[index].num_tokens, len(asks[index].prompt)))
        answers: list[list[int]] = [[] for _ in asks]
        for first in range(0, len(order), job.streams):
            batch = order[first : first + job.streams]
            width = max(len(asks[index].prompt) for index in batch)
            ids, mask = (torch.zeros((len(batch), width), dtype=torch.int64) for _ in range(2))
            for row, index in enumerate(batch):
                prompt = asks[index].prompt
                ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
                mask[row, width - len(prompt) :] = 1
            most = max(asks[index].num_tokens for index in batch)
            with torch.inference_mode():
                found = model.generate(ids.to(device), attention_mask=mask.to(device), max_new_tokens=most)
            for index, tokens in zip(batch, found[:, width:].tolist(), strict=True):
                answers[index] = tokens[: asks[index].num_tokens]
        return answers

    return BatchSubject(generate, version, job.dtype, step_weight_bytes)
