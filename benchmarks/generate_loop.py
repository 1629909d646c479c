"""Where the time of an encoder-decoder's `model.generate` goes, and what our loop makes of it; random weights, greedy
and beams.

    python benchmarks/generate_loop.py --models t5-base,whisper-small --batches 1,8 --beams 1,4 --tokens 64

For transformers' own loop, in float32, the time is divided into the encoder, the forwards of the decoder, and what is
neither: the loop. The loop's parts are timed by wrapping the functions that do them, in a run of their own, since the
wrappers cost time too. Ours is the same call after `paceline.optimize`, in float32, where its tokens are compared, and
in --dtype; --compiled adds transformers' own fast path, a static cache and a compiled forward. All are timed in turns,
best of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import transformers
from transformers import generation
from transformers.cache_utils import EncoderDecoderCache

import paceline

SHAPES: dict[str, tuple[int, int, int]] = {  # width, layers a side, heads
    "t5-small": (512, 6, 8),
    "t5-base": (768, 12, 12),
    "whisper-tiny": (384, 4, 6),
    "whisper-small": (768, 12, 12),
}
CPU_TIME = "--cpu-time" in sys.argv
LOOP_PARTS: dict[str, tuple[Any, str]] = {
    "logits processors": (generation.LogitsProcessorList, "__call__"),
    "input preparation": (generation.GenerationMixin, "prepare_inputs_for_generation"),
    "bookkeeping of arguments": (generation.GenerationMixin, "_update_model_kwargs_for_generation"),
    "stopping criteria": (generation.StoppingCriteriaList, "__call__"),
    "cache reordered": (EncoderDecoderCache, "reorder_cache"),
}


def build(name: str) -> Any:
    """A model of the shape with random weights, float32."""
    width, layers, heads = SHAPES[name]
    torch.manual_seed(0)
    if name.startswith("t5"):
        config = transformers.T5Config(
            d_model=width, d_ff=4 * width, num_layers=layers, num_heads=heads, decoder_start_token_id=0
        )
        return transformers.T5ForConditionalGeneration(config).eval()
    config = transformers.WhisperConfig(
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
    )
    return transformers.WhisperForConditionalGeneration(config).eval()


def inputs_of(name: str, model: Any, batch: int, source: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    if name.startswith("t5"):
        ids = torch.randint(2, model.config.vocab_size, (batch, source), device=model.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {"input_features": torch.randn(batch, 80, 3000, device=model.device, dtype=model.dtype)}


def now() -> float:
    """Seconds of this process on its processors with --cpu-time, else of the wall clock."""
    return time.process_time() if CPU_TIME else time.perf_counter()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def timed_modules(model: Any, spent: dict[str, float]) -> Iterator[None]:
    """Adds to `spent` what the encoder takes, and the model's forward (which, in generate, is the decoder's)."""
    began: list[float] = []

    def before(*_: Any) -> None:
        synchronize(model.device)
        began.append(now())

    def after(part: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            synchronize(model.device)
            spent[part] += now() - began.pop()

        return hook

    hooks = []
    for part, module in (("encoder", model.get_encoder()), ("decoder forwards", model)):
        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after(part))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def timed_parts(spent: dict[str, float]) -> Iterator[None]:
    """Adds to `spent` what each of the loop's parts takes."""
    originals = {part: getattr(owner, name) for part, (owner, name) in LOOP_PARTS.items()}

    def wrapped(part: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = now()
            result = originals[part](*args, **kwargs)
            spent[part] += now() - began
            return result

        return call

    for part, (owner, name) in LOOP_PARTS.items():
        setattr(owner, name, wrapped(part))
    try:
        yield
    finally:
        for part, (owner, name) in LOOP_PARTS.items():
            setattr(owner, name, originals[part])


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    began = now()
    call()
    synchronize(device)
    return now() - began


def measure(name: str, model: Any, others: dict[str, Any], batch: int, beams: int, options: argparse.Namespace) -> str:
    inputs = inputs_of(name, model, batch, options.source)
    arguments = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens, "num_beams": beams}

    def call() -> Any:
        return model.generate(**inputs, **arguments, do_sample=False)

    parts: dict[str, float] = defaultdict(float)
    with timed_parts(parts):
        expected = call()
    spent: dict[str, float] = defaultdict(float)
    with timed_modules(model, spent):
        whole = seconds(call, model.device)
    spent["loop"] = whole - sum(spent.values())

    calls = {"theirs": call}
    for label, other in others.items():
        cast = {key: value.to(other.dtype) if value.is_floating_point() else value for key, value in inputs.items()}
        extra = {"cache_implementation": "static"} if label == "compiled" else {}
        calls[label] = partial(other.generate, **cast, **arguments, **extra, do_sample=False)
    told = ""
    for label, one in calls.items():
        made = one()
        one()  # the first two calls compile and capture
        if others.get(label, model).dtype == model.dtype and not torch.equal(made, expected):
            told += f"  {label}: OTHER TOKENS, {int((made != expected).sum())} of {expected.numel()}"
    best = {label: float("inf") for label in calls}
    for _ in range(options.rounds):
        for label, one in calls.items():
            best[label] = min(best[label], seconds(one, model.device))
    share = ", ".join(f"{part} {1e3 * value:.0f}" for part, value in spent.items())
    loop = ", ".join(f"{part} {1e3 * value:.0f}" for part, value in parts.items())
    times = "".join(f"{1e3 * value:9.1f} ({best['theirs'] / value:4.1f}x)" for value in best.values())
    return f"{name:14}{batch:6}{beams:6}{times}   of {1e3 * whole:.0f} ms: {share} ({loop}){told}"


def others_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What is timed beside transformers' model, by the name of its column."""
    others = {"ours": paceline.optimize(build(name).to(options.device))}
    if options.dtype != "float32":
        dtype = getattr(torch, options.dtype)
        others[f"ours {options.dtype}"] = paceline.optimize(build(name).to(options.device, dtype), level=options.level)
    if options.compiled:
        others["compiled"] = compiled = build(name).to(options.device)
        compiled.forward = torch.compile(compiled.forward, mode="reduce-overhead")
    return others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--beams", default="1,4")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--source", type=int, default=128, help="tokens of T5's inputs; Whisper's are 30 s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of one more model of ours")
    parser.add_argument("--level", default="fast", help="of that one")
    parser.add_argument("--compiled", action="store_true", help="transformers' static cache and compiled forward, too")
    parser.add_argument(
        "--cpu-time", action="store_true", help="for a machine that others use: one thread, its own time"
    )
    options = parser.parse_args()
    torch.set_num_threads(1 if options.cpu_time else options.threads)
    for name in options.models.split(","):
        model, others = build(name).to(options.device), others_of(name, options)
        columns = "".join(f"{label + ', ms':>17}" for label in ("theirs", *others))
        print(f"{'model':14}{'batch':>6}{'beams':>6}{columns}   where theirs goes, ms", flush=True)
        for batch in map(int, options.batches.split(",")):
            for beams in map(int, options.beams.split(",")):
                print(measure(name, model, others, batch, beams, options), flush=True)


if __name__ == "__main__":
    main()
