from __future__ import annotations

import pytest

from paceline.cache.block_pool import BlockPool


@pytest.fixture
def evicted():
    return []


@pytest.fixture
def pool(evicted):
    return BlockPool(4, evicted.append)


def test_fresh_blocks_ascend_and_leave_out_the_null_block(pool):
    assert [pool.allocate() for _ in range(4)] == [1, 2, 3, 4]
    with pytest.raises(IndexError, match="no block left of 4"):
        pool.allocate()


def test_blocks_released_last_first_come_back_ascending(pool):
    blocks = [pool.allocate() for _ in range(3)]
    for block in reversed(blocks):
        pool.release(block)
    assert [pool.allocate() for _ in range(4)] == [1, 2, 3, 4]


def test_a_block_is_free_when_its_last_reference_goes(pool):
    block = pool.allocate()
    pool.acquire(block)
    assert pool.read_only(block)
    pool.release(block)
    assert (pool.num_used, pool.read_only(block)) == (1, False)
    pool.release(block)
    assert pool.num_used == 0
    with pytest.raises(ValueError, match="released more often"):
        pool.release(block)


def test_kept_blocks_go_last_and_the_least_recently_released_first(pool, evicted):
    blocks = [pool.allocate() for _ in range(3)]
    for block in blocks:
        pool.keep(block)
    for block in (2, 3, 1):
        pool.release(block)
    pool.acquire(2)
    pool.release(2)  # 2 was used again: now it is the most recent
    assert [pool.allocate() for _ in range(4)] == [4, 3, 1, 2]
    assert evicted == [3, 1, 2]


def test_a_kept_block_is_read_only_even_to_its_single_holder(pool):
    block = pool.allocate()
    pool.keep(block)
    assert pool.read_only(block)


def test_a_forgotten_block_is_blank_once_idle(pool, evicted):
    held, idle = pool.allocate(), pool.allocate()
    pool.keep(held)
    pool.keep(idle)
    pool.release(idle)
    pool.forget(idle)
    pool.forget(held)
    pool.release(held)
    pool.check_invariants([], [])
    assert [pool.allocate() for _ in range(4)]
    assert evicted == []


def test_invariants_see_a_lost_reference(pool):
    block = pool.allocate()
    pool.check_invariants([block], [])
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check_invariants([], [])
    with pytest.raises(AssertionError, match="other blocks than the tree"):
        pool.check_invariants([block], [block])
