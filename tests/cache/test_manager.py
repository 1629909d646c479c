from __future__ import annotations

import pytest

from paceline.cache.manager import CacheManager
from paceline.config import CacheConfig, KVGroup

FULL, WINDOW = KVGroup("full", (0,), None, 1, 1), KVGroup("window", (1,), 4, 1, 1)


@pytest.fixture
def make():
    def build(groups=(FULL,), num_blocks=8, block_size=2, prefix_caching=True):
        config = CacheConfig(block_size=block_size, enable_prefix_caching=prefix_caching)
        return CacheManager(groups, [num_blocks] * len(groups), config)

    return build


def fill(cache, name, tokens, namespace=""):
    """Compute and commit all of `tokens`; return the cached prefix's length."""
    start = cache.begin(name, namespace, tokens)
    assert cache.allocate(name, start, len(tokens)) is not None
    cache.commit(name, tokens, len(tokens))
    cache.check_invariants()
    return start


def test_slots_are_given_block_by_block_and_the_tuple_is_reused_while_unchanged(make):
    cache = make()
    cache.begin("a", "", [1, 2, 3])
    assert cache.allocate("a", 0, 3) == []
    tables = cache.block_tables("a")
    assert tables == ((1, 2),)
    assert cache.allocate("a", 3, 4) == ()
    assert cache.block_tables("a") is tables
    cache.allocate("a", 4, 5)
    assert cache.block_tables("a") == ((1, 2, 3),)


def test_all_groups_or_nothing(make):
    cache = CacheManager((FULL, WINDOW), (8, 2), CacheConfig(block_size=2))
    cache.begin("a", "", [1] * 6)
    assert cache.allocate("a", 0, 6) is None
    assert cache.stats.used_blocks == (0, 0)
    assert cache.room("a", 0, 6) == 4
    assert cache.allocate("a", 0, 4) == []
    cache.check_invariants()


def test_the_last_token_is_never_taken_from_the_cache(make):
    cache = make()
    assert fill(cache, "a", [1, 2, 3, 4]) == 0
    assert fill(cache, "b", [1, 2, 3, 4]) == 2
    assert fill(cache, "c", [1, 2, 3, 4, 5]) == 4
    assert fill(cache, "d", [1, 2, 3, 4, 5], namespace="lora") == 0


def test_without_prefix_caching_nothing_is_found(make):
    cache = make(prefix_caching=False)
    assert [fill(cache, name, [1, 2, 3]) for name in "ab"] == [0, 0]


def test_a_fork_shares_all_blocks_and_copies_the_partial_one_on_write(make):
    cache = make()
    fill(cache, "a", [1, 2, 3, 4])
    cache.allocate("a", 4, 5)
    assert cache.fork("a", "b", 3)
    assert cache.block_tables("b") == ((1, 2),)
    assert cache.stats.used_blocks == (3,)
    assert cache.allocate("b", 3, 4) == [(0, 2, 4)]
    assert cache.block_tables("b") == ((1, 4),)
    assert cache.block_tables("a") == ((1, 2, 3),)
    cache.check_invariants()


def test_a_kept_block_is_copied_although_its_forker_is_gone(make):
    cache = make()
    fill(cache, "a", [1, 2, 3, 4])
    cache.fork("a", "b", 3)
    cache.free("a")
    assert cache.allocate("b", 3, 4) == [(0, 2, 3)]
    assert fill(cache, "c", [1, 2, 3, 4, 5]) == 4


def test_a_fork_at_a_block_border_copies_nothing(make):
    cache = make()
    fill(cache, "a", [1, 2, 3])
    cache.fork("a", "b", 2)
    assert cache.allocate("b", 2, 3) == []
    assert cache.block_tables("b") == ((1, 3),)


def test_copy_on_write_needs_a_block(make):
    cache = make(num_blocks=2)
    fill(cache, "a", [1, 2, 3, 4])
    cache.fork("a", "b", 3)
    assert cache.allocate("b", 3, 4) is None
    assert cache.room("b", 3, 4) == 3
    cache.check_invariants()


def test_the_parent_too_copies_a_block_that_a_fork_still_shares(make):
    cache = make(prefix_caching=False)
    fill(cache, "a", [1, 2, 3])
    cache.fork("a", "b", 3)
    assert cache.allocate("a", 3, 4) == [(0, 2, 3)]
    assert cache.allocate("b", 3, 4) == []  # alone on it now


def test_a_window_group_drops_what_no_later_query_sees(make):
    cache = make(groups=(FULL, WINDOW))
    cache.begin("a", "", [1] * 12)
    cache.allocate("a", 0, 8)
    cache.allocate("a", 8, 10)  # the query at 8 sees 5..8: blocks 0 and 1 (positions 0..3) go, block 2 stays
    assert cache.block_tables("a") == ((1, 2, 3, 4, 5), (0, 0, 3, 4, 1))
    cache.check_invariants()


def test_a_fork_is_refused_where_the_window_has_passed(make):
    cache = make(groups=(FULL, WINDOW))
    fill(cache, "a", [1] * 6)
    cache.allocate("a", 6, 12)
    assert cache.fork("a", "b", 5)
    cache.free("b")
    cache.allocate("a", 12, 13)
    assert not cache.fork("a", "b", 5)
    cache.check_invariants()


def test_a_reset_forgets_and_open_requests_offer_nothing_more(make):
    cache = make()
    fill(cache, "a", [1, 2, 3, 4])
    cache.reset_prefix_cache()
    cache.allocate("a", 4, 6)
    cache.commit("a", [1, 2, 3, 4, 5, 6], 6)
    cache.check_invariants()
    cache.free("a")
    assert fill(cache, "b", [1, 2, 3, 4, 5, 6]) == 0
    assert cache.stats.used_blocks == (3,)


def test_the_smallest_pool_for_a_length(make):
    cache = CacheManager((FULL, WINDOW), (8, 2), CacheConfig(block_size=2))
    assert cache.too_small_group(4) is None
    assert cache.too_small_group(5) == 1  # a window of 4 tokens can touch 3 blocks of 2
    assert CacheManager((FULL, WINDOW), (8, 3), CacheConfig(block_size=2)).too_small_group(17) == 0


def test_the_end_of_a_freed_path_is_evicted_first(make):
    cache = make(num_blocks=3)
    fill(cache, "a", [1, 2, 3, 4, 5, 6])
    cache.free("a")
    fill(cache, "b", [7, 8])
    assert cache.begin("c", "", [1, 2, 3, 4, 5, 6, 7]) == 4


def test_room_leaves_a_block_for_the_copy(make):
    cache = make(num_blocks=3)
    fill(cache, "a", [1, 2, 3, 4])
    cache.fork("a", "b", 3)
    assert cache.room("b", 3, 6) == 4
    assert cache.allocate("b", 3, 4) == [(0, 2, 3)]


def test_a_late_fork_does_not_take_the_parents_output_for_its_own_prefix(make):
    cache = make(num_blocks=20)
    fill(cache, "a", [1, 2, 3, 4, 5, 6])  # the prompt is 1, 2, 3
    cache.fork("a", "b", 2)
    cache.allocate("b", 2, 8)
    cache.commit("b", [1, 2, 3, 9, 9, 9, 7, 7], 8)
    cache.check_invariants()
    assert cache.begin("c", "", [1, 2, 3, 4, 5, 6, 7, 7, 0]) == 6
    assert cache.begin("d", "", [1, 2, 3, 9, 9, 9, 7, 7, 0]) == 8


def test_what_was_computed_before_a_reset_stays_forgotten_after_its_prefix_returns(make):
    cache = make(num_blocks=20)
    fill(cache, "a", [1, 2, 3, 4])
    cache.reset_prefix_cache()
    cache.allocate("a", 4, 6)
    cache.commit("a", [1, 2, 3, 4, 5, 6], 6)
    fill(cache, "b", [1, 2, 3, 4])
    assert cache.begin("c", "", [1, 2, 3, 4, 5, 6, 7]) == 4
