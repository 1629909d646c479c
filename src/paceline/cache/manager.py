"""What the scheduler asks of the KV cache: a request's prefix, its slots, its block tables. Host only.

One block table a KV group, all of equal length: position p lies in block p // block_size. Freed blocks may be handed
out at once, even while a step in flight still reads or writes them: the device runs steps in order, a later holder
writes every slot before it reads it, and a block that the prefix tree keeps is never written again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paceline.cache.block_pool import NULL_BLOCK, BlockPool
from paceline.cache.prefix_tree import Node, PrefixTree
from paceline.config import CacheConfig, KVGroup

Copy = tuple[int, int, int]  # (group, source block, target block)
BlockTables = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class CacheStats:
    """Blocks that requests hold and in all, a group; tokens that asked for a cached prefix and that found one."""

    used_blocks: tuple[int, ...]
    total_blocks: tuple[int, ...]
    prefix_query_tokens: int
    prefix_hit_tokens: int


class _Table:
    """One request's blocks. `node`: where its committed tokens end in the prefix tree, None if it may not be cached.
    `safe_end`: writes from the last `start` up to here need no new block, no copy and no drop."""

    __slots__ = ("blocks", "node", "safe_end", "tuples")

    def __init__(self, blocks: tuple[list[int], ...], node: Node | None) -> None:
        self.blocks = blocks
        self.node = node
        self.safe_end = 0
        self.tuples: BlockTables | None = None


class CacheManager:
    """Block tables by request id, over one pool a KV group and the prefix tree."""

    def __init__(self, groups: Sequence[KVGroup], num_blocks: Sequence[int], config: CacheConfig) -> None:
        self.groups = tuple(groups)
        self.block_size = config.block_size
        self._caching = config.enable_prefix_caching
        self._tree = PrefixTree(config.block_size, [group.window for group in groups], num_blocks)
        self._pools: tuple[BlockPool, ...] = self._tree.pools
        self._tables: dict[str, _Table] = {}
        self._query_tokens = 0
        self._hit_tokens = 0

    # ------------------------------------------------------------------------------------- a request's life

    def begin(
        self, request_id: str, namespace: str, token_ids: Sequence[int], max_cached_tokens: int | None = None
    ) -> int:
        """Open the request's table on its longest cached prefix; return that prefix's length in tokens.

        At most len(token_ids) - 1, as the last token must be computed, for its logits; and at most
        `max_cached_tokens`, where earlier ones are wanted too.
        """
        if not self._caching:
            self._tables[request_id] = _Table(tuple([] for _ in self.groups), None)
            return 0
        limit = len(token_ids) - 1 if max_cached_tokens is None else max_cached_tokens
        match = self._tree.match(namespace, token_ids, limit)
        for pool, blocks in zip(self._pools, match.blocks, strict=True):
            for block in blocks:
                if block != NULL_BLOCK:
                    pool.acquire(block)
        match.node.pins += 1
        self._tables[request_id] = _Table(match.blocks, match.node)
        return match.node.depth * self.block_size

    def count_prefix(self, num_query_tokens: int, num_hit_tokens: int) -> None:
        """Count a prefix look-up whose request was really admitted."""
        self._query_tokens += num_query_tokens
        self._hit_tokens += num_hit_tokens

    def fork(self, parent_id: str, child_id: str, start: int) -> bool:
        """Open the child's table on the parent's blocks, up to and including the one that holds position `start` - 1.

        The child computes from `start` on. False, and nothing done, if a window has dropped what it would see.
        """
        parent = self._tables[parent_id]
        end = -(-start // self.block_size)
        shared: list[list[int]] = []
        for group, blocks in enumerate(parent.blocks):
            first = self._tree.first_visible(group, start)
            if NULL_BLOCK in blocks[first:end]:
                return False
            shared.append([NULL_BLOCK] * first + blocks[first:end])
        for pool, blocks in zip(self._pools, shared, strict=True):
            for block in blocks:
                if block != NULL_BLOCK:
                    pool.acquire(block)
        node = parent.node
        while node is not None and node.depth > start // self.block_size:
            node = node.parent
        if node is not None:
            node.pins += 1
        self._tables[child_id] = _Table(tuple(shared), node)
        parent.safe_end = 0  # its last block may now be shared
        return True

    def allocate(self, request_id: str, start: int, stop: int) -> Sequence[Copy] | None:
        """Make positions start..stop-1 writable in every group; None, and nothing allocated, if blocks are lacking.

        No query before `start` may follow: blocks out of its window are released. Returns the copies to make before the
        step; executed one after the other or all reads first, they give the same.
        """
        table = self._tables[request_id]
        if stop <= table.safe_end:
            return ()
        self._drop_unseen(table, start)
        first, end = start // self.block_size, -(-stop // self.block_size)
        read_only: list[list[int]] = []
        for pool, blocks in zip(self._pools, table.blocks, strict=True):
            indices = [i for i in range(first, min(end, len(blocks))) if pool.read_only(blocks[i])]
            if max(0, end - len(blocks)) + len(indices) > pool.num_available:
                return None
            read_only.append(indices)
        copies: list[Copy] = []
        for group, (pool, blocks) in enumerate(zip(self._pools, table.blocks, strict=True)):
            for index in read_only[group]:
                source, blocks[index] = blocks[index], pool.allocate()
                pool.release(source)
                if index * self.block_size < start:  # else every slot of it is about to be written
                    copies.append((group, source, blocks[index]))
            blocks.extend([pool.allocate() for _ in range(len(blocks), end)])
        table.safe_end = len(table.blocks[0]) * self.block_size
        table.tuples = None
        return copies

    def room(self, request_id: str, start: int, stop: int) -> int:
        """The furthest end <= `stop` for which `allocate(request_id, start, end)` succeeds; `start` if none does."""
        table = self._tables[request_id]
        self._drop_unseen(table, start)
        first = start // self.block_size
        for pool, blocks in zip(self._pools, table.blocks, strict=True):
            # Only the block of `start` can be read-only: later ones were never shared nor committed.
            copied = int(first < len(blocks) and pool.read_only(blocks[first]))
            if copied > pool.num_available:
                return start
            stop = min(stop, (len(blocks) + pool.num_available - copied) * self.block_size)
        return max(start, stop)

    def commit(self, request_id: str, token_ids: Sequence[int], num_computed: int) -> None:
        """Offer the full blocks among the first `num_computed` tokens, known and computed, to later requests."""
        table = self._tables[request_id]
        node, end = table.node, num_computed // self.block_size
        if node is not None and end > node.depth:
            table.node = self._tree.extend(node, token_ids, end, table.blocks)
            table.node.pins += 1
            self._tree.unpin(node)

    def free(self, request_id: str) -> None:
        """Close the request's table. Its last blocks are released first: of a cached path the leaves go first."""
        table = self._tables.pop(request_id)
        for pool, blocks in zip(self._pools, table.blocks, strict=True):
            for block in reversed(blocks):
                if block != NULL_BLOCK:
                    pool.release(block)
        if table.node is not None:
            self._tree.unpin(table.node)

    def _drop_unseen(self, table: _Table, start: int) -> None:
        for group, (pool, blocks) in enumerate(zip(self._pools, table.blocks, strict=True)):
            index = min(self._tree.first_visible(group, start), len(blocks)) - 1
            while index >= 0 and blocks[index] != NULL_BLOCK:  # what is before a null block was dropped earlier
                pool.release(blocks[index])
                blocks[index] = NULL_BLOCK
                table.tuples = None
                index -= 1

    # ------------------------------------------------------------------------------------------ questions

    @property
    def request_ids(self) -> list[str]:
        """Requests with an open table."""
        return list(self._tables)

    def block_tables(self, request_id: str) -> BlockTables:
        """One table a group; the same object as long as nothing in it changes."""
        table = self._tables[request_id]
        if table.tuples is None:
            table.tuples = tuple(tuple(blocks) for blocks in table.blocks)
        return table.tuples

    def writable_tables(self, request_id: str, stop: int) -> BlockTables | None:
        """`block_tables`, where positions from the last allocated `start` up to `stop` may be written as they are; None
        where `allocate` has something to do."""
        table = self._tables[request_id]
        return table.tuples if stop <= table.safe_end else None

    def has_room_for_all(self, request_id: str, num_tokens: int) -> bool:
        """Whether every group that sees the whole context could hold `num_tokens` of the request now."""
        blocks_needed = -(-num_tokens // self.block_size)
        return all(
            group.window is not None or blocks_needed - len(blocks) <= pool.num_available
            for group, pool, blocks in zip(self.groups, self._pools, self._tables[request_id].blocks, strict=True)
        )

    def too_small_group(self, num_tokens: int) -> int | None:
        """The group that could not hold `num_tokens` of one request even with all its blocks; None if all can.

        A window group needs as many blocks as its window can touch, computing one token at a time.
        """
        for index, (group, pool) in enumerate(zip(self.groups, self._pools, strict=True)):
            needed = -(-num_tokens // self.block_size)
            if group.window is not None:
                needed = min(needed, (group.window + self.block_size - 2) // self.block_size + 1)
            if needed > pool.num_blocks:
                return index
        return None

    def describe_group(self, group: int) -> str:
        """A group's size in words, for error messages."""
        blocks = self._pools[group].num_blocks
        return f"{blocks * self.block_size} tokens ({blocks} blocks of {self.block_size})"

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix (the weights changed, say). What open requests computed before is not offered."""
        for table in self._tables.values():
            if table.node is not None:
                node, table.node = table.node, None
                self._tree.unpin(node)
        self._tree.reset()

    @property
    def stats(self) -> CacheStats:
        return CacheStats(
            used_blocks=tuple(pool.num_used for pool in self._pools),
            total_blocks=tuple(pool.num_blocks for pool in self._pools),
            prefix_query_tokens=self._query_tokens,
            prefix_hit_tokens=self._hit_tokens,
        )

    def check_invariants(self) -> None:
        """AssertionError unless tables, pools and tree agree."""
        for table in self._tables.values():
            assert len({len(blocks) for blocks in table.blocks}) <= 1, "a request's tables differ in length"
            assert table.tuples in (None, tuple(tuple(b) for b in table.blocks)), "a stale block table would be sent"
        holders = [
            [block for table in self._tables.values() for block in table.blocks[group] if block != NULL_BLOCK]
            for group in range(len(self.groups))
        ]
        self._tree.check_invariants(holders, [table.node for table in self._tables.values() if table.node is not None])
