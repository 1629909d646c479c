"""POST /v1/embeddings."""

from __future__ import annotations

import base64

from fastapi import APIRouter, Request, Response

from paceline.encoders import results
from paceline.encoders.description import EncoderInfo
from paceline.encoders.inputs import TextReader
from paceline.serve.encoding import Answering, Encodable, answer_encoding
from paceline.serve.openapi import documented
from paceline.serve.protocol.embeddings import Embedding, Embeddings, EmbeddingsRequest
from paceline.serve.protocol.prompt import as_list

router = APIRouter(tags=["Encoders"])


@router.post("/v1/embeddings", **documented(EmbeddingsRequest, Embeddings))
async def create_embeddings(request: Request) -> Response:
    """The embeddings of a text or of several, in their order."""
    return await answer_encoding(request, EmbeddingsRequest, "embd", _read, _answer, {"prompt": "input"})


def _read(body: EmbeddingsRequest, info: EncoderInfo, reader: TextReader) -> Encodable[None]:
    results.check_embeds(info, body.dimensions)
    return Encodable(reader.texts(as_list(body.input), body.truncate_prompt_tokens), None)


def _answer(answering: Answering[EmbeddingsRequest, None]) -> Embeddings:
    body = answering.body
    rows_ND = results.embeddings(answering.rows, answering.info, dimensions=body.dimensions, normalize=body.normalize)
    values: list[str | list[float]]
    if body.encoding_format == "base64":
        values = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in rows_ND]
    else:
        values = rows_ND.tolist()
    return Embeddings(
        answering.request_id,
        answering.created,
        answering.model_name,
        [Embedding(index, value) for index, value in enumerate(values)],
        answering.usage,
    )
