"""One step of a model, without the engine around it: a decode of N streams, or a prompt. Random weights.

    python benchmarks/decode_step.py llama-3.1-8b --quantize none --quantize int4 --context 64 --context 8000
    python benchmarks/decode_step.py llama-3.1-8b --batch 1 --batch 64 --prompt 2048

On a GPU a decode is a CUDA graph, timed over many replays: kernels alone, no host. A prompt, and everything on a CPU,
runs as it is. Beside each figure: what the step must read and compute, and the least time that the device, by what it
reads and multiplies at best, would take for the longer of the two. `paceline bench latency` and `paceline bench
throughput` measure the same through LLM.generate.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from paceline import sizing
from paceline.benchmark.bandwidth import read_bandwidth
from paceline.benchmark.roof import read_operations
from paceline.benchmark.shapes import read_shape
from paceline.cache.kv_cache import allocate_kv
from paceline.engine.device import pick_device
from paceline.formats import FORMATS, stored_bytes
from paceline.inputs import KVLayer, ModelInputs
from paceline.kernels.argmax import argmax, argmax_ref, argmax_refusal
from paceline.kernels.attention_plan import build_attention
from paceline.kernels.decode_attention import decode_refusal
from paceline.loading.random_checkpoint import RandomCheckpoint
from paceline.models.decoder import Decoder
from paceline.models.load import load_decoder
from paceline.models.registry import read_decoder_config

BLOCK_SIZE = 16
ROUNDS, STEPS = 5, 30

Step = Callable[[], None]


def make_inputs(model: Decoder, batch: int, queries: int, context: int) -> tuple[ModelInputs, tuple[KVLayer, ...]]:
    """`batch` requests whose last `queries` tokens of `context` are computed, and a cache that holds them."""
    blocks, groups = -(-context // BLOCK_SIZE), model.kv_groups
    kv = allocate_kv(groups, [batch * blocks] * len(groups), BLOCK_SIZE, dtype=model.dtype, device=model.device)
    tables = [range(1 + r * blocks, 1 + (r + 1) * blocks) for r in range(batch)]
    attention = build_attention(
        [r * queries for r in range(batch + 1)],
        [context] * batch,
        [tables] * len(groups),
        [group.window for group in groups],
        block_size=BLOCK_SIZE,
        device=model.device,
        on_device=all(decode_refusal(group.head_dim, model.dtype, model.device) is None for group in groups),
    )
    token_T = torch.full((batch * queries,), 5, device=model.device)
    positions_T = torch.arange(context - queries, context, device=model.device).repeat(batch)
    return ModelInputs(token_T, positions_T, attention), tuple(kv)


def build_decode(model: Decoder, batch: int, context: int) -> Step:
    """A decode whose inputs lie on the device, and whose choices go there."""
    inputs, kv = make_inputs(model, batch, 1, context)

    def step() -> None:
        logits_RV = model.logits(model(inputs, kv))
        choose = argmax if argmax_refusal(logits_RV) is None else argmax_ref
        inputs.token_ids_T.copy_(choose(logits_RV)[0])

    return step


def build_prompt(model: Decoder, tokens: int) -> Step:
    """A prompt up to the choice of its first token."""
    inputs, kv = make_inputs(model, 1, tokens, tokens)

    def step() -> None:
        model.logits(model(inputs, kv)[-1:]).argmax(1)

    return step


def captured(step: Step, device: torch.device) -> Step:
    """`step` as a CUDA graph, where there is CUDA."""
    if device.type != "cuda":
        return step
    step()  # compiles and loads what is loaded lazily
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def seconds_a_step(step: Step, device: torch.device, steps: int = STEPS) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for _ in range(1 + ROUNDS):  # the first warms up
        wait()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        times.append((time.perf_counter() - start) / steps)
    return median(times[1:])


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", default="smollm2-135m")
    parser.add_argument("--quantize", action="append", choices=["none", *(name for name in FORMATS if name != "dense")])
    parser.add_argument("--batch", action="append", type=int, help="streams of a decode; several")
    parser.add_argument("--context", action="append", type=int, help="tokens that each attends to; several")
    parser.add_argument("--prompt", action="append", type=int, help="tokens of a prompt; several")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device, dtype = pick_device(options.device), torch.bfloat16
    config = read_decoder_config(read_shape(options.shape))
    roof, operations = read_bandwidth(device), read_operations(device, dtype)
    print(f"{options.shape}, bfloat16, {device}: {roof / 1e9:,.0f} GB/s, {operations / 1e12:,.1f} TFLOP/s of bfloat16")
    values = sizing.step_weight_bytes(config, dtype.itemsize, stored_bytes("dense", dtype)) // dtype.itemsize
    head = config.vocab_size * config.hidden_size
    decodes = options.batch or ([] if options.prompt else [1])
    for quantize in options.quantize or ["none"]:
        format = "dense" if quantize == "none" else quantize
        checkpoint = RandomCheckpoint(read_shape(options.shape), dtype=dtype, device=device)
        model = load_decoder(checkpoint, config, dtype=dtype, device=device, quantize=format)
        weights = sizing.step_weight_bytes(config, dtype.itemsize, stored_bytes(format, dtype))

        def tell(what: str, taken: float, tokens: int, nbytes: int, flop: float, quantize: str = quantize) -> None:
            least = max(nbytes / roof, flop / operations)
            print(
                f"{quantize:8} {what}: {taken * 1e3:8.3f} ms, {tokens / taken:9,.1f} tokens/s, {nbytes / 1e9:6.2f} GB, "
                f"{flop / 1e12:6.3f} TFLOP a step; at least {least * 1e3:.3f} ms, {least / taken:4.0%} of what it took",
                flush=True,
            )

        for batch in decodes:
            for context in options.context or [64]:
                taken = seconds_a_step(captured(build_decode(model, batch, context), device), device)
                nbytes = weights + batch * sizing.context_bytes(config.kv_groups, context, dtype.itemsize)
                tell(f"batch {batch:3} context {context:6,}", taken, batch, nbytes, 2.0 * values * batch)
        for tokens in options.prompt or []:
            taken = seconds_a_step(build_prompt(model, tokens), device, steps=3)
            tell(f"prompt {tokens:6,}", taken, tokens, weights, 2.0 * (values - head) * tokens + 2.0 * head)
        del model


if __name__ == "__main__":
    main()
