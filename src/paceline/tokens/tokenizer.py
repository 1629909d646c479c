"""Text to token ids and back, from a checkpoint directory (tokenizer.json and its companions) or a GGUF file.

The same ids as transformers' AutoTokenizer gives; neither transformers nor Jinja is imported here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from paceline.errors import ChatTemplateError, CheckpointError, UsageError
from paceline.loading.gguf import read_gguf
from paceline.log import get_logger
from paceline.tokens.chat_template import Messages, read_template, render_chat
from paceline.tokens.directory import read_directory
from paceline.tokens.gguf_tokenizer import tokenizer_from_metadata
from paceline.tokens.parts import TokenizerParts
from paceline.tokens.pieces import decode_rule, first_token_bytes, strip_start, token_bytes

if TYPE_CHECKING:
    import tokenizers

    from paceline.loading.resolve import ModelSource

log = get_logger(__name__)

_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """A `tokenizers.Tokenizer` (as `backend`) with the checkpoint's special tokens and chat templates."""

    def __init__(self, parts: TokenizerParts) -> None:
        self._parts = parts
        self.backend = parts.backend
        self.eos_token_ids = parts.eos_token_ids
        self.named_tokens = parts.named_tokens
        self.chat_templates = parts.templates
        added = self.backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(i for i, token in added.items() if token.special)
        self.vocab_size: int = self.backend.get_vocab_size(with_added_tokens=True)
        self._rule = decode_rule(self.backend)
        self._bytes: dict[int, bytes | None] = {}  # memos of token_bytes and whole_text, filled as ids are met
        self._texts: dict[int, str | None] = {}

    def for_vocabulary(self, vocab_size: int) -> Tokenizer:
        """The tokenizer of a model with `vocab_size` tokens: end tokens that it does not have end nothing, and go. What
        lies beyond the model is said; prompts that hold it are refused (engine/prompts.py)."""
        beyond = [i for i in self.backend.get_added_tokens_decoder() if i >= vocab_size]
        if beyond:
            shown = ", ".join(repr(self.token_string(i)) for i in beyond[:3])
            log.info(
                "the tokenizer adds tokens that the model's vocabulary of %d has not (%s): prompts must not hold them",
                vocab_size,
                shown,
            )
        if self.backend.get_vocab_size(with_added_tokens=False) > vocab_size:
            log.warning(
                "the tokenizer has %d tokens and the model %d: is it this model's? Prompts that hold one of the others "
                "are refused",
                self.backend.get_vocab_size(with_added_tokens=False),
                vocab_size,
            )
        outside = sorted(i for i in self.eos_token_ids if i >= vocab_size)
        if not outside:
            return self
        log.warning("end-of-sequence ids %s are not in the model's vocabulary of %d: ignored", outside, vocab_size)
        return Tokenizer(replace(self._parts, eos_token_ids=self.eos_token_ids - frozenset(outside)))

    # ------------------------------------------------------------------------------------------- encoding

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; "" gives [] or the BOS alone. Raises UsageError for text that is not valid Unicode."""
        _check_text(text)
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of each text, over the CPU's threads."""
        for text in texts:
            _check_text(text)
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def encode_pair(self, text: str, other: str) -> tokenizers.Encoding:
        """Two texts joined as a cross-encoder reads them: `ids`, and `type_ids` that say which text each is of."""
        _check_text(text)
        _check_text(other)
        return self.backend.encode(text, other)

    def encode_cut(self, text: str, other: str | None, limit: int) -> tokenizers.Encoding:
        """`encode` of the text, or `encode_pair`, with ends cut off so that at most `limit` tokens are left, special
        ones included; of a pair the longer text is cut. Raises UsageError where the special tokens take all."""
        given = [one for one in (text, other) if one is not None]
        for one in given:
            _check_text(one)
        # Not the backend's own truncation, which is a setting of the object that all threads share.
        encodings = [self.backend.encode(one, add_special_tokens=False) for one in given]
        room = limit - self.backend.num_special_tokens_to_add(other is not None)
        if room < len(given):
            raise UsageError(f"truncate_prompt_tokens {limit} leaves no token beside the special ones: raise it")
        for encoding, length in zip(encodings, _shares([len(one.ids) for one in encodings], room), strict=True):
            encoding.truncate(length)
        return self.backend.post_process(encodings[0], encodings[1] if len(encodings) == 2 else None)

    def encode_chat(self, messages: Messages, **options: Any) -> list[int]:
        """Token ids of `apply_chat_template(messages, **options)`. The template writes BOS itself: none is added."""
        return self.encode(self.apply_chat_template(messages, **options), add_special_tokens=False)

    # ------------------------------------------------------------------------------------------- decoding

    def decode(
        self,
        token_ids: Iterable[int],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """The text of `token_ids`; bytes that are not UTF-8 become U+FFFD, one for each maximal invalid part.

        `spaces_between_special_tokens` is there for callers written for vLLM: as with every vocabulary of the
        `tokenizers` library, no space is ever put there. An id without a token (padding of the embedding) is "".
        """
        pieces: list[bytes] = []
        for token_id in token_ids:
            if skip_special_tokens and token_id in self.special_token_ids:
                continue
            piece = self.token_bytes(token_id, first=not pieces)
            if piece is not None:
                pieces.append(piece)
        return self.strip_start(b"".join(pieces).decode("utf-8", "replace"))

    def token_bytes(self, token_id: int, first: bool = False) -> bytes | None:
        """The bytes a token contributes to a text (`first`: to its beginning); None for an id without a token."""
        if first:
            token = self.token_string(token_id)
            return None if token is None else first_token_bytes(self._rule, token)
        if token_id not in self._bytes:
            token = self.token_string(token_id)
            self._bytes[token_id] = None if token is None else token_bytes(self._rule, token)
        return self._bytes[token_id]

    def whole_text(self, token_id: int) -> str | None:
        """What a token adds to a text that it neither begins nor finds inside a character: "" for an id without a
        token, None where it has less than whole characters itself."""
        if token_id not in self._texts:
            try:
                self._texts[token_id] = (self.token_bytes(token_id) or b"").decode()
            except UnicodeDecodeError:
                self._texts[token_id] = None
        return self._texts[token_id]

    def strip_start(self, text: str) -> str:
        """Remove from the beginning of a whole decoded text the space that encoding put there, if it puts one."""
        return strip_start(self._rule, text)

    # ---------------------------------------------------------------------------------------- single tokens

    def token_string(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of an id ("Ġthe", "▁the"); None for an id without a token."""
        token: str | None = self.backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        return token

    def token_id(self, token: str) -> int | None:
        """The id of a vocabulary entry, None if there is none."""
        token_id: int | None = self.backend.token_to_id(token)
        return token_id

    @property
    def bos_token_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's own end token; generation stops at any of `eos_token_ids`."""
        return self._named_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._named_id("pad_token")

    def _named_id(self, name: str) -> int | None:
        token = self.named_tokens.get(name)
        return None if token is None else self.token_id(token)

    # ----------------------------------------------------------------------------------------------- chat

    @property
    def chat_template(self) -> str | None:
        """The default chat template's source, None if the checkpoint has none."""
        return self.chat_templates.get("default")

    def apply_chat_template(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation (see chat_template.render_chat). `template`: the source of one, or the
        name of one of the checkpoint's; `variables` are passed to it.
        Raises ChatTemplateError, also if there is none."""
        return render_chat(
            self._choose_template(template, tools is not None),
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            documents=documents,
            variables={**self.named_tokens, **variables},
        )

    def _choose_template(self, template: str | None, with_tools: bool) -> str:
        if template is not None:
            return self.chat_templates.get(template, template)
        if with_tools and "tool_use" in self.chat_templates:
            return self.chat_templates["tool_use"]
        if "default" in self.chat_templates:
            return self.chat_templates["default"]
        if self.chat_templates:
            names = ", ".join(sorted(self.chat_templates))
            raise ChatTemplateError(f"this model has several chat templates and no default: name one of {names}")
        raise ChatTemplateError(
            "this model has no chat template (a base model?): pass one (chat_template=, --chat-template), "
            "or complete plain text with generate"
        )


def load_tokenizer(
    source: ModelSource,
    *,
    generation_config: Mapping[str, Any],
    config: Mapping[str, Any],
    chat_template: str | None = None,
) -> Tokenizer:
    """The tokenizer of a resolved model. `eos_token_ids` joins what the vocabulary, `config` and `generation_config`
    say; `chat_template` (a Jinja source, or the path of a file) replaces the checkpoint's own.

    Raises CheckpointError for a missing or corrupt tokenizer, UnsupportedModelError for a kind that is not
    implemented, ChatTemplateError for a `chat_template` that cannot be read or does not compile.
    """
    parts = (
        tokenizer_from_metadata(read_gguf(source.path).metadata)
        if source.kind == "gguf"
        else read_directory(source.path)
    )
    eos = (
        parts.eos_token_ids
        | listed_eos(config, "config.json")
        | listed_eos(generation_config, "generation_config.json")
    )
    templates = parts.templates if chat_template is None else {"default": read_template(chat_template)}
    return Tokenizer(replace(parts, eos_token_ids=eos, templates=templates))


def listed_eos(settings: Mapping[str, Any], where: str) -> frozenset[int]:
    """`eos_token_id` of a config: absent, an int or a list of ints."""
    value = settings.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(not isinstance(i, int) or isinstance(i, bool) for i in ids):
        raise CheckpointError(f"{where}: eos_token_id must be an integer or a list of integers, got {value!r}")
    return frozenset(ids)


def _shares(lengths: list[int], room: int) -> list[int]:
    """Tokens that each of one or two texts keeps of `room`: the longer one gives first. Where both must, each has half,
    and the longer (the second of equals) what is odd."""
    if sum(lengths) <= room or len(lengths) == 1:
        return [min(length, room) for length in lengths]
    shorter = min(*lengths, room // 2)
    return [room - shorter, shorter] if lengths[0] > lengths[1] else [shorter, room - shorter]


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise UsageError(f"a prompt must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        match = _SURROGATE.search(text)
        assert match is not None
        raise UsageError(
            f"the text is not valid Unicode: a lone surrogate (U+{ord(match.group()):04X}) at character {match.start()}"
        ) from None
