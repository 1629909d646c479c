"""`LLM`: a model and its engine in this process. The offline face, with vLLM's names where they mean the same."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from rich.progress import Progress as ProgressBar

from paceline.config import CacheConfig, ParallelConfig, SchedulerConfig, SpeculativeConfig
from paceline.encoders.inputs import Text
from paceline.encoders.load import find_encoder, load_encoder
from paceline.encoders.offline import OfflineEncoder
from paceline.engine.build import LoadedModel, load_model
from paceline.engine.engine import EngineRequest, answer_ids
from paceline.engine.graphs import step_choices
from paceline.engine.load_options import LoadOptions
from paceline.engine.model_runner import ModelRunner
from paceline.engine.output import RequestState
from paceline.engine.prompts import Prompt, TokenPrompt, bad_word_ids, check_prompt, is_one_prompt, read_prompt
from paceline.engine.ranks import load_ranks
from paceline.engine.remote import RemoteRunner
from paceline.errors import UsageError
from paceline.kernels.choices import Choice
from paceline.loading.aliases import DEFAULT_MODEL
from paceline.loading.progress import Progress
from paceline.log import get_logger
from paceline.outputs import (
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    RankedDocument,
    RequestOutput,
    ScoringRequestOutput,
)
from paceline.registry import refuse_unknown_keys
from paceline.sampling.params import BeamSearchParams, SamplingParams, with_defaults
from paceline.tokens.chat_template import Messages
from paceline.tokens.tokenizer import Tokenizer

log = get_logger(__name__)

Params = SamplingParams | Mapping[str, Any] | None


@dataclass(frozen=True)
class Stats:
    """What a run moved and met. `step_weight_bytes`: weights that one decode step reads; `kv_bytes_per_token`:
    cache that one token of context takes and a decode step reads."""

    step_weight_bytes: int
    kv_bytes_per_token: int
    phases: Mapping[str, float]
    scheduler: Any


class LLM:
    """A loaded model. Use it as a context manager, or `close()` it, to give its memory back.

    `model`: a hub id (`org/name`, `org/name@revision`), a directory, a GGUF file or an alias. `dtype` "auto" keeps the
    checkpoint's. `quantization`: None, "int8", "int4", "fp8", or "w8a8-fp8", which also has activations in fp8 where a
    step has many tokens. `max_model_len` None takes the model's own.
    `kv_cache_gib` None sizes the cache by the scheduler's limits within a share of free memory. `memory_gib` bounds
    weights, cache and activations on the device together. `offload` ("auto", "host", "disk") keeps the matrices off the
    device and streams them, for models larger than it; `offload_dir` is where a file of them may lie.
    `speculative_config`: a SpeculativeConfig or its fields. `generation_config`: "auto" applies the model's sampling
    defaults where a request sets none. `model_impl`: "paceline" (one of its families), "transformers" (transformers'
    modules with our paged attention, slower), or "auto", the first of them that runs the model. `mode`: "graph"
    captures decode steps in CUDA graphs where it can, "eager" never, "auto" is "graph"; "compile" is "graph" with
    torch.compile for what no kernel of ours covers. `async_depth`: steps that the host runs ahead of the device (0 to
    2); None is 1 with graphs, 0 without or with speculation. `load_format`: "dummy" reads no weights but makes random
    ones of the model's shape, to measure with; `model` may then be a config.json. `deterministic`: a request's tokens
    and log probabilities are the same to the bit alone or among others, however its prompt is cut, from a prefix hit or
    not, preempted or not; on one machine, at one number of threads, and slower. `threads` sets torch's CPU threads,
    for the whole process. `tensor_parallel_size` splits every matrix over so many devices of this machine, which is
    faster; `pipeline_parallel_size` the layers over so many groups of them, which only makes room. Then each device may
    take `memory_gib` and holds a cache of `kv_cache_gib`, and each is a process of its own that ends with this one.
    `trust_remote_code` is refused: no code of a checkpoint is ever run.

    An encoder (encoders/description.py) has `embed`, `classify`, `score` and `rerank` instead of `generate` and `chat`:
    `max_num_batched_tokens` and `max_num_seqs` bound its batches, mode "eager" leaves transformers' module as it is.

    Raises UsageError for an unknown or impossible option, and the errors of loading (ModelNotFoundError,
    DownloadError, CheckpointError, UnsupportedModelError, OutOfMemoryError).
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        tokenizer: str | None = None,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        quantization: str | None = None,
        seed: int = 0,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        max_chunk: int | None = None,
        scheduling_policy: str = "fcfs",
        enable_prefix_caching: bool = True,
        block_size: int = 16,
        num_blocks: int | None = None,
        kv_cache_gib: float | None = None,
        memory_gib: float | None = None,
        offload: str | None = None,
        offload_dir: str | None = None,
        speculative_config: SpeculativeConfig | Mapping[str, Any] | None = None,
        async_depth: int | None = None,
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        chat_template: str | None = None,
        generation_config: str = "auto",
        hf_token: str | None = None,
        download_dir: str | None = None,
        model_impl: str = "auto",
        mode: str = "auto",
        load_format: str = "auto",
        deterministic: bool = False,
        threads: int | None = None,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        progress: Progress | None = None,
        **unknown: Any,
    ) -> None:
        refuse_unknown_keys("LLM option", unknown, KNOWN_OPTIONS)
        if trust_remote_code:
            raise UsageError("trust_remote_code is refused: paceline runs no code from a checkpoint")
        if threads is not None:
            if threads < 1:
                raise UsageError(f"threads must be at least 1, got {threads}")
            torch.set_num_threads(threads)
        options = LoadOptions(
            model=model,
            tokenizer=tokenizer,
            revision=revision,
            dtype=dtype,
            device=device,
            quantization=quantization,
            max_model_len=max_model_len,
            kv_cache_gib=kv_cache_gib,
            memory_gib=memory_gib,
            offload=offload,
            offload_dir=offload_dir,
            seed=seed,
            cache=CacheConfig(block_size, num_blocks, enable_prefix_caching),
            scheduler=SchedulerConfig(
                max_num_seqs,
                max_num_batched_tokens,
                max_chunk,
                scheduling_policy,  # type: ignore[arg-type]  # checked there
            ),
            speculative=_speculative(speculative_config),
            async_depth=async_depth,
            skip_tokenizer_init=skip_tokenizer_init,
            chat_template=chat_template,
            generation_config=generation_config,
            hf_token=hf_token,
            download_dir=download_dir,
            model_impl=model_impl,
            mode=mode,  # type: ignore[arg-type]  # checked there
            load_format=load_format,
            deterministic=deterministic,
            parallel=ParallelConfig(tensor_parallel_size, pipeline_parallel_size),
        )
        self._model: LoadedModel | None = None
        self._encoder: OfflineEncoder | None = None
        source, task = find_encoder(options, progress)
        if source is not None and task is not None:
            self._encoder = OfflineEncoder(load_encoder(options, source, task, progress), options.scheduler)
        elif options.parallel.world_size > 1:
            self._model = load_ranks(options, progress)
        else:
            self._model = load_model(options, progress, source=source)
        self._ids = itertools.count()
        self._answers: dict[str, tuple[RequestState, int]] = {}  # engine request id -> its request and index

    # -------------------------------------------------------------------------------------------- generating

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params | Sequence[Params] = None,
        *,
        use_tqdm: bool = False,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """The completions of one or many prompts, in their order. `sampling_params`: one for all, or one each.

        None takes the model's own defaults (`get_default_sampling_params`); a mapping sets some fields over them; a
        SamplingParams is used as it stands. `use_tqdm` shows a progress bar. `priority` overrides the parameters' own.
        Raises UsageError before anything runs if any prompt or parameter is wrong.
        """
        many = [prompts] if is_one_prompt(prompts) else list(prompts)
        read = [read_prompt(prompt, self.model.tokenizer) for prompt in many]  # type: ignore[arg-type]
        return self._run(read, sampling_params, priority, show=use_tqdm, chat=False)

    def beam_search(self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams) -> list[RequestOutput]:
        """The `beam_width` best answers to each prompt, best first, each with its `score`.

        vLLM's call, but with RequestOutputs, and with scores over the generated tokens as transformers counts them.
        Raises as `generate`.
        """
        return self.generate(prompts, params.sampling_params())

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: Params | Sequence[Params] = None,
        *,
        use_tqdm: bool = False,
        priority: int | Sequence[int] | None = None,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """The answers to one or many conversations, through the model's chat template. `template_options`:
        `chat_template`, `add_generation_prompt`, `continue_final_message`, `tools`, `documents`, and the
        template's own variables. Raises ChatTemplateError, or as `generate`."""
        many: Sequence[Messages] = [messages] if _is_one_conversation(messages) else messages  # type: ignore[list-item, assignment]
        read = [self._read_chat(conversation, template_options) for conversation in many]
        return self._run(read, sampling_params, priority, show=use_tqdm, chat=True)

    def stream(
        self, prompt: Prompt | Messages, sampling_params: Params = None, **template_options: Any
    ) -> Iterator[RequestOutput]:
        """One prompt or conversation, token by token: each value's `outputs[i].text` is what is new. Leaving the
        loop early aborts the request. Beam search and best_of rank whole answers: they yield once, at their end."""
        chat = _is_one_conversation(prompt)
        read = self._read_chat(prompt, template_options) if chat else read_prompt(prompt, self.model.tokenizer)  # type: ignore[arg-type]
        params = self.effective_sampling_params(sampling_params)[0]
        state = self._add(self._checked(read, params), params, None, chat=chat)
        return self._stream(state)

    def _stream(self, state: RequestState) -> Iterator[RequestOutput]:
        try:
            while not state.finished:
                if state in self._step() and state.can_show:
                    yield state.output(delta=True)
        finally:
            self._forget(state)

    def _run(
        self,
        prompts: Sequence[TokenPrompt],
        sampling_params: Params | Sequence[Params],
        priority: int | Sequence[int] | None,
        *,
        show: bool,
        chat: bool,
    ) -> list[RequestOutput]:
        count = len(prompts)
        given: list[Params] = _one_each("sampling_params", sampling_params, count, SamplingParams, Mapping)
        priorities: list[int | None] = _one_each("priority", priority, count, int)
        params = [self.effective_sampling_params(one)[0] for one in given]
        checked = [self._checked(prompt, one) for prompt, one in zip(prompts, params, strict=True)]
        states: list[RequestState] = []
        try:
            for prompt, one, rank in zip(checked, params, priorities, strict=True):
                states.append(self._add(prompt, one, rank, chat=chat))
            with ProgressBar(disable=not show) as bar:
                task = bar.add_task("generating", total=count)
                completed = 0
                while completed < count:
                    changed = self._step()
                    # 0.3 ms of 256 requests' step would go into asking each whether it ended.
                    if not changed or any(state.finished for state in changed):
                        completed = sum(state.finished for state in states)
                        bar.update(task, completed=completed)
            return [state.output() for state in states]
        finally:
            for state in states:
                self._forget(state)

    def _read_chat(self, messages: Any, options: Mapping[str, Any]) -> TokenPrompt:
        model, options = self.model, dict(options)
        if "chat_template" in options:
            options["template"] = options.pop("chat_template")
        text = self.get_tokenizer().apply_chat_template(messages, **options)
        return read_prompt(text, model.tokenizer, add_special_tokens=False)

    def _checked(self, prompt: TokenPrompt, params: SamplingParams) -> TokenPrompt:
        vocab_size = self.model.config.vocab_size
        params.check_vocabulary(vocab_size)
        return check_prompt(prompt, params, vocab_size=vocab_size, max_model_len=self.model.engine.config.max_model_len)

    # -------------------------------------------------------------------------------------------- encoding

    def embed(
        self,
        texts: Text | Sequence[Text],
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        truncate_prompt_tokens: int | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """The embeddings of one or many texts, in their order: an encoder's, pooled as the checkpoint says.

        `dimensions` keeps the first ones, for models trained so (Matryoshka). `normalize` gives them length 1; None
        does as the checkpoint says. `truncate_prompt_tokens` cuts longer texts to so many tokens, -1 to what the model
        reads; without it they are a PromptTooLongError. Raises UsageError for a model that does not embed.
        """
        return self.encoder.embed(texts, truncate_prompt_tokens, dimensions, normalize)

    def classify(
        self, texts: Text | Sequence[Text], *, truncate_prompt_tokens: int | None = None
    ) -> list[ClassificationRequestOutput]:
        """The probability of each class for each text. Raises as `embed`."""
        return self.encoder.classify(texts, truncate_prompt_tokens)

    def score(
        self, data_1: str | Sequence[str], data_2: str | Sequence[str], *, truncate_prompt_tokens: int | None = None
    ) -> list[ScoringRequestOutput]:
        """How well texts go together, one with each of many or pair by pair: a cross-encoder's score, or the cosine of
        the embeddings. Raises as `embed`."""
        return self.encoder.score(data_1, data_2, truncate_prompt_tokens)

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_n: int | None = None,
        truncate_prompt_tokens: int | None = None,
    ) -> list[RankedDocument]:
        """The `top_n` documents (None: all) that go best with the query, best first, by `score`. Raises as `embed`."""
        return self.encoder.rerank(query, documents, top_n, truncate_prompt_tokens)

    # ---------------------------------------------------------------------------------------------- stepping

    def _add(self, prompt: TokenPrompt, params: SamplingParams, priority: int | None, *, chat: bool) -> RequestState:
        model = self.model
        if priority is not None:
            params = replace(params, priority=priority)
        request_id = f"request-{next(self._ids)}"
        state = RequestState(request_id, prompt.text, prompt.token_ids, params, model.tokenizer, chat=chat)
        model.engine.add_request(
            EngineRequest(
                request_id,
                prompt.token_ids,
                params,
                eos_token_ids=self._eos_token_ids(),
                bad_words_token_ids=bad_word_ids(params, model.tokenizer, model.config.vocab_size),
            )
        )
        for index, answer_id in enumerate(answer_ids(request_id, params)):
            self._answers[answer_id] = (state, index)
        return state

    def _eos_token_ids(self) -> frozenset[int]:
        tokenizer = self.model.tokenizer
        return frozenset() if tokenizer is None else tokenizer.eos_token_ids

    def _step(self) -> list[RequestState]:
        """One engine step; the requests that it changed."""
        engine = self.model.engine
        changed: dict[str, RequestState] = {}
        for update in engine.step():
            if update.request_id not in self._answers:
                continue  # forgotten between its step and its update
            state, index = self._answers[update.request_id]
            stop = state.apply(index, update)
            if stop is not None:
                engine.finish(update.request_id, "stop", stop)
            changed[state.request_id] = state
        return list(changed.values())

    def _forget(self, state: RequestState) -> None:
        answers = answer_ids(state.request_id, state.params)
        if self._model is not None:
            for request_id in {state.request_id, *answers}:
                self._model.engine.abort(request_id)
        for request_id in answers:
            self._answers.pop(request_id, None)

    # ------------------------------------------------------------------------------------------------- about

    @property
    def model(self) -> LoadedModel:
        """The loaded model. Raises UsageError after close(), and for an encoder."""
        if self._encoder is not None:
            name = self._encoder.loaded.source.name
            raise UsageError(f"{name} is an encoder, which generates nothing: use embed, classify, score or rerank")
        if self._model is None:
            raise UsageError("this LLM was closed: make a new one")
        return self._model

    @property
    def encoder(self) -> OfflineEncoder:
        """The loaded encoder. Raises UsageError after close(), and for a model that generates."""
        if self._encoder is None:
            raise UsageError(f"{self.model.source.name} generates and is no encoder: use generate or chat")
        return self._encoder

    def get_tokenizer(self) -> Tokenizer:
        """Raises UsageError for an LLM made with skip_tokenizer_init."""
        tokenizer = (self.model if self._encoder is None else self._encoder.loaded).tokenizer
        if tokenizer is None:
            raise UsageError("this LLM has no tokenizer: it was made with skip_tokenizer_init")
        return tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """SamplingParams() with what the model's generation_config.json sets."""
        return self.effective_sampling_params(None)[0]

    def effective_sampling_params(self, given: Params) -> tuple[SamplingParams, list[str]]:
        """The parameters that a request with `given` runs with, and which of them came from generation_config.json."""
        return with_defaults(given, self.model.generation_config)

    def choices(self, rows: int) -> Iterator[Choice]:
        """What a decode of so many requests runs: see kernels/choices.py, `explain`."""
        model = self.model
        runner = model.engine.runner
        if isinstance(runner, RemoteRunner):
            yield from runner.choices(rows)
        elif isinstance(runner, ModelRunner):
            yield from step_choices(runner.model, model.engine.config, rows, streamed=model.stream is not None)

    def stats(self) -> Stats:
        model = self.model
        return Stats(model.step_weight_bytes, model.kv_bytes_per_token, model.phases, model.engine.scheduler.stats)

    def close(self) -> None:
        """Give the weights and the cache back. Running streams end; later calls raise UsageError."""
        if self._encoder is not None:
            device = self._encoder.loaded.encoder.device
            self._encoder = None
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if self._model is None:
            return
        device, stream, ranks = self._model.device, self._model.stream, self._model.ranks
        if ranks is not None:
            ranks.close()
        elif device.type == "cuda":
            torch.cuda.synchronize(device)  # a step that was launched ahead may run yet
        self._model = None
        if stream is not None:
            stream.close()
        self._answers.clear()
        gc.collect()  # the engine holds cycles
        if device.type == "cuda" and ranks is None:
            torch.cuda.empty_cache()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


KNOWN_OPTIONS = tuple(
    name for name in LLM.__init__.__annotations__ if name not in ("self", "unknown", "return")
)  # what an unknown option is compared with


def _speculative(given: SpeculativeConfig | Mapping[str, Any] | None) -> SpeculativeConfig | None:
    if given is None or isinstance(given, SpeculativeConfig):
        return given
    refuse_unknown_keys("speculative_config key", given, SpeculativeConfig.__dataclass_fields__)
    return SpeculativeConfig(**given)


def _is_one_conversation(messages: Any) -> bool:
    """A list of messages, not of conversations. A mapping with a role is a message."""
    return (
        isinstance(messages, Sequence)
        and not isinstance(messages, str)
        and bool(messages)
        and all(isinstance(item, Mapping) and "role" in item for item in messages)
    )


def _one_each(name: str, given: Any, count: int, *scalars: Callable[..., Any]) -> list[Any]:
    """`given` once for each of `count` prompts, or as many values as prompts."""
    if given is None or isinstance(given, scalars):  # type: ignore[arg-type]
        return [given] * count
    values = list(given)
    if len(values) != count:
        raise UsageError(f"{len(values)} {name} for {count} prompts: give one for all, or one each")
    return values
