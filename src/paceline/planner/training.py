"""What training a model takes on each device: model states under ZeRO and offload, and activations.

Sources, by the names that the notes use:
- mixed precision: Micikevicius et al., 2018; Adam: Kingma and Ba, 2015.
- ZeRO: Rajbhandari et al., 2020, section 3 and table 1. ZeRO-Offload: Ren et al., 2021. ZeRO-Infinity: Rajbhandari et
  al., 2021, section 3.
- activations: Korthikanti et al., 2022, equations 1 to 6 and table 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Literal

from paceline import sizing
from paceline.config import DecoderConfig
from paceline.errors import UsageError
from paceline.loading.description import describe
from paceline.planner.devices import find_gpu, parse_bytes
from paceline.planner.inference import read_family_config
from paceline.registry import lookup, refuse_unknown_keys


@dataclass(frozen=True)
class Precision:
    """Bytes a parameter. `optimizer`: Adam's two moments in float32, and the float32 master copy if there is one."""

    parameters: int
    gradients: int
    optimizer: int


PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {"fp32": Precision(4, 4, 8), "bf16": Precision(2, 2, 12), "fp16": Precision(2, 2, 12)}
)
RECOMPUTE = ("none", "selective", "full")
ZeroStage = Literal[0, 1, 2, 3]
Offload = Literal["none", "optimizer", "parameters"]


@dataclass(frozen=True)
class TrainingOptions:
    """`devices` in all; `tensor_parallel_size` of them share each layer, and ZeRO divides the states over the others.
    `fp32_gradients`: 16-bit gradients are summed in a float32 copy. `recompute` "selective": the attention's scores (or
    an attention kernel that never stores them), "full": all but each layer's input. `sequence_parallel`: norms and
    dropouts are divided over the tensor-parallel devices too. `dropout`: the model trains with it, as GPT-3 did."""

    precision: str = "bf16"
    fp32_gradients: bool = False
    devices: int = 1
    tensor_parallel_size: int = 1
    sequence_parallel: bool = False
    micro_batch: int = 1
    sequence_length: int | None = None
    recompute: str = "selective"
    dropout: bool = False
    gpu: str | None = None
    memory: str | int | None = None
    revision: str | None = None
    hf_token: str | None = None
    download_dir: str | None = None

    def __post_init__(self) -> None:
        lookup(PRECISIONS, "precision", self.precision)
        lookup(dict.fromkeys(RECOMPUTE), "recompute", self.recompute)
        for name in ("devices", "tensor_parallel_size", "micro_batch", "sequence_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        if self.gpu is not None and self.memory is not None:
            raise UsageError("gpu and memory both say how much memory there is: give one of them")
        if self.devices % self.tensor_parallel_size:
            raise UsageError(
                f"devices ({self.devices}) must be a multiple of tensor_parallel_size ({self.tensor_parallel_size}): "
                "each group of that many devices holds one copy of the model"
            )
        if self.fp32_gradients and self.precision == "fp32":
            raise UsageError("fp32_gradients with precision 'fp32': its gradients are float32 already")

    @property
    def bytes(self) -> Precision:
        """Bytes a parameter, the float32 gradients included."""
        base = PRECISIONS[self.precision]
        return Precision(base.parameters, base.gradients + 4 * self.fp32_gradients, base.optimizer)


@dataclass(frozen=True)
class States:
    """Bytes on one device, and on its share of the host, of parameters, gradients and optimizer states."""

    parameters: float
    gradients: float
    optimizer: float
    host: float = 0.0

    @property
    def device(self) -> float:
        return self.parameters + self.gradients + self.optimizer


def model_states(
    num_parameters: float,
    size: Precision,
    stage: ZeroStage,
    num_shards: int,
    offload: Offload = "none",
    largest: int = 0,
) -> States:
    """Model states of one of `num_shards` devices, with P parameters and N shards (ZeRO, section 5, table 1):

    stage 0 (p + g + K)P; 1 (p + g)P + KP/N; 2 pP + (g + K)P/N; 3 (p + g + K)P/N. In mixed precision p = g = 2 and
    K = 12. Offloading the optimizer (ZeRO-Offload, section 4) moves gradients and states to the host: pP stays, or pP/N
    in stage 3. Offloading the parameters too (ZeRO-Infinity, section 3, equation 4) leaves the parameters and gradients
    of the `largest` matrix. Raises UsageError for a stage that cannot offload so.
    """
    parameters, gradients, optimizer = (
        per * num_parameters / (num_shards if stage >= divided else 1)
        for per, divided in ((size.parameters, 3), (size.gradients, 2), (size.optimizer, 1))
    )
    if offload == "none":
        return States(parameters, gradients, optimizer)
    if stage < 2 or (offload == "parameters" and stage < 3):
        raise UsageError(f"offloading {offload} needs ZeRO stage {2 if offload == 'optimizer' else 3}, got {stage}")
    if offload == "optimizer":
        return States(parameters, 0.0, 0.0, gradients + optimizer)
    working = (size.parameters * largest, size.gradients * largest)
    return States(*working, 0.0, parameters + gradients + optimizer)


def layer_activations(config: DecoderConfig, options: TrainingOptions, layer: int, sequence: int) -> float:
    """Bytes that one layer keeps for its backward pass on one device, 16 bits a value (Korthikanti et al., section 4).

    The paper's layer (four times as wide an MLP, as many key heads as heads, dropout) gives its equation 1,
    sbh(34 + 5as/h); over t tensor-parallel devices equation 2, sbh(10 + 24/t + 5as/(ht)); with sequence parallelism
    equation 4, all of it over t. Selective recomputation leaves the term of the a heads' scores out (equation 6), full
    recomputation leaves the layer's input, 2sbh (table 2).
    """
    a, hidden, t = config.attention, config.hidden_size, options.tensor_parallel_size
    tokens = sequence * options.micro_batch
    if options.recompute == "full":
        return tokens * 2 * hidden / (t if options.sequence_parallel else 1)
    q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    # Inputs of the two norms and of the two halves; masks of their dropouts, a byte each.
    shared = 8 * hidden + 2 * hidden * options.dropout
    inner, copies = config.mlp.intermediate_size, 1
    if config.moe is not None and config.is_moe(layer):
        inner, copies = config.moe.intermediate_size, config.moe.experts_per_token
    # Queries, keys, values and the input of the projection; what goes into the activation, and into the last matrix.
    # Gated: gate, up, the gate's activation and the product.
    split = 4 * q + 4 * kv + (8 if config.mlp.gated else 4) * inner * copies
    scores = 0.0
    if options.recompute == "none":  # the softmax, and with dropout its mask and what is left
        scores = (5 if options.dropout else 2) * a.num_heads * sequence
    return tokens * ((shared / (t if options.sequence_parallel else 1)) + (split + scores) / t)


def activation_bytes(config: DecoderConfig, options: TrainingOptions, sequence: int) -> float:
    """Bytes of all layers and of the output: final norm and head read sbh values each, and the loss keeps sbv float32
    logits (Korthikanti et al., section 4.3)."""
    tokens = sequence * options.micro_batch
    layers = sum(layer_activations(config, options, layer, sequence) for layer in range(config.num_layers))
    return layers + tokens * (4 * config.hidden_size + 4 * config.vocab_size) / options.tensor_parallel_size


@dataclass(frozen=True)
class TrainingRow:
    """One way to divide the states; bytes on each device, and on the host for each device."""

    stage: ZeroStage
    offload: Offload
    parameters: float
    gradients: float
    optimizer: float
    activations: float
    device: float
    host: float
    fits: bool | None


@dataclass(frozen=True)
class TrainingPlan:
    """`formulas`: (what, formula, source) of every figure. `memory`: bytes of one device, None where not said."""

    model: str
    source: str
    num_parameters: int
    options: TrainingOptions
    sequence_length: int
    memory: int | None
    rows: tuple[TrainingRow, ...]
    formulas: tuple[tuple[str, str, str], ...]


WAYS: tuple[tuple[ZeroStage, Offload], ...] = (
    (0, "none"),
    (1, "none"),
    (2, "none"),
    (3, "none"),
    (2, "optimizer"),
    (3, "optimizer"),
    (3, "parameters"),
)


def plan_training(model: str, **options: Any) -> TrainingPlan:
    """What training `model` with Adam takes on each device, for every ZeRO stage and offload. The options are
    TrainingOptions's fields; raises as planner.inference.plan."""
    refuse_unknown_keys("option", options, [field.name for field in fields(TrainingOptions)])
    asked = TrainingOptions(**options)
    description = describe(model, revision=asked.revision, token=asked.hf_token, download_dir=asked.download_dir)
    config = read_family_config(description.config)
    sequence = asked.sequence_length or config.max_position
    if sequence > config.max_position:
        raise UsageError(
            f"sequence_length {sequence} is more than the {config.max_position} positions that the model has"
        )
    memory = None
    if asked.memory is not None:
        memory = parse_bytes(asked.memory, "memory")
    elif asked.gpu is not None:
        memory = find_gpu(asked.gpu).memory_gib * sizing.GIB
    activations = activation_bytes(config, asked, sequence)
    parameters = sizing.num_parameters(config)
    largest = max(m.rows * m.columns for m in sizing.layer_matrices(config)) // asked.tensor_parallel_size
    rows = []
    for stage, offload in WAYS:
        states = model_states(
            parameters / asked.tensor_parallel_size,
            asked.bytes,
            stage,
            asked.devices // asked.tensor_parallel_size,
            offload,
            largest,
        )
        device = states.device + activations
        fits = None if memory is None else device <= memory
        rows.append(
            TrainingRow(
                stage,
                offload,
                states.parameters,
                states.gradients,
                states.optimizer,
                activations,
                device,
                states.host,
                fits,
            )
        )
    return TrainingPlan(
        description.name, description.note, parameters, asked, sequence, memory, tuple(rows), _formulas(asked)
    )


def _formulas(options: TrainingOptions) -> tuple[tuple[str, str, str], ...]:
    size, shards = options.bytes, options.devices // options.tensor_parallel_size
    t = options.tensor_parallel_size
    kept = {
        "none": "sbh(34 + 5as/h) for a GPT layer",
        "selective": "34sbh for a GPT layer",
        "full": "2sbh a layer",
    }[options.recompute]
    precision = "Micikevicius et al., 2018" if options.precision != "fp32" else "4 bytes a value"
    return (
        ("parameters p, gradients g", f"{size.parameters} and {size.gradients} bytes a parameter", precision),
        (
            "optimizer K",
            f"Adam, {size.optimizer} bytes a parameter in float32",
            "Kingma and Ba, 2015; ZeRO, section 3.1",
        ),
        (
            "ZeRO stage 0 to 3",
            f"(p+g+K)P; (p+g)P + KP/N; pP + (g+K)P/N; (p+g+K)P/N, P parameters / {t}, N = {shards}",
            "Rajbhandari et al., 2020, table 1",
        ),
        ("offload optimizer", "gradients and K on the host", "Ren et al., 2021 (ZeRO-Offload), section 4"),
        (
            "offload parameters",
            "p+g of the largest matrix on the device",
            "Rajbhandari et al., 2021 (ZeRO-Infinity), equation 4",
        ),
        (
            "activations",
            f"{kept}, counted for this one's widths, over t = {t}; loss 4sbv",
            "Korthikanti et al., 2022, equations 1 to 6",
        ),
    )
