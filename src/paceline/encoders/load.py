"""From an encoder's directory to one that runs: transformers' own module for the architecture, made fast by
`paceline.optimize`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from paceline.encoders.description import EncoderFiles, EncoderInfo, Task, read_encoder, task_of
from paceline.encoders.encoder import Encoder
from paceline.encoders.inputs import Tokens
from paceline.encoders.pooling import Dense
from paceline.engine.device import DTYPES, pick_device
from paceline.engine.load_options import LoadOptions
from paceline.errors import CheckpointError, OutOfMemoryError, UnsupportedModelError, UsageError, is_out_of_memory
from paceline.host import read_cpu
from paceline.kernels.gpu import untried_gpu
from paceline.loading.progress import Progress, Silent
from paceline.loading.resolve import ModelSource, resolve
from paceline.log import get_logger
from paceline.models.fallback import INSTALL, quiet
from paceline.phases import Phases
from paceline.registry import lookup
from paceline.tokens.tokenizer import Tokenizer, load_tokenizer

log = get_logger(__name__)

# Which of a CPU's instructions multiply bfloat16, x86's and Arm's: without them it is slower than float32.
BF16_ISA = frozenset(["avx512_bf16", "amx_bf16", "bf16"])


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder ready to run. `phases`: seconds of each part of the loading, in order."""

    source: ModelSource
    encoder: Encoder
    tokenizer: Tokenizer | None
    phases: Mapping[str, float]


def load_encoder(
    options: LoadOptions,
    source: ModelSource,
    task: Task,
    progress: Progress | None = None,
    phases: Phases | None = None,
) -> LoadedEncoder:
    """Load the encoder of a directory (`task_of` says the task). With mode "eager" transformers' module runs as it is.

    Raises UsageError for options that no encoder has, UnsupportedModelError where transformers is missing or does not
    know the model, and for what is not implemented of it; CheckpointError; OutOfMemoryError.
    """
    phases = Phases() if phases is None else phases
    check_options(options)
    with phases.time("device"):
        device = pick_device(options.device)
        dtype = pick_encoder_dtype(options.dtype, device)
    with phases.time("tokenizer"):
        files = read_encoder(source, task, options.max_model_len)
        tokenizer = _read_tokenizer(options, source, files)
    with phases.time("imports"):
        transformers = _import_transformers(files.architecture)
    with phases.time("weights"):
        try:
            encoder = _load(transformers, files, dtype, device, progress or Silent())
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemoryError(f"{options.model} does not fit the memory of {device}: {error}") from None
    if options.mode != "eager":
        with phases.time("optimize"):
            _optimize(encoder)
    if tokenizer is not None:
        tokenizer = tokenizer.for_vocabulary(encoder.info.vocab_size)
    return LoadedEncoder(source, encoder, tokenizer, phases.seconds)


def find_encoder(options: LoadOptions, progress: Progress | None = None) -> tuple[ModelSource | None, Task | None]:
    """Where the model's files are, fetched if need be, and what for if it is an encoder. No files are looked for where
    the weights are random (`load_format` "dummy"). Raises as `resolve`."""
    if options.load_format == "dummy":
        return None, None
    source = resolve(
        options.model,
        revision=options.revision,
        token=options.hf_token,
        download_dir=options.download_dir,
        progress=progress,
    )
    return source, task_of(source)


def check_options(options: LoadOptions) -> None:
    """Raise UsageError for what only a decoder can be asked."""
    refused = {
        "quantization": options.quantization,
        "offload": options.offload,
        "kv_cache_gib": options.kv_cache_gib,
        "memory_gib": options.memory_gib,
        "chat_template": options.chat_template,
        "speculative_config": options.speculative,
        "deterministic": options.deterministic,
        "tensor_parallel_size or pipeline_parallel_size": options.parallel.world_size > 1,
    }
    for name, value in refused.items():
        if value:
            raise UsageError(f"{name} is for models that generate, and {options.model} is an encoder: leave it out")
    if options.model_impl == "paceline":
        raise UsageError("encoders run through transformers' modules: leave out model_impl 'paceline'")


def pick_encoder_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """A dtype by its name; 'auto' is bfloat16 where the device computes it faster, else float32, whatever is stored."""
    name = str(name).removeprefix("torch.")
    if name != "auto":
        return lookup(DTYPES, "dtype", name)
    fast = untried_gpu(device).bf16 if device.type == "cuda" else not BF16_ISA.isdisjoint(read_cpu().isa)
    chosen, why = (torch.bfloat16, "computes it faster") if fast else (torch.float32, "has no fast bfloat16")
    log.info("running in %s, as this %s %s", str(chosen).removeprefix("torch."), device.type, why)
    return chosen


def _import_transformers(architecture: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UnsupportedModelError(
            f"{architecture} runs through transformers, which is not installed: {INSTALL}"
        ) from error
    return transformers


def _read_tokenizer(options: LoadOptions, source: ModelSource, files: EncoderFiles) -> Tokenizer | None:
    if options.skip_tokenizer_init:
        return None
    if options.tokenizer is not None:
        source = resolve(options.tokenizer, token=options.hf_token, download_dir=options.download_dir)
    return load_tokenizer(source, generation_config={}, config=files.config)


def _load(
    transformers: Any, files: EncoderFiles, dtype: torch.dtype, device: torch.device, progress: Progress
) -> Encoder:
    model = _read_model(transformers, files, dtype, progress)
    config = model.config
    modules = files.modules
    dense = () if modules is None else tuple(Dense(module).eval().to(device) for module in modules.dense)
    size = len(files.labels)
    if modules is not None:
        size = modules.dense[-1].out_features if modules.dense else int(config.hidden_size)
    elif int(config.num_labels) != size:
        raise CheckpointError(f"{files.directory}: {config.num_labels} classes and {size} names: config.json is wrong")
    info = EncoderInfo(
        architecture=files.architecture,
        task=files.task,
        size=size,
        max_length=files.max_length,
        vocab_size=int(config.vocab_size),
        lower_case=files.lower_case,
        normalize=modules is not None and modules.normalize,
        activation=files.activation,
        labels=files.labels,
    )
    reads_types = "token_type_ids" in inspect.signature(model.forward).parameters
    pad_token_id = getattr(config, "pad_token_id", None)
    return Encoder(
        info,
        model.to(device),
        device,
        dtype,
        0 if pad_token_id is None else int(pad_token_id),
        reads_types and int(getattr(config, "type_vocab_size", None) or 0) > 1,
        None if modules is None else modules.pooling,
        dense,
    )


def _read_model(transformers: Any, files: EncoderFiles, dtype: torch.dtype, progress: Progress) -> Any:
    """transformers' module with the checkpoint's weights, in evaluation mode, on the CPU."""
    kind = files.config.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} does not know the model type {kind!r} of {files.architecture}, "
            "and paceline runs no code from a checkpoint"
        )
    maker = transformers.AutoModelForSequenceClassification if files.task == "classify" else transformers.AutoModel
    if files.architecture.endswith("EncoderModel"):  # of an encoder-decoder (T5) its encoder alone
        maker = getattr(transformers, files.architecture, maker)
    progress.start("loading", sum(file.stat().st_size for file in files.directory.glob("*.safetensors")))
    try:
        with quiet():
            model, report = maker.from_pretrained(
                files.directory, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        said = " ".join(str(error).split())
        raise CheckpointError(f"{files.directory}: transformers cannot load it ({said})") from error
    finally:
        progress.done()
    # BERT's pooler, which no pooling of ours reads, is missing where a masked language model was saved.
    missing = sorted(key for key in report["missing_keys"] if not (files.task == "embed" and key.startswith("pooler.")))
    if missing:
        raise CheckpointError(
            f"{files.directory}: {len(missing)} tensors of {files.architecture} are missing, the first is "
            f"'{missing[0]}': download it again, or check that config.json belongs to it"
        )
    if model.config.is_encoder_decoder and not files.architecture.endswith("EncoderModel"):
        raise UnsupportedModelError(f"{files.architecture} is an encoder-decoder: only encoders make embeddings")
    model.config.use_cache = False  # of a decoder that embeds: nothing is generated
    if files.task == "embed" and "add_pooling_layer" in inspect.signature(type(model).__init__).parameters:
        model.pooler = None  # BERT's, which none of our poolings reads
    return model.eval()


def _optimize(encoder: Encoder) -> None:
    """Make the module fast, and run it with one text and with several, which are captured apart: "fast", since nobody
    else changes this module."""
    from paceline.fusion import optimize  # torch's compiler: seconds that no model that generates has to wait

    optimize(encoder.model, level="fast")
    text = Tokens((encoder.pad_token_id,) * 8)
    encoder.run([text])
    encoder.run([text, Tokens(text.ids * 2)])
