"""How the byte-level vocabularies of GGUF files cut text before merging: the rule that `tokenizer.ggml.pre` names.

The names are llama.cpp's, which recognises the published tokenizers by their results. The rules here are those of the
published tokenizer.json files; several names share one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tokenizers import Regex, pre_tokenizers


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before merging: by each expression in turn, the matches and what lies between them.
    `byte_splits`: the same, after each byte has become a character of the byte-level alphabet.
    `nfc`: the text is brought into Unicode's composed form first.
    `whole_words`: a piece that is itself a token is not merged up ("ignore_merges").
    `bos`: added unless the file says otherwise."""

    splits: tuple[str, ...]
    byte_splits: tuple[str, ...] = ()
    nfc: bool = False
    whole_words: bool = False
    bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """As the `tokenizers` library's: the cuts and the step to the byte-level alphabet."""
        return pre_tokenizers.Sequence(
            [
                *(_isolated(pattern) for pattern in self.splits),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                *(_isolated(pattern) for pattern in self.byte_splits),
            ]
        )


def _isolated(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_CASED_WORDS}|\p{{N}}{_REST}"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = _CASED_WORDS.replace("|", f"{_CONTRACTION}|") + rf"{_CONTRACTION}|\p{{N}}{{1,3}}{_REST}"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_PUNCTUATION = r"[\p{P}$+<=>^~|`]+"
# Letters as DeepSeek LLM's tokenizer.json lists them: the cased ones of an old Unicode, without some scripts' small.
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5"
    "\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b"
    "\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc"
    "\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
    "\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787"
    "\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_PUNCTUATION = "[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"

GPT2 = PreTokenizer((_GPT2,))
DIGITS_GPT2 = PreTokenizer((r"\p{N}", _GPT2))
NEOX = replace(GPT2, nfc=True)
CL100K = PreTokenizer((_LLAMA3,))
LLAMA3 = replace(CL100K, whole_words=True, bos=True)
QWEN2 = PreTokenizer((_QWEN2,), nfc=True)
BLOOM = PreTokenizer((_BLOOM,))

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    **dict.fromkeys(("gpt-2", "phi-2"), GPT2),
    **dict.fromkeys(("mpt", "olmo"), NEOX),
    **dict.fromkeys(("smollm", "starcoder", "refact"), DIGITS_GPT2),
    **dict.fromkeys(("llama-bpe", "llama-v3", "llama3", "falcon3"), LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), CL100K),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4"), PreTokenizer((_GPT4O,))),
    **dict.fromkeys(("bloom", "gpt3-finnish", "poro-chat"), BLOOM),
    "tekken": PreTokenizer((_TEKKEN,), whole_words=True, bos=True),
    "falcon": PreTokenizer((_PUNCTUATION, _GPT2), byte_splits=(r"\p{N}+", "[0-9][0-9][0-9]")),
    "deepseek-llm": PreTokenizer(
        (
            "[\r\n]",
            rf"\s?[{_DEEPSEEK_LETTERS}]+",
            rf"\s?{_DEEPSEEK_PUNCTUATION}",
            r"\s+$",
            _DEEPSEEK_HAN,
            r"\p{N}",
        )
    ),
    "deepseek-coder": PreTokenizer(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_HAN, r"\p{N}")),
    # What llama.cpp does for files whose converter did not know the vocabulary.
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2.removesuffix(r"|\s+"), r"\p{N}+", r"[0-9][0-9][0-9]")),
}
