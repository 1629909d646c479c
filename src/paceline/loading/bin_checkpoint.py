"""A directory of pickled weights as a checkpoint: pytorch_model.bin, its shards, or a state dict in a .pt or .pth file.

A pickle is a program. torch's weights_only reader runs only the part of it that makes tensors, and refuses a file that
asks for anything else; there is no way round that here. Files in the zip format that torch.save has written since
1.6 (2020) are mapped, so that memory holds what the caller keeps; older ones have to be read whole.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Collection
from pathlib import Path
from types import TracebackType

import torch

from paceline.errors import CheckpointError, UnsupportedModelError
from paceline.loading.directory import check_shard, read_config, read_generation_config, read_index
from paceline.log import get_logger

log = get_logger(__name__)

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"
SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
TRAINING_STATE = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")  # begin names of what is no model
ZIP_MAGIC = b"PK\x03\x04"
REFUSED_NAME = re.compile(r"GLOBAL ([\w.]+)")  # in torch's message
CONVERT = (
    "take the model's safetensors files, or convert it where its code can do no harm: "
    'python -c "import torch, safetensors.torch as st; '
    "st.save_file({{n: t.contiguous().clone() for n, t in torch.load('{file}', weights_only=False).items()}}, "
    "'model.safetensors')\""
)


class BinCheckpoint:
    """See checkpoint.Checkpoint. Raises UnsupportedModelError, naming what it asks for, for a pickle of anything but
    tensors."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.config = read_config(directory)
        self.generation_config = read_generation_config(directory)
        self._tensors: dict[str, torch.Tensor] = {}
        for file, promised in _shards(directory).items():
            found = read_state_dict(file)
            check_shard(file, promised, found, INDEX)
            self._tensors.update({name: found[name] for name in promised} if promised else found)
        self.nbytes = sum(tensor.nbytes for tensor in self._tensors.values())

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.read(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.read(name).dtype

    def read(self, name: str) -> torch.Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(f"{self._directory}: tensor '{name}' is missing") from None

    def span(self, name: str) -> None:
        return None

    def close(self) -> None:
        """Let go of the files. Tensors already read stay valid."""
        self._tensors = {}

    def __enter__(self) -> BinCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def pickled_files(directory: Path) -> list[Path]:
    """The files of a directory that may be pickled weights, by name."""
    return sorted(
        path for path in directory.iterdir() if path.suffix in SUFFIXES and not path.name.startswith(TRAINING_STATE)
    )


def _shards(directory: Path) -> dict[Path, list[str]]:
    """The files of the checkpoint, each with the tensors that the index promises; an empty list takes all of them."""
    if (directory / SINGLE).exists():
        return {directory / SINGLE: []}
    if (directory / INDEX).exists():
        return read_index(directory / INDEX)
    files = pickled_files(directory)
    if len(files) == 1:
        return {files[0]: []}
    raise CheckpointError(
        f"{directory}: {len(files)} files of pickled weights ({files[0].name}, {files[1].name}) and no {INDEX}: "
        "leave the one that holds the model"
    )


def read_state_dict(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file, by name; dense, and without gradients. Nothing in the file is run."""
    try:
        with file.open("rb") as stream:
            is_zip = stream.read(len(ZIP_MAGIC)) == ZIP_MAGIC
        if not is_zip:
            log.info("%s: not in torch's zip format (of 1.6 and later), so it is read whole into memory", file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: what cannot be read raises
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        found = REFUSED_NAME.search(str(error))
        if found and _ends_within(file, found[1].rpartition(".")[2]):
            raise CheckpointError(f"{file}: corrupt or truncated (it ends within a name); download it again") from error
        raise _refusal(file, found[1] if found else None) from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # torch raises many types for bytes that are no checkpoint: RuntimeError, EOFError, ...
        reason = str(error).split(". ")[0].strip() or type(error).__name__
        raise CheckpointError(f"{file}: corrupt or truncated ({reason}); download it again") from error
    if not isinstance(loaded, dict):
        raise UnsupportedModelError(f"{file}: holds a {type(loaded).__name__}, expected the model's state_dict()")
    return {name: _tensor(file, name, value) for name, value in loaded.items()}


def _tensor(file: Path, name: object, value: object) -> torch.Tensor:
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        raise UnsupportedModelError(
            f"{file}: its entry {name!r} is a {type(value).__name__}, expected tensors by name: "
            "save the model's state_dict() alone"
        )
    if value.layout != torch.strided or value.is_quantized:
        raise UnsupportedModelError(f"{file}: tensor '{name}' is sparse or quantised, which this version cannot read")
    return value.detach()


def _ends_within(file: Path, name: str) -> bool:
    """Whether the file breaks off in this name, which torch read up to the last byte: there it expects a newline."""
    data = file.read_bytes()
    return data[:-1].endswith(name.encode())


def _refusal(file: Path, name: str | None) -> UnsupportedModelError:
    why = f"it asks for '{name}', and so could run code" if name else "it is corrupt or holds more than tensors"
    return UnsupportedModelError(f"{file}: refused, as {why}: {CONVERT.format(file=file.name)}")
