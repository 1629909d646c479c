"""gpt-fast (github.com/meta-pytorch/gpt-fast) from a checkout of it, whose own functions build, quantise and generate.

Its model reads Llama-like configs only: full attention, SiLU, no biases, an untied head. As its README runs it: the
decode step compiled with reduce-overhead, int8 per channel, int4 in groups of 32.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from paceline.benchmark.job import Job, Subject
from paceline.benchmark.protocol import LAST
from paceline.errors import UsageError
from paceline.phases import Phases

INT4_GROUP = 32
_MODULES = ("model", "generate", "quantize")


def build(job: Job, device: torch.device, phases: Phases) -> Subject:
    """Raises UsageError for a directory that is not gpt-fast's, a package that it needs, or a shape it has not."""
    with phases.time("import gpt-fast"):
        theirs = _import(job.gpt_fast or "")
    arguments = model_arguments(job.config, theirs["model"])
    # Its int4 product takes bfloat16 only.
    dtype = torch.bfloat16 if job.weight_format == "int4" else getattr(torch, job.dtype)
    with phases.time("weights"), torch.device(device):
        torch.manual_seed(0)
        model = _quantized(theirs, theirs["model"].Transformer(arguments).to(dtype), job.weight_format, device)
    step_weight_bytes = _step_weight_bytes(model)
    generate_module: Any = theirs["generate"]
    generate_module.decode_one_token = torch.compile(
        generate_module.decode_one_token, mode="reduce-overhead", fullgraph=True
    )
    # Of the largest size at once: a cache that grows would be compiled for anew.
    with torch.device(device):
        model.setup_caches(max_batch_size=1, max_seq_length=max(job.contexts) + LAST)
    extra = _known(generate_module.generate, {"batch_size": 1})

    def generate(prompt: Sequence[int], num_tokens: int) -> list[int]:
        ids = torch.tensor(list(prompt), dtype=torch.int, device=device)
        # It cannot make one token alone (it joins an empty list): its first token is timed with one step too many.
        answer, _ = generate_module.generate(
            model, ids, max(num_tokens, 2), interactive=False, draft_model=None, temperature=0.0, top_k=None, **extra
        )
        tokens: list[int] = answer.flatten()[len(prompt) : len(prompt) + num_tokens].tolist()
        return tokens

    head = model.output
    stored = sum(tensor.nbytes for tensor in (*head.parameters(), *head.buffers()))
    return Subject(
        generate,
        "checkout",
        dtype=str(dtype).removeprefix("torch."),
        weight_format=job.weight_format,
        step_weight_bytes=step_weight_bytes,
        head_bits=8 * stored / (arguments.vocab_size * arguments.dim),
    )


def model_arguments(config: Any, model: ModuleType | Any) -> Any:
    """gpt-fast's ModelArgs of a config.json. Raises UsageError for what they cannot say."""
    if config.get("model_type") not in ("llama", "mistral") or config.get("tie_word_embeddings"):
        raise UsageError("gpt-fast has Llama's and Mistral's layers with an untied head only: choose llama-3.1-8b")
    given = {
        "block_size": config["max_position_embeddings"],
        "vocab_size": config["vocab_size"],
        "n_layer": config["num_hidden_layers"],
        "n_head": config["num_attention_heads"],
        "n_local_heads": config["num_key_value_heads"],
        "dim": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "rope_base": config["rope_theta"],
        "norm_eps": config["rms_norm_eps"],
    }
    if scaling := config.get("rope_scaling"):
        given["rope_scaling"] = {name: value for name, value in scaling.items() if name != "rope_type"}
    known = {field.name for field in dataclasses.fields(model.ModelArgs)}
    # An old checkout scales no rotary embedding, which changes values and no time.
    return model.ModelArgs(**{name: value for name, value in given.items() if name in known})


def _import(folder: str) -> dict[str, Any]:
    path = Path(folder).expanduser().resolve()
    if not all((path / f"{name}.py").is_file() for name in _MODULES):
        raise UsageError(f"{path} is no checkout of gpt-fast: it has no model.py, generate.py and quantize.py")
    sys.path.insert(0, str(path))
    try:
        return {name: importlib.import_module(name) for name in _MODULES}
    except ImportError as error:
        raise UsageError(f"gpt-fast does not import here: {error}; install what its README lists") from error
    finally:
        sys.path.remove(str(path))


def _quantized(theirs: dict[str, Any], model: Any, weight_format: str, device: torch.device) -> Any:
    """Through the handlers of its quantize.py, without a file in between."""
    quantize = theirs["quantize"]
    if weight_format == "dense":
        return model.eval()
    if weight_format == "int8":
        handler = quantize.WeightOnlyInt8QuantHandler(model)
    elif weight_format == "int4":
        quantize.prepare_int4_weight_and_scales_and_zeros = partial(packed_int4, quantize.group_quantize_tensor)
        handler = quantize.WeightOnlyInt4QuantHandler(model, INT4_GROUP)
    else:
        raise UsageError(f"gpt-fast has no weights in {weight_format}: it has int8 and int4")
    on_cuda = {"use_cuda": device.type == "cuda"}
    state = handler.create_quantized_state_dict(**_known(handler.create_quantized_state_dict, on_cuda))
    model = handler.convert_for_runtime(**_known(handler.convert_for_runtime, on_cuda))
    model.load_state_dict(state, assign=True)
    return model.to(device).eval()


def packed_int4(
    quantized: Callable[..., tuple[torch.Tensor, torch.Tensor]], weight: torch.Tensor, group: int, inner_k_tiles: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What its function of this name gives, for a torch that packs from bytes of two values each, the first one high
    (2.5 and later); its last checkouts hand over an int32 a value, which such a torch refuses."""
    values_NK, scales_and_zeros = quantized(weight, n_bit=4, groupsize=group)
    bytes_NK = (values_NK[:, ::2] << 4 | values_NK[:, 1::2]).to(torch.uint8)
    return torch.ops.aten._convert_weight_to_int4pack(bytes_NK, inner_k_tiles), scales_and_zeros


def _known(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Of `arguments` those that `function` takes: they came and went between its versions."""
    return {name: value for name, value in arguments.items() if name in inspect.signature(function).parameters}


def _step_weight_bytes(model: Any) -> int:
    """Parameters and buffers, the embedding's left out: it is indexed. Taken before the caches are made."""
    modules = [module for module in model.modules() if not isinstance(module, torch.nn.Embedding)]
    tensors = [t for m in modules for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
    return sum(tensor.nbytes for tensor in tensors)
