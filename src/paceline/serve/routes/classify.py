"""POST /v1/classify, and the same at vLLM's path."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from paceline.encoders import results
from paceline.encoders.description import EncoderInfo
from paceline.encoders.inputs import TextReader
from paceline.serve.encoding import Answering, Encodable, answer_encoding
from paceline.serve.openapi import documented
from paceline.serve.protocol.classify import Classification, Classifications, ClassifyRequest
from paceline.serve.protocol.prompt import as_list

router = APIRouter(tags=["Encoders"])


@router.post("/v1/classify", **documented(ClassifyRequest, Classifications))
@router.post("/classify", include_in_schema=False)
async def classify(request: Request) -> Response:
    """The probability of each of a classifier's classes, for a text or several."""
    return await answer_encoding(request, ClassifyRequest, "classify", _read, _answer, {"prompt": "input"})


def _read(body: ClassifyRequest, info: EncoderInfo, reader: TextReader) -> Encodable[None]:
    results.check_classifies(info)
    return Encodable(reader.texts(as_list(body.input), body.truncate_prompt_tokens), None)


def _answer(answering: Answering[ClassifyRequest, None]) -> Classifications:
    info = answering.info
    rows_ND = results.probabilities(answering.rows, info)
    return Classifications(
        answering.request_id,
        answering.created,
        answering.model_name,
        [
            Classification(index, info.labels[likeliest], row, len(row))
            for index, (row, likeliest) in enumerate(zip(rows_ND.tolist(), rows_ND.argmax(-1), strict=True))
        ],
        answering.usage,
    )
