"""A model's directory on disk with random weights, to time what a real one's start would take."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from paceline.loading.random_checkpoint import RandomCheckpoint
from paceline.loading.safetensors_checkpoint import DTYPES, INDEX

SHARD_BYTES = 5 * 10**9  # as transformers cuts them
WRITERS = 8
PIECE_BYTES = 64 << 20


def write_directory(config: Mapping[str, Any], directory: Path, *, device: torch.device | str = "cpu") -> int:
    """config.json, safetensors shards and a tokenizer of its vocabulary; the bytes of the weights.

    The values are made on `device` and stored in the config's own dtype.
    """
    dtype = getattr(torch, config["torch_dtype"])
    checkpoint = RandomCheckpoint(config, dtype=dtype, device=device)
    shards = _shards(checkpoint)
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        path = directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(checkpoint, names, dtype, path)
        index.update(dict.fromkeys(names, path.name))
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (directory / "config.json").write_text(json.dumps(dict(config)))
    random_tokenizer(config["vocab_size"]).save(str(directory / "tokenizer.json"))
    return checkpoint.nbytes


def _shards(checkpoint: RandomCheckpoint) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name in checkpoint.names():
        nbytes = _nbytes(checkpoint, name)
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _write_shard(checkpoint: RandomCheckpoint, names: Sequence[str], dtype: torch.dtype, path: Path) -> None:
    kind = next(kind for kind, known in DTYPES.items() if known == dtype)
    spans: dict[str, tuple[int, int]] = {}
    end = 0
    for name in names:
        begin, end = end, end + _nbytes(checkpoint, name)
        spans[name] = begin, end
    header = {
        name: {"dtype": kind, "shape": checkpoint.shape(name), "data_offsets": span} for name, span in spans.items()
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(name: str) -> None:
        offset = 8 + len(text) + spans[name][0]
        for piece in torch.split(checkpoint.read(name).view(-1).view(torch.uint8), PIECE_BYTES):
            # Pinned memory is kept and used again. Fresh memory for each tensor, 16 GB in all, took 19 s, and pieces
            # like these 7 s in a script that wrote nothing else.
            rest = torch.empty_like(piece, device="cpu", pin_memory=piece.is_cuda).copy_(piece).numpy().data
            while rest:
                count = os.pwrite(file.fileno(), rest, offset)
                rest, offset = rest[count:], offset + count

    with path.open("wb") as file, ThreadPoolExecutor(WRITERS) as executor:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        for _ in executor.map(write, names):  # raises what a writer raised
            pass


def _nbytes(checkpoint: RandomCheckpoint, name: str) -> int:
    return math.prod(checkpoint.shape(name)) * checkpoint.dtype(name).itemsize


def random_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE of that many tokens, at least 256: all bytes, then pairs, then as many triples as are left."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = product(letters, letters)
    triples = ((first + second, third) for first, second, third in product(letters, repeat=3))
    merges = list(islice(chain(pairs, triples), max(0, vocab_size - len(letters))))
    words = [*letters, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
