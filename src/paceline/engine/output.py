"""From token ids to what the user sees: text, stop strings, log probabilities, times. One RequestState a request.

It runs wherever the text is wanted: in process for `LLM`, beside the sockets for a server; the engine itself
never sees text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

from paceline.engine.step import RequestUpdate
from paceline.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, decoded_logprobs
from paceline.sampling.logprobs import TokenLogprobs, penalised
from paceline.sampling.params import SamplingParams
from paceline.tokens.detokenizer import IncrementalDetokenizer
from paceline.tokens.tokenizer import Tokenizer


class Answer:
    """One of a request's answers, growing. It begins with `echoed`: the prompt's text and tokens, if asked for."""

    def __init__(
        self,
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        *,
        chat: bool,
        echoed: tuple[str, Sequence[int]] = ("", ()),
    ) -> None:
        self.params = params
        self.tokenizer = tokenizer if params.detokenize else None
        self.detokenizer = (
            IncrementalDetokenizer(
                self.tokenizer,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
                stop=tuple(params.stop),
                include_stop_str_in_output=params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
                continues_prompt=not chat,
            )
            if self.tokenizer is not None
            else None
        )
        text, token_ids = echoed
        self.text = [text]
        self.token_ids = list(token_ids)
        self.logprobs: list[Mapping[int, Logprob] | None] = [None] * len(token_ids)
        self._num_echoed = len(token_ids)
        self._is_ranked = params.is_ranked
        self._wants_sum = params.num_logprobs is not None
        self.cumulative_logprob = 0.0
        self.score: float | None = None
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self._shown = (0, 0)  # pieces of text and tokens that a delta has carried

    def apply(self, update: RequestUpdate) -> str | None:
        """Add a step's tokens; the stop string that they completed, if any, ends the answer there."""
        token_ids = update.new_token_ids
        kept, stop = len(token_ids), None
        if self.detokenizer is not None:
            hidden = update.finish_reason == "stop" and not self.params.include_stop_str_in_output
            delta = self.detokenizer.append(token_ids[:-1] if hidden else token_ids)
            self.text.append(delta.text)
            stop = delta.stop
            kept = kept if stop is None else delta.num_kept
        self.token_ids += token_ids[:kept]
        if update.logprobs:
            self._add_logprobs(update.logprobs[:kept])
        if update.cumulative_logprob is not None:
            self.cumulative_logprob = update.cumulative_logprob
        if stop is not None:
            self.finish_reason, self.stop_reason = "stop", stop
        elif update.finish_reason is not None:
            self.finish(update.finish_reason, update.stop_reason, update.error)
        if self.finish_reason is not None and self._is_ranked and update.error is None:
            length = max(1, len(self.token_ids) - self._num_echoed)  # a stop string may leave no token
            score = penalised(self.cumulative_logprob, length, self.params.length_penalty)
            self.score = score if update.score is None else update.score
        return stop

    def finish(self, reason: str, stop_reason: int | str | None = None, error: str | None = None) -> None:
        self.finish_reason, self.stop_reason, self.error = reason, stop_reason, error
        if self.detokenizer is not None:
            self.text.append(self.detokenizer.finish())

    def _add_logprobs(self, entries: Sequence[TokenLogprobs]) -> None:
        for entry in entries:
            self.cumulative_logprob += entry.logprob
            self.logprobs.append(_decoded(entry, self.tokenizer))

    def echo_logprobs(self, entries: Sequence[Mapping[int, Logprob] | None]) -> None:
        """The prompt's log probabilities, which come once its last chunk is computed."""
        self.logprobs[: self._num_echoed] = entries[: self._num_echoed]

    def output(self, index: int, *, delta: bool) -> CompletionOutput:
        """All of the answer so far, or with `delta` what no earlier delta has carried."""
        pieces, tokens = self._shown if delta else (0, 0)
        if delta:
            self._shown = (len(self.text), len(self.token_ids))
        wants_logprobs = self.params.logprobs is not None
        return CompletionOutput(
            index,
            "".join(self.text[pieces:]),
            tuple(self.token_ids[tokens:]),
            self.cumulative_logprob if self._wants_sum else None,
            tuple(self.logprobs[tokens:]) if wants_logprobs else None,
            self.finish_reason,
            self.stop_reason,
            self.error,
            self.score,
        )


class RequestState:
    """A request and its answers. `chat`: the answer begins a text of its own; otherwise it continues the prompt.

    Where answers are ranked (beam search, best_of), there is nothing to show before all have ended.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        *,
        chat: bool,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.tokenizer = tokenizer if params.detokenize else None
        echoed = (self._echoed_text(params), prompt_token_ids) if params.echo else ("", ())
        self.answers = [Answer(params, tokenizer, chat=chat, echoed=echoed) for _ in range(params.num_answers)]
        self.prompt_logprobs: list[Mapping[int, Logprob] | None] | None = None
        self._prompt_logprobs_shown = False  # a delta has carried them
        self.num_cached_tokens = 0
        self._is_ranked = params.is_ranked
        self._arrival = time.perf_counter()
        self._first: float | None = None
        self._last: float | None = None

    @property
    def finished(self) -> bool:
        # No all() of a generator: this is asked of every request that a step changes, and takes 3 times as long.
        for answer in self.answers:  # noqa: SIM110
            if answer.finish_reason is None:
                return False
        return True

    @property
    def can_show(self) -> bool:
        """Whether `output` has something to say yet."""
        return not self._is_ranked or self.finished

    def apply(self, index: int, update: RequestUpdate) -> str | None:
        """Add one answer's update; returns the stop string it completed, at which the engine must end it."""
        if update.new_token_ids:
            self._last = time.perf_counter()
            self._first = self._first or self._last
        if index == 0:
            self.num_cached_tokens = update.num_cached_tokens
        if update.prompt_logprobs is not None:
            self.prompt_logprobs = [None, *(_decoded(entry, self.tokenizer) for entry in update.prompt_logprobs)]
            for answer in self.answers:
                answer.echo_logprobs(self.prompt_logprobs)
        return self.answers[index].apply(update)

    def _echoed_text(self, params: SamplingParams) -> str:
        """The prompt as it was given; what is left of a cut one, and token ids, as they decode."""
        if self.tokenizer is None:
            return ""
        if self.prompt is not None and params.truncate_prompt_tokens is None:
            return self.prompt
        return self.tokenizer.decode(self.prompt_token_ids, params.skip_special_tokens)

    def _shown_answers(self) -> list[Answer]:
        """The n best, best first, where they are ranked; an answer that failed has no score and comes last."""
        if not self._is_ranked:
            return self.answers
        if not self.finished:
            return []
        return sorted(self.answers, key=lambda a: math.inf if a.score is None else -a.score)[: self.params.n]

    def grown(self, index: int) -> Sequence[CompletionOutput]:
        """What no earlier delta has carried, once answer `index` has grown: its own; of ranked ones that of all, at
        their end."""
        if not self._is_ranked:
            return (self.answers[index].output(index, delta=True),)
        return self.output(delta=True).outputs

    def output(self, *, delta: bool = False) -> RequestOutput:
        prompt_logprobs = None if delta and self._prompt_logprobs_shown else self.prompt_logprobs
        self._prompt_logprobs_shown |= delta and prompt_logprobs is not None
        return RequestOutput(
            self.request_id,
            self.prompt,
            self.prompt_token_ids,
            tuple(answer.output(index, delta=delta) for index, answer in enumerate(self._shown_answers())),
            self.finished,
            RequestMetrics(self._arrival, self._first, self._last),
            self.num_cached_tokens,
            prompt_logprobs,
        )


def _decoded(entry: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    ids = {*entry.top, entry.token_id}
    return decoded_logprobs(entry, None if tokenizer is None else {i: tokenizer.decode([i], False) for i in ids})
