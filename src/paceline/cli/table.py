"""Columns of text, aligned. Not rich's tables: these wrap to the terminal's width, also where the output is a file."""

from __future__ import annotations

from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """One line a row, its cells padded to their column's width; rows may have fewer cells than others."""
    widths = [
        max(len(row[column]) for row in rows if column < len(row)) for column in range(max(map(len, rows), default=0))
    ]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in rows)
    return "\n".join(f"{indent}{line}".rstrip() for line in lines)


def size(num_bytes: int) -> str:
    """'98.4 MB': decimal, as the hub and disks count."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} B"
