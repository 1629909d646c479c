"""What optimize() brings to a model: latency and error beside the model's own forward, torch.compile and OpenVINO, in
one run.

All models are loaded before anything is timed, and take turns, so that a machine that slows down slows all of them:
BURST calls in a row each, of which the first is not counted, as a server calls one model. Errors are of the first
result, relative to float32's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from paceline.benchmark.engines import openvino_model
from paceline.benchmark.worker import read_machine
from paceline.errors import UsageError
from paceline.fusion import Stage, measure_stages, optimize, report
from paceline.fusion.stages import timed

PACELINE, COMPILE, OPENVINO, EAGER, EXACT = "paceline", "torch.compile", "openvino", "eager", "eager float32"
BURST = 6

# From inputs to the call that is timed, in which they have the form that the model takes.
Prepare = Callable[[Mapping[str, torch.Tensor]], Callable[[], Any]]


@dataclass(frozen=True)
class Settings:
    """`shapes`: (batch, length) each; a length means nothing to a model of images. `against`: COMPILE and OPENVINO."""

    shapes: Sequence[tuple[int, int]]
    device: torch.device
    dtype: torch.dtype
    level: str = "safe"
    quantize: str | None = None
    compile_rest: bool = False
    rounds: int = 20
    against: Sequence[str] = ()


@dataclass(frozen=True)
class Row:
    """`milliseconds`: the median of a call; `first_seconds`: the first call of this shape, captures and compiles
    included; `error`: relative, of the first result."""

    engine: str
    batch: int
    length: int
    milliseconds: float
    first_seconds: float
    error: float


@dataclass(frozen=True)
class Report:
    """`stages`: what each pass brings, at the first shape. `told`: what optimize() says of the model."""

    rows: Sequence[Row]
    stages: Sequence[Stage]
    told: str
    machine: Mapping[str, Any]

    @property
    def where(self) -> str:
        threads = self.machine["threads"]
        device = self.machine["device"] if threads is None else f"{self.machine['device']}, {threads} threads"
        return f"{device}, torch {self.machine['torch']}"


def run(
    make: Callable[[], nn.Module], settings: Settings, progress: Callable[[str], None] = lambda text: None
) -> Report:
    """`make`: the model in float32, with the same weights each time. Raises UsageError for a model whose inputs are
    none of text, images and sound."""
    exact = make().eval().to(settings.device)
    models: dict[str, Prepare] = {EXACT: _prepare(exact)}
    if settings.dtype != torch.float32:
        models[EAGER] = _prepare(make().eval().to(settings.device, settings.dtype))
    for name in settings.against:
        progress(name)
        models[name] = _other(name, make().eval(), settings)
    ours = make().eval().to(settings.device, settings.dtype)
    optimize(
        ours,
        level=settings.level,  # type: ignore[arg-type]
        quantize=settings.quantize,
        compile_rest=settings.compile_rest,
    )
    models[PACELINE] = _prepare(ours)
    rows: list[Row] = []
    with torch.inference_mode():
        for batch, length in settings.shapes:
            progress(f"{batch}x{length}")
            given = make_inputs(exact, batch, length, settings.device)
            rows += _shape({name: prepare(given) for name, prepare in models.items()}, settings.rounds, batch, length)
        stages = measure_stages(
            ours, **_for(ours, make_inputs(ours, *settings.shapes[0], settings.device)), repeats=settings.rounds
        )
    return Report(rows, stages, str(report(ours)), read_machine(settings.device))


def _other(name: str, model: nn.Module, settings: Settings) -> Prepare:
    """`model`: in float32 on the CPU."""
    if name == OPENVINO:
        example = make_inputs(model, 2, 16, torch.device("cpu"))
        return openvino_model.build(model, example, settings.device, settings.dtype)
    mode = "reduce-overhead" if settings.device.type == "cuda" else None
    return _prepare(torch.compile(model.to(settings.device, settings.dtype), mode=mode))  # type: ignore[arg-type]


def _prepare(model: nn.Module) -> Prepare:
    def prepare(given: Mapping[str, torch.Tensor]) -> Callable[[], Any]:
        inputs = _for(model, given)
        return lambda: model(**inputs)

    return prepare


def _shape(calls: Mapping[str, Callable[[], Any]], rounds: int, batch: int, length: int) -> list[Row]:
    first: dict[str, float] = {}
    found: dict[str, torch.Tensor] = {}
    for name, call in calls.items():
        first[name] = timed(call)
        for _ in range(2):  # where calls are captured in graphs, the second call does that
            result = call()
        found[name] = first_tensor(result).double()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(-(-rounds // (BURST - 1))):
        for name, call in calls.items():
            times[name] += [timed(call) for _ in range(BURST)][1:]
    exact = found[EXACT]
    return [
        Row(
            name,
            batch,
            length,
            statistics.median(times[name]) * 1e3,
            first[name],
            float((found[name] - exact).norm() / exact.norm()),
        )
        for name in calls
    ]


def make_inputs(model: nn.Module, batch: int, length: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random inputs of a transformers model, the same for the same shape."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(batch * 8191 + length)
    kind = getattr(model, "main_input_name", None)
    if kind == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
        made = {kind: torch.randn(batch, vision.num_channels, size, size, generator=generator)}
    elif kind == "input_features":
        made = {kind: torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)}
    elif kind == "input_ids":
        text = getattr(config, "text_config", config)
        ids = torch.randint(5, text.vocab_size, (batch, length), generator=generator)
        made = {kind: ids, "attention_mask": torch.ones_like(ids)}
    else:
        raise UsageError(f"{type(model).__name__} takes {kind}: text, images and sound are what can be made up here")
    if getattr(config, "is_encoder_decoder", False):
        made["decoder_input_ids"] = torch.randint(5, config.vocab_size, (batch, length), generator=generator)
    return {name: value.to(device) for name, value in made.items()}


def _for(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs in the model's dtype."""
    dtype = next(model.parameters()).dtype
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def first_tensor(result: Any) -> torch.Tensor:
    """The first tensor of what a model returns."""
    return result if isinstance(result, torch.Tensor) else first_tensor(result[0])
