"""What the device side remembers of a request: what was asked, and its tokens."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from paceline.engine.step import NewRequest
from paceline.sampling.static import Kind, kind_of, needs_history


@dataclass(frozen=True, eq=False)
class RequestTokens:
    """A request and its tokens, which grow. Arrays, because the sampler's penalties read them as buffers. Two are equal
    only if they are one: an id may be used again.

    `kind`: how a plain decode chooses its token; `plain_from`: the first position whose computation can be one, None
    if its parameters allow none (engine/decode_step.py).
    """

    new: NewRequest
    prompt: array[int]
    output: array[int]
    kind: Kind
    plain_from: int | None

    @property
    def num_known(self) -> int:
        return len(self.prompt) + len(self.output)

    def known(self, position: int) -> int:
        """The token at a position that an earlier step has chosen."""
        prompt_length = len(self.prompt)
        return self.prompt[position] if position < prompt_length else self.output[position - prompt_length]


def begin(new: NewRequest) -> RequestTokens:
    """A request as it is announced: its prompt, and what an engine before this one has chosen."""
    params = new.params
    plain_from = None
    if not needs_history(params):
        # Stop tokens are masked for the first `min_tokens` tokens; the first of all is chosen at the prompt's end.
        plain_from = len(new.prompt_token_ids) - 1 + (params.min_tokens if new.stop_token_ids else 0)
    return RequestTokens(
        new, array("q", new.prompt_token_ids), array("q", new.output_token_ids), kind_of(params), plain_from
    )
