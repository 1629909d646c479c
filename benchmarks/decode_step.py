"""One decode step of one stream, without the engine around it: what a model's kernels take, random weights.

    python benchmarks/decode_step.py llama-3.1-8b --quantize none --quantize int4 --context 64 --context 8000

On a GPU the step is a CUDA graph, timed over many replays: kernels alone, no host. On a CPU it runs as it is.
`paceline bench latency` measures the same through LLM.generate.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from paceline import sizing
from paceline.benchmark.bandwidth import read_bandwidth
from paceline.benchmark.shapes import read_shape
from paceline.cache.kv_cache import allocate_kv
from paceline.engine.device import pick_device
from paceline.formats import stored_bytes
from paceline.inputs import AttentionMetadata, GroupMetadata, ModelInputs
from paceline.kernels.decode_attention import make_counts
from paceline.loading.random_checkpoint import RandomCheckpoint
from paceline.models.decoder import Decoder
from paceline.models.load import load_decoder
from paceline.models.registry import read_decoder_config

BLOCK_SIZE = 16
ROUNDS, STEPS = 5, 30


def build_step(model: Decoder, context: int) -> Callable[[], None]:
    """A step whose one token is the last of `context`: its inputs lie on the device, and it writes its choice there."""
    blocks = -(-context // BLOCK_SIZE)
    kv = allocate_kv(
        model.kv_groups, [blocks] * len(model.kv_groups), BLOCK_SIZE, dtype=model.dtype, device=model.device
    )
    table_RB = torch.arange(1, blocks + 1, dtype=torch.int32, device=model.device)[None]
    slot_T = torch.tensor([BLOCK_SIZE + context - 1], device=model.device)
    lens_R = torch.tensor([context], dtype=torch.int32, device=model.device)
    groups = tuple(GroupMetadata(table_RB, slot_T, group.window, ()) for group in model.kv_groups)
    attention = AttentionMetadata((0, 1), (), BLOCK_SIZE, groups, lens_R, make_counts(1, model.device))
    token_T = torch.tensor([5], device=model.device)
    inputs = ModelInputs(token_T, torch.tensor([context - 1], device=model.device), attention)

    def step() -> None:
        token_T.copy_(model.logits(model(inputs, kv)).argmax(1))

    return step


def seconds_a_step(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        step()  # compiles and loads what is loaded lazily
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        step = graph.replay

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for _ in range(1 + ROUNDS):  # the first warms up
        wait()
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        wait()
        times.append((time.perf_counter() - start) / STEPS)
    return median(times[1:])


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", default="smollm2-135m")
    parser.add_argument("--quantize", action="append", choices=["none", "int8", "fp8", "int4"])
    parser.add_argument("--context", action="append", type=int)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device, dtype = pick_device(options.device), torch.bfloat16
    config, roof = read_decoder_config(read_shape(options.shape)), read_bandwidth(device)
    print(f"{options.shape}, bfloat16, {device}, which reads {roof / 1e9:,.0f} GB/s")
    for quantize in options.quantize or ["none"]:
        format = "dense" if quantize == "none" else quantize
        checkpoint = RandomCheckpoint(read_shape(options.shape), dtype=dtype, device=device)
        model = load_decoder(checkpoint, config, dtype=dtype, device=device, quantize=format)
        weights = sizing.step_weight_bytes(config, dtype.itemsize, stored_bytes(format, dtype))
        for context in options.context or [64]:
            taken = seconds_a_step(build_step(model, context), device)
            nbytes = weights + sizing.context_bytes(config.kv_groups, context, dtype.itemsize)
            print(
                f"{quantize:5} context {context:6,}: {taken * 1e3:8.3f} ms, {1 / taken:8.1f} tokens/s, "
                f"{nbytes / 1e9:6.2f} GB a step, {nbytes / taken / 1e9:7,.0f} GB/s, {nbytes / taken / roof:4.0%}"
            )
        del model


if __name__ == "__main__":
    main()
