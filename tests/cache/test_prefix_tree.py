from __future__ import annotations

import pytest

from paceline.cache.prefix_tree import PrefixTree


class Writer:
    """Puts token paths into a tree as a request would: blocks allocated, kept, then released last first."""

    def __init__(self, windows=(None,), num_blocks=8, block_size=2):
        self.tree = PrefixTree(block_size, windows, [num_blocks] * len(windows))

    def write(self, tokens, namespace="", dropped=0):
        """Returns the block tables; `dropped`: leading blocks that window groups no longer hold."""
        end = len(tokens) // self.tree.block_size
        tables = [[pool.allocate() for _ in range(end)] for pool in self.tree.pools]
        for group, window in enumerate(self.tree.windows):
            for index in range(dropped if window is not None else 0):
                self.tree.pools[group].release(tables[group][index])
                tables[group][index] = 0
        self.tree.extend(self.tree.root(namespace), tokens, end, tables)
        for pool, table in zip(self.tree.pools, tables, strict=True):
            for block in reversed(table):
                if block:
                    pool.release(block)
        self.check()
        return tables

    def matched(self, tokens, namespace="", max_tokens=None):
        match = self.tree.match(namespace, tokens, len(tokens) if max_tokens is None else max_tokens)
        root = self.tree.root(namespace)
        root.pins += 1
        self.tree.unpin(root)  # a look-up alone leaves no empty root behind
        return match.node.depth, match.blocks

    def check(self):
        self.tree.check_invariants([[] for _ in self.tree.pools])


def test_the_longest_prefix_of_full_blocks_matches():
    cache = Writer()
    (table,) = cache.write([1, 2, 3, 4, 5])
    assert cache.matched([1, 2, 3, 4, 9]) == (2, (table,))
    assert cache.matched([1, 2, 3, 9]) == (1, (table[:1],))
    assert cache.matched([2, 2, 3, 4]) == (0, ([],))


def test_at_most_max_tokens_match():
    cache = Writer()
    cache.write([1, 2, 3, 4])
    assert [cache.matched([1, 2, 3, 4], max_tokens=n)[0] for n in range(5)] == [0, 0, 1, 1, 2]


def test_namespaces_do_not_meet_and_an_empty_one_is_forgotten():
    cache = Writer()
    cache.write([1, 2], namespace="lora")
    assert cache.matched([1, 2])[0] == 0
    assert cache.matched([1, 2], namespace="lora")[0] == 1
    cache.tree.reset()
    assert list(cache.tree.nodes()) == []
    cache.check()


def test_an_equal_block_written_twice_is_kept_once():
    cache = Writer()
    (first,) = cache.write([1, 2, 3, 4])
    cache.write([1, 2, 3, 4])
    assert cache.matched([1, 2, 3, 4]) == (2, (first,))
    assert cache.tree.pools[0].num_available == 8


def test_leaves_are_evicted_before_their_parents_and_branches_by_last_use():
    cache = Writer(num_blocks=4)
    cache.write([1, 2, 3, 4])
    cache.write([5, 6, 7, 8])
    pool = cache.tree.pools[0]
    assert pool.allocate()
    assert [cache.matched(t)[0] for t in ([1, 2, 3, 4], [5, 6, 7, 8])] == [1, 2]
    assert pool.allocate()
    assert [cache.matched(t)[0] for t in ([1, 2, 3, 4], [5, 6, 7, 8])] == [0, 2]


def test_a_path_with_a_lost_block_ends_there_and_heals_when_recomputed():
    cache = Writer(num_blocks=4)
    (table,) = cache.write([1, 2, 3, 4, 5, 6])
    pool = cache.tree.pools[0]
    for block in table[1:]:
        pool.acquire(block)  # only the first block is idle now, so it goes although it is no leaf
    taken = [pool.allocate(), pool.allocate()]
    assert table[0] in taken
    assert cache.matched([1, 2, 3, 4, 5, 6])[0] == 0
    fresh = taken[1]
    cache.tree.extend(cache.tree.root(""), [1, 2], 1, [[fresh]])
    assert cache.matched([1, 2, 3, 4, 5, 6]) == (3, ([fresh, *table[1:]],))


@pytest.mark.parametrize(("window", "needed"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2), (6, 3)])
def test_a_window_group_needs_only_what_the_next_query_sees(window, needed):
    # 6 tokens in blocks of 2: the query at position 6 sees positions 6 - window + 1 .. 5 of them.
    tokens = [1, 2, 3, 4, 5, 6]
    for present in range(4):
        cache = Writer(windows=(None, window))
        full, _ = cache.write(tokens, dropped=3 - present)
        depth, blocks = cache.matched(tokens)
        assert (depth == 3) == (present >= needed)
        if depth == 3:
            assert blocks[0] == full
            assert [block != 0 for block in blocks[1]] == [False] * (3 - needed) + [True] * needed


def test_a_shorter_prefix_is_taken_where_the_window_lacks_the_longer_one():
    cache = Writer(windows=(None, 2))
    _, table = cache.write([1, 2, 3, 4, 5, 6])
    last = table[2]
    window_pool = cache.tree.pools[1]
    for block in table[:2]:
        window_pool.acquire(block)
    while window_pool.read_only(last):  # evict the last block of the window group alone
        window_pool.allocate()
    assert cache.matched([1, 2, 3, 4, 5, 6])[0] == 2


def test_a_hundred_thousand_tokens_neither_recurse_nor_square():
    tokens = list(range(100_000))
    cache = Writer(num_blocks=50_000)
    cache.write(tokens)
    assert cache.matched(tokens)[0] == 50_000
    cache.tree.reset()
    assert list(cache.tree.nodes()) == []
