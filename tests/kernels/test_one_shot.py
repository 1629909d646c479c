"""The one-shot sum of several ranks, each in turn with what the others would have sent; without a GPU in Triton's
interpreter. tests/parallel/test_ranks_gpu.py runs it on two GPUs."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from paceline.kernels.one_shot import (
    BLOCK,
    LIMIT_BYTES,
    Inboxes,
    inbox_shape,
    num_programs,
    one_shot,
    one_shot_ref,
    size_refusal,
)

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def open_inboxes(ranks, device):
    own = [torch.zeros(inbox_shape(ranks), dtype=torch.int64, device=device) for _ in range(ranks)]
    peers = torch.tensor([one.data_ptr() for one in own], device=device)
    sums = [torch.zeros(num_programs(LIMIT_BYTES), dtype=torch.int32, device=device) for _ in range(ranks)]
    return [Inboxes(rank, own[rank], peers, sums[rank]) for rank in range(ranks)]


def packets(x, number):
    """What a rank sends of x: its words, each under the number of the sum, which is above 2**31 at last negative."""
    words = x.contiguous().view(-1).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    return (torch.tensor(number, device=x.device).to(torch.int32).to(torch.int64) << 32) | words


def deliver(inboxes, parts, number):
    """To rank 0, as the others would."""
    own = inboxes[0].own_2RC
    for rank in range(1, len(parts)):
        sent = packets(parts[rank], number)
        padded = -(-sent.shape[0] // BLOCK) * BLOCK
        own[number & 1, rank, :padded] = number << 32
        own[number & 1, rank, : sent.shape[0]] = sent


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_sends_its_part_and_adds_all_in_the_order_of_the_ranks(triton_device, dtype, ranks):
    inboxes = open_inboxes(ranks, triton_device)
    for number, size in enumerate((8, 2 * BLOCK + 6, 8, 40), start=1):
        torch.manual_seed(number)
        parts = [torch.randn(3, size, device=triton_device).to(dtype) for _ in range(ranks)]
        count = int(inboxes[0].sums[0]) + 1
        deliver(inboxes, parts, count)
        if size > BLOCK:  # programs that take part for the first time
            inboxes[0].sums.fill_(count - 1)
        found = one_shot(parts[0], inboxes[0])
        assert found.dtype == dtype
        # Triton's interpreter cuts a float32 off where it becomes a bfloat16; a GPU rounds it.
        rtol = 2.0**-7 if dtype == torch.bfloat16 and triton_device == "cpu" else 0
        torch.testing.assert_close(found, one_shot_ref(parts), rtol=rtol, atol=0)
        sent = packets(parts[0], count)
        for rank in range(1, ranks):
            assert torch.equal(inboxes[rank].own_2RC[count & 1, 0, : sent.shape[0]], sent)
            assert not inboxes[rank].own_2RC[:, 1:].any()


def test_a_program_counts_its_own_sums(triton_device):
    inboxes = open_inboxes(2, triton_device)
    small = [torch.ones(8, device=triton_device)] * 2
    for number in (1, 2, 3):
        deliver(inboxes, small, number)
        one_shot(small[0], inboxes[0])
    assert inboxes[0].sums.tolist()[:3] == [3, 0, 0]
    assert torch.equal(inboxes[1].own_2RC[1, 0, :8], packets(small[0], 3))
    assert torch.equal(inboxes[1].own_2RC[0, 0, :8], packets(small[0], 2))
    own = inboxes[0].own_2RC
    for number in (4, 5):
        large = [torch.randn(2 * BLOCK, device=triton_device) for _ in range(2)]
        own[number & 1, 1, :BLOCK] = packets(large[1][:BLOCK], number)
        own[(number - 3) & 1, 1, BLOCK : 2 * BLOCK] = packets(large[1][BLOCK:], number - 3)
        assert torch.equal(one_shot(large[0], inboxes[0]), one_shot_ref(large))
    assert inboxes[0].sums.tolist()[:3] == [5, 2, 0]


def test_numbers_go_round(triton_device):
    """64 sums a step and 300 steps a second reach 2**31 within two days."""
    inboxes = open_inboxes(2, triton_device)
    parts = [torch.randn(8, device=triton_device) for _ in range(2)]
    inboxes[0].sums.fill_(2**31 - 1)
    deliver(inboxes, parts, -(2**31))
    assert torch.equal(one_shot(parts[0], inboxes[0]), one_shot_ref(parts))
    assert int(inboxes[0].sums[0]) == -(2**31)


def test_what_belongs_to_another_sum_is_waited_out():
    inboxes = open_inboxes(2, "cpu")
    old, new = ([torch.randn(8) for _ in range(2)] for _ in range(2))
    inboxes[0].sums.fill_(4)
    deliver(inboxes, old, 3)  # of the same half, two sums ago
    found = []
    thread = threading.Thread(target=lambda: found.append(one_shot(new[0], inboxes[0])), daemon=True)
    thread.start()
    time.sleep(0.2)
    assert not found
    sent = packets(new[1], 5)
    inboxes[0].own_2RC[1, 1, :BLOCK] = 5 << 32
    inboxes[0].own_2RC[1, 1, 1 : sent.shape[0]] = sent[1:]
    inboxes[0].own_2RC[1, 1, 0] = sent[0]
    thread.join(20)
    assert torch.equal(found[0], one_shot_ref(new))


def test_the_twin_rounds_once():
    parts = [torch.tensor([1.0]), torch.tensor([2.0**-9]), torch.tensor([2.0**-9])]
    assert one_shot_ref([part.bfloat16() for part in parts]).item() == 1.0
    parts = [torch.tensor([1.0]), *[torch.tensor([2.0**-9])] * 3]
    assert one_shot_ref([part.bfloat16() for part in parts]).item() == 1.0 + 2.0**-7


@pytest.mark.parametrize(
    ("nbytes", "dtype", "words"),
    [
        (8192, torch.float64, "float64"),
        (LIMIT_BYTES + 4, torch.bfloat16, "256 KiB"),
        (6, torch.bfloat16, "whole words"),
        (0, torch.bfloat16, "whole words"),
    ],
)
def test_what_the_kernel_refuses(nbytes, dtype, words):
    assert words in (size_refusal(nbytes, dtype) or "")


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_it_takes(dtype):
    assert size_refusal(LIMIT_BYTES, dtype) is None
