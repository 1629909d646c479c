"""What one token id spells, in bytes: the part of a tokenizer that streaming needs.

A vocabulary stores bytes in one of three ways: byte-level BPE (each byte a printable character, GPT-2's alphabet),
SentencePiece ("▁" for a space, `<0xNN>` tokens for bytes without a token of their own) or WordPiece (a space before
each token that does not begin with "##"). In all, a text is the concatenation of its tokens' bytes, so that it can be
decoded a token at a time without looking back.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from paceline.errors import UnsupportedModelError

if TYPE_CHECKING:
    import tokenizers


@dataclass(frozen=True)
class DecodeRule:
    """How a tokenizer spells tokens. `first_spaces`: what becomes of the spaces that a text begins with, which
    encoding added: kept ("keep"), one removed ("strip_one"), or all those of the first token ("strip_token")."""

    kind: Literal["byte_level", "sentencepiece", "wordpiece", "words"]
    replace: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    first_spaces: Literal["keep", "strip_one", "strip_token"] = "keep"
    prefix: str = ""  # of a WordPiece token that continues a word


def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: the character that stands for each byte. Printable Latin-1 stands for itself, the other
    68 bytes for U+0100 onwards, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + i): byte for i, byte in enumerate(hidden)}}


_BYTE_OF = byte_alphabet()
# What WordPiece's decoder does to a token and the space before it, where it cleans up (`cleanup`).
_CLEANUP = (
    *((f" {mark}", mark) for mark in (".", "?", "!", ",")),
    (" ' ", "'"),
    *((f" {end}", end) for end in ("n't", "'m")),
    (" do not", " don't"),
    *((f" {end}", end) for end in ("'s", "'ve", "'re")),
)


def decode_rule(tokenizer: tokenizers.Tokenizer) -> DecodeRule:
    """Read the rule off the tokenizer's decoder. Raises UnsupportedModelError for a decoder that is neither kind."""
    if tokenizer.decoder is None:
        return DecodeRule("words")
    state: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return DecodeRule("byte_level")
    if kinds == ["WordPiece"]:
        return DecodeRule("wordpiece", _CLEANUP if state["cleanup"] else (), prefix=state["prefix"])
    replace: list[tuple[str, str]] = []
    first_spaces: Literal["keep", "strip_one", "strip_token"] = "keep"
    for step in steps:
        if step["type"] == "Replace" and "String" in step["pattern"]:
            replace.append((step["pattern"]["String"], step["content"]))
        elif step["type"] == "Metaspace":
            replace.append((step["replacement"], " "))
            first_spaces = "keep" if step.get("prepend_scheme", "always") == "never" else "strip_token"
        elif (
            step["type"] == "Strip"
            and (step["content"], step["start"], step["stop"]) == (" ", 1, 0)
            and "Fuse" in kinds
        ):
            first_spaces = "strip_one"
        elif step["type"] not in ("ByteFallback", "Fuse"):
            raise UnsupportedModelError(
                f"tokenizer.json has the decoder {'+'.join(kinds)}, which is not supported: "
                "only byte-level, SentencePiece and WordPiece vocabularies are"
            )
    return DecodeRule("sentencepiece", tuple(replace), "ByteFallback" in kinds, first_spaces)


def token_bytes(rule: DecodeRule, token: str) -> bytes:
    """The bytes that `token` (a vocabulary entry) contributes to a text, wherever it stands but first."""
    if rule.kind == "words":
        return f" {token}".encode()
    if rule.kind == "byte_level":
        try:
            return bytes([_BYTE_OF[char] for char in token])
        except KeyError:  # an added token written as plain text
            return token.encode()
    if rule.kind == "wordpiece":
        token = token[len(rule.prefix) :] if token.startswith(rule.prefix) else f" {token}"
    for old, new in rule.replace:
        token = token.replace(old, new)
    if rule.byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.encode()


def first_token_bytes(rule: DecodeRule, token: str) -> bytes:
    """`token_bytes` for the first token of a text ("strip_one" acts on the text instead: see `strip_start`)."""
    piece = token_bytes(rule, token)
    if rule.kind == "words":
        return piece[1:]
    if rule.kind == "wordpiece":
        for old, new in rule.replace:
            token = token.replace(old, new)
        return token.encode()
    if rule.first_spaces == "strip_token":
        return token_bytes(rule, token.replace("▁", ""))
    return piece


def strip_start(rule: DecodeRule, text: str) -> str:
    """Remove from the beginning of a whole text the space that encoding put there."""
    return text[1:] if rule.first_spaces == "strip_one" and text.startswith(" ") else text
