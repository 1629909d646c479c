"""Gemma 3 270M's real weights in Q4_K_M, against transformers reading the same file: tokenizer, prompts, tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.errors import ChatTemplateError
from paceline.llm import LLM

pytestmark = pytest.mark.slow

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Shopping list:\n1. Milk\n2. Eggs\n3.",
    "12 + 35 = 47, 20 + 22 = 42, 31 + 11 =",
    "Once upon a time, in a village by the sea, there lived",
    "Les élèves français étudient à l'école; 東京は日本の",
    '<html>\n<head><title>Hello</title></head>\n<body>\n<h1 class="',
    "one two three one two three one two three one two",
]
TEXTS = [
    *PROMPTS,
    "",
    " ",
    *(f"{' ' * count}x" for count in (2, 5, 31, 32, 70)),
    *("\n" * count for count in (1, 2, 31, 33)),
    "\t\ttabs\r\n and e\u0301 Å ½² 1234567 ٣٤٥ 👨‍👩‍👧‍👦 \u202e\u3000\x00\x7f",
    "<start_of_turn>user\nhi<end_of_turn>\n<unused5> <table> [multimodal] <0x41> <bos> ▁ a▁b",
]
# The form that Gemma's own template gives a conversation; the file is of the base model and has none.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message.role == 'assistant' else message.role }}\n{{ message.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
CONVERSATION = [
    {"role": "user", "content": "Why is the sky blue? "},
    {"role": "assistant", "content": "Scattering."},
    {"role": "user", "content": "Of what?"},
]


@pytest.fixture(scope="module")
def llm(gemma3_gguf: Path) -> Iterator[LLM]:
    with LLM(str(gemma3_gguf), device="cpu", dtype="float32", max_model_len=256) as made:
        yield made


@pytest.fixture(scope="module")
def their_tokenizer(gemma3_gguf: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(gemma3_gguf.parent, gguf_file=gemma3_gguf.name)


def test_the_tokenizer_is_that_of_transformers(llm, their_tokenizer):
    ours = llm.get_tokenizer()
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == their_tokenizer.encode(text), repr(text)
        assert ours.decode(ids, skip_special_tokens=False) == their_tokenizer.decode(ids), repr(text)
    assert (ours.vocab_size, ours.bos_token_id) == (len(their_tokenizer), their_tokenizer.bos_token_id)
    assert ours.eos_token_ids == {1, 106}  # <eos>, and <end_of_turn>, which the file does not name


def test_a_chat_needs_a_template_and_then_is_that_of_transformers(llm, their_tokenizer):
    with pytest.raises(ChatTemplateError, match="has no chat template"):
        llm.chat(CONVERSATION)
    ours = llm.get_tokenizer()
    text = ours.apply_chat_template(CONVERSATION, template=TEMPLATE)
    options = {"chat_template": TEMPLATE, "add_generation_prompt": True}
    assert text == their_tokenizer.apply_chat_template(CONVERSATION, tokenize=False, **options)
    ids = ours.encode_chat(CONVERSATION, template=TEMPLATE)
    assert ids == their_tokenizer.encode(text, add_special_tokens=False)
    assert ids[:3] == [2, 105, 2364]  # <bos>, once, <start_of_turn>, "user"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_greedy_tokens_are_those_of_transformers(gemma3_gguf, llm):
    """float32, 32 tokens, eight prompts in one batch here and one by one there."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        gemma3_gguf.parent, gguf_file=gemma3_gguf.name, dtype=torch.float32
    ).eval()
    outputs = llm.generate(PROMPTS, {"temperature": 0, "max_tokens": 32, "ignore_eos": True})
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = torch.tensor([output.prompt_token_ids])
        with torch.inference_mode():
            expected = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=32, min_new_tokens=32,
                eos_token_id=None, pad_token_id=0,
            )[0, ids.shape[1] :]  # fmt: skip
        assert list(output.outputs[0].token_ids) == expected.tolist(), prompt
