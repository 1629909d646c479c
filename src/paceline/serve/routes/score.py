"""POST /v1/score, and the same at vLLM's path."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from paceline.encoders.description import EncoderInfo
from paceline.encoders.inputs import TextReader
from paceline.encoders.scoring import Scoring, pair_up, read_pairs
from paceline.serve.encoding import Answering, Encodable, answer_encoding
from paceline.serve.openapi import documented
from paceline.serve.protocol.score import Score, ScoreRequest, Scores

router = APIRouter(tags=["Encoders"])


@router.post("/v1/score", **documented(ScoreRequest, Scores))
@router.post("/score", include_in_schema=False)
async def score(request: Request) -> Response:
    """How well texts go together: a cross-encoder's score, or the cosine of their embeddings."""
    return await answer_encoding(request, ScoreRequest, "score", _read, _answer, {"prompt": "text_2"})


def _read(body: ScoreRequest, info: EncoderInfo, reader: TextReader) -> Encodable[Scoring]:
    scoring = read_pairs(reader, info, pair_up(body.text_1, body.text_2), body.truncate_prompt_tokens)
    return Encodable(scoring.texts, scoring)


def _answer(answering: Answering[ScoreRequest, Scoring]) -> Scores:
    return Scores(
        answering.request_id,
        answering.created,
        answering.model_name,
        [Score(index, value) for index, value in enumerate(answering.read.scores(answering.rows))],
        answering.usage,
    )
