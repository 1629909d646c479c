"""POST /v1/rerank, and the same at the paths of Jina's and Cohere's clients."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from paceline.encoders.description import EncoderInfo
from paceline.encoders.inputs import TextReader
from paceline.encoders.results import best_first, check_top_n
from paceline.encoders.scoring import Scoring, pair_up, read_pairs
from paceline.serve.encoding import Answering, Encodable, answer_encoding
from paceline.serve.openapi import documented
from paceline.serve.protocol.rerank import Document, Ranked, Ranking, RerankRequest

router = APIRouter(tags=["Encoders"])


@router.post("/v1/rerank", **documented(RerankRequest, Ranking))
@router.post("/v2/rerank", include_in_schema=False)
@router.post("/rerank", include_in_schema=False)
async def rerank(request: Request) -> Response:
    """Documents by how well they go with a query, the best first."""
    return await answer_encoding(request, RerankRequest, "rerank", _read, _answer, {"prompt": "documents"})


def _read(body: RerankRequest, info: EncoderInfo, reader: TextReader) -> Encodable[Scoring]:
    check_top_n(body.top_n)
    scoring = read_pairs(reader, info, pair_up(body.query, body.texts), body.truncate_prompt_tokens)
    return Encodable(scoring.texts, scoring)


def _answer(answering: Answering[RerankRequest, Scoring]) -> Ranking:
    body, texts = answering.body, answering.body.texts
    scores = answering.read.scores(answering.rows)
    shown = body.return_documents is not False
    ranked = [
        Ranked(place, scores[place], Document(texts[place]) if shown else UNSET)
        for place in best_first(scores, body.top_n)
    ]
    return Ranking(answering.request_id, answering.model_name, ranked, answering.usage)
