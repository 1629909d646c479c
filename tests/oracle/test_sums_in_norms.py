"""Promise: a decoder whose norms add the residual before them computes, to the bit, what one computes that adds first.

In Triton's interpreter where there is no GPU; only the norms are kernels there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from paceline.formats import w8a8_fp8
from paceline.layers import norm as module
from paceline.models import decoder as decoder_module

ON_GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if ON_GPU else []  # so that `make test-gpu` has them
# The interpreter cuts bfloat16 off where the GPU rounds.
DTYPE = torch.bfloat16 if ON_GPU else torch.float16
# More rows than the kernels for few take; where those cannot run, more than fp8's.
PROMPTS = [list(range(3, 60)), list(range(20, 63))] if ON_GPU else [list(range(3, 32)), list(range(20, 27))]


@pytest.fixture
def sums(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each sum by a norm's kernel, in order, whether that norm is in fp8. Elsewhere too the norms are kernels."""
    monkeypatch.setattr("paceline.kernels.norm.triton_refusal", lambda device, dtype: None)
    found: list[bool] = []
    for name in ("add_norm_", "scaled_add_norm_"):
        monkeypatch.setattr(module, name, _recorded(getattr(module, name), found, name == "scaled_add_norm_"))
    return found


def _recorded(run: Callable[..., Any], found: list[bool], scaled: bool) -> Callable[..., Any]:
    return lambda *args: found.append(scaled) or run(*args)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of rows in fp8, where nothing multiplies them."""

    def multiply(x: Any, q_NK: torch.Tensor, scale_N: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        y_TN = (x.q_TK.float() @ q_NK.float().T * x.scale_T1 * scale_N).to(DTYPE)
        return y_TN if bias_N is None else y_TN + bias_N

    if not ON_GPU:
        monkeypatch.setattr(w8a8_fp8, "scaled_refusal", lambda *_: None)
        monkeypatch.setattr(w8a8_fp8, "scaled_linear", multiply)


def logits(pages: Any, decoder: Any) -> torch.Tensor:
    return torch.cat(pages(decoder, PROMPTS).run())


def added_first(monkeypatch: pytest.MonkeyPatch, pages: Any, decoder: Any) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(decoder_module, "in_place_refusal", lambda x_TC: "added first")
        return logits(pages, decoder)


# Sums of three layers: one after each half.
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama", 6),
        ("gpt2", 6),
        ("mixtral", 3),  # experts add by themselves
        ("gpt-neox", 0),  # two norms of one stream
        ("falcon-7b", 0),  # one norm for both halves
        ("gemma3", 0),  # norms before the sums
        ("granite", 0),  # sums with a factor
    ],
)
def test_norms_add_what_no_projection_does(monkeypatch, tiny_model, pages, sums, name, count):
    decoder = tiny_model(name).decoder(DTYPE, device="cuda" if ON_GPU else "cpu")
    found_TV = logits(pages, decoder)
    assert sums == [False] * count
    assert torch.equal(found_TV, added_first(monkeypatch, pages, decoder))
    assert len(sums) == count


def test_norms_add_and_give_the_products_their_rows_in_fp8(monkeypatch, tiny_model, pages, sums, products):
    decoder = tiny_model("llama").decoder(DTYPE, "w8a8-fp8", device="cuda" if ON_GPU else "cpu")
    found_TV = logits(pages, decoder)
    assert sums == [True] * 5 + [False]  # the last norm's are the hidden states
    assert torch.equal(found_TV, added_first(monkeypatch, pages, decoder))


def test_a_projection_that_adds_leaves_nothing_to_the_norm(monkeypatch, tiny_model, pages, sums):
    decoder = tiny_model("llama").decoder(DTYPE, device="cuda" if ON_GPU else "cpu")
    monkeypatch.setattr("paceline.layers.linear.Linear.adds", lambda self, residual_TN: True)
    logits(pages, decoder)
    assert not sums


def test_a_step_holds_no_more_than_one_that_adds_first(monkeypatch, tiny_model, pages, sums, live_bytes):
    decoder = tiny_model("gpt2").decoder(DTYPE, device="cuda" if ON_GPU else "cpu")
    with live_bytes() as with_norms:
        logits(pages, decoder)
    assert sums
    with live_bytes() as before:
        added_first(monkeypatch, pages, decoder)
    assert with_norms.peak <= before.peak


@pytest.mark.skipif(ON_GPU, reason="a CPU's step is plain")
def test_on_a_cpu_torch_adds(monkeypatch, tiny_model, pages):
    monkeypatch.setattr(decoder_module.Block, "_join", None)
    decoder = tiny_model("llama").decoder()
    logits(pages, decoder)
