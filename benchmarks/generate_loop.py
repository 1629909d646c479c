"""Where the time of an encoder-decoder's `model.generate` goes, and what our loop makes of it; random weights, greedy
and beams.

    python benchmarks/generate_loop.py --models t5-base,whisper-small --batches 1,8 --beams 1,4 --tokens 64

For transformers' own loop the time is divided into the encoder, the forwards of the decoder, and what is neither: the
loop. The loop's parts are timed by wrapping the functions that do them, in a run of their own, since the wrappers cost
time too. Ours is the same call after `paceline.fusion.generate.install`; both are timed in turns, best of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
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


def measure(name: str, model: Any, fast: Any, batch: int, beams: int, options: argparse.Namespace) -> str:
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

    def fast_call() -> Any:
        return fast.generate(**inputs, **arguments, do_sample=False)

    assert torch.equal(fast_call(), expected), "tokens differ"
    fast_call()  # both calls capture
    theirs, ours = [], []
    for _ in range(options.rounds):
        theirs.append(seconds(call, model.device))
        ours.append(seconds(fast_call, model.device))
    best, mine = min(theirs), min(ours)
    share = ", ".join(f"{part} {1e3 * value:.0f}" for part, value in spent.items())
    loop = ", ".join(f"{part} {1e3 * value:.0f}" for part, value in parts.items())
    return (
        f"{name:14}{batch:6}{beams:6}{1e3 * best:10.0f}{1e3 * mine:8.0f}{best / mine:7.2f}x"
        f"   of {1e3 * whole:.0f} ms: {share} ({loop})"
    )


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
    parser.add_argument(
        "--cpu-time", action="store_true", help="for a machine that others use: one thread, its own time"
    )
    options = parser.parse_args()
    torch.set_num_threads(1 if options.cpu_time else options.threads)
    print(f"{'model':14}{'batch':>6}{'beams':>6}{'theirs ms':>10}{'ours':>8}{'ratio':>8}   where theirs goes, ms")
    for name in options.models.split(","):
        model, fast = build(name).to(options.device), paceline.optimize(build(name).to(options.device))
        for batch in map(int, options.batches.split(",")):
            for beams in map(int, options.beams.split(",")):
                print(measure(name, model, fast, batch, beams, options), flush=True)


if __name__ == "__main__":
    main()
