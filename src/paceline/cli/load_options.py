"""What a command that loads a model as `paceline serve` does hands to the engine, and to the side that has text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from paceline.config import CacheConfig, ParallelConfig, SchedulerConfig, SpeculativeConfig
from paceline.engine.load_options import LoadOptions
from paceline.errors import UsageError
from paceline.registry import refuse_unknown_keys
from paceline.tokens.chat_template import read_template

if TYPE_CHECKING:
    from paceline.serve.text import TextOptions


def load_options(options: Mapping[str, Any]) -> LoadOptions:
    """What `model_and_engine_options` were set to. Raises UsageError for those that contradict each other."""
    if options["trust_remote_code"]:
        raise UsageError("--trust-remote-code is refused: paceline runs no code from a checkpoint")
    if options["enforce_eager"] and options["mode"] not in ("auto", "eager"):
        raise UsageError(f"--enforce-eager and --mode {options['mode']} contradict each other: give one of them")
    if options["load_format"] == "dummy" and options["tokenizer"] is None:
        raise UsageError("--load-format dummy comes without a tokenizer: name one with --tokenizer")
    if options["chat_template"] is not None:
        read_template(options["chat_template"])  # what is wrong with it is told before a model is loaded
    cache = CacheConfig(options["block_size"], None, options["enable_prefix_caching"])
    scheduler = SchedulerConfig(
        options["max_num_seqs"], options["max_num_batched_tokens"], None, options["scheduling_policy"]
    )
    speculative = _speculative(options["speculative_config"])
    same = [
        "model",
        "tokenizer",
        "revision",
        "dtype",
        "device",
        "quantization",
        "max_model_len",
        "kv_cache_gib",
        "memory_gib",
        "offload",
        "offload_dir",
        "seed",
        "chat_template",
        "download_dir",
        "model_impl",
        "load_format",
        "deterministic",
    ]
    return LoadOptions(
        **{name: options[name] for name in same},
        cache=cache,
        scheduler=scheduler,
        speculative=speculative,
        parallel=ParallelConfig(options["tensor_parallel_size"], options["pipeline_parallel_size"]),
        mode="eager" if options["enforce_eager"] else options["mode"],
        generation_config="none" if options["generation_config"] == "vllm" else options["generation_config"],
    )


def text_options(load: LoadOptions) -> TextOptions:
    """Where the text side of what is loaded is."""
    from paceline.serve.text import TextOptions

    return TextOptions(
        load.model,
        load.tokenizer,
        load.revision,
        load.chat_template,
        load.hf_token,
        load.download_dir,
        load.load_format,
    )


def _speculative(given: Mapping[str, Any] | None) -> SpeculativeConfig | None:
    if given is None:
        return None
    refuse_unknown_keys("--speculative-config key", given, SpeculativeConfig.__dataclass_fields__)
    return SpeculativeConfig(**given)
