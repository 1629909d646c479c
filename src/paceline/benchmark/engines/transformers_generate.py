"""transformers' own `generate`, as its users call it: eager, or with a static cache, which it compiles on CUDA."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from paceline import sizing
from paceline.benchmark.job import Job, Subject
from paceline.errors import UsageError
from paceline.formats import stored_bytes
from paceline.models.registry import read_decoder_config
from paceline.phases import Phases


def build(job: Job, device: torch.device, phases: Phases) -> Subject:
    """Eager, with its default cache. Raises UsageError where transformers is not installed."""
    return _build(job, device, phases, {})


def build_static(job: Job, device: torch.device, phases: Phases) -> Subject:
    """With a static cache, for which transformers (from 4.45) compiles the forward by itself, on CUDA."""
    return _build(job, device, phases, {"cache_implementation": "static"})


def _build(job: Job, device: torch.device, phases: Phases, options: dict[str, Any]) -> Subject:
    with phases.time("import transformers"):
        try:
            transformers: Any = importlib.import_module("transformers")
        except ImportError as error:
            raise UsageError(f"--against transformers needs it: pip install transformers ({error})") from error
    dtype = getattr(torch, job.dtype)
    known = {name: value for name, value in job.config.items() if name not in ("architectures", "torch_dtype")}
    with phases.time("weights"), torch.device(device):
        config = transformers.AutoConfig.for_model(**known)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    # No end of the text: every answer has the length that is asked.
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)

    def generate(prompt: Sequence[int], num_tokens: int) -> list[int]:
        ids = torch.tensor([list(prompt)], device=device)
        with torch.inference_mode():
            answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, **options)
        tokens: list[int] = answer[0, len(prompt) :].tolist()
        return tokens

    return Subject(
        generate,
        transformers.__version__,
        dtype=job.dtype,
        weight_format="dense",
        step_weight_bytes=sizing.step_weight_bytes(
            read_decoder_config(job.config), dtype.itemsize, stored_bytes("dense", dtype)
        ),
        head_bits=8.0 * dtype.itemsize,
    )
