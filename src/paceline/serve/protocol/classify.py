"""/v1/classify, in vLLM's form."""

from __future__ import annotations

from typing import Literal

import msgspec

from paceline.serve.protocol.encoding import EncodingFields, EncodingUsage
from paceline.serve.protocol.prompt import Prompt


class ClassifyRequest(EncodingFields):
    input: Prompt


class Classification(msgspec.Struct):
    """`label`: the likeliest class; `probs`: of all, in the checkpoint's order."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class Classifications(msgspec.Struct):
    id: str
    created: int
    model: str
    data: list[Classification]
    usage: EncodingUsage
    object: Literal["list"] = "list"
