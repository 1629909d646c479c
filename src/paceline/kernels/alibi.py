"""ALiBi (Press et al., 2022): attention with a linear bias in place of position embeddings."""

from __future__ import annotations

import math


def alibi_slopes(num_heads: int) -> list[float]:
    """A head's slope m: a key at distance d gets m * d taken from its score.

    For a power of two n they are 2**(-8/n), its square, and so on; otherwise those of the next lower power of two,
    then every other one of the next higher.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
