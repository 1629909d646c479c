"""Which special tokens encode() puts around a text."""

from __future__ import annotations

import tokenizers
from tokenizers import processors


def add_bos_eos(backend: tokenizers.Tokenizer, *, bos: str | None, eos: str | None) -> None:
    """Replace the post-processor: `bos` before each sequence, `eos` after it, None for neither."""
    around = [(token, backend.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token is not None]
    before, after = ([] if bos is None else [bos]), ([] if eos is None else [eos])
    single = [f"{t}:0" for t in before] + ["$A:0"] + [f"{t}:0" for t in after]
    second = [f"{t}:1" for t in before] + ["$B:1"] + [f"{t}:1" for t in after]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=single + second, special_tokens=around)
