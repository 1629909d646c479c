"""What a model's files hold besides weights, as the options ask for it: read by who loads a model whole or in ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from paceline.engine.device import DTYPES
from paceline.engine.load_options import LoadOptions
from paceline.loading.checkpoint import Checkpoint, open_checkpoint
from paceline.loading.description import describe
from paceline.loading.progress import Progress
from paceline.loading.random_checkpoint import RandomCheckpoint
from paceline.loading.resolve import ModelSource, resolve
from paceline.log import get_logger
from paceline.registry import lookup
from paceline.sampling.params import generation_defaults
from paceline.tokens.tokenizer import Tokenizer, load_tokenizer

log = get_logger(__name__)


def open_model(
    options: LoadOptions, device: torch.device, progress: Progress | None, source: ModelSource | None = None
) -> tuple[ModelSource, Checkpoint]:
    """Find the model's files, fetched first where they must be, and read their headers. `source`: where they were
    found before."""
    if options.load_format == "dummy":
        found = describe(
            options.model, revision=options.revision, token=options.hf_token, download_dir=options.download_dir
        )
        log.warning("%s: the weights are random, and so is what the model says", options.model)
        checkpoint = RandomCheckpoint(
            found.config,
            dtype=lookup(DTYPES, "dtype of the checkpoint", found.stored_dtype),
            # A store of offloaded weights lies in host memory or in a file.
            device=device if options.offload is None else "cpu",
            seed=options.seed,
        )
        return ModelSource(options.model, "dummy", Path(options.model), note=found.note), checkpoint
    source = source or resolve(
        options.model,
        revision=options.revision,
        token=options.hf_token,
        download_dir=options.download_dir,
        progress=progress,
    )
    if source.note:
        log.info("%s", source.note)
    return source, open_checkpoint(source)


def read_tokenizer(options: LoadOptions, source: ModelSource, checkpoint: Checkpoint) -> Tokenizer | None:
    """None where the options say so."""
    if options.skip_tokenizer_init:
        return None
    if options.tokenizer is not None:
        source = resolve(options.tokenizer, token=options.hf_token, download_dir=options.download_dir)
    return load_tokenizer(
        source,
        generation_config=checkpoint.generation_config,
        config=checkpoint.config,
        chat_template=options.chat_template,
    )


def read_generation_config(options: LoadOptions, checkpoint: Checkpoint) -> dict[str, Any]:
    """The model's sampling defaults, said once: they decide wherever a request is silent."""
    if options.generation_config == "none":
        return {}
    defaults = generation_defaults(checkpoint.generation_config)
    if defaults:
        listed = ", ".join(f"{name}={value}" for name, value in defaults.items())
        log.warning("the model's generation_config.json sets %s where a request sets nothing", listed)
    return dict(checkpoint.generation_config)


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that most of the checkpoint's values have, once read."""
    sizes: dict[torch.dtype, int] = {}
    for name in checkpoint.names():
        count = 1
        for size in checkpoint.shape(name):
            count *= size
        dtype = checkpoint.dtype(name)
        sizes[dtype] = sizes.get(dtype, 0) + count
    return max(sizes, key=lambda dtype: sizes[dtype])
