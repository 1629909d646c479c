"""What a request may give as its text: a string or token ids, one or many, as OpenAI takes them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, WithJsonSchema


def _check_prompt(value: Any) -> Any:
    """By hand: pydantic's union would try each alternative on each of 100,000 ids, and report all of them."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if _are_ids(value) or all(isinstance(item, list) and item and _are_ids(item) for item in value):
            return value
    raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists, not empty")


def _are_ids(items: list[Any]) -> bool:
    return all(type(item) is int for item in items)


_TEXT, _IDS = {"type": "string"}, {"type": "array", "minItems": 1, "items": {"type": "integer"}}
_PROMPT_SCHEMA = {
    "anyOf": [
        _TEXT,
        {"type": "array", "minItems": 1, "items": _TEXT},
        _IDS,
        {"type": "array", "minItems": 1, "items": _IDS},
    ]
}
Prompt = Annotated[Any, AfterValidator(_check_prompt), WithJsonSchema(_PROMPT_SCHEMA)]


def as_list(prompt: Any) -> list[str | list[int]]:
    """One or many, as a list."""
    one = isinstance(prompt, str) or isinstance(prompt[0], int)
    return [prompt] if one else prompt
