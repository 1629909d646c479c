"""sentence-transformers' modules.json: what is done to a transformer's hidden states to make an embedding of them.

A directory without one is taken to be pooled by the mean and normalised, which the log says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from paceline.errors import CheckpointError, UnsupportedModelError
from paceline.loading.directory import read_json
from paceline.log import get_logger

log = get_logger(__name__)

Pooling = Literal["mean", "cls", "last", "max"]
# 1_Pooling/config.json: one flag a mode.
POOLING_FLAGS: Mapping[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
}
# The newer form: one key that names the mode.
POOLING_NAMES: Mapping[str, Pooling] = {"lasttoken": "last", **{name: name for name in get_args(Pooling)}}
DENSE_ACTIVATIONS: Mapping[str, Literal["identity", "tanh"]] = {
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.modules.activation.Tanh": "tanh",
}


@dataclass(frozen=True)
class DenseModule:
    """A linear layer over the pooled vector; its weights lie in `directory`."""

    directory: Path
    in_features: int
    out_features: int
    bias: bool
    activation: Literal["identity", "tanh"]


@dataclass(frozen=True)
class EncoderModules:
    pooling: Pooling
    dense: tuple[DenseModule, ...] = ()
    normalize: bool = True


def read_modules(directory: Path) -> EncoderModules:
    """Raises CheckpointError for files that are missing or corrupt, UnsupportedModelError naming a module, or an order
    of them, that is not implemented."""
    file = directory / "modules.json"
    if not file.exists():
        log.warning("%s has no modules.json: embeddings are the normalised mean of its hidden states", directory)
        return EncoderModules("mean")
    modules = [(_kind(file, entry), directory / str(entry.get("path", ""))) for entry in _read_list(file)]
    kinds = [kind for kind, _ in modules]
    normalize = kinds[-1:] == ["Normalize"]
    expected = ["Transformer", "Pooling", *["Dense"] * kinds.count("Dense"), *["Normalize"] * normalize]
    if kinds != expected:
        raise UnsupportedModelError(
            f"{file}: the modules {', '.join(kinds)} are not a Transformer, a Pooling, any number of Dense and "
            "perhaps a Normalize, in this order: that is all that is implemented"
        )
    if modules[0][1] != directory:
        raise UnsupportedModelError(f"{file}: the transformer lies in {modules[0][1].name}, not beside this file")
    _tell_prompts(directory)
    return EncoderModules(
        _read_pooling(modules[1][1] / "config.json"),
        tuple(_read_dense(path) for kind, path in modules if kind == "Dense"),
        normalize,
    )


def _read_list(file: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(f"{file}: holds no list of modules; download it again")
    return entries


def _kind(file: Path, entry: Mapping[str, Any]) -> str:
    """A module's class. Its package has moved between sentence-transformers' versions; another's is not known."""
    package, *_, kind = str(entry.get("type")).split(".")
    if package != "sentence_transformers" or kind not in ("Transformer", "Pooling", "Dense", "Normalize"):
        raise UnsupportedModelError(
            f"{file}: the module {entry.get('type')} is not implemented (known: Transformer, Pooling, Dense, Normalize)"
        )
    return kind


def _read_pooling(file: Path) -> Pooling:
    config = read_json(file)
    if "pooling_mode" in config:
        modes = config["pooling_mode"] if isinstance(config["pooling_mode"], list) else [config["pooling_mode"]]
        table = POOLING_NAMES
    else:
        modes = [name for name, on in config.items() if name.startswith("pooling_mode_") and on]
        table = POOLING_FLAGS
    if len(modes) != 1 or modes[0] not in table:
        raise UnsupportedModelError(
            f"{file}: pooling by {' and '.join(map(str, modes)) or 'nothing'} is not implemented, only by one of "
            f"{', '.join(get_args(Pooling))}"
        )
    if config.get("include_prompt") is False:
        log.warning("%s leaves a prompt's tokens out of the pooling; here they are pooled like all others", file)
    return table[modes[0]]


def _read_dense(directory: Path) -> DenseModule:
    file = directory / "config.json"
    config = read_json(file)
    name = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    if name not in DENSE_ACTIVATIONS:
        raise UnsupportedModelError(f"{file}: the activation {name} is not implemented")
    try:
        sizes = int(config["in_features"]), int(config["out_features"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: has no in_features and out_features; download it again") from error
    return DenseModule(directory, *sizes, bool(config.get("bias", True)), DENSE_ACTIVATIONS[name])


def _tell_prompts(directory: Path) -> None:
    file = directory / "config_sentence_transformers.json"
    prompts = read_json(file).get("prompts") if file.exists() else None
    used = [name for name, text in prompts.items() if text] if isinstance(prompts, dict) else []
    if used:
        log.warning(
            "%s names prompts (%s) that belong before a text: none is added, write them yourself", file, ", ".join(used)
        )
