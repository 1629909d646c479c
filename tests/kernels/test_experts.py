"""A mixture of experts through Triton's kernels, in the interpreter where there is no GPU, against its plain twin."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from paceline import formats
from paceline.kernels.experts import (
    Experts,
    experts_refusal,
    experts_shape_refusal,
    group_pairs,
    group_pairs_ref,
    group_rows,
    mixture,
    most_groups,
    route_tokens,
    stack_planes,
)

pytest.importorskip("triton", reason="the kernels are Triton's")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []  # so that `make test-gpu` has them
DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random_experts(
    kind: str, number: int, hidden: int, inner: int, dtype: torch.dtype
) -> tuple[Experts, list[tuple[torch.Tensor, torch.Tensor]]]:
    """And the values of each expert's gate_up and down, in float32."""

    def weights(rows: int, columns: int) -> list[formats.Weight]:
        # On a GPU's layout wherever the test runs: the CPU's own are no planes.
        made = []
        for _ in range(number):
            values = (torch.randn(rows, columns) * columns**-0.5).to(dtype)
            if kind == "dense":
                made.append(formats.dense.DenseWeight(values))
            elif kind == "int4":
                made.append(int4_weight(values))
            else:
                made.append(formats.pack(values, kind, dtype=dtype, device="cpu"))
        return made

    up, down = weights(2 * inner, hidden), weights(hidden, inner)
    experts = Experts(*(stack_planes([w.planes for w in part]) for part in (up, down)), "silu")
    moved = [
        type(p)(p.format, p.shape, p.values.to(DEVICE), None if p.scale is None else p.scale.to(DEVICE), p.group)
        for p in (experts.gate_up, experts.down)
    ]
    values = [(a.unpack().float().to(DEVICE), b.unpack().float().to(DEVICE)) for a, b in zip(up, down, strict=True)]
    return Experts(*moved, "silu"), values


def int4_weight(values: torch.Tensor) -> formats.Weight:
    group = formats.int4.group_size_for(values.shape[1])
    q, scale_offset = formats.int4.quantize(values, group)
    words = formats.int4.pack_words(q, group)
    return formats.int4.Int4Weight(words, scale_offset, group, tuple(values.shape), values.dtype)


def plain(x_TD, router_ED, values, active, normalize, residual_TD, experts_TA, weights_TA):
    """As layers/moe.py computes it, over the same choice of experts."""
    rows = []
    for t in range(x_TD.shape[0]):
        answers = []
        for e in experts_TA[t].tolist():
            gate, up = (x_TD[t : t + 1] @ values[e][0].to(x_TD.dtype).T).chunk(2, dim=1)
            answers.append((torch.nn.functional.silu(gate) * up) @ values[e][1].to(x_TD.dtype).T)
        rows.append((torch.cat(answers) * weights_TA[t, :, None].to(x_TD.dtype)).sum(0))
    y_TD = torch.stack(rows)
    return y_TD if residual_TD is None else y_TD + residual_TD


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "tokens", "number", "active", "hidden", "inner"),
    [
        *((kind, 1, 5, 2, 72, 40) for kind in ("dense", "fp8", "int4")),
        *((kind, 7, 3, 2, 72, 40) for kind in ("dense", "int8")),
        *((kind, 20, 4, 3, 64, 136) for kind in ("int8", "fp8", "int4")),
    ],
)
def test_a_mixture_is_as_exact_as_plain_torch(kind, tokens, number, active, hidden, inner, dtype):
    experts, values = random_experts(kind, number, hidden, inner, dtype)
    router = torch.randn(number, hidden, device=DEVICE).to(dtype)
    x, residual = (torch.randn(tokens, 2 * hidden, device=DEVICE).to(dtype)[:, :hidden] for _ in range(2))
    chosen, weights = route_tokens(x, router, active, normalize=True)
    y = mixture(x, router, experts, active=active, normalize=True, residual_TD=residual)
    wide = plain(x.float(), router.float(), values, active, True, residual.float(), chosen, weights)
    narrow = plain(x, router, values, active, True, residual, chosen, weights)
    assert y.dtype == dtype
    error, allowed = (y.float() - wide).norm(), (narrow.float() - wide).norm()
    assert error <= 2 * allowed, f"{error / wide.norm():.2e} of it wrong, plain torch {allowed / wide.norm():.2e}"
    again = mixture(x, router, experts, active=active, normalize=True, residual_TD=residual)
    assert torch.equal(y, again)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("experts", "active"), [(5, 2), (8, 1), (33, 8)])
def test_tokens_go_where_torch_sends_them(experts: int, active: int, normalize: bool) -> None:
    x, router = torch.randn(6, 300, device=DEVICE).half(), torch.randn(experts, 300, device=DEVICE).half()
    chosen, weights = route_tokens(x, router, active, normalize=normalize)
    probs = torch.nn.functional.linear(x, router).softmax(-1, dtype=torch.float32)
    expected_weights, expected = probs.topk(active, dim=-1)
    if normalize:
        expected_weights = expected_weights / expected_weights.sum(-1, keepdim=True)
    assert torch.equal(chosen.long(), expected)
    torch.testing.assert_close(weights, expected_weights, rtol=2e-2, atol=1e-6)  # scores rounded to float16


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes by NumPy
def test_of_equal_scores_the_first_wins_and_scores_that_are_nan_reach_experts_that_exist() -> None:
    router = torch.ones(5, 32, device=DEVICE).half()
    x = torch.ones(2, 32, device=DEVICE).half()
    x[1] = float("nan")
    chosen, weights = route_tokens(x, router, 3, normalize=True)
    assert chosen[0].tolist() == [0, 1, 2]
    torch.testing.assert_close(weights[0], torch.full((3,), 1 / 3, device=DEVICE))
    assert ((chosen[1] >= 0) & (chosen[1] < 5)).all()


@pytest.mark.parametrize(
    ("pairs", "experts", "rows"), [(1, 4, 16), (6, 3, 16), (150, 5, 16), (130, 40, 16), (200, 2, 64)]
)
def test_groups_hold_every_pair_once_by_expert_and_in_order(pairs: int, experts: int, rows: int) -> None:
    expert_P = torch.randint(0, experts, (pairs,), dtype=torch.int32, device=DEVICE)
    expert_P[: pairs // 2] = experts - 1  # one of them has most
    for groups in (group_pairs(expert_P, experts, rows), group_pairs_ref(expert_P, experts, rows)):
        assert groups.pair_GM.shape == (most_groups(pairs, experts, rows), rows)
        seen = []
        for expert, members in zip(groups.expert_G.tolist(), groups.pair_GM.tolist(), strict=True):
            held = [pair for pair in members if pair >= 0]
            assert members == held + [-1] * (rows - len(held))
            assert (expert < 0) == (not held)
            assert all(int(expert_P[pair]) == expert for pair in held)
            seen += [(expert, pair) for pair in held]
        assert len(seen) == pairs
        assert all(before < after for before, after in pairwise(seen))


def test_no_choice_of_experts_needs_more_groups_than_are_launched() -> None:
    for pairs in range(1, 40):
        for experts in range(1, 6):
            worst = max(sum(-(-count // 4) for count in split) for split in compositions(pairs, min(pairs, experts)))
            assert worst <= most_groups(pairs, experts, 4)


def compositions(total: int, parts: int) -> list[list[int]]:
    """The worst are near those in which all but one expert have one pair more than whole groups."""
    found = [[total]]
    for used in range(1, parts + 1):
        for each in (1, 5, 9):
            rest = total - each * (used - 1)
            if rest >= 0:
                found.append([each] * (used - 1) + [rest])
    return found


def test_a_group_takes_twice_the_mean() -> None:
    assert [group_rows(*of) for of in [(2, 8), (128, 8), (512, 128), (8192, 8)]] == [16, 32, 16, 128]


def test_no_tokens_give_none() -> None:
    experts, _ = random_experts("dense", 2, 32, 16, torch.float16)
    x, router = torch.empty(0, 32, device=DEVICE).half(), torch.zeros(2, 32, device=DEVICE).half()
    assert mixture(x, router, experts, active=1, normalize=True).shape == (0, 32)


def test_refusals() -> None:
    experts, _ = random_experts("dense", 2, 32, 16, torch.float16)
    assert experts_shape_refusal(torch.zeros(1, 32).half(), experts) is None
    assert experts_refusal(torch.zeros(1, 32).half(), experts) == "device is cpu"
    assert experts_shape_refusal(torch.zeros(1, 32), experts) == "dtype is torch.float32"
    assert "weight is torch.float16" in (experts_shape_refusal(torch.zeros(1, 32).bfloat16(), experts) or "")
    assert experts_shape_refusal(torch.zeros(32, 2).half().T, experts) == "a row of x has gaps"


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_a_mixture_in_a_graph_follows_what_its_tokens_choose() -> None:
    experts, _ = random_experts("int8", 8, 256, 128, torch.bfloat16)
    router = torch.randn(8, 256, device="cuda").bfloat16()
    for tokens in (1, 16):
        x = torch.randn(tokens, 256, device="cuda").bfloat16()
        mixture(x, router, experts, active=2, normalize=True)  # compiles
        try:
            torch.cuda.set_sync_debug_mode("error")
            mixture(x, router, experts, active=2, normalize=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = mixture(x, router, experts, active=2, normalize=True)
        for _ in range(3):
            x.copy_(torch.randn(tokens, 256, device="cuda"))
            graph.replay()
            assert torch.equal(y, mixture(x, router, experts, active=2, normalize=True))
