"""What an encoder is, from the files beside its weights: config.json, and sentence-transformers' where they are.

Nothing is guessed: a directory that is no encoder for sure is none, and what would change a result and is not
implemented is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from paceline.encoders.modules import EncoderModules, read_modules
from paceline.errors import CheckpointError, UnsupportedModelError
from paceline.loading.directory import read_config, read_json
from paceline.loading.resolve import ModelSource

Task = Literal["embed", "classify"]
Activation = Literal["identity", "sigmoid", "softmax"]

# Model types (config.json's) whose every token sees the whole text. Others may be decoders: of those only
# sentence-transformers' files say that they embed.
BIDIRECTIONAL = frozenset(
    [
        *("albert", "bert", "camembert", "data2vec-text", "deberta", "deberta-v2", "distilbert", "electra", "ernie"),
        *("eurobert", "ibert", "mobilebert", "modernbert", "mpnet", "roberta", "roberta-prelayernorm", "squeezebert"),
        *("xlm-roberta", "xlm-roberta-xl", "xmod"),
    ]
)
# Those whose position p is row p + padding index + 1 of the table.
OFFSET_POSITIONS = frozenset(
    [
        *("camembert", "data2vec-text", "ibert", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta"),
        *("xlm-roberta-xl", "xmod"),
    ]
)
UNBOUNDED = 10**6  # transformers writes 10^30 as model_max_length where a tokenizer has none

# torch's activations as sentence-transformers names them in a config.json.
ACTIVATIONS: Mapping[str, Activation] = {
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
}


@dataclass(frozen=True)
class EncoderInfo:
    """`size`: values of a result, an embedding's dimensions or the classes. `max_length`: tokens of a text, special
    ones included. `normalize`: embeddings have length 1. `labels`: the classes' names, for `classify`, and what
    `activation` turns their logits into probabilities. Plain data, which a server's processes send each other."""

    architecture: str
    task: Task
    size: int
    max_length: int
    vocab_size: int
    lower_case: bool = False
    normalize: bool = True
    activation: Activation = "identity"
    labels: tuple[str, ...] = ()

    @property
    def is_cross_encoder(self) -> bool:
        """Whether it reads a pair of texts and says with one number how well they go together."""
        return self.task == "classify" and self.size == 1


def task_of(source: ModelSource) -> Task | None:
    """What the encoder in a directory is for; None for all other models."""
    if source.kind != "directory" or not (source.path / "config.json").exists():
        return None
    if (source.path / "modules.json").exists():
        return "embed"
    config = read_json(source.path / "config.json")
    if config.get("model_type") not in BIDIRECTIONAL or config.get("is_decoder"):
        return None
    architecture = architecture_of(config)
    if architecture.endswith("ForSequenceClassification"):
        return "classify"
    return "embed" if architecture.endswith(("Model", "ForMaskedLM", "ForPreTraining")) else None


def architecture_of(config: Mapping[str, Any]) -> str:
    return str((config.get("architectures") or ["(no architecture)"])[0])


@dataclass(frozen=True)
class EncoderFiles:
    """All that a directory says beside its weights. `modules`: what follows the transformer; None for a classifier."""

    directory: Path
    config: Mapping[str, Any]
    task: Task
    max_length: int
    lower_case: bool
    modules: EncoderModules | None
    activation: Activation
    labels: tuple[str, ...]

    @property
    def architecture(self) -> str:
        return architecture_of(self.config)


def read_encoder(source: ModelSource, task: Task, max_length: int | None = None) -> EncoderFiles:
    """Read a directory of which `task_of` says `task`. `max_length`: instead of the checkpoint's own.

    Raises CheckpointError for files that are missing or corrupt, UnsupportedModelError for what is not implemented or a
    `max_length` that the position embeddings do not have.
    """
    directory = source.path
    config = read_config(directory)
    settings = _transformer_settings(directory)
    labels = _labels(config) if task == "classify" else ()
    return EncoderFiles(
        directory,
        config,
        task,
        _max_length(directory, config, settings, max_length),
        bool(settings.get("do_lower_case")),
        read_modules(directory) if task == "embed" else None,
        _activation(config, labels) if task == "classify" else "identity",
        labels,
    )


def _transformer_settings(directory: Path) -> dict[str, Any]:
    """sentence_bert_config.json, which is also called by other models' names; {} where there is none."""
    files = sorted(directory.glob("sentence_*_config.json"))
    return read_json(files[0]) if files else {}


def _max_length(directory: Path, config: Mapping[str, Any], settings: Mapping[str, Any], asked: int | None) -> int:
    file = directory / "tokenizer_config.json"
    tokenizer = read_json(file) if file.exists() else {}
    positions = _positions(config)
    own = settings.get("max_seq_length") or tokenizer.get("model_max_length")
    limits = [int(n) for n in (asked or own, positions) if isinstance(n, (int, float)) and 0 < n < UNBOUNDED]
    if not limits:
        raise CheckpointError(f"{directory}: no file says how long a text may be: set max_model_len")
    if asked is not None and positions is not None and asked > positions:
        raise UnsupportedModelError(
            f"max_model_len {asked} is more than the {positions} positions of {architecture_of(config)}: lower it"
        )
    return min(limits)


def _positions(config: Mapping[str, Any]) -> int | None:
    """The longest text that the position embeddings have; None where the config does not say."""
    longest = config.get("max_position_embeddings")
    if not isinstance(longest, int) or longest < 1:
        return None
    if config.get("model_type") in OFFSET_POSITIONS:
        longest -= int(config.get("pad_token_id", 1)) + 1
    return longest


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the classes, in the logits' order; transformers' default is two."""
    named = config.get("id2label")
    if not isinstance(named, dict) or not named:
        return tuple(f"LABEL_{i}" for i in range(int(config.get("num_labels", 2))))
    try:
        by_index = {int(index): str(label) for index, label in named.items()}
        return tuple(by_index[index] for index in range(len(by_index)))
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"config.json: id2label does not number the classes from 0 ({error})") from error


def _activation(config: Mapping[str, Any], labels: tuple[str, ...]) -> Activation:
    """As sentence-transformers' CrossEncoder and transformers' pipeline choose it."""
    own = config.get("sentence_transformers")
    name = own.get("activation_fn") if isinstance(own, dict) else None
    name = name or config.get("sbert_ce_default_activation_function")
    if name is not None:
        if name not in ACTIVATIONS:
            raise UnsupportedModelError(
                f"config.json: scores pass through {name}, which is not implemented; known: {', '.join(ACTIVATIONS)}"
            )
        return ACTIVATIONS[name]
    if config.get("problem_type") == "regression":
        return "identity"
    return "sigmoid" if len(labels) == 1 or config.get("problem_type") == "multi_label_classification" else "softmax"
