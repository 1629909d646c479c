"""/v1/completions: the request, the answer, and a stream's chunks, which have the same form."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from paceline.outputs import CompletionOutput
from paceline.serve.protocol.common import SYSTEM_FINGERPRINT, PromptLogprobs, Usage, finite
from paceline.serve.protocol.prompt import Prompt, as_list
from paceline.serve.protocol.sampling import Int, SamplingFields


class CompletionRequest(SamplingFields):
    prompt: Prompt
    logprobs: Int | None = None
    add_special_tokens: bool | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or many, as a list."""
        return as_list(self.prompt)


class CompletionLogprobs(msgspec.Struct):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    object: Literal["text_completion"] = "text_completion"
    system_fingerprint: str = SYSTEM_FINGERPRINT


def completion_logprobs(
    answer: CompletionOutput, num_top: int, first_offset: int, decode: Any
) -> CompletionLogprobs | None:
    """The legacy form; None unless the request asked. `first_offset`: characters of the text before this piece.
    `decode(id)`: a token's text, for the one whose log probability nothing precedes."""
    if answer.logprobs is None:
        return None
    result = CompletionLogprobs([], [], [], [])
    offset = first_offset
    for token_id, entry in zip(answer.token_ids, answer.logprobs, strict=True):
        token: str = decode(token_id) if entry is None else entry[token_id].decoded_token or ""
        result.text_offset.append(offset)
        result.tokens.append(token)
        offset += len(token)
        if entry is None:
            result.token_logprobs.append(None)
            result.top_logprobs.append(None)
            continue
        result.token_logprobs.append(finite(entry[token_id].logprob))
        top: dict[str, float] = {}
        for other in list(entry)[:num_top]:
            # Two ids may read alike (an incomplete character each): the likelier one has the name.
            top.setdefault(entry[other].decoded_token or "", finite(entry[other].logprob))
        result.top_logprobs.append(top)
    return result
