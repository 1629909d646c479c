"""Any causal language model that transformers can build, through transformers' own modules and our paged attention.

What a family (models/families) runs, it runs faster; this is for the others. The model is transformers' own, its
weights pass through transformers' own renaming and fusing (a table that only its loader applies), and each attention
call goes to models/fallback_attention.py. Nothing is believed: when a model is made, a probe forward writes down its
attention calls, whatever paged attention does not compute is refused by name, and models/fallback_check.py compares a
prompt in pieces with transformers' own forward of the whole.

All that is used of transformers outside its documented interfaces: `base_model_prefix` (and that a model's head reads
nothing but its body's output), the keywords of a mask function, and a checkpoint as a mapping of lazy tensors.

Shapes: T tokens of the step, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from logging import CRITICAL
from typing import Any

import torch
from torch import nn

from paceline.config import KVGroup
from paceline.errors import CheckpointError, PacelineError, UnsupportedModelError
from paceline.inputs import KVLayer, ModelInputs
from paceline.kernels.choices import Choice
from paceline.loading.progress import Progress, Silent
from paceline.log import get_logger
from paceline.models.fallback_attention import PAGED, PROBE, AttentionCall, Port, Probing, Step, register
from paceline.models.fallback_check import check_forward, check_tokens, eager_logits
from paceline.models.load import Tensors, report_unused

log = get_logger(__name__)

OLDEST = 5  # transformers' major version; 4 has no conversion of weights and describes masks in another way
INSTALL = 'pip install "paceline[fallback]"'
SLOWER = "no fused projections, no matrices packed for the CPU, no int8"
# Rotary embeddings that transformers changes once a context grows past the original one: keys in the cache would be
# those of another position code. Up to there they are constant.
GROWING_ROPES = ("dynamic", "longrope")


@dataclass(frozen=True)
class FallbackConfig:
    """A model that transformers can build: its class and configuration (both transformers'). `why`: what keeps our
    families from running it, for errors; empty where the user asked for transformers."""

    architecture: str
    model_class: Any
    hf: Any
    why: str = ""

    @property
    def vocab_size(self) -> int:
        return int(self.text.vocab_size)

    @property
    def text(self) -> Any:
        """The configuration of the language model proper."""
        return self.hf.get_text_config(decoder=True)

    @property
    def max_position(self) -> int:
        """Tokens of context. Raises UnsupportedModelError where the configuration does not say."""
        longest = getattr(self.text, "max_position_embeddings", None)
        if not isinstance(longest, int) or longest < 1:
            raise UnsupportedModelError(f"{self.architecture}: its config.json does not say how long its context is")
        for rope in _ropes(self.text):
            original = rope.get("original_max_position_embeddings")
            if rope.get("rope_type") in GROWING_ROPES and original and original < longest:
                log.warning(
                    "%s: context limited to %d of %d tokens: beyond, its rotary embedding (%s) changes with the length",
                    *(self.architecture, original, longest, rope["rope_type"]),
                )
                longest = int(original)
        return longest


def read_fallback_config(hf_config: Mapping[str, Any], why: str = "") -> FallbackConfig:
    """How transformers would build the model of a config.json (parsed); no weights, no memory.

    Raises UnsupportedModelError where transformers is not installed or too old, does not know the model, or knows it as
    something else than a causal language model; CheckpointError for a config.json that it cannot read.
    """
    architecture = str((hf_config.get("architectures") or ["(no architecture)"])[0])
    transformers = _import_transformers(architecture)
    kind = hf_config.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        code = ", and paceline runs no code from a checkpoint" if hf_config.get("auto_map") else ""
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} does not know the model type {kind!r} of {architecture}{code}"
        )
    try:
        hf = transformers.CONFIG_MAPPING[kind].from_dict(dict(hf_config))
    except Exception as error:  # its checks raise errors of many kinds
        raise CheckpointError(f"config.json: transformers cannot read it ({_one_line(error)})") from error
    for mapping in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        classes = mapping.get(type(hf), ())
        for model_class in classes if isinstance(classes, tuple) else (classes,):
            if model_class.__name__ == architecture:
                return FallbackConfig(architecture, model_class, hf, why)
    raise UnsupportedModelError(
        f"transformers {transformers.__version__} does not build {architecture} as a causal language model"
    )


@dataclass(frozen=True)
class FallbackSizes:
    """What a model takes, in bytes, by transformers' own parameters (compare sizing.py). `step_weights`: those that a
    decode step reads, every expert counted. `per_token`: what a step holds of each of its tokens, at the most."""

    weights: int
    step_weights: int
    per_token: int

    def activations(self, config: FallbackConfig, num_tokens: int, num_rows: int) -> int:
        return num_tokens * self.per_token + 4 * num_rows * config.vocab_size * 4


def measure(config: FallbackConfig, dtype: torch.dtype) -> FallbackSizes:
    """The sizes of the model in `dtype`, from its parameters' shapes; nothing is allocated."""
    with torch.device("meta"):
        model = config.model_class._from_config(config.hf, dtype=dtype)
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    weights = sum(parameter.nbytes for parameter in model.parameters())
    visits = getattr(config.text, "num_experts_per_tok", None) or 1
    # Each product's input, output and copies on the way, and the residual stream: transformers fuses none of it.
    widest = max(
        sum(parameter.shape[-2:]) * (visits if parameter.dim() == 3 else 1)
        for parameter in model.parameters()
        if parameter.dim() > 1 and all(parameter is not table for table in tables)
    )
    untied = tables[0] is not tables[1]
    return FallbackSizes(weights, weights - tables[0].nbytes * untied, 4 * widest * dtype.itemsize)


def load_fallback(
    checkpoint: Tensors,
    config: FallbackConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> TransformersModel:
    """The model in `dtype` on `device`, probed and checked.

    Raises CheckpointError for tensors that are missing or of the wrong shape, UnsupportedModelError for a model that
    paged attention cannot run, naming what stands in the way.
    """
    progress = progress or Silent()
    stored = {name: _Stored(checkpoint, name, progress) for name in checkpoint.names()}
    device = torch.device(device)
    placed = {} if device.type == "cpu" else {"device_map": {"": device}}
    progress.start("loading", sum(tensor.nbytes for tensor in stored.values()))
    try:
        with quiet():
            hf, report = config.model_class.from_pretrained(
                None,
                config=config.hf,
                state_dict=stored,
                dtype=dtype,
                attn_implementation="eager",
                ignore_mismatched_sizes=True,  # reported below, by name
                output_loading_info=True,
                **placed,
            )
    except (PacelineError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{config.architecture}: {_one_line(error)}") from error
    finally:
        progress.done()
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise CheckpointError(
            f"{len(missing)} tensors of {config.architecture} are missing from the checkpoint, the first is "
            f"'{missing[0]}': download the model again, or check that config.json belongs to it"
        )
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise CheckpointError(
            f"tensor '{name}' has shape {list(found)}, expected {list(expected)}: config.json does not belong to it"
        )
    report_unused(report["unexpected_keys"])
    return TransformersModel(hf.eval(), config, dtype, device)


class TransformersModel(nn.Module):
    """A causal language model of transformers' as the engine takes it: see models/model.py."""

    def __init__(self, hf: Any, config: FallbackConfig, dtype: torch.dtype, device: torch.device) -> None:
        """Probes and checks `hf`, whose parameters are in `dtype` on `device`. Raises UnsupportedModelError."""
        super().__init__()
        self.config, self.dtype, self.device = config, dtype, device
        self.vocab_size = config.vocab_size
        self.hf = hf
        self.port = Port(hf)
        self.given = _Given()
        register()
        with _named(config), torch.inference_mode(), quiet():
            name, self.body = _body(hf)
            self.head = copy.copy(hf)  # the same modules but the body, which answers with what it is given
            self.head._modules = {**hf._modules, name: self.given}
            tokens_PT = check_tokens(config, device)
            expected_PTV = eager_logits(hf, tokens_PT)
            if expected_PTV.shape[-1] != self.vocab_size:
                raise UnsupportedModelError(f"{expected_PTV.shape[-1]} logits for a vocabulary of {self.vocab_size}")
            self.calls = self._probe(tokens_PT[0])
            self.kv_groups = group_calls(self.calls)
            hf.set_attn_implementation(PAGED)
            check_forward(self, tokens_PT, expected_PTV)

    def forward(self, inputs: ModelInputs, kv: Sequence[KVLayer]) -> torch.Tensor:
        """The hidden states that the head reads, [T, D] in the model's dtype. `kv`: one an attention call, written."""
        step = Step(inputs.attention, kv, self.calls)
        hidden_TD = self._run(inputs.token_ids_T, inputs.positions_T, step)
        if step.done != len(self.calls):
            raise UnsupportedModelError(
                f"{self.config.architecture}: {step.done} attention calls in a forward that had {len(self.calls)} "
                "when the model was loaded"
            )
        return hidden_TD

    def logits(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Logits of the given rows, [T, V] float32, with whatever scale or cap the model's own head has."""
        self.given.hidden = hidden_TD[None]
        try:
            logits_TV: torch.Tensor = self.head(input_ids=self.given.tokens(hidden_TD)).logits[0].float()
        finally:
            self.given.hidden = None
        return logits_TV

    def choices(self, rows: int) -> list[Choice]:
        why = self.config.why or "model_impl is 'transformers'"
        return [
            Choice("the model", "transformers' own modules", why),
            Choice("attention", "torch, planned on the host", why, count=len(self.calls)),
        ]

    def _run(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, current: Step | Probing) -> torch.Tensor:
        self.port.current = current
        try:
            hidden_1TD = self.body(input_ids=token_ids_T[None], position_ids=positions_T[None], use_cache=False)[0]
        finally:
            self.port.current = None
        hidden_TD: torch.Tensor = hidden_1TD[0]
        return hidden_TD

    def _probe(self, tokens_T: torch.Tensor) -> tuple[AttentionCall, ...]:
        self.hf.set_attn_implementation(PROBE)
        probing = Probing()
        self._run(tokens_T, torch.arange(len(tokens_T), device=self.device), probing)
        if not probing.calls:
            raise UnsupportedModelError("none of its layers attends through transformers' attention interface")
        return tuple(probing.calls)


class _Given(nn.Module):
    """Stands where a model's body was and answers with hidden states computed before."""

    hidden: torch.Tensor | None = None

    @property
    def decoder(self) -> _Given:
        """OPT's head asks for it past the body."""
        return self

    def forward(self, *_: Any, **__: Any) -> _GivenOutput:
        assert self.hidden is not None
        return _GivenOutput(self.hidden)

    @staticmethod
    def tokens(hidden_TD: torch.Tensor) -> torch.Tensor:
        return torch.zeros((1, hidden_TD.shape[0]), dtype=torch.int64, device=hidden_TD.device)


class _GivenOutput:
    """An output of a model's body: the hidden states, by name or as the first of a tuple; everything else is None."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> torch.Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


class _Stored:
    """A tensor of the checkpoint that transformers' loader reads with [...], and then owns."""

    def __init__(self, checkpoint: Tensors, name: str, progress: Progress) -> None:
        self.checkpoint, self.name, self.progress = checkpoint, name, progress

    @property
    def nbytes(self) -> int:
        elements = torch.Size(self.checkpoint.shape(self.name)).numel()
        return elements * self.checkpoint.dtype(self.name).itemsize

    def __getitem__(self, index: Any) -> torch.Tensor:
        values = self.checkpoint.read(self.name)
        self.progress.advance(values.nbytes)
        return values[index].clone()


def group_calls(calls: Sequence[AttentionCall]) -> tuple[KVGroup, ...]:
    """The KV groups of attention calls: those of one window and one shape of cache; full context first."""
    layers: dict[tuple[int | None, int, int], list[int]] = {}
    for layer, call in enumerate(calls):
        layers.setdefault((call.window, call.num_kv_heads, call.head_dim), []).append(layer)
    ordered = sorted(layers.items(), key=lambda item: item[0][0] is not None)
    return tuple(
        KVGroup("full" if window is None else "window", tuple(members), window, heads, dim)
        for (window, heads, dim), members in ordered
    )


def _body(hf: Any) -> tuple[str, nn.Module]:
    """The part of a model that turns tokens into the hidden states that its head reads, and its name in the model."""
    children = dict(hf.named_children())
    known = (hf.base_model_prefix, "model")  # the second, since Llama 4's prefix names a model around it
    name = next((name for name in known if name in children), None)
    if name is None:
        raise UnsupportedModelError(f"it has no body ('{known[0]}') apart from its head")
    takes = inspect.signature(children[name].forward).parameters
    for argument in ("input_ids", "position_ids"):
        if argument not in takes:
            raise UnsupportedModelError(f"its forward takes no '{argument}', so it cannot run a prompt in pieces")
    return name, children[name]


def _import_transformers(architecture: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UnsupportedModelError(
            f"transformers, which may run {architecture}, is not installed: {INSTALL}"
        ) from error
    if int(transformers.__version__.split(".")[0]) < OLDEST:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} is too old to run {architecture}: {INSTALL}"
        )
    return transformers


def _ropes(text: Any) -> list[Mapping[str, Any]]:
    """The rotary parameters of a configuration, which are nested by layer type where there are several."""
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    return nested or [parameters]


@contextmanager
def _named(config: FallbackConfig) -> Iterator[None]:
    """Errors of a model's own code, which can be of any kind, as UnsupportedModelError that says which model."""
    ours = f"{config.why}, and " if config.why else ""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{config.architecture}: {ours}through transformers {error}") from error
    except Exception as error:
        raise UnsupportedModelError(
            f"{config.architecture}: {ours}through transformers its modules fail here ({_one_line(error)})"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own warnings and progress bars: what matters of them is said by paceline."""
    logging: Any = import_module("transformers.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
