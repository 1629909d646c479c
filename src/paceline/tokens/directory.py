"""A Hugging Face directory's tokenizer: tokenizer.json and what tokenizer_config.json adds, as transformers reads them.

Whether BOS and EOS are added is tokenizer.json's to say (its post-processor); tokenizer_config.json's `add_bos_token`
is for tokenizers that are built without one, and transformers ignores it here too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from paceline.errors import CheckpointError
from paceline.tokens.parts import TokenizerParts

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_ADDED_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def read_directory(path: Path) -> TokenizerParts:
    """Read tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat templates beside them.

    Raises CheckpointError if tokenizer.json is missing or any of them is corrupt.
    """
    backend = _read_backend(path)
    config = {**_read_json(path / "special_tokens_map.json"), **_read_json(path / "tokenizer_config.json")}
    named = _named_tokens(config)
    try:
        _add_tokens(backend, config, named)
        templates = _read_templates(path, config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # an entry is not what it has to be
        raise CheckpointError(
            f"{path / 'tokenizer_config.json'} has an entry of the wrong form ({error!r}): download it again"
        ) from error
    eos_id = backend.token_to_id(named["eos_token"]) if "eos_token" in named else None
    return TokenizerParts(
        backend=backend,
        named_tokens=named,
        eos_token_ids=frozenset() if eos_id is None else frozenset({eos_id}),
        templates=templates,
    )


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    file = path / "tokenizer.json"
    if not file.is_file():
        kinds = ("*.model", "*.tiktoken", "tekken.json", "vocab.json")
        others = [file.name for kind in kinds for file in sorted(path.glob(kind))]
        if others:
            raise CheckpointError(
                f"{path} has {others[0]} but no tokenizer.json: convert it once with transformers, "
                f"AutoTokenizer.from_pretrained('{path}').save_pretrained('{path}')"
            )
        raise CheckpointError(f"{path} has no tokenizer.json: copy it from the model's repository")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for whatever it cannot parse
        raise CheckpointError(f"{file} is corrupt or not a tokenizer ({error}): download it again") from error
    # Limits that training left in the file would cut or pad prompts silently.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object, it holds a {type(value).__name__}")
    return value


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... Each is a string, or an added token written out as an object with `content`."""
    named: dict[str, str] = {}
    for name in _NAMED:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            named[name] = content
    return named


def _add_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Tokens that tokenizer_config.json declares and tokenizer.json lacks, or declares otherwise."""
    known = backend.get_added_tokens_decoder()
    declared = config.get("added_tokens_decoder") or {}
    for token_id, spec in sorted(declared.items(), key=lambda item: int(item[0])):
        flags = {flag: bool(spec[flag]) for flag in _ADDED_FLAGS if flag in spec}
        token = AddedToken(spec["content"], **flags)
        if repr(known.get(int(token_id))) != repr(token):
            backend.add_tokens([token])
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    contents = [
        t.get("content") if isinstance(t, dict) else t for t in (extra.values() if isinstance(extra, dict) else extra)
    ]
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = [text for text in dict.fromkeys([*named.values(), *contents]) if text not in present]
    backend.add_special_tokens([AddedToken(text, special=True) for text in missing])


def _read_templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name; a .jinja file is preferred to tokenizer_config.json's string or list."""
    declared = config.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(declared, str):
        templates["default"] = declared
    elif isinstance(declared, list):
        templates.update({entry["name"]: entry["template"] for entry in declared})
    files = {file.stem: file for file in sorted(path.glob("additional_chat_templates/*.jinja"))}
    if (path / "chat_template.jinja").is_file():
        files["default"] = path / "chat_template.jinja"
    for name, file in files.items():
        try:
            templates[name] = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file} cannot be read ({error})") from error
    return templates
