"""Prompts of a wanted number of tokens for a server whose tokenizer is not known: random words, as many as a short
question and a longer one show to be needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paceline.benchmark.workload import Workload

# One token each, with the space before it, in a vocabulary of tens of thousands.
_TEXT = """
time year people way day man thing woman life child world school state family student group country problem hand
part place case week company system program question work government number night point home water room mother area
money story fact month lot right study book eye job word business issue side kind head house service friend father
power hour game line end member law car city community name president team minute idea kid body information back
parent face others level office door health person art war history party result change morning reason research girl
guy moment air teacher force education foot boy age policy process music market sense nation plan college interest
death experience effect use class control care field development role effort rate heart drug show leader light voice
wife police mind price report decision son view relationship town road arm difference value building action season
society tax director position player record paper space ground form event official matter center couple site project
activity star table need court oil situation cost industry figure street image phone data picture practice piece
land product doctor wall patient worker news test movie north love step support computer river stone sugar paint
train horse glass snow garden winter summer spring island mountain valley ocean forest bridge engine metal letter
color green blue red black white brown yellow small large early young important public private real best free able
common poor happy serious ready simple left physical general environmental financial cold recent full
"""
WORDS = _TEXT.split()
_FIRST_ID = 100  # protocol.random_prompt draws no id below
NUM_IDS = _FIRST_ID + len(WORDS)  # the vocabulary to draw a Workload's prompts from, for `text_of`
PROBES = (8, 72)  # words of the questions that `Scale` is found with


def text_of(ids: Sequence[int]) -> str:
    return " ".join(WORDS[token_id - _FIRST_ID] for token_id in ids)


@dataclass(frozen=True)
class Scale:
    """A prompt of n words has `overhead + n * per_word` tokens; the overhead is the chat template's."""

    overhead: float = 0.0
    per_word: float = 1.0

    @classmethod
    def of_probes(cls, tokens: Sequence[int]) -> Scale:
        """`tokens`: what prompts of PROBES words had."""
        per_word = (tokens[1] - tokens[0]) / (PROBES[1] - PROBES[0])
        # A server that counts nothing, or the same for any prompt, says nothing of its tokenizer.
        return cls(max(0.0, tokens[0] - PROBES[0] * per_word), per_word) if per_word > 0 else cls()

    def words(self, num_tokens: int) -> int:
        """The prompt of so many tokens, at least one word."""
        return max(1, round((num_tokens - self.overhead) / self.per_word))


def in_words(workload: Workload, scale: Scale) -> Workload:
    """The workload whose prompts' ids, one a word, make the tokens that `workload` asks for."""
    prefix = round(workload.prefix / scale.per_word)
    words = max(1, scale.words(workload.prefix + workload.input_len) - prefix)
    return Workload(
        workload.num_requests,
        words,
        workload.output_len,
        workload.mixed,
        prefix,
        workload.groups,
        workload.seed,
    )
