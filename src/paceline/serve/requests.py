"""From a checked body to what the engine takes: parameters, prompts, and the generations that hold them."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from paceline.engine.output import RequestState
from paceline.engine.prompts import TokenPrompt, bad_word_ids, check_prompt, read_prompt
from paceline.errors import PromptTooLongError
from paceline.sampling.params import SamplingParams, with_defaults
from paceline.serve.client import GenerateRequest
from paceline.serve.errors import bad_request
from paceline.serve.generation import Generation
from paceline.serve.protocol.chat import ChatCompletionRequest, message_parts
from paceline.serve.protocol.completions import CompletionRequest
from paceline.serve.protocol.sampling import INERT, REFUSED, SAMPLING_NAMES, SamplingFields
from paceline.serve.protocol.tokenize import TokenizeRequest
from paceline.serve.service import ServedModel, Service

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions; a chat goes to its own end
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024  # what is held back while it may still become one is looked through at every token
MAX_BAD_WORDS = 1024
# What the template's renderer calls its own: no variable of a request may take its place.
TEMPLATE_NAMES = frozenset(
    ["self", "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "template", "range"]
)
# A body up to this is tokenized in the event loop, where every stream waits for it, a larger one in a thread: SmolLM2's
# tokenizer takes 0.7 ms of a core for 2 KiB of English and 2.1 ms for 8; handing work to a thread takes 0.08 ms.
INLINE_BYTES = 2 << 10


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def chat_generations(body: ChatCompletionRequest, service: Service, request_id: str) -> list[Generation]:
    """The generation of a conversation. Raises UsageError, PromptTooLongError or ApiError 400."""
    model = service.model
    _check_fields(body, service)
    given = _given(body)
    if body.max_completion_tokens is not None:
        given["max_tokens"] = body.max_completion_tokens
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
    if body.logprobs:
        given["logprobs"] = body.top_logprobs or 0
    params = _params(given, model, service, default_max_tokens=None)
    text = render(body, service)
    prompt = read_prompt(text, model.tokenizer, add_special_tokens=bool(body.add_special_tokens))
    return [_generation(request_id, prompt, params, body, service, chat=True)]


def completion_generations(body: CompletionRequest, service: Service, request_id: str) -> list[Generation]:
    """A generation for each prompt. Raises as chat_generations."""
    model = service.model
    _check_fields(body, service)
    given = _given(body)
    if body.logprobs is not None:
        given["logprobs"] = body.logprobs
    params = _params(given, model, service, default_max_tokens=COMPLETION_MAX_TOKENS)
    prompts = body.prompts
    count = len(prompts) * params.width
    if count > service.settings.max_answers:
        raise bad_request(
            f"prompt asks for {count} answers in one request ({len(prompts)} prompts, {params.width} each) and this "
            f"server makes at most {service.settings.max_answers}: send several requests",
            "prompt",
        )
    add_special_tokens = True if body.add_special_tokens is None else body.add_special_tokens
    read = [read_prompt(prompt, model.tokenizer, add_special_tokens=add_special_tokens) for prompt in prompts]
    ids = [request_id] if len(read) == 1 else [f"{request_id}-{index}" for index in range(len(read))]
    return [_generation(one, prompt, params, body, service, chat=False) for one, prompt in zip(ids, read, strict=True)]


def render(body: ChatCompletionRequest | TokenizeRequest, service: Service) -> str:
    """A conversation's prompt text."""
    tokenizer = service.model.tokenizer
    template = body.chat_template
    if template is not None and not service.settings.trust_request_chat_template:
        raise bad_request(
            "chat_template in a request is not allowed: start the server with --trust-request-chat-template",
            "chat_template",
            "unsupported_parameter",
        )
    source = template or tokenizer.chat_template or ""
    variables: dict[str, Any] = dict(body.chat_template_kwargs or {})
    _check_variables(variables)
    effort = getattr(body, "reasoning_effort", None)
    if effort is not None:
        if "reasoning_effort" not in source:
            raise bad_request(
                "reasoning_effort is not supported by this model: its chat template does not ask for it",
                "reasoning_effort",
                "unsupported_parameter",
            )
        variables["reasoning_effort"] = effort
    continues = bool(body.continue_final_message)
    adds = not continues if body.add_generation_prompt is None else body.add_generation_prompt
    assert body.messages is not None
    try:
        return tokenizer.apply_chat_template(
            message_parts(body.messages, "developer" in source),
            add_generation_prompt=adds,
            continue_final_message=continues,
            documents=body.documents,
            tools=getattr(body, "tools", None),
            template=template,
            **variables,
        )
    except RecursionError:
        raise bad_request("messages or what goes with them is nested too deeply", "messages") from None


def _check_variables(variables: Mapping[str, Any]) -> None:
    for name in variables:
        if name in TEMPLATE_NAMES:
            raise bad_request(f"chat_template_kwargs may not set {name!r}", "chat_template_kwargs")


def _check_fields(body: SamplingFields, service: Service) -> None:
    service.check_extras(body.model_extra, REFUSED, INERT)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stop) > MAX_STOP_STRINGS or any(len(text) > MAX_STOP_CHARS for text in stop):
        raise bad_request(
            f"stop may hold at most {MAX_STOP_STRINGS} strings of at most {MAX_STOP_CHARS} characters", "stop"
        )
    if len(body.bad_words or []) > MAX_BAD_WORDS:
        raise bad_request(f"bad_words may hold at most {MAX_BAD_WORDS} words", "bad_words")
    for name in ("prompt_logprobs", "top_logprobs", "logprobs"):
        value = getattr(body, name, None)
        limit = service.settings.max_logprobs
        if type(value) is int and limit != -1 and (value > limit or value < 0):
            raise bad_request(
                f"{name} must be from 0 to {limit} on this server (--max-logprobs), got {value}",
                name,
            )
    if body.stream and body.prompt_logprobs is not None:
        raise bad_request("prompt_logprobs cannot be streamed: leave out stream", "prompt_logprobs")
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream to be true", "stream_options")


def _given(body: SamplingFields) -> dict[str, Any]:
    """The sampling parameters that the request sets. null sets nothing."""
    fields = {name: getattr(body, name) for name in SAMPLING_NAMES}
    return {name: value for name, value in fields.items() if value is not None}


def _params(
    given: dict[str, Any], model: ServedModel, service: Service, *, default_max_tokens: int | None
) -> SamplingParams:
    limit = service.settings.max_answers
    for name in ("n", "best_of"):
        if given.get(name, 1) > limit:
            raise bad_request(f"{name} must be at most {limit} on this server, got {given[name]}", name)
    without = with_defaults(None, model.info.generation_config)[1]
    if "max_tokens" not in given and "max_tokens" not in without:
        given["max_tokens"] = default_max_tokens
    params = with_defaults(given, model.info.generation_config)[0]
    params.check_vocabulary(model.info.vocab_size)
    return params


def _generation(
    request_id: str, prompt: TokenPrompt, params: SamplingParams, body: SamplingFields, service: Service, *, chat: bool
) -> Generation:
    model = service.model
    max_model_len = model.info.max_model_len
    prompt = check_prompt(prompt, params, vocab_size=model.info.vocab_size, max_model_len=max_model_len)
    asked = getattr(body, "max_completion_tokens", None) or body.max_tokens
    if asked is not None and len(prompt.token_ids) + asked > max_model_len:
        raise PromptTooLongError(
            f"the prompt has {len(prompt.token_ids)} tokens and {asked} more are asked for, but the context holds "
            f"{max_model_len}: shorten the prompt or lower max_tokens"
        )
    request = GenerateRequest(
        request_id,
        prompt.token_ids,
        params,
        eos_token_ids=model.tokenizer.eos_token_ids,
        bad_words_token_ids=bad_word_ids(params, model.tokenizer, model.info.vocab_size),
        namespace=body.cache_salt or "",
    )
    state = RequestState(request_id, prompt.text, prompt.token_ids, params, model.tokenizer, chat=chat)
    return Generation(request, state, service.metrics)
