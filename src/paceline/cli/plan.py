"""`paceline plan`: what a model takes, what fits and how fast it can be, before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import click

from paceline.cli.options import configure_logging
from paceline.config import QUANTIZATIONS
from paceline.errors import UsageError

_SHARED = ("gpu", "memory", "revision", "tensor_parallel_size")
_INFERENCE = (
    *("dtype", "device", "measure", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size"),
    *("kv_cache_gib",),
)
_TRAINING = (
    *("precision", "fp32_gradients", "devices", "sequence_parallel", "micro_batch"),
    *("sequence_length", "recompute"),
)


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), help="What it is computed in.")
@click.option("--quantize", type=click.Choice(QUANTIZATIONS), help="Weights in 8 or 4 bits.")
@click.option("--device", metavar="NAME", help="Plan for this machine's cpu, cuda or cuda:N [default: the first GPU].")
@click.option("--gpu", metavar="NAME", help="Plan for another GPU, by its data sheet: h100, a100, l4, rtx-4090, ...")
@click.option("--memory", metavar="SIZE", help="Plan for so much memory, such as 24GiB.")
@click.option("--bandwidth", type=float, metavar="GB/S", help="What the memory reads, for the bound on tokens/s.")
@click.option("--measure", is_flag=True, default=None, help="Measure this machine's bandwidth (0.15 s).")
@click.option("--max-model-len", type=int, metavar="N", help="Longest context [default: the model's own].")
@click.option("--max-num-seqs", type=int, metavar="N", help="Requests that run at once [default: 64].")
@click.option("--max-num-batched-tokens", type=int, metavar="N", help="Tokens of one step [default: 2048].")
@click.option("--block-size", type=int, metavar="N", help="Tokens of a cache block [default: 16].")
@click.option("--kv-cache-gib", type=float, metavar="GIB", help="Size of the cache [default: what is left].")
@click.option("--tensor-parallel-size", "-tp", type=int, metavar="N", help="GPUs that share each layer [default: 1].")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub model.")
@click.option("--train", is_flag=True, help="Plan training with Adam instead; the options below are its own.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    help="bf16 and fp16 are mixed, with float32 states [default: bf16].",
)
@click.option("--fp32-gradients", is_flag=True, default=None, help="Sum 16-bit gradients in float32.")
@click.option("--devices", type=int, metavar="N", help="GPUs in all [default: 1].")
@click.option("--sequence-parallel", is_flag=True, default=None, help="Divide norms over them too.")
@click.option("--micro-batch", type=int, metavar="B", help="Sequences of one forward pass [default: 1].")
@click.option("--sequence-length", type=int, metavar="S", help="Tokens of each [default: the model's context].")
@click.option(
    "--recompute",
    type=click.Choice(["none", "selective", "full"]),
    help="What the backward pass computes again [default: selective].",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.option("--debug", is_flag=True, help="Log in detail, and show the traceback of an error.")
def plan(model: str, **options: Any) -> None:
    """Say what MODEL takes and what fits: weights, cache, activations, the largest batch, the bound on tokens/s.

    MODEL is an alias, a hub id, a directory, a GGUF file or a config.json. Nothing is loaded: only its configuration
    and the headers of its weights are read. Without --gpu or --memory the plan is for this machine.
    """
    configure_logging(options["debug"])
    given = {name: value for name, value in options.items() if value is not None}
    if options["train"]:
        _refuse(given, (*_INFERENCE, "quantize", "bandwidth"), "has no meaning with --train")
        _train(model, {name: given[name] for name in (*_SHARED, *_TRAINING) if name in given}, options["as_json"])
        return
    _refuse(given, _TRAINING, "needs --train")
    kept = {name: given[name] for name in (*_SHARED, *_INFERENCE) if name in given}
    if "quantize" in given:
        kept["quantization"] = given["quantize"]
    if "bandwidth" in given:
        kept["bandwidth"] = given["bandwidth"] * 1e9
    from paceline.planner.inference import plan as plan_inference

    found = plan_inference(model, **kept)
    if options["as_json"]:
        click.echo(json.dumps(dataclasses.asdict(found)))
        return
    from paceline.cli.plan_tables import print_plan

    print_plan(found)


def _train(model: str, options: dict[str, Any], as_json: bool) -> None:
    from paceline.planner.training import plan_training

    found = plan_training(model, **options)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found)))
        return
    from paceline.cli.plan_tables import print_training

    print_training(found)


def _refuse(given: dict[str, Any], names: tuple[str, ...], why: str) -> None:
    for name in names:
        if name in given:
            raise UsageError(f"--{name.replace('_', '-')} {why}")
