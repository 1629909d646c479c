"""What requests to encoders share: their fields, and what is done with those that are not declared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from pydantic import BaseModel, ConfigDict

from paceline.serve.protocol.sampling import Int

# Fields that would change the answer and are not supported, with the values at which they change nothing.
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "activation": (True,),
    "add_special_tokens": (True,),
    "embed_dtype": ("float32",),
    "embedding_types": (["float"],),
    "input_type": (),
    "instruction": ("",),
    "late_chunking": (False,),
    "max_tokens_per_doc": (),
    "messages": (),
    "mm_processor_kwargs": ({},),
    "softmax": (True,),
    "task": (),
    "use_activation": (True,),
}
# Fields that never change the answer.
INERT = frozenset(["endianness", "metadata", "priority", "request_id", "user"])


class EncodingFields(BaseModel):
    """`truncate_prompt_tokens`: cut longer texts to so many tokens, -1 to what the model reads; null refuses them."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    truncate_prompt_tokens: Int | None = None


class EncodingUsage(msgspec.Struct):
    """Tokens that the model read, special ones included."""

    prompt_tokens: int
    total_tokens: int
