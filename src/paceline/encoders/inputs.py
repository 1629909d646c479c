"""From texts, pairs of texts and token ids to what an encoder reads. Too long is an error here unless a cut was asked
for: nothing is cut silently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from paceline.encoders.description import EncoderInfo
from paceline.engine.prompts import token_ids
from paceline.errors import PromptTooLongError, UsageError
from paceline.registry import refuse_unknown_keys
from paceline.tokens.tokenizer import Tokenizer

Text = str | Sequence[int] | Mapping[str, Any]
WHOLE = -1  # as truncate_prompt_tokens: cut to what the model reads, vLLM's word for it


class Tokens(NamedTuple):
    """One sequence as the model reads it, special tokens included. `type_ids`: which text of a pair each token is of;
    empty where there is one text."""

    ids: tuple[int, ...]
    type_ids: tuple[int, ...] = ()


class TextReader:
    """Tokenizes for one encoder. `truncate` of its methods: None refuses what is too long, a number cuts to so many
    tokens, WHOLE to as many as the model reads; the beginning stays, and the special tokens around it."""

    def __init__(self, info: EncoderInfo, tokenizer: Tokenizer) -> None:
        self._info = info
        self._tokenizer = tokenizer

    def texts(self, texts: Sequence[Text], truncate: int | None = None) -> list[Tokens]:
        """Of each text, or of token ids, which are taken as they are. Raises UsageError, PromptTooLongError."""
        limit = self._limit(truncate)
        given = [_text_or_ids(text) for text in texts]
        strings = [self._cased(one) for one in given if isinstance(one, str)]
        encoded = iter(self._tokenizer.encode_batch(strings))
        found = []
        for index, one in enumerate(given):
            ids = tuple(next(encoded)) if isinstance(one, str) else one
            if len(ids) > self._allowed(limit):
                if limit is None:
                    raise self._too_long(f"text {index}" if len(given) > 1 else "the text", len(ids))
                ids = ids[:limit] if not isinstance(one, str) else self._cut(self._cased(one), None, limit).ids
            found.append(Tokens(self._checked(ids)))
        return found

    def pairs(self, pairs: Sequence[tuple[str, str]], truncate: int | None = None) -> list[Tokens]:
        """Of each pair as the model's tokenizer joins one. A cut takes tokens from the longer text. Raises as above."""
        limit = self._limit(truncate)
        found = []
        for index, (one, other) in enumerate(pairs):
            tokens = self._pair(one, other)
            if len(tokens.ids) > self._allowed(limit):
                if limit is None:
                    raise self._too_long(f"pair {index}" if len(pairs) > 1 else "the pair", len(tokens.ids))
                tokens = self._cut(self._cased(one), self._cased(other), limit)
            self._checked(tokens.ids)
            found.append(tokens)
        return found

    def _pair(self, one: str, other: str) -> Tokens:
        encoding = self._tokenizer.encode_pair(self._cased(one), self._cased(other))
        return Tokens(tuple(encoding.ids), tuple(encoding.type_ids))

    def _cut(self, text: str, other: str | None, limit: int) -> Tokens:
        encoding = self._tokenizer.encode_cut(text, other, limit)
        return Tokens(tuple(encoding.ids), () if other is None else tuple(encoding.type_ids))

    def _limit(self, truncate: int | None) -> int | None:
        if truncate is None:
            return None
        longest = self._info.max_length
        if truncate == WHOLE:
            return longest
        if not 1 <= truncate <= longest:
            raise UsageError(f"truncate_prompt_tokens must be -1 or from 1 to {longest}, got {truncate}")
        return truncate

    def _allowed(self, limit: int | None) -> int:
        return self._info.max_length if limit is None else limit

    def _cased(self, text: str) -> str:
        return text.lower() if self._info.lower_case else text

    def _checked(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        if not ids:
            raise UsageError("the text is empty: pass at least one token")
        vocab_size = self._info.vocab_size
        if min(ids) < 0 or max(ids) >= vocab_size:
            outside = next(i for i in ids if not 0 <= i < vocab_size)
            raise UsageError(f"token id {outside} is outside the vocabulary, which ends at {vocab_size - 1}")
        return ids

    def _too_long(self, what: str, length: int) -> PromptTooLongError:
        return PromptTooLongError(
            f"{what} has {length} tokens and {self._info.architecture} reads {self._info.max_length}: shorten it, or "
            "set truncate_prompt_tokens to -1 to have its end cut off"
        )


def _text_or_ids(text: Text) -> str | tuple[int, ...]:
    """Raises UsageError for what is neither; vLLM's {"prompt": str} and {"prompt_token_ids": [...]} are either."""
    if isinstance(text, Mapping):
        refuse_unknown_keys("prompt key", text, ("prompt", "prompt_token_ids"))
        inner = text.get("prompt_token_ids", text.get("prompt"))
        if inner is None or isinstance(inner, Mapping):
            raise UsageError("a text given as a mapping needs 'prompt' or 'prompt_token_ids'")
        return _text_or_ids(inner)
    if isinstance(text, str):
        return text
    return token_ids(text)
