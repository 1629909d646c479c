"""From what a user passes as a prompt to checked token ids. Too long, empty or out of the vocabulary is an error here,
before the engine sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paceline.errors import PromptTooLongError, UsageError
from paceline.registry import refuse_unknown_keys
from paceline.sampling.params import SamplingParams
from paceline.tokens.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]


@dataclass(frozen=True)
class TokenPrompt:
    text: str | None
    token_ids: tuple[int, ...]


def read_prompt(prompt: Prompt, tokenizer: Tokenizer | None, *, add_special_tokens: bool = True) -> TokenPrompt:
    """A string, token ids, or vLLM's {"prompt": str} and {"prompt_token_ids": [...]}. Raises UsageError otherwise."""
    if isinstance(prompt, Mapping):
        refuse_unknown_keys("prompt key", prompt, ("prompt", "prompt_token_ids"))
        if "prompt_token_ids" in prompt:
            return TokenPrompt(prompt.get("prompt"), token_ids(prompt["prompt_token_ids"]))
        if "prompt" not in prompt:
            raise UsageError("a prompt given as a mapping needs 'prompt' or 'prompt_token_ids'")
        prompt = prompt["prompt"]
    if not isinstance(prompt, str):
        return TokenPrompt(None, token_ids(prompt))
    if tokenizer is None:
        raise UsageError("this LLM has no tokenizer (skip_tokenizer_init): pass prompt_token_ids instead of text")
    if not prompt:
        raise UsageError("the prompt is empty: pass at least one character or token")
    return TokenPrompt(prompt, tuple(tokenizer.encode(prompt, add_special_tokens)))


def is_one_prompt(prompts: Any) -> bool:
    """A string, a mapping or a list of token ids is one prompt; any other list holds several."""
    if isinstance(prompts, (str, Mapping)):
        return True
    return isinstance(prompts, Sequence) and bool(prompts) and all(isinstance(item, int) for item in prompts)


def token_ids(value: Any) -> tuple[int, ...]:
    """A list of integers. Raises UsageError."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise UsageError(f"a prompt must be a string or a list of token ids, got {type(value).__name__}")
    for token in value:
        if not isinstance(token, int) or isinstance(token, bool):
            raise UsageError(f"prompt_token_ids must be integers, got {token!r}")
    return tuple(value)


def check_prompt(prompt: TokenPrompt, params: SamplingParams, *, vocab_size: int, max_model_len: int) -> TokenPrompt:
    """The prompt as the engine takes it: not empty, inside the vocabulary, shorter than the context by at least one
    token unless none is to be chosen. Cut to its last `truncate_prompt_tokens` tokens only where the user asked."""
    token_ids = prompt.token_ids
    if params.truncate_prompt_tokens is not None:
        token_ids = token_ids[-params.truncate_prompt_tokens :]
    if not token_ids:
        raise UsageError("the prompt is empty: pass at least one character or token")
    outside = next((token for token in token_ids if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise UsageError(f"prompt token id {outside} is outside the vocabulary, which ends at {vocab_size - 1}")
    if len(token_ids) + (params.max_tokens != 0) > max_model_len:
        raise PromptTooLongError(
            f"the prompt has {len(token_ids)} tokens and the context holds {max_model_len}, of which at least one must "
            "be left to answer: shorten the prompt, raise max_model_len, or set truncate_prompt_tokens"
        )
    return TokenPrompt(prompt.text, token_ids)


def bad_word_ids(params: SamplingParams, tokenizer: Tokenizer | None, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """The token sequences that spell params.bad_words, each as it begins a text and as it follows a space; but for
    those that the model's vocabulary cannot spell."""
    if not params.bad_words:
        return ()
    if tokenizer is None:
        raise UsageError("bad_words needs a tokenizer; this LLM was made with skip_tokenizer_init")
    found: dict[tuple[int, ...], None] = {}
    for word in params.bad_words:
        for spelling in (word.lstrip(), " " + word.lstrip()):
            ids = tuple(tokenizer.encode(spelling, add_special_tokens=False))
            if ids and max(ids) < vocab_size:
                found[ids] = None
    return tuple(found)
