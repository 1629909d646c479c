"""What a checkpoint says about its tokens, whichever format it is in: the value that both readers return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import tokenizers


@dataclass(frozen=True)
class TokenizerParts:
    """`named_tokens`: bos_token, eos_token, ... as the strings that a chat template refers to.
    `eos_token_ids`: what the vocabulary itself says ends a reply. `templates`: by name, "default" for the usual one."""

    backend: tokenizers.Tokenizer
    named_tokens: Mapping[str, str]
    eos_token_ids: frozenset[int]
    templates: Mapping[str, str] = field(default_factory=dict)
