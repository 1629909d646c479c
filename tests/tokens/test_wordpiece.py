"""BERT's kind of tokenizer: decoding, pairs, and cuts that leave the special tokens, as the tokenizers library does."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from paceline.errors import UsageError
from paceline.tokens.parts import TokenizerParts
from paceline.tokens.tokenizer import Tokenizer

WORDS = [
    "[PAD]",
    "[CLS]",
    "[SEP]",
    "[UNK]",
    "the",
    "fox",
    "jump",
    "##s",
    "##ed",
    "un",
    "##do",
    ".",
    ",",
    "'",
    "s",
    "n't",
]


@pytest.fixture(params=[True, False], ids=["cleanup", "as-it-is"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    backend = Backend(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=request.param)
    special = [("[CLS]", 1), ("[SEP]", 2)]
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", special)
    backend.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[UNK]"])
    return Tokenizer(TokenizerParts(backend, {}, frozenset()))


def test_decoding_is_the_librarys(tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    for _ in range(200):
        ids = [draw.randrange(len(WORDS)) for _ in range(draw.randrange(12))]
        assert tokenizer.decode(ids) == tokenizer.backend.decode(ids)
    assert tokenizer.decode(tokenizer.encode("The fox jumps")) == "the fox jumps"


def test_a_cut_is_the_librarys(tokenizer: Tokenizer) -> None:
    draw = random.Random(1)
    for _ in range(300):
        one, other = (" ".join(draw.choices(["fox", "jumps", "the"], k=draw.randrange(1, 15))) for _ in "ab")
        limit = draw.randrange(5, 30)
        cut, whole = tokenizer.encode_cut(one, other, limit), tokenizer.encode_pair(one, other)
        alone = tokenizer.encode_cut(one, None, limit)
        tokenizer.backend.enable_truncation(limit, strategy="longest_first")
        expected = tokenizer.backend.encode(one, other)
        assert (cut.ids, cut.type_ids) == (expected.ids, expected.type_ids)
        assert alone.ids == tokenizer.backend.encode(one).ids
        tokenizer.backend.no_truncation()
        assert whole.ids == tokenizer.backend.encode(one, other).ids


def test_a_cut_to_special_tokens_alone_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="truncate_prompt_tokens 2 leaves no token"):
        tokenizer.encode_cut("fox", None, 2)
    with pytest.raises(UsageError, match="truncate_prompt_tokens 4 leaves no token"):
        tokenizer.encode_cut("fox", "fox", 4)
