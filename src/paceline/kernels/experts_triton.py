# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
"""What a mixture of experts does beside its products: the Triton side of kernels/experts.py.

Shapes: T tokens, D hidden size, E experts, A active experts a token, P = T * A pairs of a token and an expert, G groups
of M pairs of one expert.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def route_kernel(
    x_ptr,  # [T, D], rows x_stride apart
    router_ptr,  # [E, D]
    expert_ptr,  # int32 [T, A]
    weight_ptr,  # float32 [T, A]
    x_stride,
    D: tl.constexpr,
    E: tl.constexpr,
    A: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,  # E padded to a power of two
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program has a token: its scores, rounded to x's dtype as a product of that dtype is, their softmax in float32,
    and the A likeliest, of equal ones the first."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tok = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    sums = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    for start in tl.range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + tok.to(tl.int64) * x_stride + cols, mask=cols < D, other=0.0).to(tl.float32)
        inside = (experts < E)[:, None] & (cols < D)[None, :]
        w = tl.load(router_ptr + experts[:, None] * D + cols[None, :], mask=inside, other=0.0)
        sums += w.to(tl.float32) * x[None, :]
    scores = tl.sum(sums, 1).to(x_ptr.dtype.element_ty).to(tl.float32)
    scores = tl.where(experts < E, scores, -float("inf"))
    probs = tl.exp(scores - tl.max(scores, 0))
    probs = probs / tl.sum(probs, 0)
    left = tl.where(experts < E, probs, -1.0)
    total = 1.0
    if NORMALIZE:
        total = 0.0
        for _ in tl.static_range(A):
            best = tl.minimum(tl.argmax(left, 0), E - 1)
            total += tl.max(left, 0)
            left = tl.where(experts == best, -1.0, left)
        left = tl.where(experts < E, probs, -1.0)
    for place in tl.static_range(A):
        best = tl.minimum(tl.argmax(left, 0), E - 1)  # of scores that are NaN, too, one that there is
        tl.store(expert_ptr + tok * A + place, best)
        tl.store(weight_ptr + tok * A + place, tl.max(left, 0) / total)
        left = tl.where(experts == best, -1.0, left)


@triton.jit(do_not_specialize=["P", "G"])
def group_kernel(
    expert_ptr,  # int32 [P]
    group_ptr,  # int32 [G]: the expert of each group, -1 for none
    row_ptr,  # int32 [G, M]: the pairs of each group, -1 for none
    P,
    G,
    M: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,  # pairs, or groups, at once
    PDL: tl.constexpr,
):
    """One program: counts each expert's pairs, gives it whole groups, and puts its pairs there in their order."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    experts = tl.arange(0, BLOCK_E)[None, :]
    many = tl.arange(0, BLOCK)
    counts = tl.zeros([1, BLOCK_E], tl.int32)
    for start in tl.range(0, P, BLOCK):
        expert = tl.load(expert_ptr + start + many, mask=start + many < P, other=-1)
        counts += tl.sum((expert[:, None] == experts).to(tl.int32), 0)[None, :]
    groups = (counts + M - 1) // M
    ends = tl.cumsum(groups, 1)
    for start in tl.range(0, G, BLOCK):
        group = start + many
        expert = tl.sum((ends <= group[:, None]).to(tl.int32), 1)
        tl.store(group_ptr + group, tl.where(expert < BLOCK_E, expert, -1), mask=group < G)
    for start in tl.range(0, G * M, BLOCK):
        tl.store(row_ptr + start + many, tl.full([BLOCK], -1, tl.int32), mask=start + many < G * M)
    tl.debug_barrier()  # other threads write there now
    places = (ends - groups) * M
    for start in tl.range(0, P, BLOCK):
        pair = start + many
        expert = tl.load(expert_ptr + pair, mask=pair < P, other=-1)
        mine = (expert[:, None] == experts).to(tl.int32)
        place = tl.sum(mine * (places + tl.cumsum(mine, 0) - mine), 1)
        tl.store(row_ptr + place, pair, mask=pair < P)
        places += tl.sum(mine, 0)[None, :]


@triton.jit(do_not_specialize=["P"])
def mix_kernel(
    parts_ptr,  # [SPLIT, P, D]: the experts' answers, or the parts of them that are added first
    weight_ptr,  # float32 [T, A]
    residual_ptr,  # [T, D], rows residual_stride apart; None: no residual
    y_ptr,  # [T, D]
    P,
    residual_stride,
    D: tl.constexpr,
    A: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Each token's answers in the order of its choices, weighted, plus the residual."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tok = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = cols < D
    acc = tl.zeros([BLOCK], tl.float32)
    for place in tl.static_range(A):
        answer = tl.zeros([BLOCK], tl.float32)
        for part in tl.static_range(SPLIT):
            at = (part * P + tok * A + place).to(tl.int64) * D + cols
            answer += tl.load(parts_ptr + at, mask=live, other=0.0).to(tl.float32)
        acc += answer * tl.load(weight_ptr + tok * A + place)
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + tok.to(tl.int64) * residual_stride + cols, mask=live, other=0.0).to(tl.float32)
    tl.store(y_ptr + tok.to(tl.int64) * D + cols, acc.to(y_ptr.dtype.element_ty), mask=live)
