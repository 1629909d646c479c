"""Scores of pairs of texts, by whatever encoder there is: a cross-encoder reads a pair at once; of one that embeds,
the score is the cosine of the two embeddings, and a text that stands in many pairs is embedded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paceline.encoders import results
from paceline.encoders.description import EncoderInfo
from paceline.encoders.inputs import TextReader, Tokens
from paceline.encoders.results import Rows
from paceline.errors import UsageError

Pair = tuple[str, str]


@dataclass(frozen=True)
class Scoring:
    """`texts`: what the encoder is to run. `places`: of each pair's two among them; None where each text is a pair."""

    info: EncoderInfo
    texts: list[Tokens]
    places: list[tuple[int, int]] | None

    def scores(self, rows: Rows) -> list[float]:
        """The score of each pair, from the row of each of `texts`."""
        if self.places is None:
            return results.cross_scores(rows, self.info)
        ones, others = zip(*self.places, strict=True)
        return results.cosines(rows[list(ones)], rows[list(others)])

    def token_ids(self, pair: int) -> tuple[int, ...]:
        """What was read of a pair."""
        if self.places is None:
            return self.texts[pair].ids
        one, other = self.places[pair]
        return self.texts[one].ids + self.texts[other].ids


def read_pairs(reader: TextReader, info: EncoderInfo, pairs: Sequence[Pair], truncate: int | None) -> Scoring:
    """`truncate` as TextReader has it. Raises UsageError for an encoder without scores, and as TextReader."""
    results.check_scores(info)
    if info.is_cross_encoder:
        return Scoring(info, reader.pairs(pairs, truncate), None)
    places = {text: place for place, text in enumerate(dict.fromkeys(text for pair in pairs for text in pair))}
    return Scoring(info, reader.texts(list(places), truncate), [(places[one], places[other]) for one, other in pairs])


def pair_up(one: str | Sequence[str], other: str | Sequence[str]) -> list[Pair]:
    """One text with each of several, or two lists pair by pair, as vLLM's `score` takes them. Raises UsageError."""
    ones, others = ([one] if isinstance(one, str) else list(one)), ([other] if isinstance(other, str) else list(other))
    for text in (*ones, *others):
        if not isinstance(text, str):
            raise UsageError(f"a score is of two texts, got {type(text).__name__}")
    if not ones or not others:
        raise UsageError("a score needs at least one text on either side")
    if len(ones) == 1:
        ones *= len(others)
    if len(ones) != len(others):
        raise UsageError(f"{len(ones)} texts against {len(others)}: give one against many, or as many as there are")
    return list(zip(ones, others, strict=True))
