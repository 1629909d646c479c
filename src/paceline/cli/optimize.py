"""`paceline optimize`: what paceline.optimize makes of a model of transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from paceline import __version__
from paceline.cli.options import (
    check_report_paths,
    configure_logging,
    debug_option,
    device_option,
    threads_option,
    write_json,
)
from paceline.cli.table import columns
from paceline.config import QUANTIZATIONS
from paceline.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from paceline.benchmark.optimized import Report

SHAPES = ("1x16", "1x128", "8x128")


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--bench", is_flag=True, help="Time it beside the model's own forward.")
@click.option("--against", multiple=True, type=click.Choice(["torch.compile", "openvino"]), help="And these.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="What is computed in.",
)
@click.option("--level", type=click.Choice(["safe", "fast"]), default="safe", show_default=True, help="As optimize's.")
@click.option("--quantize", type=click.Choice(QUANTIZATIONS), help="Store linears' weights in 8 or 4 bits.")
@click.option("--compile-rest", is_flag=True, help="What no pass replaces is compiled by torch.compile.")
@click.option(
    "--shape", "shapes", multiple=True, metavar="BxL", help=f"Batch and length; several [{', '.join(SHAPES)}]."
)
@click.option("--rounds", type=click.IntRange(min=1), default=20, show_default=True, help="Calls that are timed.")
@device_option
@threads_option
@click.option("--json", "json_path", metavar="FILE", help="The figures; - is the standard output.")
@click.option("--plot", "plot_path", metavar="FILE", help="A figure of them.")
@debug_option
def optimize(model: str, **options: Any) -> None:
    """Show what paceline.optimize replaces in MODEL, a hub id, a directory or an alias, and what that brings.

    MODEL is any model of transformers; a directory or file with a config.json alone runs with random weights.
    """
    configure_logging(options["debug"])
    if not options["bench"] and (options["against"] or options["json_path"] or options["plot_path"]):
        raise UsageError("--against, --json and --plot belong to --bench")
    check_report_paths(options["json_path"], options["plot_path"])
    shapes = [_shape(text) for text in options["shapes"] or SHAPES]
    import torch

    from paceline.benchmark.optimized import Settings, make_inputs, run
    from paceline.engine.device import pick_device
    from paceline.fusion import optimize as optimised
    from paceline.fusion import report

    if options["threads"] is not None:
        torch.set_num_threads(options["threads"])
    device, dtype = pick_device(options["device"]), getattr(torch, options["dtype"])
    make = _maker(model)
    if not options["bench"]:
        asked = {name: options[name] for name in ("level", "quantize", "compile_rest")}
        made = optimised(make().eval().to(device, dtype), **asked)
        with torch.inference_mode():
            made(**make_inputs(made, *shapes[0], device))
        click.echo(report(made))
        return
    settings = Settings(
        shapes,
        device,
        dtype,
        options["level"],
        options["quantize"],
        options["compile_rest"],
        options["rounds"],
        options["against"],
    )
    found = run(make, settings, lambda text: click.echo(f"  {text}", err=True))
    if write_json(options["json_path"], {"model": model, **dataclasses.asdict(found)}):
        _print(model, found, options["dtype"])
    if options["plot_path"] is not None:
        from paceline.benchmark.optimized_plot import plot

        plot(found, f"{model}, {options['dtype']}", options["plot_path"], __version__)


def _shape(text: str) -> tuple[int, int]:
    batch, cross, length = text.partition("x")
    if not (cross and batch.isdigit() and length.isdigit() and int(batch) and int(length)):
        raise UsageError(f"--shape takes batch x length, as in 8x128, got '{text}'")
    return int(batch), int(length)


def _maker(name: str) -> Callable[[], nn.Module]:
    """What makes the model in float32. Raises UsageError where transformers is missing or does not know it."""
    try:
        import transformers
    except ImportError:
        raise UsageError("paceline optimize needs transformers: pip install 'paceline[fallback]'") from None
    import torch

    from paceline.loading.resolve import resolve

    source = resolve(name)
    if source.kind == "gguf":
        raise UsageError(f"{source.path} is a GGUF file: give a model as transformers stores it")
    config = transformers.AutoConfig.from_pretrained(source.path)
    architecture = (config.architectures or ["AutoModel"])[0]
    kind: Any = getattr(transformers, architecture, transformers.AutoModel)
    has_weights = any(source.path.glob("*.safetensors")) or any(source.path.glob("*.bin"))

    def make() -> nn.Module:
        if has_weights:
            return kind.from_pretrained(source.path, dtype=torch.float32)  # type: ignore[no-any-return]
        torch.manual_seed(0)
        return kind(config)  # type: ignore[no-any-return]

    return make


def _print(model: str, found: Report, dtype: str) -> None:
    click.echo(f"{model}, {dtype}, {found.where}, paceline {__version__}\n")
    ours = {(row.batch, row.length): row.milliseconds for row in found.rows if row.engine == "paceline"}
    rows = [["", "batch x length", "ms", "paceline is", "error", "first call"]]
    for row in found.rows:
        ratio = row.milliseconds / ours[row.batch, row.length]
        rows.append(
            [
                row.engine,
                f"{row.batch}x{row.length}",
                f"{row.milliseconds:.2f}",
                "" if row.engine == "paceline" else f"{ratio:.2f}x as fast",
                f"{row.error:.1e}",
                f"{row.first_seconds:.2f} s",
            ]
        )
    click.echo(columns(rows))
    first = found.rows[0]
    click.echo(f"\nWhat each pass brings, at {first.batch}x{first.length}:")
    stages = [
        [stage.name, f"{stage.milliseconds:.2f} ms", "" if stage.error is None else f"error {stage.error:.1e}"]
        for stage in found.stages
    ]
    click.echo(columns(stages))
    click.echo(f"\n{found.told}")
