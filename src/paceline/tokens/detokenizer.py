"""Incremental detokenisation: tokens in, finished characters out, stop strings found on the way.

Text leaves only when it can no longer change: an incomplete UTF-8 sequence waits for its last byte, and a suffix
that may begin a stop string waits until it does or cannot. Every token costs O(1): its bytes go through a UTF-8
decoder that keeps at most three of them, and nothing already said is looked at again.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from paceline.tokens.tokenizer import Tokenizer


class Delta(NamedTuple):
    """What some tokens added. `stop`: the stop string that was completed, None if none was. `num_kept`: how many of
    the given tokens belong to the output; the rest (drafts after a stop) were not looked at."""

    text: str
    stop: str | None
    num_kept: int


class IncrementalDetokenizer:
    """The text of one request's output. The deltas and finish() concatenate to `tokenizer.decode(all ids)`, cut at a
    stop string.

    Of several stop strings the one that is complete first wins, so that the result does not depend on how the
    text falls into tokens; of two complete at the same character, the longer. A stop string completed by one of
    the first `min_tokens` tokens is ignored, as an end-of-sequence token there would be. `continues_prompt`: the
    text goes on where a prompt ended, so a SentencePiece space at its beginning is a real one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        stop: tuple[str, ...] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
        continues_prompt: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stop = tuple(s for s in stop if s)
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._no_token_yet = not continues_prompt  # a first token is spelled differently
        self._no_text_yet = not continues_prompt  # and so is a first character
        self._is_between = False  # characters: neither inside of one nor before the first
        self._num_tokens = 0
        self._held = ""  # finished characters that may begin a stop string
        self._stopped = False

    def append(self, token_ids: Sequence[int]) -> Delta:
        """Add tokens (several at once when drafts were accepted); see Delta. Nothing is added after a stop."""
        if self._stopped:
            return Delta("", None, 0)
        if not self._stop:
            return Delta("".join([self._token_text(token_id) for token_id in token_ids]), None, len(token_ids))
        out: list[str] = []
        for i, token_id in enumerate(token_ids):
            self._num_tokens += 1
            new = self._token_text(token_id)
            if not new:
                continue
            match = self._find_stop(new) if self._num_tokens > self._min_tokens else None
            text = self._held + new
            if match is not None:
                stop, end = match
                self._stopped = True
                self._held = ""
                out.append(text[: end if self._include_stop else end - len(stop)])
                return Delta("".join(out), stop, i + 1)
            ready = len(text) - self._length_to_hold(text)
            out.append(text[:ready])
            self._held = text[ready:]
        return Delta("".join(out), None, len(token_ids))

    def finish(self) -> str:
        """The text held back so far, now that no token follows; an incomplete character becomes U+FFFD."""
        if self._stopped:
            return ""
        text = self._held + self._start(self._utf8.decode(b"", final=True))
        self._held = ""
        self._stopped = True
        return text

    def _token_text(self, token_id: int) -> str:
        """The characters that this token completes."""
        if self._skip_special_tokens and token_id in self._tokenizer.special_token_ids:
            return ""
        if self._is_between:
            text = self._tokenizer.whole_text(token_id)
            if text is not None:
                return text
        piece = self._tokenizer.token_bytes(token_id, first=self._no_token_yet)
        if piece is None:  # an id that has no token, in the padding of the embedding
            return ""
        self._no_token_yet = False
        text = self._start(self._utf8.decode(piece))
        self._is_between = not self._no_text_yet and not self._utf8.getstate()[0]
        return text

    def _start(self, text: str) -> str:
        if self._no_text_yet and text:
            self._no_text_yet = False
            return self._tokenizer.strip_start(text)
        return text

    def _find_stop(self, new: str) -> tuple[str, int] | None:
        """The stop string that ends first within `new`, and where it ends in held + new."""
        text, old = self._held + new, len(self._held)
        best: tuple[int, int, str] | None = None
        for stop in self._stop:
            start = text.find(stop, max(0, old + 1 - len(stop)))
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return None if best is None else (best[2], best[0])

    def _length_to_hold(self, text: str) -> int:
        """The length of the longest suffix of `text` that a stop string begins with."""
        return max((_overlap(text, stop) for stop in self._stop), default=0)


def _overlap(text: str, stop: str) -> int:
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
