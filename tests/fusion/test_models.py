"""Models of many architectures, tiny and with random weights: what comes out, and that each pass found what it should,
so that a pattern which stops matching turns a test red and not only a benchmark slow."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import paceline
from paceline.fusion import packing, report
from paceline.fusion.passes import padding

# With attention spelled out by transformers ("eager"): what every graph must have replaced, and how often. Two layers
# each; encoder-decoders have six attentions, and read the encoder's result once for both cross-attentions.
TURNED = {"rotary embedding": 4, "heads taken along": 2}
REPLACED = {
    "bert": {"attention": 2, "3 linears as one": 2},
    "roberta": {"attention": 2, "3 linears as one": 2},
    "distilbert": {"attention": 2, "3 linears as one": 2},
    "albert": {"attention": 2, "3 linears as one": 2, "gelu": 2},
    "modernbert": {"attention": 2, **TURNED},
    "deberta-v2": {"attention": 2, "3 linears as one": 2},
    "t5": {"attention": 6, "3 linears as one": 4, "4 linears as one": 1, "rms norm": 12},
    "bart": {"attention": 6, "3 linears as one": 4, "4 linears as one": 1},
    "marian": {"attention": 6, "3 linears as one": 4, "4 linears as one": 1},
    "whisper": {"attention": 6, "3 linears as one": 4, "4 linears as one": 1},
    "vit": {"attention": 2, "3 linears as one": 2},
    "clip": {"attention": 4, "3 linears as one": 4, "quick gelu": 4},
    "gpt2": {"attention": 2, "gelu": 2, "linear": 8},
    "llama": {"attention": 2, "3 linears as one": 2, "2 linears as one": 2, "rms norm": 5, **TURNED},
    "qwen3": {"attention": 2, "3 linears as one": 2, "2 linears as one": 2, "rms norm": 9, **TURNED},
    "phi": {"attention": 2, "4 linears as one": 2, **TURNED},
    "gpt-neox": {"attention": 2, "rotary embedding": 4},
}
# Which spell out their attention whatever they are asked for.
ONE_ATTENTION = ("deberta-v2", "t5")
pytestmark = [
    # Older transformers compile parts with torch.jit, and make masks by torch.vmap, which Dynamo warns of.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]
SHAPES = [(2, 7, "right"), (3, 12, "left"), (1, 9, "left"), (2, 4, "right"), (1, 1, "right"), (0, 5, "right")]


def exact(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Any:
    """The result of a copy of the model in float64."""
    try:
        return copy.deepcopy(model).double()(**{name: widened(value) for name, value in inputs.items()})
    except RuntimeError as error:
        if "without overflow" in str(error):
            pytest.skip("this transformers cannot mask in float64")
        raise


def widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def assert_replaced(model: nn.Module, wanted: dict[str, int]) -> None:
    told = report(model)
    assert told.graphs
    assert not told.eager
    assert not told.breaks
    for graph in told.graphs:
        assert graph.refused is None
        assert {name: graph.replaced[name] for name in wanted} == wanted


@pytest.mark.parametrize("name", REPLACED)
def test_results_and_passes(
    name: str,
    tiny_model: Callable[..., nn.Module],
    tiny_inputs: Callable[..., Any],
    assert_as_exact: Callable[..., None],
) -> None:
    model = tiny_model(name, "eager")
    own = copy.deepcopy(model)
    paceline.optimize(model)
    for shape in SHAPES[:2]:
        inputs = tiny_inputs(name, *shape)
        with torch.no_grad():
            assert_as_exact(model(**inputs), own(**inputs), exact(own, inputs))
    import transformers

    older = int(transformers.__version__.split(".")[0]) < 5
    if older:
        if not report(model).graphs:
            pytest.skip(f"not captured with this transformers: {report(model)}")
    else:
        assert len(report(model).graphs) == 1
    wanted = dict(REPLACED[name])
    if older and name == "gpt2":
        del wanted["attention"]  # its scale is a tensor there, and its attention stays
    assert_replaced(model, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", REPLACED)
def test_every_shape_in_every_spelling_and_dtype(
    name: str,
    attention: str,
    dtype: torch.dtype,
    tiny_model: Callable[..., nn.Module],
    tiny_inputs: Callable[..., Any],
    assert_as_exact: Callable[..., None],
) -> None:
    if attention == "sdpa" and name in ONE_ATTENTION:
        pytest.skip("transformers has one spelling of its attention")
    model = tiny_model(name, attention, dtype)
    own = copy.deepcopy(model)
    paceline.optimize(model)
    for shape in SHAPES:
        inputs = tiny_inputs(name, *shape, dtype=dtype)
        with torch.no_grad():
            try:
                wanted = own(**inputs)
            except Exception as error:  # some take no empty batch: then the same error
                with pytest.raises(type(error)):
                    model(**inputs)
                continue
            assert_as_exact(model(**inputs), wanted, exact(own, inputs))
    assert not report(model).breaks
    assert not any(graph.refused for graph in report(model).graphs)


def test_modes_and_layouts(
    tiny_model: Callable[..., nn.Module], tiny_inputs: Callable[..., Any], assert_as_exact: Callable[..., None]
) -> None:
    """A model through one batch after another, as callers have them."""
    model = tiny_model("bert")
    own = copy.deepcopy(model)
    paceline.optimize(model)

    def check(inputs: dict[str, Any], mode: Any) -> Any:
        with mode:
            result, wanted = model(**inputs), own(**inputs)
        with torch.no_grad():
            assert_as_exact(result, wanted, exact(own, inputs))
        return result

    inputs = tiny_inputs("bert", 2, 7)
    assert not check(inputs, contextlib.nullcontext())[0].requires_grad
    assert check(inputs, torch.inference_mode())[0].is_inference()
    assert not check(inputs, torch.no_grad())[0].is_inference()
    check({name: value.t().contiguous().t() for name, value in inputs.items()}, torch.no_grad())
    check(tiny_inputs("bert", 1, 9), torch.inference_mode())
    check(tiny_inputs("bert", 1, 1), torch.inference_mode())
    assert_replaced(model, {"3 linears as one": 2})
    empty = tiny_inputs("bert", 0, 5)  # which the model itself cannot take: its views ask for a size of its own
    for one in (own, model):
        with torch.inference_mode(), pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
            one(**empty)


def test_autocast_is_the_models_own(tiny_model: Callable[..., nn.Module], tiny_inputs: Callable[..., Any]) -> None:
    model = tiny_model("distilbert")
    own = copy.deepcopy(model)
    paceline.optimize(model)
    inputs = tiny_inputs("distilbert", 2, 7)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(**inputs)[0], own(**inputs)[0], rtol=0, atol=0)
    assert report(model).eager == {"autocast is on: pass dtype= to optimize instead": 1}
    assert not report(model).graphs


def test_another_dtype(
    tiny_model: Callable[..., nn.Module], tiny_inputs: Callable[..., Any], assert_as_exact: Callable[..., None]
) -> None:
    """As the same model would answer whose weights are in it."""
    model = tiny_model("llama", "eager")
    own = tiny_model("llama", "eager", torch.bfloat16)
    paceline.optimize(model, dtype=torch.bfloat16)
    inputs = tiny_inputs("llama", 2, 7, "left")
    with torch.no_grad():
        assert_as_exact(model(**inputs), own(**inputs), exact(own, inputs))
    assert_replaced(model, REPLACED["llama"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_minilm(dtype: torch.dtype | None, minilm: Path) -> None:
    """Real weights: each token's vector as in float32, and the spread of lengths that callers have."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(minilm).eval()
    own = copy.deepcopy(model)
    paceline.optimize(model, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for batch, length in [(1, 16), (8, 128), (3, 40)]:
        ids = torch.randint(1000, 30000, (batch, length), generator=generator)
        mask = (torch.arange(length) < torch.randint(length // 2, length + 1, (batch, 1), generator=generator)).long()
        with torch.inference_mode():
            found = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            wanted = own(input_ids=ids, attention_mask=mask).last_hidden_state
        pooled = [(mask.unsqueeze(-1) * states).sum(1) for states in (found, wanted)]
        assert torch.cosine_similarity(*pooled).min() > (0.9998 if dtype else 0.999999)
    assert_replaced(model, {"3 linears as one": 6})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["bert", "modernbert", "llama", "qwen3", "phi"])
def test_padding_is_left_out(
    name: str,
    attention: str,
    tiny_model: Callable[..., nn.Module],
    tiny_inputs: Callable[..., Any],
    assert_as_exact: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the left, at the right, inside; what is left has the places that it had, and stays packed between layers."""
    packed = []
    monkeypatch.setattr(padding, "pack", lambda *args: packed.append(args) or packing.pack(*args))
    model = tiny_model(name, attention)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # keys and values at padding would be results
    own = copy.deepcopy(model)
    paceline.optimize(model, level="fast")
    for shape in SHAPES[:2]:
        inputs = tiny_inputs(name, *shape)
        mask = inputs["attention_mask"]
        mask[0, 4 if shape[2] == "right" else slice(0, 5)] = 0
        with torch.no_grad():
            model(**inputs)
            packed.clear()
            found, wanted, right = model(**inputs)[0], own(**inputs)[0], exact(own, inputs)[0]
        assert len(packed) <= 3  # the embeddings, and the angles of local and of other layers
        real = mask.bool()
        assert_as_exact([found[real]], [wanted[real]], [right[real]])
        assert name == "llama" or not found[~real].any()  # whose results are logits
    assert_replaced(model, {"padding left out": 1, "heads taken along": 2})
