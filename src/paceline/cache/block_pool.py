"""A pool of KV cache blocks: who holds each one, which are free, and which free ones still hold a cached prefix.

Host only: a block is an integer, the tensors are elsewhere. Ids run from 1; block 0 is the null block, which pads
block tables and stands where a sliding window dropped a block, and is never handed out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

NULL_BLOCK = 0


class BlockPool:
    """Reference-counted blocks. Every operation is O(1).

    A block with no reference is free. If the prefix tree keeps it (`keep`), its content may be asked for again: it is
    handed out only when no blank block is left, the least recently released one first, and `on_evict(block)` tells the
    tree that it is gone.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None]) -> None:
        self.num_blocks = num_blocks
        self._on_evict = on_evict
        self._refs = [0] * (num_blocks + 1)
        # A stack: tables are released last block first, so the next request gets ascending ids again, and a run of
        # consecutive blocks is read by attention as one slice instead of a gather.
        self._blank = list(range(num_blocks, 0, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # kept and unreferenced, least recently released first
        self._kept: set[int] = set()

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can still give, those of idle cached prefixes included."""
        return len(self._blank) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Blocks that some request holds."""
        return self.num_blocks - self.num_available

    def allocate(self) -> int:
        """A block with one reference, its content to be overwritten. IndexError if none is available."""
        if self._blank:
            block = self._blank.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            self._kept.discard(block)
            self._on_evict(block)
        else:
            raise IndexError(f"no block left of {self.num_blocks}: check num_available before allocating")
        self._refs[block] = 1
        return block

    def acquire(self, block: int) -> None:
        """One more reference to a block that is held or kept."""
        if self._refs[block] == 0:
            del self._idle[block]
        self._refs[block] += 1

    def release(self, block: int) -> None:
        """One reference less; at none the block is free: idle if the tree keeps it, else blank."""
        refs = self._refs[block] - 1
        if refs < 0:
            raise ValueError(f"block {block} was released more often than acquired")
        self._refs[block] = refs
        if refs == 0:
            if block in self._kept:
                self._idle[block] = None
            else:
                self._blank.append(block)

    def read_only(self, block: int) -> bool:
        """Whether a holder must copy the block before writing to it: others hold it, or the prefix tree keeps it."""
        return self._refs[block] > 1 or block in self._kept

    def keep(self, block: int) -> None:
        """The prefix tree keeps this block, which some request holds: its content may outlive the request."""
        self._kept.add(block)

    def forget(self, block: int) -> None:
        """The prefix tree gives the block up, held or idle."""
        self._kept.remove(block)
        if self._refs[block] == 0:
            del self._idle[block]
            self._blank.append(block)

    def check_invariants(self, holders: Iterable[int], kept: Iterable[int]) -> None:
        """AssertionError unless `holders` (a block once a reference) and `kept` agree with the pool's own books."""
        refs = [0] * (self.num_blocks + 1)
        for block in holders:
            refs[block] += 1
        assert refs[NULL_BLOCK] == 0, "the null block is held"
        assert refs == self._refs, "reference counts disagree with the block tables"
        kept = list(kept)
        assert len(kept) == len(set(kept)), "a block is kept twice"
        assert set(kept) == self._kept, "the pool keeps other blocks than the tree"
        free = [*self._blank, *self._idle]
        assert len(free) == len(set(free)), "a block is free twice"
        assert set(free) == {b for b in range(1, self.num_blocks + 1) if refs[b] == 0}, "free blocks are wrong"
        assert set(self._idle) == {b for b in self._kept if refs[b] == 0}, "idle blocks are wrong"
