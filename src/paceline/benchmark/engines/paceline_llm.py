"""paceline through its public face: LLM with load_format="dummy", LLM.generate."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paceline import sizing
from paceline.benchmark.engines.random_llm import random_llm
from paceline.benchmark.job import Job, Subject
from paceline.benchmark.protocol import LAST
from paceline.engine.memory import Sizes
from paceline.engine.model_runner import ModelRunner
from paceline.errors import UsageError
from paceline.formats import stored_bytes
from paceline.phases import Phases
from paceline.sampling.params import SamplingParams

STEP_TOKENS = 2048  # a longer prompt is read in chunks


def build(job: Job, device: torch.device, phases: Phases) -> Subject:
    """Raises what LLM raises."""
    longest = max(job.contexts) + LAST
    llm = random_llm(
        job.config,
        job.weight_format,
        device,
        dtype=job.dtype,
        mode=job.mode,
        tensor_parallel_size=job.tensor_parallel_size,
        max_model_len=longest,
        max_num_seqs=1,
        max_num_batched_tokens=STEP_TOKENS,
        enable_prefix_caching=False,  # rounds repeat their prompt
    )
    phases.seconds |= {name: s for name, s in llm.stats().phases.items() if name not in phases.seconds}  # the device's
    runner = llm.model.engine.runner
    sizes = llm.model.sizes
    if sizes is None:
        raise UsageError(f"{job.shape} runs through transformers' modules: only models of a family are measured")
    cache = sizing.cache_bytes(sizes.config.kv_groups, llm.model.num_blocks, sizes.block_size, sizes.dtype.itemsize)
    decode = runner.decode if isinstance(runner, ModelRunner) else None  # of a model that is split the ranks have it
    head = (sizes.config.vocab_size, sizes.config.hidden_size)

    def generate(prompt: Sequence[int], num_tokens: int) -> list[int]:
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        return list(llm.generate([list(prompt)], params)[0].outputs[0].token_ids)

    return Subject(
        generate,
        None,
        dtype=str(llm.model.dtype).removeprefix("torch."),
        weight_format=job.weight_format,
        step_weight_bytes=llm.stats().step_weight_bytes,
        head_bits=8 * stored_bytes(sizes.format, sizes.dtype).head(*head) / (head[0] * head[1]),
        planned=_planned(sizes, job, cache),
        held={"cache": cache, "decode buffers": 0 if decode is None else decode.nbytes},
        load_peak=llm.model.load_peak,
    )


def _planned(sizes: Sizes, job: Job, cache: int) -> dict[str, int]:
    """By the formulas that `paceline plan` shows; the step is the largest that is run here."""
    longest = max(job.contexts)
    tokens = min(longest, STEP_TOKENS)
    return {
        "loading": sizes.loading,
        "weights": sizes.weights.total,
        "cache": cache,
        "decode buffers": sizes.buffers(longest + LAST),
        "graphs": sizes.graph_pool,
        "cuBLAS": sizes.workspace,
        "step": sizes.step_of(sizing.StepShape(tokens, 1, longest + LAST, tokens, greedy=True, scores=False)),
    }
