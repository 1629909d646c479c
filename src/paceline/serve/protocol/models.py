"""/v1/models."""

from __future__ import annotations

from typing import Literal

import msgspec


class ModelCard(msgspec.Struct):
    id: str
    created: int
    root: str  # the name that the server was started with
    max_model_len: int | None  # None until it is loaded
    object: Literal["model"] = "model"
    owned_by: Literal["paceline"] = "paceline"
    parent: None = None


class ModelList(msgspec.Struct):
    data: list[ModelCard]
    object: Literal["list"] = "list"
