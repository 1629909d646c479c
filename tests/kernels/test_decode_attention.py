"""The split decode attention against its twin; without a GPU in Triton's interpreter, and so in float32 and float16.

Importing the kernels is each test's business, since Triton is optional: the fixture `triton_device` comes first.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from paceline.inputs import KVLayer
from paceline.kernels.alibi import alibi_slopes
from paceline.kernels.attention import paged_attention_ref

pytest.importorskip("triton")
from paceline.kernels import decode_attention as module
from paceline.kernels import gpu as gpu_module
from paceline.kernels.decode_attention import (
    DecodeLaunch,
    decode_attention,
    decode_refusal,
    default_launch,
    fused_refusal,
    make_counts,
    rope_and_attend,
)
from paceline.kernels.gpu import GPU
from paceline.kernels.rope_kv import QKNorm, rope_and_write_kv

SMALL = DecodeLaunch(splits=3, keys_a_tile=16, tiles_a_split=1, warps=2, stages=2, prefetch=1, dependent=False)


def run(batch, *, scale=0.3, launch=SMALL, window=None, soft_cap=None, slopes_H=None, lengths=None):
    """decode_attention of a batch from make_batch, and the reference's answer in the batch's own dtype."""
    metadata = batch.metadata
    seq_lens = torch.tensor(metadata.seq_lens if lengths is None else lengths, dtype=torch.int32)
    found = decode_attention(
        batch.q_THD,
        batch.kv,
        metadata.groups[0].block_tables_RB,
        seq_lens.to(batch.q_THD.device),
        block_size=metadata.block_size,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        slopes_H=slopes_H,
        launch=launch,
    )
    expected = paged_attention_ref(batch.q_THD, batch.kv, metadata, scale=scale, soft_cap=soft_cap, slopes_H=slopes_H)
    return found, expected


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("lengths", [[17], [1, 70, 16, 33, 5]], ids=["one", "five"])
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize(("soft_cap", "alibi"), [(None, False), (2.0, False), (None, True), (2.0, True)])
def test_equals_the_reference(make_batch, triton_device, lengths, window, soft_cap, alibi):
    """`padded=False`: slots that no request owns hold NaN, and a block's last slots too."""
    batch = make_batch([(n, 1) for n in lengths], dim=16, window=window, padded=False, device=triton_device)
    slopes = torch.tensor(alibi_slopes(4), device=triton_device) if alibi else None
    assert_close(*run(batch, window=window, soft_cap=soft_cap, slopes_H=slopes))


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 3), (6, 1), (36, 1)])
@pytest.mark.parametrize("queries", [1, 4])
def test_head_groupings_and_drafts(make_batch, triton_device, heads, kv_heads, queries):
    """MHA, GQA and MQA; 6 * 4 rows are a tile and a half, 36 * 4 nine tiles."""
    batch = make_batch(
        [(37, queries), (4, queries)],
        heads=heads,
        kv_heads=kv_heads,
        dim=16,
        padded=False,
        device=triton_device,
    )
    assert_close(*run(batch))


@pytest.mark.parametrize("window", [1, 6, 30])
def test_drafts_in_a_window(make_batch, triton_device, window):
    """The window of the last query starts later than the first one's: whole tiles are hidden from some rows."""
    batch = make_batch([(50, 5), (18, 5), (5, 5)], dim=16, window=window, padded=False, device=triton_device)
    slopes = torch.tensor(alibi_slopes(4), device=triton_device)
    assert_close(*run(batch, window=window, slopes_H=slopes))


def test_blocks_that_a_window_has_passed_are_not_read(make_batch, triton_device):
    """The window of 80 tokens' last begins at 75, in a tile that begins at 64: blocks 16 and 17 are given back."""
    batch = make_batch([(80, 1)], dim=16, window=5, padded=False, device=triton_device)
    tables = batch.metadata.groups[0].block_tables_RB
    tables[0, :18] = 0
    assert batch.kv.v_HSD[:, :4].isnan().all()
    assert_close(*run(batch, window=5))


@pytest.mark.parametrize("dim", [8, 16, 24, 80, 256])
@pytest.mark.parametrize("block_size", [4, 16])
def test_head_sizes_and_block_sizes(make_batch, triton_device, dim, block_size):
    batch = make_batch([(35, 1), (2, 1)], dim=dim, block_size=block_size, padded=False, device=triton_device)
    assert_close(*run(batch, scale=dim**-0.5))


def test_default_launch(make_batch, triton_device):
    batch = make_batch([(300, 1), (70, 1)], dim=64, padded=False, device=triton_device)
    assert_close(*run(batch, launch=None))


def test_queries_inside_a_fused_projection(make_batch, triton_device):
    batch = make_batch([(20, 1), (7, 1)], dim=16, device=triton_device)
    wide = torch.randn(2, 8, 16, device=triton_device)
    wide[:, :4] = batch.q_THD
    found, expected = run(type(batch)(wide[:, :4], batch.kv, batch.metadata))
    assert found.is_contiguous()
    assert_close(found, expected)


def test_unused_rows_of_a_captured_step_give_zeros(make_batch, triton_device):
    batch = make_batch([(20, 1), (7, 1), (9, 1)], dim=16, padded=False, device=triton_device)
    found, expected = run(batch, lengths=[20, 0, 9])
    assert not found[1].any()
    assert_close(found[[0, 2]], expected[[0, 2]])


def test_neighbours_change_nothing(make_batch, triton_device):
    """To the bit: a request's splits follow from its own length."""
    batch = make_batch([(60, 1), (7, 1), (33, 1)], dim=16, device=triton_device)
    together, _ = run(batch)
    tables = batch.metadata.groups[0].block_tables_RB
    for r, length in enumerate(batch.metadata.seq_lens):
        alone = decode_attention(
            batch.q_THD[r : r + 1],
            batch.kv,
            tables[r : r + 1],
            torch.tensor([length], dtype=torch.int32, device=triton_device),
            block_size=4,
            scale=0.3,
            launch=SMALL,
        )
        assert torch.equal(alone[0], together[r])


def test_nan_of_a_request_stays_its_own(make_batch, triton_device):
    batch = make_batch([(20, 1), (7, 1)], dim=16, padded=False, device=triton_device)
    slot = int(batch.metadata.groups[0].block_tables_RB[1, 0]) * 4
    batch.kv.v_HSD[:, slot] = float("nan")
    found, expected = run(batch)
    assert found[1].isnan().all()
    assert_close(found[0], expected[0])


def test_large_scores_do_not_overflow(make_batch, triton_device):
    batch = make_batch([(40, 1)], dim=16, device=triton_device)
    assert_close(*run(batch, scale=1e4))


def test_a_soft_cap_keeps_the_digits_of_small_scores(make_batch, triton_device):
    """A cap of 1,000 hardly bends scores around 1, and must not round them either: 1 - 2 / (1 + e^2x) is off by
    6e-8 of the cap, 6e-5 in the score."""
    batch = make_batch([(40, 1)], dim=16, device=triton_device)
    found, expected = run(batch, soft_cap=1000.0, scale=0.25)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-6)


def errors(batch, launch, scale):
    """The norms of our error and of plain torch's in the same dtype, both against float64: what float32 loses shows
    only there."""
    metadata = batch.metadata
    found, _ = run(batch, launch=launch, scale=scale)
    exact, plain = torch.empty_like(batch.q_THD, dtype=torch.float64), torch.empty_like(batch.q_THD)
    group, size = batch.q_THD.shape[1] // batch.kv.k_HSD.shape[0], metadata.block_size
    for r, length in enumerate(metadata.seq_lens):
        first, end = metadata.query_starts[r], metadata.query_starts[r + 1]
        table = metadata.groups[0].block_tables_RB[r].tolist()
        slots = [table[p // size] * size + p % size for p in range(length)]
        k, v = (x[:, slots].repeat_interleave(group, 0) for x in (batch.kv.k_HSD, batch.kv.v_HSD))
        scores = (batch.q_THD[first:end].transpose(0, 1) * scale) @ k.transpose(1, 2)
        hidden = torch.ones(end - first, length, dtype=torch.bool, device=k.device).triu(length - (end - first) + 1)
        probs = torch.softmax(scores.float().masked_fill(hidden, float("-inf")), -1).to(v.dtype)
        plain[first:end] = (probs @ v).transpose(0, 1)
        scores = (batch.q_THD[first:end].double().transpose(0, 1) * scale) @ k.double().transpose(1, 2)
        probs = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1)
        exact[first:end] = (probs @ v.double()).transpose(0, 1)
    assert found.dtype == batch.q_THD.dtype
    return (found.double() - exact).norm(), (plain.double() - exact).norm()


@pytest.mark.parametrize("requests", [[(1, 1), (70, 1), (33, 1)], [(20, 3), (6, 3)]])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_error_is_at_most_twice_that_of_plain_torch(make_batch, triton_device, requests, dtype):
    batch = make_batch(requests, dim=32, dtype=dtype, padded=False, device=triton_device)
    ours, plain = errors(batch, SMALL, 0.3)
    assert ours <= 2 * plain


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(32, 8, 128), (9, 3, 64), (71, 1, 64), (8, 8, 80), (16, 2, 256)]
)
def test_default_launch_on_a_gpu(make_batch, dtype, queries, heads, kv_heads, dim):
    batch = make_batch(
        [(1700, queries), (33, queries), (5, queries)],
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        block_size=16,
        dtype=dtype,
        padded=False,
        device="cuda",
    )
    ours, plain = errors(batch, None, dim**-0.5)
    assert ours <= 2 * plain


def test_nothing_to_do(make_batch, triton_device):
    batch = make_batch([(5, 1)], dim=16, device=triton_device)
    empty = torch.empty(0, dtype=torch.int32, device=triton_device)
    out = decode_attention(batch.q_THD[:0], batch.kv, empty.view(0, 1), empty, block_size=4, scale=1.0)
    assert out.shape == (0, 4, 16)


def test_unequal_queries_are_refused(make_batch, triton_device):
    batch = make_batch([(5, 2), (6, 1)], dim=16, device=triton_device)
    with pytest.raises(ValueError, match="3 tokens are not equally many for each of 2 requests"):
        run(batch)


def test_refusals_say_why(monkeypatch):
    monkeypatch.setattr(gpu_module, "gpu", lambda device: GPU("NVIDIA H100", 132, (9, 0)))
    cuda = torch.device("cuda")
    assert decode_refusal(256, torch.bfloat16, torch.device("cpu")) == "device is cpu"
    assert decode_refusal(256, torch.bfloat16, cuda) is None
    assert decode_refusal(257, torch.bfloat16, cuda) == "heads of 257 are larger than 256"
    assert decode_refusal(64, torch.float8_e4m3fn, cuda) == "dtype is torch.float8_e4m3fn"
    together = QKNorm("rms", 1e-6, torch.ones(4 * 64), torch.ones(2 * 64))
    assert fused_refusal(64, torch.bfloat16, cuda, 8) is None
    assert fused_refusal(64, torch.bfloat16, cuda, 9) == "9 queries a request are more than 8"
    assert fused_refusal(64, torch.bfloat16, cuda, 1, together) == "all heads of a token are normed together"
    assert fused_refusal(300, torch.bfloat16, cuda) == "heads of 300 are larger than 256"


@pytest.mark.parametrize(
    ("rows", "kv_heads", "dim", "itemsize", "expected"),
    [
        (4, 8, 128, 2, (16, 64, 3)),  # Llama-3.1-8B: 128 of 132 multiprocessors, splits of 96 KiB
        (3, 3, 64, 2, (32, 128, 3)),
        (1, 32, 128, 2, (4, 64, 3)),
        (71, 1, 64, 2, (16, 128, 3)),  # two tiles of rows, 16 KiB each to merge
        (4, 200, 128, 2, (1, 64, 3)),
        (8, 2, 256, 4, (32, 16, 3)),
    ],
)
def test_as_many_programs_as_multiprocessors_and_no_split_below_96_kib(
    monkeypatch, rows, kv_heads, dim, itemsize, expected
):
    monkeypatch.setattr(module, "gpu", lambda device: GPU("NVIDIA H100", 132, (9, 0)))
    launch = default_launch(rows, kv_heads, dim, itemsize, torch.device("cuda"))
    assert (launch.splits, launch.keys_a_tile, launch.tiles_a_split) == expected


def fused_and_stepwise(
    batch, *, rotated, norm=None, window=None, soft_cap=None, alibi=False, launch=SMALL, counts=None
):
    """rope_and_attend, and rope_and_write_kv with decode_attention after it; each with the cache it left. What the
    cache holds at the new tokens' slots beforehand must not matter: NaN."""
    metadata, (heads, dim), device = batch.metadata, batch.q_THD.shape[1:], batch.q_THD.device
    tokens, kv_heads, dtype = batch.q_THD.shape[0], batch.kv.k_HSD.shape[0], batch.q_THD.dtype
    slots = metadata.groups[0].slot_mapping_T
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim, device=device).to(dtype)
    turn = torch.rand(tokens, rotated // 2, device=device) * 6
    cos, sin = torch.cat((turn.cos(), turn.cos()), -1).to(dtype), torch.cat((-turn.sin(), turn.sin()), -1).to(dtype)
    rotary = (cos, sin) if rotated else None
    if norm is not None:
        norm = QKNorm(norm, 0.01, *torch.randn(2, dim, device=device).to(dtype))
    caches = [KVLayer(batch.kv.k_HSD.clone(), batch.kv.v_HSD.clone(), 0) for _ in range(2)]
    for cache in caches:
        cache.k_HSD[:, slots] = cache.v_HSD[:, slots] = float("nan")
    lengths = torch.tensor(metadata.seq_lens, dtype=torch.int32, device=device)
    options = {
        "block_size": metadata.block_size,
        "scale": 0.3,
        "window": window,
        "soft_cap": soft_cap,
        "slopes_H": torch.tensor(alibi_slopes(heads), device=device) if alibi else None,
        "launch": launch,
        "counts": counts,
    }
    where = (metadata.groups[0].block_tables_RB, lengths)
    fused = rope_and_attend(qkv, rotary, caches[0], slots, *where, norm=norm, **options)
    q = rope_and_write_kv(qkv, rotary, caches[1], slots, norm)
    stepwise = decode_attention(q, caches[1], *where, **options)
    for name, exact in (("k_HSD", False), ("v_HSD", True)):
        written, expected = (getattr(cache, name)[:, slots] for cache in caches)
        assert_near(written, expected, dtype, exact=exact)
    return fused, stepwise


def assert_near(found, expected, dtype, *, exact=False):
    tolerance = 0 if exact else {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize(("norm", "rotated"), [(None, 12), ("rms", 12), ("layer", 6), (None, 0)])
@pytest.mark.parametrize(("window", "soft_cap", "alibi"), [(None, None, False), (2, 2.0, True)])
def test_turning_and_writing_in_the_same_kernel(
    make_batch, triton_device, queries, norm, rotated, window, soft_cap, alibi
):
    """Lengths of nothing but new tokens, of a few tiles and of several splits; a window shorter than the drafts."""
    batch = make_batch(
        [(queries, queries), (40, queries), (70, queries)], dim=12, window=window, padded=False, device=triton_device
    )
    fused, stepwise = fused_and_stepwise(
        batch, rotated=rotated, norm=norm, window=window, soft_cap=soft_cap, alibi=alibi
    )
    assert_near(fused, stepwise, torch.float32)


def test_counts_are_zero_again_and_may_be_shared(make_batch, triton_device):
    counts = make_counts(2, triton_device)
    for lengths in ([70, 3], [50, 60]):
        batch = make_batch([(n, 1) for n in lengths], dim=16, padded=False, device=triton_device)
        fused, stepwise = fused_and_stepwise(batch, rotated=16, counts=counts)
        assert_near(fused, stepwise, torch.float32)
        assert not counts.any()


def test_an_unused_row_is_written_nowhere(make_batch, triton_device):
    batch = make_batch([(20, 1), (7, 1)], dim=16, padded=False, device=triton_device)
    before = batch.kv.k_HSD.clone()
    qkv = torch.randn(2, 8, 16, device=triton_device)
    lengths = torch.tensor([0, 0], dtype=torch.int32, device=triton_device)
    unused = torch.tensor([-1, -1], device=triton_device)
    out = rope_and_attend(
        qkv, None, batch.kv, unused, batch.metadata.groups[0].block_tables_RB, lengths,
        block_size=4, scale=1.0, launch=SMALL,
    )  # fmt: skip
    assert not out.any()
    torch.testing.assert_close(batch.kv.k_HSD, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (9, 3, 64), (71, 1, 64), (16, 2, 256)])
def test_turning_and_writing_in_the_same_kernel_on_a_gpu(make_batch, dtype, queries, heads, kv_heads, dim):
    """The same to the bit at every run: the order in which splits end does not matter."""
    batch = make_batch(
        [(1700, queries), (33, queries), (queries, queries), (5000, queries)],
        heads=heads, kv_heads=kv_heads, dim=dim, block_size=16, dtype=dtype, padded=False, device="cuda",
    )  # fmt: skip
    counts = make_counts(4, "cuda")
    torch.manual_seed(0)
    first, stepwise = fused_and_stepwise(batch, rotated=dim, norm="rms", launch=None, counts=counts)
    assert_near(first, stepwise, dtype)
    for _ in range(5):
        torch.manual_seed(0)
        again, _ = fused_and_stepwise(batch, rotated=dim, norm="rms", launch=None, counts=counts)
        assert torch.equal(again, first)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dependent", [False, True])
def test_in_a_graph_lengths_and_tables_may_change(dtype, dependent):
    """One capture, then other lengths, tables and keys: the replay must see them."""
    if dependent and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("dependent launches need compute capability 9")
    torch.manual_seed(0)
    cache = torch.randn(2, 8, 1025 * 16, 128, device="cuda", dtype=dtype)
    kv = KVLayer(cache[0], cache[1], 0)
    q = torch.randn(2, 32, 128, device="cuda", dtype=dtype)
    tables = torch.zeros(2, 512, device="cuda", dtype=torch.int32)
    lens = torch.ones(2, device="cuda", dtype=torch.int32)
    launch = replace(default_launch(4, 8, 128, 2, q.device), splits=33, dependent=dependent)

    def step():
        return decode_attention(q, kv, tables, lens, block_size=16, scale=0.09, launch=launch)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for lengths in ([8192, 700], [3, 0], [64, 65]):
        tables.copy_(torch.randperm(1024).view(2, 512) + 1)
        lens.copy_(torch.tensor(lengths))
        graph.replay()
        for r, length in enumerate(lengths):
            slots = (tables[r].long()[:, None] * 16 + torch.arange(16, device="cuda")).flatten()[:length]
            k, v = (x[:, slots].double().repeat_interleave(4, 0) for x in cache)
            probs = torch.softmax((k @ q[r].double()[:, :, None])[..., 0] * 0.09, -1)
            expected = (probs[:, None] @ v)[:, 0] if length else torch.zeros(32, 128, device="cuda").double()
            torch.testing.assert_close(out[r].double(), expected, rtol=2e-2, atol=4e-3)
