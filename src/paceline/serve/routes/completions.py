"""POST /v1/completions, OpenAI's older endpoint: plain text or token ids, one prompt or many."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from paceline.outputs import CompletionOutput
from paceline.serve.generation import grow_all, usage_of
from paceline.serve.openapi import documented
from paceline.serve.protocol.common import prompt_logprobs
from paceline.serve.protocol.completions import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    completion_logprobs,
)
from paceline.serve.requests import completion_generations
from paceline.serve.routes.generate import Answering, answer_request
from paceline.serve.streaming import event

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/completions", **documented(CompletionRequest, Completion, stream=True))
async def create_completion(request: Request) -> Response:
    """Continue a text, or several. With `stream`, server-sent events: chunks, then [DONE]."""
    return await answer_request(
        request,
        CompletionRequest,
        "cmpl",
        completion_generations,
        whole=_whole,
        events=_events,
        names={"prompt_token_ids": "prompt"},
        operation="text_completion",
    )


def _whole(answering: Answering[CompletionRequest]) -> Completion:
    choices = []
    for position, generation in enumerate(answering.generations):
        output = generation.state.output()
        for answer in output.outputs:
            choices.append(
                CompletionChoice(
                    _index(answering, position, answer),
                    answer.text,
                    _logprobs(answering, answer, 0),
                    answer.finish_reason,
                    answer.stop_reason,
                    UNSET if answering.body.prompt_logprobs is None else prompt_logprobs(output),
                )
            )
    return Completion(
        answering.request_id, answering.created, answering.model_name, choices, usage_of(answering.generations)
    )


async def _events(answering: Answering[CompletionRequest]) -> AsyncGenerator[bytes, None]:
    offsets: dict[int, int] = {}  # choice -> characters of the tokens sent
    ended: set[int] = set()

    request_id, created, model = answering.request_id, answering.created, answering.model_name

    def chunk(choices: list[CompletionChoice], *, last: bool = False) -> bytes:
        return event(Completion(request_id, created, model, choices, answering.usage(last=last)))

    async with aclosing(grow_all(answering.generations)) as growing:
        async for position, grown in growing:
            out = b""
            for answer in answering.generations[position].state.grown(grown):
                index = _index(answering, position, answer)
                if answer.text or (answer.token_ids and answer.logprobs is not None):
                    logprobs = _logprobs(answering, answer, offsets.get(index, 0))
                    if logprobs is not None and logprobs.tokens:
                        offsets[index] = logprobs.text_offset[-1] + len(logprobs.tokens[-1])
                    out += chunk([CompletionChoice(index, answer.text, logprobs)])
                if answer.finish_reason is not None and index not in ended:
                    ended.add(index)
                    out += chunk([CompletionChoice(index, "", None, answer.finish_reason, answer.stop_reason)])
            if out:
                yield out
    if answering.body.include_usage:
        yield chunk([], last=True)


def _index(answering: Answering[CompletionRequest], position: int, answer: CompletionOutput) -> int:
    """Choices are numbered through: the answers to the first prompt, then those to the second."""
    return position * answering.generations[position].state.params.n + answer.index


def _logprobs(
    answering: Answering[CompletionRequest], answer: CompletionOutput, offset: int
) -> CompletionLogprobs | None:
    if answer.logprobs is None:
        return None
    tokenizer = answering.service.model.tokenizer
    return completion_logprobs(
        answer, answering.body.logprobs or 0, offset, lambda token_id: tokenizer.decode([token_id], False)
    )
