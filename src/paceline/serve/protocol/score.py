"""/v1/score, in vLLM's form."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from pydantic import Field

from paceline.serve.protocol.encoding import EncodingFields, EncodingUsage

Texts = str | Annotated[list[str], Field(min_length=1)]


class ScoreRequest(EncodingFields):
    """One text against each of several, or two lists pair by pair."""

    text_1: Texts
    text_2: Texts


class Score(msgspec.Struct):
    index: int
    score: float
    object: Literal["score"] = "score"


class Scores(msgspec.Struct):
    id: str
    created: int
    model: str
    data: list[Score]
    usage: EncodingUsage
    object: Literal["list"] = "list"
