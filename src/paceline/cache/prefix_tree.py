"""The prefix cache: a tree whose nodes are full blocks of token ids, so that equal prefixes share their KV blocks.

A node stands for (its parent, block_size token ids) and holds one block id a KV group, or None where that group's
block was evicted or dropped out of a sliding window. Since a node is identified by the tokens alone, a node whose block
was evicted becomes usable again as soon as any request recomputes it.

Roots are namespaces: prefixes that must not be shared (an adapter's id, a tenant's salt) live in different trees.
Nothing here recurses: a prompt of 100,000 tokens is a path of thousands of nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from paceline.cache.block_pool import NULL_BLOCK, BlockPool


class Node:
    """`pins`: requests whose committed tokens end here; a pinned node stays although its blocks may go."""

    __slots__ = ("blocks", "children", "depth", "key", "parent", "pins")

    def __init__(self, parent: Node | None, key: tuple[int, ...], depth: int, num_groups: int) -> None:
        self.parent = parent
        self.key = key
        self.depth = depth  # blocks from the root
        self.children: dict[tuple[int, ...], Node] = {}
        self.blocks: list[int | None] = [None] * num_groups
        self.pins = 0


@dataclass(frozen=True)
class Match:
    """The longest usable prefix: `node` ends it, `blocks[g]` are its node.depth block ids in group g, the null block
    where the group's window has passed."""

    node: Node
    blocks: tuple[list[int], ...]


class PrefixTree:
    """`windows[g]`: tokens that a query of KV group g sees, itself included; None sees all."""

    def __init__(self, block_size: int, windows: Sequence[int | None], num_blocks: Sequence[int]) -> None:
        self.block_size = block_size
        self.windows = tuple(windows)
        self._roots: dict[str, Node] = {}
        self._namespaces: dict[Node, str] = {}
        self._owner: list[dict[int, Node]] = [{} for _ in num_blocks]  # block id -> the node that keeps it
        self.pools = tuple(BlockPool(blocks, partial(self._evicted, group)) for group, blocks in enumerate(num_blocks))

    def root(self, namespace: str) -> Node:
        """The namespace's root, made on first use. Pin it or it may vanish."""
        node = self._roots.get(namespace)
        if node is None:
            node = self._roots[namespace] = Node(None, (), 0, len(self.windows))
            self._namespaces[node] = namespace
        return node

    def match(self, namespace: str, token_ids: Sequence[int], max_tokens: int) -> Match:
        """The longest cached prefix of at most `max_tokens` tokens from which the next token can be computed.

        A full group needs every block; a window group only those that the query after the prefix still sees. O(tokens).
        """
        size = self.block_size
        node = best = self.root(namespace)
        path: list[Node] = []
        runs = [0] * len(self.windows)  # a group's unbroken run of present blocks that ends at `node`
        for start in range(0, max_tokens - size + 1, size):
            child = node.children.get(tuple(token_ids[start : start + size]))
            if child is None:
                break
            node = child
            path.append(node)
            for group, block in enumerate(node.blocks):
                runs[group] = runs[group] + 1 if block is not None else 0
            needs = [node.depth - self.first_visible(group, start + size) for group in range(len(runs))]
            if all(run >= need for run, need in zip(runs, needs, strict=True)):
                best = node
            elif any(w is None and run < node.depth for w, run in zip(self.windows, runs, strict=True)):
                break  # a full group has lost a block here: nothing longer can be used
        return Match(best, self._visible_blocks(path[: best.depth]))

    def first_visible(self, group: int, position: int) -> int:
        """Index of the first block that a query at `position`, or any later one, sees in the group."""
        window = self.windows[group]
        return 0 if window is None else max(0, position - window + 1) // self.block_size

    def extend(self, node: Node, token_ids: Sequence[int], end: int, tables: Sequence[Sequence[int]]) -> Node:
        """Keep the blocks node.depth..end-1 of `tables` (one a group), all of whose tokens are computed, below `node`;
        return the last one's node. Where another request's equal block is already kept, that one stays."""
        size = self.block_size
        for index in range(node.depth, end):
            key = tuple(token_ids[index * size : (index + 1) * size])
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = Node(node, key, index + 1, len(self.windows))
            for group, table in enumerate(tables):
                block = table[index]
                if child.blocks[group] is None and block != NULL_BLOCK:
                    child.blocks[group] = block
                    self._owner[group][block] = child
                    self.pools[group].keep(block)
            node = child
        return node

    def unpin(self, node: Node) -> None:
        node.pins -= 1
        self._prune(node)

    def reset(self) -> None:
        """Forget every prefix. Blocks that requests hold stay theirs; the caller must stop extending old nodes."""
        for group, owner in enumerate(self._owner):
            for block, node in list(owner.items()):
                node.blocks[group] = None
                self.pools[group].forget(block)
                self._prune(node)
            owner.clear()

    def _visible_blocks(self, path: list[Node]) -> tuple[list[int], ...]:
        position = len(path) * self.block_size
        tables: list[list[int]] = []
        for group in range(len(self.windows)):
            first = self.first_visible(group, position)
            tables.append(
                [NULL_BLOCK] * first + [block for n in path[first:] if (block := n.blocks[group]) is not None]
            )
        return tuple(tables)

    def _evicted(self, group: int, block: int) -> None:
        node = self._owner[group].pop(block)
        node.blocks[group] = None
        self._prune(node)

    def _prune(self, node: Node) -> None:
        """Remove the node, and then its ancestors, while nothing needs them."""
        while not node.children and node.pins == 0 and all(block is None for block in node.blocks):
            parent = node.parent
            if parent is None:
                namespace = self._namespaces.pop(node, None)
                if namespace is not None:
                    del self._roots[namespace]
                return
            if parent.children.pop(node.key, None) is None:
                return
            node = parent

    def nodes(self) -> Iterator[Node]:
        """Every node, roots included."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check_invariants(self, holders: Sequence[list[int]], ends: Sequence[Node] = ()) -> None:
        """AssertionError unless tree, owners and pools agree. `holders[g]`: group g's blocks, once a reference;
        `ends`: where the requests' committed tokens end, once a request."""
        pins = Counter(ends)
        assert sum(node.pins for node in self.nodes()) == len(ends), "a pin was lost, or its node"
        kept: list[list[int]] = [[] for _ in self.pools]
        for node in self.nodes():
            assert node.children or node.pins or any(b is not None for b in node.blocks), "a useless node was left"
            assert node.pins == pins[node], "a node is pinned by others than end there"
            assert node.parent is None or len(node.key) == self.block_size, "a node is not a full block"
            for key, child in node.children.items():
                assert child.parent is node, "a child points at another parent"
                assert child.key == key, "a child is filed under another key"
                assert child.depth == node.depth + 1, "a child's depth is wrong"
            for group, block in enumerate(node.blocks):
                if block is not None:
                    kept[group].append(block)
                    assert self._owner[group].get(block) is node, "a block's owner is another node"
        for group, pool in enumerate(self.pools):
            assert len(kept[group]) == len(self._owner[group]), "an owner is not in the tree"
            pool.check_invariants(holders[group], kept[group])
