"""The tables of `paceline plan`, drawn with rich."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from paceline.planner.inference import BATCHES, Plan
from paceline.planner.training import TrainingPlan
from paceline.sizing import GIB, gib

NO = "[red]{} ✗[/red]"  # the sign too: a file has no colours


def print_plan(plan: Plan) -> None:
    console = _console()
    form = "" if plan.weight_format == "dense" else f", weights in {plan.weight_format}"
    console.print(
        f"[bold]{plan.model}[/bold]  {plan.architecture}, {_count(plan.num_parameters)} parameters, {plan.dtype}{form}"
    )
    stored = ", ".join(f"{_count(values)} in {dtype}" for dtype, values in plan.stored.items())
    console.print(f"[dim]{plan.source}{f': {stored}' if stored else ''}[/dim]\n")
    console.print(_memory(plan))
    if plan.fits:
        held = f"The cache holds contexts of up to {_tokens(plan.max_model_len)}; memory: {plan.memory.source}."
    else:
        held = NO.format("It does not fit") + ": use --quantize int8, a smaller --max-model-len or more memory."
    console.print(f"{held}")
    console.print(f"[dim]Loading holds {gib(plan.loading)} beside the weights, before there is a cache.[/dim]\n")
    console.print(_fits(plan))
    everything = "everything" if plan.num_devices == 1 else "everything on each device"
    console.print(f"[dim]GiB of {everything}, steps of {plan.max_num_batched_tokens} tokens; ✗ does not fit.[/dim]\n")
    if plan.bandwidth is None:
        console.print("For the bound on tokens/s say what the memory reads: --bandwidth GB/S, --measure or --gpu NAME.")
        return
    console.print(_speeds(plan))
    roof = f"{plan.bandwidth.value / 1e9:.0f} GB/s ({plan.bandwidth.source})"
    each = "" if plan.num_devices == 1 else " of each device, without what their sums take"
    console.print(f"[dim]{roof}, over the weights and the keys and values that a step reads{each}.[/dim]")
    if plan.weights.experts:
        console.print("[dim]Experts: as many as independent, equal choices visit; real ones visit fewer.[/dim]")


def print_training(plan: TrainingPlan) -> None:
    console = _console()
    options = plan.options
    console.print(f"[bold]{plan.model}[/bold]  {_count(plan.num_parameters)} parameters, training with Adam")
    devices = f"{options.devices} devices, tensor parallel {options.tensor_parallel_size}"
    batch = f"micro-batch {options.micro_batch} x {_tokens(plan.sequence_length)}, recompute {options.recompute}"
    console.print(f"[dim]{plan.source}; {options.precision}, {devices}, {batch}[/dim]\n")
    table = _table("GiB on each device", ("parameters", "gradients", "optimizer", "activations", "device", "host"))
    for row in plan.rows:
        name = f"ZeRO {row.stage}" if row.stage else "no ZeRO"
        if row.offload != "none":
            name += f", {row.offload} on the host"
        sizes = (row.parameters, row.gradients, row.optimizer, row.activations, row.device, row.host)
        cells = [f"{size / GIB:,.2f}" for size in sizes]
        if row.fits is not None:
            cells[4] = f"[green]{cells[4]}[/green]" if row.fits else NO.format(cells[4])
        table.add_row(name, *cells)
    console.print(table)
    if plan.memory is not None:
        console.print(f"[dim]✗ is more than the {gib(plan.memory)} of a device.[/dim]")
    console.print("\n[bold]Formulas[/bold]")
    for what, formula, source in plan.formulas:
        console.print(f"  {what}: {formula} [dim]({source})[/dim]")


def _console() -> Console:
    """As wide as the terminal; 120 columns where the output is a file, which has no width."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=120)


def _memory(plan: Plan) -> Table:
    w = plan.weights
    table = _table(
        "Memory" if plan.num_devices == 1 else f"Memory of each of {plan.num_devices} devices", ("GiB",), "", ""
    )
    parts = [
        ("weights: layers", w.layers),
        ("weights: experts", w.experts),
        ("weights: output head", w.head),
        ("weights: embedding", w.embedding),
        ("weights: norms, biases, constants", w.small),
        (f"a step of {plan.max_num_batched_tokens} tokens, {plan.max_num_seqs} requests", plan.activations),
        ("log probabilities", plan.logprob_workspace),
        ("CUDA graphs", plan.decode_buffers + plan.graph_pool),
        ("cuBLAS", plan.blas_workspace),
    ]
    for name, nbytes in parts:
        if nbytes:
            table.add_row(name, "", f"{nbytes / GIB:,.2f}")
    for group in plan.cache:
        seen = "all of the context" if group.window is None else f"a window of {group.window:,}"
        detail = (
            f"{group.num_layers} layers, {group.bytes_per_token / 1024:,.1f} KiB a token, {group.num_blocks:,} blocks"
        )
        table.add_row(f"cache: {seen}", detail, f"{group.nbytes / GIB:,.2f}")
    table.add_section()
    total = f"{plan.total / GIB:,.2f}"
    table.add_row("total", f"of {gib(plan.memory.value)}", total if plan.fits else NO.format(total))
    return table


def _fits(plan: Plan) -> Table:
    table = _table("What fits", [_tokens(c) for c in plan.contexts] + ["longest context"], "requests of")
    needs = {(fit.batch, fit.context): fit for fit in plan.grid}
    longest = dict(plan.longest_context)
    for batch in BATCHES:
        row = [needs[batch, context] for context in plan.contexts]
        cells = [f"{fit.nbytes / GIB:,.1f}" if fit.fits else NO.format(f"{fit.nbytes / GIB:,.1f}") for fit in row]
        table.add_row(str(batch), *cells, f"{longest[batch]:,}" if longest[batch] else NO.format("none"))
    table.add_section()
    most = (f"{requests:,}" if requests else NO.format("none") for _, requests in plan.largest_batch)
    table.add_row("most requests", *most, "")
    return table


def _speeds(plan: Plan) -> Table:
    table = _table("Bound on tokens/s, all requests together", [_tokens(c) for c in plan.contexts], "requests at")
    speeds = {(speed.batch, speed.context): speed.tokens_per_second for speed in plan.speeds}
    fits = {(fit.batch, fit.context): fit.fits for fit in plan.grid}
    for batch in BATCHES:
        cells = [(f"{speeds[batch, context]:,.0f}", fits[batch, context]) for context in plan.contexts]
        table.add_row(str(batch), *(cell if fit else NO.format(cell) for cell, fit in cells))
    return table


def _table(title: str, numbers: Sequence[str], *words: str) -> Table:
    """A table whose first columns hold words (one without a head, if none is named) and the others numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=SIMPLE_HEAD)
    for head in words or ("",):
        table.add_column(head)
    for head in numbers:
        table.add_column(head, justify="right")
    return table


def _count(number: int) -> str:
    """'8.03 B', '134.5 M'."""
    return f"{number / 1e9:,.2f} B" if number >= 1e9 else f"{number / 1e6:,.1f} M"


def _tokens(number: int) -> str:
    """'128k tokens' for whole multiples of 1,024."""
    return f"{number // 1024}k tokens" if number % 1024 == 0 else f"{number:,} tokens"
