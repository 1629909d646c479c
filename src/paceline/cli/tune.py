"""`paceline tune`: time the launches of a model's linears on this GPU, and write those that were fastest as a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paceline.cli.options import configure_logging, debug_option
from paceline.cli.table import columns
from paceline.config import STORED
from paceline.errors import UsageError

if TYPE_CHECKING:
    from paceline.kernels.gemv_launch import Launch, Product


@click.command()
@click.argument("model", metavar="[MODEL|SHAPE]", default="llama-3.1-8b")
@click.option(
    "--quantize",
    multiple=True,
    type=click.Choice(["none", *STORED]),
    help="How weights are stored; several [default: all].",
)
@click.option(
    "--rows",
    multiple=True,
    type=click.Choice(["1", "16", "32", "64", "128", "256"]),
    help="Requests a step, up to so many; several [default: 1].",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16"]),
    default="bfloat16",
    show_default=True,
    help="Of activations.",
)
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="cuda or cuda:N.")
@click.option("--out", metavar="FILE", help="Where the table goes [default: where it is looked up, see paceline env].")
@click.option("--quiet", is_flag=True, help="No line a linear.")
@debug_option
def tune(model: str, **options: Any) -> None:
    """Find the fastest launch of each linear of a model on this GPU, and write a table of them.

    A shape by name (see paceline bench latency), or a model: a hub id, a directory, a config.json, an alias; its
    weights are not read. Most of the time goes by compiling, a process a core. What the table already had for this GPU
    stays, unless it is measured anew. Without --out the table is used from now on; another FILE where PACELINE_TUNED
    names it.
    """
    configure_logging(options["debug"])
    import torch

    from paceline.benchmark.shapes import SHAPES, read_shape
    from paceline.benchmark.tune import check_device, compile_ahead, device_of, linears, time_on
    from paceline.benchmark.tune import tune as run
    from paceline.engine.device import pick_device
    from paceline.kernels.gemv_launch import read_table, user_table, write_table
    from paceline.loading.description import describe
    from paceline.models.registry import read_decoder_config

    device, dtype = pick_device(options["device"]), getattr(torch, options["dtype"])
    check_device(device, dtype)
    config = read_decoder_config(read_shape(model) if model in SHAPES else describe(model).config)
    name, processors = device_of(str(device))
    path = Path(options["out"]).expanduser() if options["out"] else user_table(name)
    written: dict[Product, Launch] = {}
    if path.exists():
        of, known = read_table(path)
        if of != name:
            raise UsageError(f"{path} is a table of {of}, and this is {name}: give another --out")
        written.update(known)
    formats = ["dense" if one == "none" else one for one in options["quantize"]] or ["dense", *STORED]
    wanted = linears(config, formats, [int(count) for count in options["rows"]] or [1])
    compile_ahead(wanted, processors, dtype, device)
    rows = [("linear", "rows", "by rule", "tuned", "")]
    for found in run(wanted, processors, time_on(device, dtype)):
        written[found.product] = found.launch
        product, rule = found.product, found.rule_seconds
        line = (
            f"{product.format} {product.shape[0]} x {product.shape[1]}",
            str(product.rows),
            "fails" if rule is None else f"{rule * 1e6:.1f} us",
            f"{found.seconds * 1e6:.1f} us",
            "" if rule is None else f"{rule / found.seconds:.2f}x",
        )
        rows.append(line)
        if not options["quiet"]:
            click.echo("  ".join(line), err=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(path, name, written)
    click.echo(columns(rows, indent=""))
    click.echo(f"{len(written)} launches for {name} in {path}")
