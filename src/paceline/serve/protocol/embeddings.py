"""/v1/embeddings, in OpenAI's form."""

from __future__ import annotations

from typing import Literal

import msgspec

from paceline.serve.protocol.encoding import EncodingFields, EncodingUsage
from paceline.serve.protocol.prompt import Prompt
from paceline.serve.protocol.sampling import Int


class EmbeddingsRequest(EncodingFields):
    """`normalize`: embeddings of length 1; null does as the model says."""

    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Int | None = None
    normalize: bool | None = None


class Embedding(msgspec.Struct):
    """`embedding`: numbers, or in base64 the bytes of little-endian float32."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class Embeddings(msgspec.Struct):
    id: str
    created: int
    model: str
    data: list[Embedding]
    usage: EncodingUsage
    object: Literal["list"] = "list"
