"""The tokenizer of a served model, for the API process: read beside the engine, without torch or a weight."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.loading.directory import read_generation_config, read_json
from paceline.loading.gguf import read_gguf
from paceline.loading.gguf_config import generation_config
from paceline.loading.resolve import ModelSource, resolve
from paceline.tokens.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class TextOptions:
    """Where a model's text side is, as LoadOptions names it: of random weights (`load_format` "dummy") it is the
    tokenizer alone, and nothing of the model is fetched."""

    model: str
    tokenizer: str | None = None
    revision: str | None = None
    chat_template: str | None = None
    hf_token: str | None = None
    download_dir: str | None = None
    load_format: str = "auto"

    def load(self) -> Tokenizer:
        """Raises as `load_tokenizer` and `resolve`. Fetches nothing where the engine has fetched the model."""
        config: dict[str, object] = {}
        generation: dict[str, object] = {}
        if self.load_format != "dummy":
            source = resolve(self.model, revision=self.revision, token=self.hf_token, download_dir=self.download_dir)
            config, generation = _end_tokens(source)
        if self.tokenizer is not None:
            source = resolve(self.tokenizer, token=self.hf_token, download_dir=self.download_dir)
        return load_tokenizer(source, config=config, generation_config=generation, chat_template=self.chat_template)


def _end_tokens(source: ModelSource) -> tuple[dict[str, object], dict[str, object]]:
    """config.json and generation_config.json, both of which may list end tokens."""
    if source.kind == "gguf":
        return {}, generation_config(read_gguf(source.path).metadata)
    return read_json(source.path / "config.json"), read_generation_config(source.path)
