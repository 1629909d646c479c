"""Attention of ragged batches against its twins; without a GPU in Triton's interpreter, and so in float32 and float16.

Importing the kernels is each test's business, since Triton is optional: the fixture `triton_device` comes first.
"""

from __future__ import annotations

import pytest
import torch

from paceline.inputs import Ragged
from paceline.kernels import attention
from paceline.kernels.alibi import alibi_slopes
from paceline.kernels.attention import paged_attention_ref
from paceline.kernels.attention_plan import build_attention
from paceline.kernels.decode_attention import make_counts
from paceline.kernels.varlen_attention import (
    VarlenLaunch,
    default_launch,
    mixed_attention,
    varlen_attention,
    varlen_attention_plain,
)

SMALL = VarlenLaunch(rows_a_tile=16, keys_a_tile=16, warps=2, stages=2, dependent=False)
# A whole prompt, a chunk after a prefix, a decode, a chunk of several tiles, and drafts.
MIXED = [(17, 17), (44, 7), (33, 1), (30, 21), (7, 3)]


def make_ragged(metadata, device):
    starts, lens = (
        torch.tensor(x, dtype=torch.int32, device=device) for x in (metadata.query_starts, metadata.seq_lens)
    )
    return Ragged(starts, lens)


def run(batch, *, kernel=varlen_attention, scale=0.3, window=None, soft_cap=None, slopes_H=None, **options):
    metadata = batch.metadata
    return kernel(
        batch.q_THD,
        batch.kv,
        metadata.groups[0].block_tables_RB,
        make_ragged(metadata, batch.q_THD.device),
        block_size=metadata.block_size,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        slopes_H=slopes_H,
        **options,
    )


def kernels(device):
    """The kernel, with tiles that small contexts fill, and its plain twin."""
    return [
        lambda *args, **kwargs: varlen_attention(*args, launch=SMALL, **kwargs),
        varlen_attention_plain,
    ]


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)


def check(batch, device, *, scale=0.3, soft_cap=None, slopes_H=None, window=None):
    expected = paged_attention_ref(
        batch.q_THD, batch.kv, batch.metadata, scale=scale, soft_cap=soft_cap, slopes_H=slopes_H
    )
    for kernel in kernels(device):
        found = run(batch, kernel=kernel, scale=scale, soft_cap=soft_cap, slopes_H=slopes_H, window=window)
        assert_close(found, expected)


@pytest.mark.parametrize("window", [None, 1, 5, 24])
@pytest.mark.parametrize(("soft_cap", "alibi"), [(None, False), (2.0, True)])
def test_equals_the_reference(make_batch, triton_device, window, soft_cap, alibi):
    """`padded=False`: slots that no request owns hold NaN, and a block's last slots too."""
    batch = make_batch(MIXED, dim=16, window=window, padded=False, device=triton_device)
    slopes = torch.tensor(alibi_slopes(4), device=triton_device) if alibi else None
    check(batch, triton_device, soft_cap=soft_cap, slopes_H=slopes, window=window)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 2), (6, 1), (20, 1)])
def test_head_groupings(make_batch, triton_device, heads, kv_heads):
    """Groups of 3, 6 and 20: a tile of 16 rows cuts through a query's heads."""
    check(
        make_batch(MIXED[1:], heads=heads, kv_heads=kv_heads, dim=16, padded=False, device=triton_device), triton_device
    )


@pytest.mark.parametrize("dim", [8, 24, 32, 80, 256])
@pytest.mark.parametrize("block_size", [4, 32])
def test_head_sizes_and_block_sizes(make_batch, triton_device, dim, block_size):
    batch = make_batch([(35, 20), (2, 2)], dim=dim, block_size=block_size, padded=False, device=triton_device)
    check(batch, triton_device, scale=dim**-0.5)


def test_default_launch(make_batch, triton_device):
    batch = make_batch([(150, 100), (70, 1)], dim=64, padded=False, device=triton_device)
    assert_close(run(batch), paged_attention_ref(batch.q_THD, batch.kv, batch.metadata, scale=0.3))


def test_queries_inside_a_fused_projection(make_batch, triton_device):
    batch = make_batch(MIXED, dim=16, device=triton_device)
    wide = torch.randn(batch.q_THD.shape[0], 8, 16, device=triton_device)
    wide[:, :4] = batch.q_THD
    check(type(batch)(wide[:, :4], batch.kv, batch.metadata), triton_device)


def test_requests_without_queries(make_batch, triton_device):
    batch = make_batch([(9, 0), (20, 5), (4, 0), (6, 1), (3, 0)], dim=16, padded=False, device=triton_device)
    check(batch, triton_device)
    nothing = type(batch)(batch.q_THD[:0], batch.kv, batch.metadata)
    assert run(nothing).shape == (0, 4, 16)


def test_blocks_that_a_window_has_passed_are_not_read(make_batch, triton_device):
    """The first of 3 queries at 80 sees from 73 on, in a tile that begins at 64: blocks 0 to 17 are given back."""
    batch = make_batch([(80, 3)], dim=16, window=5, padded=False, device=triton_device)
    batch.metadata.groups[0].block_tables_RB[0, :18] = 0
    assert batch.kv.v_HSD[:, :4].isnan().all()
    check(batch, triton_device, window=5)


def test_nan_of_a_request_stays_its_own(make_batch, triton_device):
    batch = make_batch([(20, 6), (7, 2)], dim=16, padded=False, device=triton_device)
    expected = paged_attention_ref(batch.q_THD, batch.kv, batch.metadata, scale=0.3)
    batch.kv.v_HSD[:, int(batch.metadata.groups[0].block_tables_RB[1, 0]) * 4] = float("nan")
    for kernel in kernels(triton_device):
        found = run(batch, kernel=kernel)
        assert found[6:].isnan().all()
        assert_close(found[:6], expected[:6])


@pytest.mark.parametrize(
    ("requests", "decodes"),
    [([(33, 1), (5, 1), (60, 9), (17, 17), (8, 1)], 2), ([(60, 9), (33, 1)], 0), ([(60, 9)], 0)],
)
def test_decodes_first_go_through_their_own_kernel(make_batch, triton_device, requests, decodes):
    batch = make_batch(requests, dim=16, padded=False, device=triton_device)
    metadata = batch.metadata
    tables = batch.metadata.groups[0].block_tables_RB.tolist()
    step = build_attention(
        metadata.query_starts,
        metadata.seq_lens,
        [tables],
        [None],
        block_size=4,
        device=triton_device,
        on_device=True,
    )
    assert step.ragged.decodes == decodes
    found = mixed_attention(
        batch.q_THD, batch.kv, step.groups[0].block_tables_RB, step.ragged, counts=step.counts, block_size=4, scale=0.3
    )
    assert_close(found, paged_attention_ref(batch.q_THD, batch.kv, metadata, scale=0.3))


def test_unused_rows_of_a_captured_step_change_nothing(make_batch, triton_device):
    """As engine/prompt_step.py fills it up: decodes of length 0, prompts without tokens, and a last request of the
    tokens that are left over, whose keys are zeros."""
    batch = make_batch([(33, 1), (60, 9), (17, 17)], dim=16, padded=False, device=triton_device)
    expected = paged_attention_ref(batch.q_THD, batch.kv, batch.metadata, scale=0.3)
    given = batch.metadata.groups[0].block_tables_RB
    rows = [0, *range(3, 29)]  # of the step's tokens: two decodes, one of them unused and one that never was, then 30
    q_THD = torch.full((33, *batch.q_THD.shape[1:]), 7.0, device=triton_device)
    q_THD[rows] = batch.q_THD
    tables_RB = torch.zeros((7, given.shape[1]), dtype=torch.int32, device=triton_device)
    tables_RB[[0, 3, 4]] = given
    batch.kv.k_HSD[:, :4], batch.kv.v_HSD[:, :4] = 0.0, 0.0  # the null block
    starts, lens = [0, 1, 2, 3, 12, 29, 29, 33], [33, 0, 0, 60, 17, 0, 4]
    ragged = Ragged(*(torch.tensor(x, dtype=torch.int32, device=triton_device) for x in (starts, lens)), decodes=3)
    counts = make_counts(3, triton_device)
    found = mixed_attention(q_THD, batch.kv, tables_RB, ragged, counts=counts, block_size=4, scale=0.3)
    assert_close(found[rows], expected)
    assert (found[29:] == 0).all()  # so that nothing that is not a number goes on


def test_large_scores_do_not_overflow(make_batch, triton_device):
    check(make_batch([(40, 20)], dim=16, device=triton_device), triton_device, scale=1e4)


@pytest.mark.parametrize("window", [None, 20])
def test_neither_chunks_nor_neighbours_change_a_bit(make_batch, triton_device, window):
    """A prompt of 70 at once, beside others, and in chunks that begin anywhere: each query's sums have one order."""
    batch = make_batch([(33, 5), (70, 70), (41, 1)], dim=16, window=window, padded=False, device=triton_device)
    rows = slice(5, 75)
    table = batch.metadata.groups[0].block_tables_RB[1:2]
    for kernel in kernels(triton_device):
        whole = run(batch, kernel=kernel, window=window)[rows]
        for first, end in ((0, 1), (3, 4), (16, 33), (5, 69), (69, 70)):
            starts, lens = (torch.tensor(x, dtype=torch.int32, device=triton_device) for x in ([0, end - first], [end]))
            q_THD = batch.q_THD[rows][first:end]
            chunk = kernel(q_THD, batch.kv, table, Ragged(starts, lens), block_size=4, scale=0.3, window=window)
            assert torch.equal(chunk, whole[first:end])


def error_norms(batch, launch, scale):
    """Of our error and of plain torch's in the same dtype, both against float64."""
    metadata = batch.metadata
    found = run(batch, scale=scale, launch=launch)
    exact, plain = torch.empty_like(found, dtype=torch.float64), torch.empty_like(found)
    group, size = found.shape[1] // batch.kv.k_HSD.shape[0], metadata.block_size
    for r, length in enumerate(metadata.seq_lens):
        first, end = metadata.query_starts[r], metadata.query_starts[r + 1]
        table = metadata.groups[0].block_tables_RB[r].tolist()
        slots = [table[p // size] * size + p % size for p in range(length)]
        k, v = (x[:, slots].repeat_interleave(group, 0) for x in (batch.kv.k_HSD, batch.kv.v_HSD))
        hidden = torch.ones(end - first, length, dtype=torch.bool, device=k.device).triu(length - (end - first) + 1)
        q = batch.q_THD[first:end].transpose(0, 1)
        scores = (q * scale) @ k.transpose(1, 2)
        probs = torch.softmax(scores.float().masked_fill(hidden, -torch.inf), -1).to(v.dtype)
        plain[first:end] = (probs @ v).transpose(0, 1)
        scores = (q.double() * scale) @ k.double().transpose(1, 2)
        exact[first:end] = (torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ v.double()).transpose(0, 1)
    assert found.dtype == batch.q_THD.dtype
    return (found.double() - exact).norm(), (plain.double() - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_error_is_at_most_twice_that_of_plain_torch(make_batch, triton_device, dtype):
    batch = make_batch(MIXED, dim=32, dtype=dtype, padded=False, device=triton_device)
    ours, plain = error_norms(batch, SMALL, 0.3)
    assert ours <= 2 * plain


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(32, 8, 128), (9, 3, 64), (71, 1, 64), (8, 8, 80), (16, 2, 256), (4, 2, 32)]
)
def test_default_launch_on_a_gpu(make_batch, dtype, heads, kv_heads, dim):
    batch = make_batch(
        [(1700, 900), (300, 300), (33, 1), (700, 70)],
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        block_size=16,
        dtype=dtype,
        padded=False,
        device="cuda",
    )
    ours, plain = error_norms(batch, None, dim**-0.5)
    assert ours <= 2 * plain


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (9, 3, 64), (16, 2, 256)])
def test_chunks_change_no_bit_on_a_gpu(make_batch, dtype, heads, kv_heads, dim):
    options = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "block_size": 16, "dtype": dtype, "device": "cuda"}
    batch = make_batch([(777, 777)], padded=False, **options)
    whole, table = run(batch), batch.metadata.groups[0].block_tables_RB
    for first, size in ((0, 5), (5, 300), (305, 1), (306, 471), (776, 1)):
        starts, lens = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, size], [first + size]))
        q_THD = batch.q_THD[first : first + size]
        chunk = varlen_attention(q_THD, batch.kv, table, Ragged(starts, lens), block_size=16, scale=0.3)
        assert torch.equal(chunk, whole[first : first + size])


def test_launches_do_not_follow_the_batch_and_fill_the_registers():
    cpu = torch.device("cpu")
    assert default_launch(128, 2, cpu) == VarlenLaunch(128, 64, 8, 2, False)
    assert default_launch(256, 4, cpu).keys_a_tile == 16


def test_a_ragged_step_has_no_segments_and_runs_through_the_plain_twin(make_batch):
    batch = make_batch(MIXED, padded=False)
    metadata, tables = batch.metadata, batch.metadata.groups[0].block_tables_RB.tolist()
    ragged = build_attention(
        metadata.query_starts, metadata.seq_lens, [tables], [None], block_size=4, deterministic=True
    )
    assert ragged.lens_R is None
    assert ragged.ragged.decodes == 0
    assert not ragged.groups[0].segments
    found = attention.paged_attention(batch.q_THD, batch.kv, ragged, scale=0.3)
    assert torch.equal(found, run(batch, kernel=varlen_attention_plain))
