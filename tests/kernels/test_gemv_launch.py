"""How GEMV kernels are launched: the tables and the rule."""

from __future__ import annotations

import json

import pytest

from paceline.errors import UsageError
from paceline.kernels.gemv_launch import (
    TUNED,
    Launch,
    Product,
    candidates,
    choose_launch,
    filling_launch,
    launch_by_rule,
    launch_rows,
    load_table,
    read_table,
    tables_of,
    user_table,
    write_table,
)
from paceline.kernels.gpu import GPU

H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize("path", sorted(TUNED.glob("*.json")), ids=lambda path: path.stem)
def test_our_tables_are_found_by_their_devices_names(path):
    device, table = read_table(path)
    assert load_table(device) == table
    for product, launch in table.items():
        assert product.rows == launch_rows(product.rows)
        assert launch.block_n % 2 == launch.block_k % 16 == 0


def test_a_known_device_takes_its_table_and_another_the_rule():
    product = Product("int8", (4096, 4096), 1)
    assert choose_launch(product, H100, 132) == load_table(H100)[product]
    assert choose_launch(product, "another", 132) == launch_by_rule(product, 132) != load_table(H100)[product]
    assert not load_table("another")


def test_a_table_is_read_as_it_was_written(tmp_path):
    table = {
        Product("dense", (6144, 4096), 1): Launch(2, 2048, 8),
        Product("int4", (96, 64), 16, 32): Launch(16, 512, 4, stages=3, split=2, prefetch=0),
    }
    write_table(tmp_path / "table.json", 'a "device"', table)
    assert read_table(tmp_path / "table.json") == ('a "device"', table)


UNKNOWN_FIELD = {"format": "int8", "shape": [8, 8], "rows": 1, "blocks": 1}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"device": "x"}',
        '{"launches": []}',
        '{"device": "x", "launches": [{"shape": [1]}]}',
        json.dumps({"device": "x", "launches": [UNKNOWN_FIELD]}),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, text):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(UsageError, match=r"table\.json is no table of launches .*paceline tune"):
        read_table(tmp_path / "table.json")


@pytest.mark.parametrize(
    ("shape", "format", "expected"),
    [
        ((6144, 4096), "int8", Launch(2, 1024, 4)),
        ((6144, 4096), "dense", Launch(2, 2048, 8)),
        ((4096, 14336), "dense", Launch(2, 2048, 8)),
        ((3072, 576), "int8", Launch(4, 256, 1)),
        ((8, 20), "dense", Launch(4, 32, 1)),
    ],
)
def test_one_row_by_rule(shape, format, expected):
    assert launch_by_rule(Product(format, shape, 1), 132) == expected


def test_tall_matrices_are_not_split_and_flat_ones_are():
    assert launch_by_rule(Product("dense", (4096, 14336), 16), 132).split == 4
    assert launch_by_rule(Product("int8", (4096, 14336), 16), 132).split == 8
    assert launch_by_rule(Product("dense", (128256, 4096), 16), 132).split == 1
    assert launch_by_rule(Product("int8", (4096, 512), 16), 132).split == 1


# The best of those timed on an H100 for several rows of x; of 64 in fp8 within a model's step.
MEASURED = {
    ("fp8", (6144, 4096), 16): Launch(128, 128, 4, 3, split=5),
    ("fp8", (4096, 14336), 32): Launch(128, 128, 4, 3, split=8),
    ("fp8", (4096, 14336), 64): Launch(128, 128, 4, 3, split=8),
    ("fp8", (4096, 4096), 128): Launch(128, 64, 8, 4, split=4),
    ("fp8", (28672, 4096), 256): Launch(128, 64, 8, 4),
    ("int4", (6144, 4096), 16): Launch(128, 256, 4, 4, split=4),
    ("int4", (28672, 4096), 64): Launch(64, 128, 4, 4),
    ("int4", (4096, 14336), 256): Launch(128, 128, 8, 2, split=4),
    ("dense", (4096, 14336), 16): Launch(64, 128, 4, 4, split=4),
    ("dense", (6144, 4096), 32): Launch(64, 128, 4, 4, split=2),
}


@pytest.mark.parametrize("of", MEASURED)
def test_the_rule_gives_what_was_measured_to_be_best(of):
    format, shape, rows = of
    assert launch_by_rule(Product(format, shape, rows, 128 if format == "int4" else 0), 132) == MEASURED[of]


@pytest.mark.parametrize("rows", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("format", ["dense", "int8", "fp8", "int4"])
@pytest.mark.parametrize("shape", [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)])
def test_many_rows_fill_the_multiprocessors_and_fit_in_a_small_ones_memory(shape, format, rows):
    launch = launch_by_rule(Product(format, shape, rows, 128 if format == "int4" else 0), 132)
    programs = -(-shape[0] // launch.block_n) * launch.split
    rows = min(rows, 128)
    assert programs >= 96
    assert launch.split == 1 or programs <= 264
    value_bytes = {"dense": 2, "int4": 0.5}.get(format, 1)
    stage = launch.block_k * (launch.block_n * value_bytes + 2 * rows)
    assert launch.stages >= 2
    assert launch.stages * stage <= 96 << 10
    assert launch.block_n * rows <= 64 * 32 * launch.warps
    # A block's share of x is at most as many bytes as of the weight, or four times that where a value is half a byte.
    assert rows * 2 <= launch.block_n * value_bytes * (1 if format == "dense" else 2 if value_bytes == 1 else 4)


@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("format", ["dense", "int8", "fp8", "int4"])
def test_candidates_start_with_the_rule_and_name_none_twice(format, rows):
    product = Product(format, (4096, 14336), rows, 128 if format == "int4" else 0)
    found = candidates(product, 132)
    assert found[0] == launch_by_rule(product, 132)
    assert len(set(found)) == len(found) > 1


def test_rows_are_those_that_kernels_are_compiled_for():
    assert [launch_rows(rows) for rows in (1, 2, 8, 9, 16, 17, 65, 129)] == [1, 16, 16, 16, 16, 32, 128, 256]


@pytest.fixture
def forgetful():
    """load_table remembers what it read: nothing of it before and after."""
    load_table.cache_clear()
    yield
    load_table.cache_clear()


OTHER = Launch(8, 256, 2)


@pytest.mark.usefixtures("forgetful")
def test_the_users_table_comes_before_ours(tmp_path, monkeypatch):
    monkeypatch.delenv("PACELINE_TUNED", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    path = tmp_path / "paceline" / "tuned" / "NVIDIA_H100_80GB_HBM3.json"
    assert user_table(H100) == path
    path.parent.mkdir(parents=True)
    product, new = Product("int8", (4096, 4096), 1), Product("int8", (40, 40), 1)
    write_table(path, H100, {product: OTHER, new: OTHER})
    assert load_table(H100)[product] == load_table(H100)[new] == OTHER
    assert load_table(H100)[Product("dense", (4096, 4096), 1)] != OTHER
    assert [len(table) for _, table in tables_of(H100)] == [len(load_table(H100)) - 1, 2]


@pytest.mark.usefixtures("forgetful")
def test_the_variable_names_another_file_and_one_of_another_device_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv("PACELINE_TUNED", str(tmp_path / "mine.json"))
    write_table(tmp_path / "mine.json", "a card", {Product("int8", (40, 40), 1): OTHER})
    assert load_table("a card") == {Product("int8", (40, 40), 1): OTHER}
    assert load_table("another card") == {}


def test_a_file_that_the_variable_names_must_be_there(tmp_path, monkeypatch):
    monkeypatch.setenv("PACELINE_TUNED", str(tmp_path / "mine.json"))
    with pytest.raises(UsageError, match=r"mine\.json is no table of launches .*No such file"):
        tables_of("a card")


HOPPER, SMALLER = GPU(H100, 132, (9, 0)), GPU("smaller", 132, (8, 6))


@pytest.mark.parametrize("shape", [(2304, 768), (768, 768), (768, 3072), (384, 1536), (4096, 1024), (30, 8)])
@pytest.mark.parametrize("rows", [16, 32, 64, 128, 256])
def test_a_filling_launch_gives_each_multiprocessor_a_program_at_most(shape, rows):
    for device, shared in ((HOPPER, 227 << 10), (SMALLER, 96 << 10)):
        launch = filling_launch(Product("dense", shape, rows), device)
        tiles, steps = -(-rows // launch.block_m) * -(-shape[0] // launch.block_n), -(-shape[1] // 128)
        assert launch.split == 1 or tiles * launch.split <= 132
        assert (launch.split - 1) * -(-steps // launch.split) < steps  # each part has some
        assert launch.split <= max(1, steps // 2)
        assert launch.prefetch in (1, 2, 4, 8)  # the kernel makes a range of it
        assert launch.prefetch <= max(1, steps // launch.split)
        nbytes = (launch.block_m + launch.block_n) * launch.block_k * 2 * launch.stages
        assert nbytes <= shared
        assert tiles <= 132 or 2 * nbytes <= 227 << 10  # else two programs a multiprocessor


# The best, or nearly so, of those timed on an H100 for BERT-base.
FILLING = {
    ((2304, 768), 16): Launch(64, 128, 4, 4, split=3, prefetch=2, block_m=16),
    ((3072, 768), 16): Launch(64, 128, 4, 4, split=2, prefetch=2, block_m=16),
    ((768, 768), 64): Launch(64, 128, 4, 4, split=2, prefetch=2, block_m=16),
    ((768, 3072), 64): Launch(64, 128, 4, 4, split=5, prefetch=4, block_m=32),
    ((2304, 768), 128): Launch(64, 128, 4, 4, split=1, prefetch=4, block_m=64),
    ((3072, 768), 128): Launch(64, 128, 4, 4, split=1, prefetch=4, block_m=64),
    ((768, 768), 128): Launch(64, 128, 4, 4, split=2, prefetch=2, block_m=32),
    ((768, 3072), 128): Launch(64, 128, 4, 4, split=5, prefetch=4, block_m=64),
    ((768, 768), 256): Launch(64, 128, 4, 4, split=2, prefetch=2, block_m=64),
    ((768, 3072), 256): Launch(64, 128, 4, 4, split=2, prefetch=8, block_m=64),
    ((2304, 768), 256): Launch(64, 128, 4, 3, split=1, prefetch=4, block_m=64),
}


@pytest.mark.parametrize("of", FILLING)
def test_a_filling_launch_is_what_was_measured_to_be_best(of):
    shape, rows = of
    assert filling_launch(Product("dense", shape, rows), HOPPER) == FILLING[of]
