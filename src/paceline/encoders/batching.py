"""Which texts an encoder runs together: those of like length, up to a budget of tokens, so that little is padding."""

from __future__ import annotations

from collections.abc import Sequence

# Padding that a batch may hold, in tokens. A call costs about what so many do (measured with all-MiniLM-L6-v2 on a CPU,
# in transformers' own module), so that cutting the batch once more would gain nothing.
SPARE_TOKENS = 32


def batches(lengths: Sequence[int], max_tokens: int, max_texts: int) -> list[list[int]]:
    """Places of all texts, longest first, in batches: of at most `max_texts` texts and `max_tokens` tokens with their
    padding, but one that is longer is a batch of its own; and of at most SPARE_TOKENS padding."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found: list[list[int]] = []
    longest = padding = 0
    for place in order:
        more = padding + longest - lengths[place]
        batch = found[-1] if found else []
        if batch and len(batch) < max_texts and (len(batch) + 1) * longest <= max_tokens and more <= SPARE_TOKENS:
            batch.append(place)
            padding = more
        else:
            found.append([place])
            longest, padding = lengths[place], 0
    return found
