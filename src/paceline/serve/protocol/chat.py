"""/v1/chat/completions: the request, the answer, and a stream's chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import Field, WithJsonSchema

from paceline.outputs import CompletionOutput, Logprob
from paceline.serve.protocol.common import SYSTEM_FINGERPRINT, PromptLogprobs, Usage, finite
from paceline.serve.protocol.sampling import Int, SamplingFields

# What a template makes of a message is its own affair: only this much is asked of all.
_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}
_MESSAGE = {
    "type": "object",
    "required": ["role"],
    "anyOf": [{"required": ["content"]}, {"required": ["tool_calls"]}, {"required": ["reasoning_content"]}],
    "properties": {
        "role": {"type": "string", "minLength": 1},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]},
    },
}


class ChatCompletionRequest(SamplingFields):
    messages: list[Annotated[dict[str, Any], WithJsonSchema(_MESSAGE)]] = Field(min_length=1)
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ContentLogprob]
    refusal: None = None


class Message(msgspec.Struct):
    role: str
    content: str | None
    refusal: None = None


class ChatChoice(msgspec.Struct):
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None


class ChatCompletion(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"
    system_fingerprint: str = SYSTEM_FINGERPRINT
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Delta(msgspec.Struct):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChunkChoice(msgspec.Struct):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET


class ChatCompletionChunk(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    system_fingerprint: str = SYSTEM_FINGERPRINT
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


TokenBytes = Mapping[int, bytes]


def chat_logprobs(answer: CompletionOutput, num_top: int, token_bytes: Any) -> ChatLogprobs | None:
    """The log probabilities of an answer's tokens, `num_top` candidates each; None unless the request asked.
    `token_bytes(id)`: what a token adds to a text, or None."""
    if answer.logprobs is None:
        return None
    return ChatLogprobs(
        [
            _content(token_id, entry, num_top, token_bytes)
            for token_id, entry in zip(answer.token_ids, answer.logprobs, strict=True)
            if entry is not None
        ]
    )


def _content(token_id: int, entry: Mapping[int, Logprob], num_top: int, token_bytes: Any) -> ContentLogprob:
    # The likeliest come first; the chosen one may follow them, as one more.
    top = [_one(i, entry[i], token_bytes) for i in list(entry)[:num_top]]
    chosen = _one(token_id, entry[token_id], token_bytes)
    return ContentLogprob(chosen.token, chosen.logprob, chosen.bytes, top)


def _one(token_id: int, logprob: Logprob, token_bytes: Any) -> TokenLogprob:
    piece: bytes | None = token_bytes(token_id)
    return TokenLogprob(logprob.decoded_token or "", finite(logprob.logprob), None if piece is None else list(piece))


def role_chunk(index: int) -> ChunkChoice:
    return ChunkChoice(index, Delta(role="assistant", content=""))


def text_chunk(answer: CompletionOutput, logprobs: ChatLogprobs | None) -> ChunkChoice:
    return ChunkChoice(answer.index, Delta(content=answer.text), logprobs)


def final_chunk(answer: CompletionOutput) -> ChunkChoice:
    return ChunkChoice(answer.index, Delta(), None, answer.finish_reason, answer.stop_reason)


def message_parts(messages: Sequence[Mapping[str, Any]], knows_developer: bool) -> list[Mapping[str, Any]]:
    """The messages as a template takes them. "developer" is OpenAI's newer word for "system", which few know."""
    if knows_developer:
        return list(messages)
    return [{**m, "role": "system"} if m.get("role") == "developer" else m for m in messages]
