"""transformers' own `generate`, as its users call it: eager, or with a static cache, which it compiles on CUDA."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
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


def load(config: Mapping[str, Any], dtype: str, device: torch.device) -> tuple[Any, str, int]:
    """A model of the shape with random weights, transformers' version, and the bytes of weights that a step reads.
    Raises UsageError where transformers is not installed."""
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise UsageError(f"--against transformers needs it: pip install transformers ({error})") from error
    of = getattr(torch, dtype)
    known = {name: value for name, value in config.items() if name not in ("architectures", "torch_dtype")}
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**known), dtype=of
        ).eval()
    # No end of the text: every answer has the length that is asked.
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    weights = sizing.step_weight_bytes(read_decoder_config(config), of.itemsize, stored_bytes("dense", of))
    return model, transformers.__version__, weights


def _build(job: Job, device: torch.device, phases: Phases, options: dict[str, Any]) -> Subject:
    with phases.time("import transformers"), suppress(ImportError):  # load says what is missing
        importlib.import_module("transformers")
    with phases.time("weights"):
        model, version, step_weight_bytes = load(job.config, job.dtype, device)

    def generate(prompt: Sequence[int], num_tokens: int) -> list[int]:
        ids = torch.tensor([list(prompt)], device=device)
        with torch.inference_mode():
            answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, **options)
        tokens: list[int] = answer[0, len(prompt) :].tolist()
        return tokens

    return Subject(
        generate,
        version,
        dtype=job.dtype,
        weight_format="dense",
        step_weight_bytes=step_weight_bytes,
        head_bits=8.0 * getattr(torch, job.dtype).itemsize,
    )
