"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from fastapi import APIRouter, Request, Response

from paceline.outputs import CompletionOutput
from paceline.serve.generation import usage_of
from paceline.serve.openapi import documented
from paceline.serve.protocol.chat import (
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatLogprobs,
    ChunkChoice,
    Message,
    chat_logprobs,
    final_chunk,
    role_chunk,
    text_chunk,
)
from paceline.serve.protocol.common import prompt_logprobs
from paceline.serve.requests import chat_generations
from paceline.serve.routes.generate import Answering, answer_request
from paceline.serve.streaming import event

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions", **documented(ChatCompletionRequest, ChatCompletion, stream=True))
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation. With `stream`, server-sent events: chunks, then [DONE]."""
    names = {"prompt": "messages", "logprobs": "top_logprobs"}
    return await answer_request(
        request,
        ChatCompletionRequest,
        "chatcmpl",
        chat_generations,
        whole=_whole,
        events=_events,
        names=names,
        operation="chat",
    )


def _whole(answering: Answering[ChatCompletionRequest]) -> ChatCompletion:
    (generation,) = answering.generations
    output = generation.state.output()
    return ChatCompletion(
        answering.request_id,
        answering.created,
        answering.model_name,
        [
            ChatChoice(
                answer.index,
                Message("assistant", answer.text),
                _logprobs(answering, answer),
                answer.finish_reason,
                answer.stop_reason,
            )
            for answer in output.outputs
        ],
        usage_of(answering.generations),
        prompt_logprobs=prompt_logprobs(output),
    )


async def _events(answering: Answering[ChatCompletionRequest]) -> AsyncGenerator[bytes, None]:
    (generation,) = answering.generations
    begun: set[int] = set()
    ended: set[int] = set()

    request_id, created, model = answering.request_id, answering.created, answering.model_name

    def chunk(choices: list[ChunkChoice], *, last: bool = False) -> bytes:
        return event(ChatCompletionChunk(request_id, created, model, choices, answering.usage(last=last)))

    for index in range(generation.state.params.n):
        begun.add(index)
        yield chunk([role_chunk(index)])
    async for grown in generation:
        out = b""
        for answer in generation.state.grown(grown):
            if answer.text or (answer.token_ids and answer.logprobs is not None):
                out += chunk([text_chunk(answer, _logprobs(answering, answer))])
            if answer.finish_reason is not None and answer.index not in ended:
                ended.add(answer.index)
                out += chunk([final_chunk(answer)])
        if out:
            yield out
    if answering.body.include_usage:
        yield chunk([], last=True)


def _logprobs(answering: Answering[ChatCompletionRequest], answer: CompletionOutput) -> ChatLogprobs | None:
    if answer.logprobs is None:
        return None
    tokenizer = answering.service.model.tokenizer
    return chat_logprobs(answer, answering.body.top_logprobs or 0, tokenizer.token_bytes)
