"""/v1/rerank, in the form that Jina's and Cohere's clients share."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BaseModel, ConfigDict, Field

from paceline.serve.protocol.encoding import EncodingFields, EncodingUsage
from paceline.serve.protocol.sampling import Int


class DocumentText(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    text: str


class RerankRequest(EncodingFields):
    """`top_n`: the best ones alone. `return_documents`: false leaves the texts out of the answer."""

    query: str
    documents: Annotated[list[str | DocumentText], Field(min_length=1)]
    top_n: Int | None = None
    return_documents: bool | None = None

    @property
    def texts(self) -> list[str]:
        return [one if isinstance(one, str) else one.text for one in self.documents]


class Document(msgspec.Struct):
    text: str


class Ranked(msgspec.Struct):
    """`index`: the document's place in the request."""

    index: int
    relevance_score: float
    document: Document | UnsetType = UNSET


class Ranking(msgspec.Struct):
    id: str
    model: str
    results: list[Ranked]
    usage: EncodingUsage
