import pytest
import torch
from torch import nn

import paceline
from paceline.errors import UsageError
from paceline.fusion import measure_stages, report, restore


class Block(nn.Module):
    """A transformer layer as one writes it by hand."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part(x).view(batch, length, self.heads, -1).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5
        scores = scores.masked_fill(attention_mask[:, None, None, :] == 0, torch.finfo(x.dtype).min)
        seen = self.dropout(scores.softmax(-1)) @ v
        x = self.first(x + self.dropout(self.out(seen.transpose(1, 2).reshape(batch, length, width))))
        return self.second(x + self.dropout(self.down(nn.functional.gelu(self.up(x)))))


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block().eval()


def inputs(batch: int, length: int, padded: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch * 100 + length)
    mask = torch.ones(batch, length, dtype=torch.long)
    if padded:
        mask[-1, -padded:] = 0
    return torch.randn(batch, length, 32, generator=generator), mask


def test_each_shape_gives_what_the_model_gives(block: Block) -> None:
    shapes = [(2, 7), (2, 7), (3, 5), (1, 9), (1, 4), (8, 33)]
    with torch.no_grad():
        expected = [block(*inputs(*shape)) for shape in shapes]
    assert paceline.optimize(block) is block
    for shape, wanted in zip(shapes, expected, strict=True):
        torch.testing.assert_close(block(*inputs(*shape)), wanted, rtol=1e-5, atol=1e-5)
    told = report(block)
    assert len(told.graphs) == 2  # a batch of one, and more
    for graph in told.graphs:
        assert graph.refused is None
        assert graph.error is not None
        assert graph.error < 1e-5
        assert graph.replaced["attention"] == 1
        assert graph.replaced["3 linears as one"] == 1
        assert graph.replaced["packed linear with gelu"] == 1
    assert not told.eager


def test_restore_gives_the_model_back(block: Block) -> None:
    before = block.forward
    paceline.optimize(block)
    assert "forward" in vars(block)
    assert restore(block) is block
    assert block.forward == before
    with pytest.raises(UsageError, match="Block is not optimised"):
        report(block)


def test_training_and_gradients_are_the_models_own(block: Block) -> None:
    paceline.optimize(block)
    x, mask = inputs(2, 5)
    block.train()
    block(x, mask).sum().backward()
    assert block.up.weight.grad is not None
    block.eval()
    x.requires_grad_()
    block(x, mask).sum().backward()
    assert x.grad is not None
    assert report(block).eager == {
        "it is in training mode: call model.eval()": 1,
        "an input requires a gradient": 1,
    }


def test_a_weight_that_changes_is_noticed(block: Block) -> None:
    paceline.optimize(block)
    x, mask = inputs(2, 5)
    block(x, mask)
    with torch.no_grad():
        block.query.weight.mul_(-3)
        torch.testing.assert_close(block(x, mask), block.forward.original(x, mask), rtol=1e-5, atol=1e-5)
        block.down.weight = nn.Parameter(block.down.weight * 2)
        torch.testing.assert_close(block(x, mask), block.forward.original(x, mask), rtol=1e-5, atol=1e-5)
        block.up.weight.data = block.up.weight.data * 5
        torch.testing.assert_close(block(x, mask), block.forward.original(x, mask), rtol=1e-5, atol=1e-5)


def test_another_dtype_leaves_the_weights_alone(block: Block) -> None:
    x, mask = inputs(2, 5)
    with torch.no_grad():
        wanted = block(x, mask)
    paceline.optimize(block, dtype=torch.bfloat16)
    found = block(x, mask)
    assert found.dtype == torch.bfloat16
    assert block.up.weight.dtype == torch.float32
    torch.testing.assert_close(found.float(), wanted, rtol=5e-2, atol=5e-2)
    with torch.no_grad():
        block.first.weight.mul_(2)
    torch.testing.assert_close(block(x, mask).float(), block.forward.original(x, mask), rtol=8e-2, atol=8e-2)


def test_fast_computes_nothing_at_padding(block: Block) -> None:
    x, mask = inputs(4, 9, padded=5)
    with torch.no_grad():
        wanted = block(x, mask)
    paceline.optimize(block, level="fast")
    block(x, mask)
    found = block(x, mask)
    real = mask.bool()
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-5, atol=1e-5)
    assert not found[~real].any()
    assert report(block).graphs[0].replaced["padding left out"] == 1
    unpadded, ones = inputs(3, 6, padded=0)
    torch.testing.assert_close(block(unpadded, ones), block.forward.original(unpadded, ones), rtol=1e-5, atol=1e-5)


class Leaky(Block):
    """Its tokens see the mean over the whole length, padding and all."""

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return super().forward(x, attention_mask) + super().forward(x, attention_mask).mean(1, keepdim=True)


def test_padding_that_tokens_depend_on_is_computed() -> None:
    torch.manual_seed(0)
    leaky = Leaky().eval()
    x, mask = inputs(4, 9, padded=0)  # nothing in this call tells the difference
    paceline.optimize(leaky, level="fast")
    leaky(x, mask)
    x, mask = inputs(4, 9, padded=5)
    torch.testing.assert_close(leaky(x, mask), leaky.forward.original(x, mask), rtol=1e-5, atol=1e-5)
    assert any(reason.startswith("padding is computed") for reason in report(leaky).graphs[0].left)


class Causal(Block):
    """Its tokens see all before them, padding too; the mask is for its caller."""

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch, length = attention_mask.shape
        q, k, v = (
            part(x).view(batch, length, self.heads, -1).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.first(x + self.out(y.transpose(1, 2).flatten(2))), attention_mask.sum(1)


def test_causal_attention_that_does_not_mask_padding_computes_it() -> None:
    """What is masked at a text's end, as the first call has it, tells no difference."""
    torch.manual_seed(0)
    causal = Causal().eval()
    x, mask = inputs(4, 9)
    paceline.optimize(causal, level="fast")
    causal(x, mask)
    found, wanted = causal(x, mask.flip(1))[0], causal.forward.original(x, mask.flip(1))[0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    (graph,) = report(causal).graphs
    assert graph.replaced["heads taken along"] == 1
    assert not graph.replaced["padding left out"]


def test_stages_are_measured_by_pass(block: Block) -> None:
    paceline.optimize(block)
    stages = measure_stages(block, *inputs(2, 7), repeats=2)
    names = [stage.name for stage in stages]
    assert names[:2] == ["the model's own forward", "as captured"]
    assert names[-1] == "called through the model"
    assert {"attention", "qkv", "cpu linear"} <= set(names)
    assert "norms" not in names  # which finds nothing here
    for stage in stages:
        assert stage.milliseconds > 0
        assert stage.error is None or stage.error < 1e-5


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_quantised_weights_on_request(quantize: str) -> None:
    torch.manual_seed(0)
    wide = Block(width=64).eval()
    x, mask = torch.randn(2, 7, 64), torch.ones(2, 7, dtype=torch.long)
    with torch.no_grad():
        wanted = wide(x, mask)
    paceline.optimize(wide, quantize=quantize)
    wide(x, mask)
    found = wide(x, mask)
    (graph,) = report(wide).graphs
    assert graph.replaced[f"{quantize} linear"] == 4  # queries, keys and values are one
    assert graph.error is not None
    assert 1e-4 < graph.error < 0.1
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 0.1
    with pytest.raises(UsageError, match="quantize"):
        paceline.optimize(wide, quantize="int3")


def test_a_weight_is_copied_once(block: Block) -> None:
    """The joined weight of queries, keys and values goes where it was packed."""
    paceline.optimize(block)
    block(*inputs(2, 7))
    (graph,) = report(block).graphs
    linears = (block.query, block.key, block.value, block.out, block.up, block.down)
    joined_biases = sum(part.bias.nbytes for part in linears[:3])
    assert graph.copied_bytes == sum(part.weight.nbytes for part in linears) + joined_biases
    ((captured, given),) = block.forward.record(inputs(2, 7), {})
    del given
    held = [value for name, value in vars(captured._run.__self__).items() if name.startswith("constant_")]
    assert sum("joined_weight" in name for name in vars(captured._run.__self__)) == 0
    assert len(held) == len([node for node in captured._run.__self__.graph.nodes if node.op == "get_attr"])


def test_graphs_of_one_model_share_their_copies(block: Block) -> None:
    paceline.optimize(block)
    held = []
    for shape in ((2, 7), (1, 5)):
        block(*inputs(*shape))
        ((captured, _),) = block.forward.record(inputs(*shape), {})
        module = captured._run.__self__
        held.append({id(value) for name, value in vars(module).items() if name.endswith("packed")})
    assert len(held[0]) == 4
    assert held[0] == held[1]
    with torch.no_grad():
        block.up.weight.mul_(2)
    torch.testing.assert_close(block(*inputs(2, 7)), block.forward.original(*inputs(2, 7)), rtol=1e-5, atol=1e-5)
