"""A chat as it stands: the model, the conversation, the sampling parameters typed so far, and what it has cost."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from paceline.cli.conversation import Conversation
from paceline.cli.model import decode_figures, effective_sampling, interrupt_stops, stream_answer, write_stdout
from paceline.cli.report import Answer, cost_parts
from paceline.errors import ChatTemplateError, PromptTooLongError, UsageError
from paceline.sampling.params import SamplingParams

if TYPE_CHECKING:
    from paceline.benchmark.mbu import DecodeFigures
    from paceline.llm import LLM

MAKE_ROOM = "/undo takes the last turn back, /clear forgets the conversation, --max-model-len may allow more"


@dataclass
class Totals:
    """Sums over a session's answers; the decode's tokens and seconds leave each answer's first token out."""

    answers: int = 0
    tokens: int = 0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    def add(self, answer: Answer, figures: DecodeFigures | None) -> None:
        self.answers += 1
        self.tokens += len(answer.token_ids)
        if figures is not None:
            self.decode_tokens += figures.num_tokens
            self.decode_seconds += figures.seconds


class ChatSession:
    """`given`: sampling parameters that the user typed. Answers go to stdout; all else is a note on stderr.

    Raises ChatTemplateError when the model has no chat template, or its template takes no system message.
    """

    def __init__(self, llm: LLM, given: dict[str, Any], system: str | None, *, quiet: bool) -> None:
        self.llm = llm
        self.given = given
        self.quiet = quiet
        self.conversation = Conversation()
        self.totals = Totals()
        self.last: Answer | None = None
        self._bandwidth: float | None = None
        if llm.get_tokenizer().chat_template is None:
            raise ChatTemplateError(
                f"{llm.model.source.name} has no chat template (a base model?): give one with --chat-template FILE, or "
                f'complete plain text: paceline generate --raw --model {llm.model.source.name} "..."'
            )
        self.set_system(system)

    # ------------------------------------------------------------------------------------------ the conversation

    def set_system(self, system: str | None) -> None:
        """Raises ChatTemplateError where the model's template refuses it; nothing has changed then."""
        changed = Conversation(system, self.conversation.turns)
        probe = changed if changed.num_turns else changed.say("user", "Hi")
        self.llm.get_tokenizer().apply_chat_template(probe.messages)
        self.conversation = changed

    def say(self, text: str) -> None:
        """Answer `text`. Raises PromptTooLongError and EngineError; the conversation is then what it was."""
        self._answer(self.conversation.say("user", text))

    def regenerate(self) -> None:
        """Answer the user's last message anew."""
        params, _ = self.params()
        if self.conversation.turns[-1:] and (params.greedy or params.seed is not None):
            why = f"seed {params.seed}" if params.seed is not None else "temperature 0"
            self.note(f"with {why} the answer is the same again; /set changes it")
        self._answer(self.conversation.unanswered())

    def context_tokens(self, conversation: Conversation | None = None) -> int:
        """Tokens that the conversation takes as a prompt."""
        messages = (conversation or self.conversation).messages
        return len(self.llm.get_tokenizer().encode_chat(messages)) if messages else 0

    @property
    def max_context(self) -> int:
        return self.llm.model.engine.config.max_model_len

    def params(self) -> tuple[SamplingParams, dict[str, str]]:
        """The sampling parameters in force, and where each came from."""
        return effective_sampling(self.llm, self.given, "paceline chat")

    def set_params(self, given: dict[str, Any]) -> None:
        """Raises UsageError for a value that cannot be right; nothing has changed then."""
        params, _ = effective_sampling(self.llm, given, "paceline chat")
        params.check_vocabulary(self.llm.model.config.vocab_size)
        self.given = given

    # ------------------------------------------------------------------------------------------------- answering

    def _answer(self, conversation: Conversation) -> None:
        params, _ = self.params()
        needed = self.context_tokens(conversation)
        if needed >= self.max_context:
            raise PromptTooLongError(
                f"not sent: with this message the conversation has {needed} tokens and the context holds "
                f"{self.max_context}, the answer included; {MAKE_ROOM}"
            )
        with interrupt_stops() as stopped:
            answer = stream_answer(self.llm, conversation.messages, params, write_stdout, stopped)
            if answer.last.outputs[0].finish_reason is None and not answer.text.strip():
                self.note("stopped before the first word: the conversation is what it was")
                return
            self.conversation = conversation.say("assistant", answer.text)
            self._account(answer, params)

    def _account(self, answer: Answer, params: SamplingParams) -> None:
        # The bandwidth is measured after the first answer only: 0.15 s before every prompt would be felt.
        figures = decode_figures(self.llm, answer, self._bandwidth)
        if figures is not None:
            self._bandwidth = figures.bandwidth
        self.totals.add(answer, figures)
        self.last = answer
        used = len(answer.last.prompt_token_ids) + len(answer.token_ids)
        if not self.quiet:
            parts = cost_parts(answer, params, figures)
            if answer.last.outputs[0].finish_reason is None:
                parts.append("stopped")
            parts.append(f"{answer.last.num_cached_tokens} cached")
            self.note(" · ".join([*parts, f"context {used} of {self.max_context}"]))
        if used >= self.max_context:
            self.note(f"the context is full, so the answer may be cut off; {MAKE_ROOM}")

    def note(self, text: str) -> None:
        """Say something beside the answers: on stderr, dim where that is a terminal."""
        click.echo(dimmed(text), err=True)

    def stats(self) -> list[tuple[str, str]]:
        """What /stats shows: names and values."""
        used, cache = self.context_tokens(), self.llm.stats().scheduler.cache
        rows = [
            ("turns", f"{self.conversation.num_turns} in the conversation, {self.totals.answers} answered"),
            ("context", f"{used} of {self.max_context} tokens ({used / self.max_context:.0%})"),
        ]
        if self.last is None:
            return rows
        totals, last = self.totals, self.last.last
        if totals.decode_seconds:
            speed = f"{totals.tokens} tokens, {totals.decode_tokens / totals.decode_seconds:.1f} tokens/s"
            rows.append(("answers", f"{speed} after each one's first"))
        hits, queries = cache.prefix_hit_tokens, cache.prefix_query_tokens
        rows.append(("last prompt", f"{last.num_cached_tokens} of {len(last.prompt_token_ids)} tokens from the cache"))
        rows.append(("all prompts", f"{hits} of {queries} tokens from the cache ({hits / max(queries, 1):.0%})"))
        return rows


def dimmed(text: str) -> str:
    """`text` in a terminal's faint type, unless NO_COLOR (no-color.org) is set."""
    return text if os.environ.get("NO_COLOR") else click.style(text, dim=True)


def check_text(text: str) -> str:
    """Raise UsageError for text that no tokenizer can take (a terminal that is not UTF-8 gives lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("what you typed is not valid text: set the terminal to UTF-8") from None
    return text
