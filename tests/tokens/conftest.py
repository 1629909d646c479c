"""Small tokenizers of the three kinds, trained here and saved as a checkpoint would hold them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from paceline.loading.resolve import ModelSource
from paceline.tokens import tokenizer as tokens

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TRAINING_TEXT = [
    "The quick brown fox jumps over the lazy dog; I'm sure you've seen the fox, haven't you?",
    "def add(a, b):\n    return a + b  # 12345 67890\n\n\nclass Point:\n\tpass\n",
    "the there then these those other mother brother weather whether",
    "中文字符和日本語のテキスト, 中文字符。 Ünïcödé naïve café — “quotes” … \u00a0",
    "Привет мир, مرحبا بالعالم, שלום עולם",
] * 4
NASTY_TEXTS = [
    "",
    " ",
    "Hello world",
    " leading and trailing ",
    "  two   three    four     spaces",
    "tabs\t\tand\r\nlines\n\n\n\nend\n",
    "digits 1234567890 007 3.14159 1,000,000 ½ ²³ ٣٤٥ ①②",
    "I'm you'LL we've DON'T it's",
    "👨‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪🇫🇷",
    "中文字符 日本語のテキスト 한국어 텍스트",
    "مرحبا بالعالم \u200f שלום \u202e עולם",
    "def f(x):\n    return x ** 2  # café\n",
    "null \x00 bytes \x01\x7f",
    "e\u0301 \u0301\u0302 alone, Å vs A\u030a, ﬁ ℌ",
    "\u3000wide\u00a0nbsp\u2028line",
    "<s>control</s> <|im_start|>user\nhi<|im_end|><bos> <0x41> ▁▁x",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "...!!!???,,,;;;((([[[{{{",
    "\ufffd \uffff \U0010ffff",
]


def _byte_level(pattern: str, nfc: bool, specials: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return tokenizer


def _sentencepiece(specials: list[str], prefix: str) -> Tokenizer:
    """`prefix`: how a leading space comes in, "normalizer" (Llama 2), "metaspace" (later) or "none" (Gemma)."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    strip = [decoders.Strip(" ", 1, 0)]
    if prefix == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    elif prefix == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = replace
        strip = []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    learner = Tokenizer(models.BPE(unk_token="<unk>"))  # words apart, so that merges are those of words
    learner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*specials, *byte_tokens], show_progress=False)
    learner.train_from_iterator(TRAINING_TEXT[:3], trainer)
    learned = json.loads(learner.to_str())["model"]
    tokenizer.model = models.BPE(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    return tokenizer


def _template_bos(tokenizer: Tokenizer, bos: str) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


def _save(path: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> Path:
    path.mkdir(parents=True)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="session")
def tokenizer_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint directory (tokenizer files only) of each kind."""
    root = tmp_path_factory.mktemp("tokenizers")
    fast = {"tokenizer_class": "PreTrainedTokenizerFast"}
    llama3 = _byte_level(LLAMA3, False, ["<|begin_of_text|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"])
    _template_bos(llama3, "<|begin_of_text|>")
    qwen2 = _byte_level(LLAMA3.replace("{1,3}", ""), True, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    llama2 = _sentencepiece(["<unk>", "<s>", "</s>"], "normalizer")
    _template_bos(llama2, "<s>")
    metaspace = _sentencepiece(["<unk>", "<s>", "</s>"], "metaspace")
    gemma = _sentencepiece(["<pad>", "<eos>", "<bos>", "<unk>"], "none")
    _template_bos(gemma, "<bos>")
    return {
        "llama3": _save(root / "llama3", llama3, {**fast, "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
        "qwen2": _save(
            root / "qwen2",
            qwen2,
            {**fast, "eos_token": "<|im_end|>", "pad_token": {"__type": "AddedToken", "content": "<|endoftext|>"}},
        ),
        "llama2": _save(
            root / "llama2", llama2, {**fast, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        ),
        # Its tokenizer.json adds no BOS, and that is what counts.
        "metaspace": _save(
            root / "metaspace",
            metaspace,
            {**fast, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True},
        ),
        "gemma": _save(
            root / "gemma",
            gemma,
            {**fast, "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
        ),
    }


@pytest.fixture(scope="session")
def nasty_texts() -> list[str]:
    return NASTY_TEXTS


@pytest.fixture(scope="session")
def load(tokenizer_dirs: dict[str, Path]) -> Callable[..., tokens.Tokenizer]:
    """load(kind, generation_config={}, config={}, chat_template=None): one of `tokenizer_dirs` as our Tokenizer."""

    def load_kind(kind: str, **options: Any) -> tokens.Tokenizer:
        source = ModelSource(name="test", kind="directory", path=tokenizer_dirs[kind])
        return tokens.load_tokenizer(source, **{"generation_config": {}, "config": {}, **options})

    return load_kind
