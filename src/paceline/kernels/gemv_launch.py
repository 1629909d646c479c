"""How the GEMV kernels are launched: by measurement where a table has the weight's shape, else by rule.

A table is a JSON file of one device: {"device": its name, "launches": [{"format", "shape", "rows", ...Launch}, ...]}.
Ours are kernels/tuned/*.json. `paceline tune` writes a user's, whose launches come before ours: the file that
PACELINE_TUNED names, else XDG_CONFIG_HOME/paceline/tuned/<device>.json (~/.config where that is not set).

Shapes: N rows of the weight, K columns.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from paceline.errors import UsageError
from paceline.kernels.gpu import GPU

PROGRAM_ROWS = 128  # of x that a program multiplies at most; more take one program for each so many
TUNED = Path(__file__).parent / "tuned"
VARIABLE = "PACELINE_TUNED"


@dataclass(frozen=True)
class Launch:
    """block_n: rows of the weight a program (even where gate and up make one, 16 and up on the matrix unit); block_k:
    columns a step (int4: of one row four groups a warp, whatever it says; of more at least 128, and at most four
    groups).

    For several rows of x, and int4: stages of the loop over K; split: programs that share a row's columns; prefetch:
    steps of the weight that a dependent launch asks for before x is awaited, a power of two; block_m: rows of x a
    program, of several at least 16. One row has its whole block in registers.
    """

    block_n: int
    block_k: int
    warps: int
    stages: int = 1
    split: int = 1
    prefetch: int = 1
    block_m: int = PROGRAM_ROWS


@dataclass(frozen=True)
class Product:
    """What a launch is tuned for. `rows`: 1, 16, 32, 64, 128 or 256, as launch_rows makes it of the rows of x."""

    format: str
    shape: tuple[int, int]
    rows: int
    group: int = 0  # int4's


Table = Mapping[Product, Launch]


@dataclass(frozen=True)
class Tile:
    """What a program multiplies at once where x has several rows, as Launch has it. programs: of a multiprocessor, up
    to which K is split."""

    block_n: int
    block_k: int
    stages: int
    programs: int = 2


# By the most rows of x: of some five each, those that took least for Llama-3.1-8B's four shapes together on an H100, as
# far as their stages fit in 96 KB of shared memory, of which the smaller GPUs have no more. 32 layers of 16 rows take
# 5.19 ms so in bf16, 3.37 in fp8 and 2.88 in int4. What is best alone need not be so among a model's other kernels: of
# 64 rows in fp8, one program a multiprocessor took 4.27 ms and two 4.50, but in a whole decode 6.86 and 5.55.
_BYTES = MappingProxyType({64: Tile(128, 128, 3), 128: Tile(128, 64, 4, programs=1)})
TILES: Mapping[str, Mapping[int, Tile]] = MappingProxyType(
    {
        "dense": {32: Tile(64, 128, 4), 64: Tile(64, 128, 3), 128: Tile(128, 64, 3)},
        "int8": _BYTES,
        "fp8": _BYTES,
        "int4": {
            16: Tile(128, 256, 4),
            32: Tile(128, 256, 3),
            64: Tile(64, 128, 4),
            128: Tile(128, 128, 2, programs=1),
        },
    }
)


def launch_rows(rows: int) -> int:
    """The rows of x as kernels are compiled for them: 1, or a power of two from 16 on. 8 are slower than 16 on an H100,
    whose matrix unit takes packed weights from registers for 16 and not for 8."""
    return 1 if rows == 1 else max(16, 1 << (rows - 1).bit_length())


def choose_launch(product: Product, device_name: str, processors: int) -> Launch:
    """The table's for a device of that name; by rule otherwise, for a device of so many multiprocessors."""
    tuned = load_table(device_name).get(product)
    return launch_by_rule(product, processors) if tuned is None else tuned


@cache
def load_table(device_name: str) -> Table:
    """Ours and the user's for that device; empty where neither has measured it. Raises as tables_of."""
    return MappingProxyType(
        {product: launch for _, table in tables_of(device_name) for product, launch in table.items()}
    )


def tables_of(device_name: str) -> list[tuple[Path, Table]]:
    """The files that are read for that device, the user's last. One that is of another device is passed over.

    Raises UsageError for a file that is no table, and where PACELINE_TUNED names none.
    """
    ours, users = TUNED / _file_name(device_name), user_table(device_name)
    found = []
    for path in (ours, users):
        if path.is_file() or (path == users and os.environ.get(VARIABLE)):
            of, table = read_table(path)
            if of == device_name:
                found.append((path, table))
    return found


def user_table(device_name: str) -> Path:
    """Where the user's table for that device is looked up."""
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "paceline" / "tuned" / _file_name(device_name)


def _file_name(device_name: str) -> str:
    return f"{device_name.replace(' ', '_').replace('/', '_')}.json"


def read_table(path: Path) -> tuple[str, Table]:
    """The device's name and its launches. Raises UsageError for a file that is no such table."""
    try:
        found = json.loads(path.read_text())
        table = {}
        for entry in found["launches"]:
            rows, columns = entry.pop("shape")
            product = Product(entry.pop("format"), (rows, columns), entry.pop("rows"), entry.pop("group", 0))
            table[product] = Launch(**entry)
        return str(found["device"]), MappingProxyType(table)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is no table of launches ({error}): write one with `paceline tune`") from error


def write_table(path: Path, device_name: str, table: Table) -> None:
    """A line a launch, so that two tables compare."""
    lines = [json.dumps(_entry(product, launch)) for product, launch in table.items()]
    path.write_text(f'{{"device": {json.dumps(device_name)}, "launches": [\n' + ",\n".join(lines) + "\n]}\n")


def _entry(product: Product, launch: Launch) -> dict[str, Any]:
    given = {name: value for name, value in asdict(launch).items() if value != getattr(Launch, name, None)}
    group = {"group": product.group} if product.group else {}
    return {"format": product.format, "shape": list(product.shape), "rows": product.rows, **group, **given}


def launch_by_rule(product: Product, processors: int) -> Launch:
    """One row: two rows of the weight a program, in at most 8 warps, of whose threads each has at least 64 bytes. On an
    H100 this is within 2% of the best at each of Llama-3.1-8B's shapes, dense, int8 and fp8. Short rows make blocks of
    four: 3,072 x 576 takes 2.3 us so and 2.7 in twos.
    """
    columns = product.shape[1]
    if product.rows > 1:
        return _many_rows(product, processors)
    if product.format == "int4":
        return Launch(16, 512, min(4, _int4_warps(product)), stages=3)
    row_bytes = columns * (2 if product.format == "dense" else 1)
    block_n = 2 if row_bytes >= 2048 else 4
    warps = block_n * row_bytes // (32 * 64)
    return one_row_launch(block_n, min(8, 1 << max(warps, 1).bit_length() - 1), columns)


def _many_rows(product: Product, processors: int, weights: int = 1) -> Launch:
    """TILES' for so many rows of x. `weights`: as many products in one launch."""
    rows = min(product.rows, PROGRAM_ROWS)
    tile = next(tile for most, tile in TILES[product.format].items() if rows <= most)
    return _tile_launch(tile, product, processors, weights)


def _tile_launch(tile: Tile, product: Product, processors: int, weights: int = 1) -> Launch:
    """K is split until every multiprocessor has its programs, in parts of at least four steps. More than PROGRAM_ROWS
    rows of x split it no further, since their programs share a weight."""
    blocks, steps = weights * -(-product.shape[0] // tile.block_n), -(-product.shape[1] // tile.block_k)
    split = max(1, min(tile.programs * processors // blocks, steps // 4))
    warps = 4 if tile.block_n * min(product.rows, PROGRAM_ROWS) <= 8192 else 8  # of 64 sums a thread
    return Launch(tile.block_n, tile.block_k, warps, tile.stages, split)


def filling_launch(product: Product, device: GPU) -> Launch:
    """For several rows of x and a weight of which TILES' tiles would leave multiprocessors idle, BERT's say: nearly a
    program each, and no more. Small tiles of x first, then K in parts of two steps at least. Of its weight a program
    has what a power of two up to 8 steps has asked for ahead.

    With some more programs than multiprocessors BERT-base's products of 128 rows took 4.9 us for 4.3 and 8.1 for 6.3 on
    an H100.
    """
    N, K = product.shape
    block_n, block_k, block_m = 64, 128, min(product.rows, 64)
    steps = -(-K // block_k)

    def tiles(block_m: int) -> int:
        return -(-product.rows // block_m) * -(-N // block_n)

    while block_m > 16 and tiles(block_m) * min(6, steps // 2) < 0.6 * device.processors:
        block_m //= 2
    most = max(1, min(steps // 2, device.processors // tiles(block_m)))
    split = -(-steps // -(-steps // most))  # as few as take no more steps each
    prefetch = 1 << min(3, (steps // split).bit_length() - 1)
    # 96 KB of shared memory, of which smaller GPUs have no more, and Hopper has twice that for a program alone.
    fits = block_m + block_n <= 96 or (device.dependent and tiles(block_m) <= device.processors)
    return Launch(block_n, block_k, 4, 4 if fits else 3, split, prefetch, block_m)


def experts_launch(product: Product, weights: int, processors: int) -> Launch:
    """For a product of `rows` pairs with each of so many experts, in one launch."""
    return _many_rows(product, processors, weights)


def _int4_warps(product: Product) -> int:
    """As many as a row has tiles of 4 groups."""
    return 1 << (-(-product.shape[1] // (4 * product.group)) - 1).bit_length()


def one_row_launch(block_n: int, warps: int, columns: int) -> Launch:
    """With steps of 8 columns a thread: as much of x as one load brings."""
    return Launch(block_n, min(256 * warps, max(16, 1 << (columns - 1).bit_length())), warps)


def candidates(product: Product, processors: int) -> tuple[Launch, ...]:
    """Launches to time for a product, the rule's first."""
    rule = launch_by_rule(product, processors)
    return tuple(dict.fromkeys((rule, *_variants(product, rule, processors))))


def _variants(product: Product, rule: Launch, processors: int) -> Iterator[Launch]:
    columns = product.shape[1]
    if product.rows > 1:
        tiles = [(32, 256), (64, 128), (64, 256), (128, 64), (128, 128), (128, 256)]
        for block_n, block_k in tiles:
            if product.format != "int4" or 128 <= block_k <= 4 * product.group:
                for stages in (2, 3, 4):
                    for programs in (1, 2):
                        yield _tile_launch(Tile(block_n, block_k, stages, programs), product, processors)
    elif product.format == "int4":
        for block_n in (16, 32):
            for warps in (1, 2, 4, 8):
                if warps <= _int4_warps(product):
                    yield from (replace(rule, block_n=block_n, warps=warps, stages=stages) for stages in (2, 3, 4))
    else:
        row_bytes = columns * (2 if product.format == "dense" else 1)
        for block_n in (2, 4, 8):
            for warps in (1, 2, 4, 8, 16):
                # More than 256 bytes a thread spill, fewer than 32 leave it idle.
                if 32 <= block_n * row_bytes / (32 * warps) <= 256:
                    yield one_row_launch(block_n, warps, columns)
