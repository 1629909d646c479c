"""The GEMV kernel against plain torch: in Triton's interpreter on a CPU (float16, small), on a GPU where there is one.

The rule: against float32 the kernel errs at most twice as much as plain torch in the same dtype.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from paceline.kernels.gemv import (
    PLAIN,
    Epilogue,
    Norm,
    Planes,
    fuses_norm,
    gemv,
    gemv_ref,
    gemv_refusal,
    shape_refusal,
)
from paceline.kernels.gemv_launch import Launch, Product, candidates, launch_by_rule, launch_rows

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []  # so that `make test-gpu` has them
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="the kernel is Triton's")
DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]
LAUNCH = Launch(block_n=16, block_k=64, warps=1, stages=2)
INT4_LAUNCH = replace(LAUNCH, block_k=128)  # of several rows


def words_of(values_NK: torch.Tensor) -> torch.Tensor:
    return values_NK.contiguous().view(torch.uint8).view(torch.int32)


def int4_words(q_NK: torch.Tensor, group: int) -> torch.Tensor:
    """By the definition: one value at a time into its word and nibble."""
    rows, columns = q_NK.shape
    tiles = -(-columns // (4 * group))
    words = torch.zeros(rows, tiles * group // 2, dtype=torch.int64)
    for column in range(columns):
        tile, inside = divmod(column, 4 * group)
        plane, place = divmod(inside, group)
        chunk, place = divmod(place, 32)
        pair, high = divmod(place, 2)
        word = tile * group // 2 + 16 * chunk + 4 * (pair % 4) + pair // 4
        words[:, word] |= q_NK[:, column].long() << (4 * (plane + 4 * high))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def random_planes(
    kind: str, rows: int, columns: int, dtype: torch.dtype, *, offset: bool = False, group: int = 32
) -> tuple[Planes, torch.Tensor]:
    """Random planes and the weight in float32 that they stand for."""
    shape = (rows, columns)
    scale_N = torch.rand(rows) * 0.01 + 0.001
    if kind == "dense":
        weight = (torch.randn(shape) * 0.1).to(dtype)
        return Planes(kind, shape, weight), weight.float()
    if kind == "int8":
        q = torch.randint(-128, 128, shape, dtype=torch.int8)
        return Planes(kind, shape, words_of(q), scale_N), q.float() * scale_N[:, None]
    if kind == "fp8":
        q = (torch.randn(shape) * 2 ** torch.randint(-9, 8, shape)).clamp(-448, 448).to(torch.float8_e4m3fn)
        return Planes(kind, shape, words_of(q), scale_N), q.float() * scale_N[:, None]
    q = torch.randint(0, 16, shape)
    groups = -(-columns // (4 * group)) * 4
    scale_NG = torch.rand(rows, groups) * 0.02 + 0.01
    offset_NG = torch.randn(rows, groups) * 0.02 * offset
    scale_offset_NG2 = torch.stack([scale_NG, offset_NG], 2).to(torch.bfloat16)
    scale, offset_NK = scale_offset_NG2.float().repeat_interleave(group, 1)[:, :columns].unbind(2)
    return Planes(kind, shape, int4_words(q, group), scale_offset_NG2, group), (q - 8) * scale + offset_NK


def on_device(planes: Planes) -> Planes:
    def move(t: torch.Tensor | None) -> torch.Tensor | None:
        return None if t is None else t.to(DEVICE)

    return Planes(planes.format, planes.shape, planes.values.to(DEVICE), move(planes.scale), planes.group)


def run(
    x_TK: torch.Tensor, planes: Planes, launch: Launch, norm: Norm | None = None, epilogue: Epilogue = PLAIN
) -> torch.Tensor:
    return gemv(x_TK, planes, norm=norm, epilogue=epilogue, launch=launch)


def assert_as_exact(
    y_TN: torch.Tensor, x_TK: torch.Tensor, weight: torch.Tensor, norm: Norm | None, epilogue: Epilogue
) -> None:
    def wide(t: torch.Tensor | None) -> torch.Tensor | None:
        return None if t is None else t.float()

    weight = weight.to(DEVICE)
    exact = gemv_ref(
        x_TK.float(),
        weight,
        None if norm is None else Norm(norm.weight_K.float(), norm.eps),
        Epilogue(wide(epilogue.bias_N), epilogue.activation, epilogue.gated, wide(epilogue.residual_TN)),
    )
    plain = gemv_ref(x_TK, weight.to(x_TK.dtype), norm, epilogue)
    assert y_TN.shape == exact.shape
    assert y_TN.dtype == x_TK.dtype
    error, allowed = (y_TN.float() - exact).norm(), (plain.float() - exact).norm()
    assert error <= 2 * allowed, f"{error / exact.norm():.2e} of it wrong, plain torch {allowed / exact.norm():.2e}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(40, 192), (17, 100), (1, 32)])
@pytest.mark.parametrize(("kind", "offset"), [("dense", 0), ("int8", 0), ("fp8", 0), ("int4", 0), ("int4", 1)])
def test_each_format_on_odd_sizes(kind: str, offset: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    planes, weight = random_planes(kind, rows, columns, dtype, offset=bool(offset))
    x = torch.randn(1, columns, device=DEVICE).to(dtype)
    assert_as_exact(run(x, on_device(planes), LAUNCH), x, weight, None, Epilogue())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "tokens"), [("dense", 3), ("int8", 9), ("int4", 8), ("fp8", 2)])
def test_a_few_rows_with_a_stride(kind: str, tokens: int, dtype: torch.dtype) -> None:
    planes, weight = random_planes(kind, 33, 128, dtype)
    x = torch.randn(tokens, 300, device=DEVICE).to(dtype)[:, 50:178]
    norm = Norm(torch.rand(128, device=DEVICE).to(dtype) + 0.5, 1e-5)
    launch = INT4_LAUNCH if kind == "int4" else LAUNCH
    assert_as_exact(run(x, on_device(planes), launch, norm), x, weight, norm, Epilogue())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "split"), [("dense", 1), ("dense", 2), ("dense", 4), ("int4", 1)])
def test_every_part_of_the_epilogue_with_k_split(kind: str, split: int, dtype: torch.dtype) -> None:
    """Three steps of K: among four parts one has none."""
    columns = 3 * (128 if kind == "int4" else 64)
    planes, weight = random_planes(kind, 44, columns, dtype, offset=True)
    x = torch.randn(2, columns, device=DEVICE).to(dtype)
    norm = Norm(torch.rand(columns, device=DEVICE).to(dtype) + 0.5, 1e-5)
    residual = torch.randn(2, 30, device=DEVICE).to(dtype)[:, :22]
    epilogue = Epilogue(torch.randn(44, device=DEVICE).to(dtype), "silu", True, residual)
    launch = replace(INT4_LAUNCH if kind == "int4" else LAUNCH, split=split)
    first = run(x, on_device(planes), launch, norm, epilogue)
    assert_as_exact(first, x, weight, norm, epilogue)
    assert torch.equal(first, run(x, on_device(planes), launch, norm, epilogue))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 12])
@pytest.mark.parametrize(("group", "block_n", "warps"), [(32, 32, 4), (64, 16, 2), (128, 32, 1)])
def test_int4_groups_blocks_and_warps(group: int, block_n: int, warps: int, tokens: int, dtype: torch.dtype) -> None:
    """Two and a half steps of K, the last one with warps that have none."""
    columns = 10 * warps * group
    planes, weight = random_planes("int4", 50, columns, dtype, offset=True, group=group)
    x = torch.randn(tokens, columns, device=DEVICE).to(dtype)
    launch = Launch(block_n, 128, warps=warps, stages=2)
    assert_as_exact(run(x, on_device(planes), launch), x, weight, None, Epilogue())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "split"), [(17, 1), (33, 3), (70, 2)])
@pytest.mark.parametrize("kind", ["dense", "int8", "fp8", "int4"])
def test_many_rows_of_every_format_with_all_that_follows(
    kind: str, tokens: int, split: int, dtype: torch.dtype
) -> None:
    """Five steps and a bit of K, in one, two or three parts."""
    columns = 5 * 128 + 12
    planes, weight = random_planes(kind, 70, columns, dtype, offset=True)
    x = torch.randn(tokens, columns + 6, device=DEVICE).to(dtype)[:, 4:-2]
    residual = torch.randn(tokens, 40, device=DEVICE).to(dtype)[:, :35]
    epilogue = Epilogue(torch.randn(70, device=DEVICE).to(dtype), "silu", True, residual)
    launch = Launch(64, 128, warps=4, stages=2, split=split)
    first = run(x, on_device(planes), launch, None, epilogue)
    assert_as_exact(first, x, weight, None, epilogue)
    assert torch.equal(first, run(x, on_device(planes), launch, None, epilogue))


@pytest.mark.parametrize(("kind", "tokens"), [("int8", 129), ("int4", 130)])
def test_more_rows_than_a_program_takes(kind: str, tokens: int) -> None:
    planes, weight = random_planes(kind, 40, 264, torch.float16, group=32)
    x = torch.randn(tokens, 264, device=DEVICE).half()
    residual = torch.randn(tokens, 20, device=DEVICE).half()
    epilogue = Epilogue(torch.randn(40, device=DEVICE).half(), "silu", True, residual)
    launch = Launch(32, 128, warps=4, stages=2, split=2)
    assert_as_exact(run(x, on_device(planes), launch, None, epilogue), x, weight, None, epilogue)


@pytest.mark.parametrize("tokens", [9, 20, 40])
@pytest.mark.parametrize("kind", ["dense", "int8", "fp8", "int4"])
def test_the_launch_by_rule_of_many_rows_is_right(kind: str, tokens: int) -> None:
    planes, weight = random_planes(kind, 40, 1100, torch.float16, group=128)
    x = torch.randn(tokens, 1100, device=DEVICE).half()
    assert_as_exact(gemv(x, on_device(planes)), x, weight, None, PLAIN)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activations(activation: str, gated: bool) -> None:
    planes, weight = random_planes("dense", 32, 64, torch.float16)
    x = torch.randn(1, 64, device=DEVICE).half()
    epilogue = Epilogue(activation=activation, gated=gated)
    assert_as_exact(run(x, on_device(planes), LAUNCH, None, epilogue), x, weight, None, epilogue)


def test_fp8_and_int8_bytes_are_exact_one_by_one() -> None:
    """Every byte as a column that a unit vector picks: 256 columns, 16 rows a time."""
    for kind, view in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
        values = torch.arange(256, dtype=torch.uint8)
        values = torch.where((values & 127) == 127, 0, values).to(torch.uint8) if kind == "fp8" else values  # NaN
        weight = values.view(view)[None].float()
        planes = on_device(Planes(kind, (1, 256), values[None].view(torch.int32), torch.ones(1)))
        for start in range(0, 256, 16):
            x = F.one_hot(torch.arange(start, start + 16), 256).half().to(DEVICE)
            assert torch.equal(run(x, planes, LAUNCH)[:, 0].float().cpu(), weight[0, start : start + 16])


def test_no_rows_give_no_rows() -> None:
    planes, _ = random_planes("dense", 8, 16, torch.float16)
    assert run(torch.empty(0, 16, device=DEVICE).half(), on_device(planes), LAUNCH).shape == (0, 8)


@pytest.mark.parametrize(
    ("x", "kind", "columns", "reason"),
    [
        (torch.zeros(257, 64).half(), "dense", 64, "257 rows, and the kernel takes 256"),
        (torch.zeros(1, 64), "dense", 64, "dtype is torch.float32"),
        (torch.zeros(1, 66).half(), "int8", 66, "66 columns are no whole words"),
        (torch.zeros(1, 64).bfloat16(), "dense", 64, "weight is torch.float16, x torch.bfloat16"),
        (torch.zeros(64, 8).half().T, "dense", 64, "a row of x has gaps"),
        (torch.zeros(1, 64).half(), "dense", 64, None),
    ],
)
def test_refusals(x: torch.Tensor, kind: str, columns: int, reason: str | None) -> None:
    values = torch.zeros(8, columns).half() if kind == "dense" else torch.zeros(8, columns // 4, dtype=torch.int32)
    assert shape_refusal(x, Planes(kind, (8, columns), values)) == reason


def test_a_norm_of_too_many_channels_and_a_cpu_are_refused() -> None:
    x, planes = torch.zeros(2, 16392).half(), Planes("dense", (1, 16392), torch.zeros(1, 16392).half())
    assert "16392 channels" in (shape_refusal(x, planes, Norm(torch.ones(16392), 1e-5)) or "")
    assert shape_refusal(x, planes) is None
    assert gemv_refusal(x, planes) == "device is cpu"


def test_a_norm_goes_into_one_row_of_a_small_weight() -> None:
    small, large = (Planes("dense", (rows, 576), torch.empty(0)) for rows in (3072, 49152))
    one, two = torch.empty(1, 576), torch.empty(2, 576)
    assert fuses_norm(one, small)
    assert not fuses_norm(two, small)
    assert not fuses_norm(one, large)
    assert not fuses_norm(one, Planes("int4", (3072, 576), torch.empty(0), group=64))


@pytest.mark.parametrize(("rows", "columns", "tokens"), [(34, 1100, 1), (40, 544, 5)])
@pytest.mark.parametrize("kind", ["dense", "int8", "fp8", "int4"])
def test_the_launch_chosen_for_an_unknown_device_is_right(kind: str, rows: int, columns: int, tokens: int) -> None:
    planes, weight = random_planes(kind, rows, columns, torch.float16)
    x = torch.randn(tokens, columns, device=DEVICE).half()
    epilogue = Epilogue(activation="silu", gated=True)
    launch = launch_by_rule(Product(kind, planes.shape, launch_rows(tokens), planes.group), 8)
    assert_as_exact(run(x, on_device(planes), launch, None, epilogue), x, weight, None, epilogue)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("kind", ["dense", "int8", "fp8"])
def test_every_launch_worth_timing_is_right(kind: str, tokens: int) -> None:
    planes, weight = random_planes(kind, 18, 600, torch.float16)
    x = torch.randn(tokens, 600, device=DEVICE).half()
    for launch in candidates(Product(kind, planes.shape, launch_rows(tokens), planes.group), 8)[
        : 3 if DEVICE == "cpu" else None
    ]:
        assert_as_exact(run(x, on_device(planes), launch), x, weight, None, PLAIN)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "gated"), [("dense", False), ("int8", True), ("fp8", False)])
def test_one_row_with_all_that_goes_before_and_after(kind: str, gated: bool, dtype: torch.dtype) -> None:
    """Three steps of K, the last one odd."""
    planes, weight = random_planes(kind, 44, 168, dtype)
    x = torch.randn(1, 168, device=DEVICE).to(dtype)
    norm = Norm(torch.rand(168, device=DEVICE).to(dtype) + 0.5, 1e-5)
    outputs = 22 if gated else 44
    residual = torch.randn(1, outputs, device=DEVICE).to(dtype)
    epilogue = Epilogue(torch.randn(44, device=DEVICE).to(dtype), "silu", gated, residual)
    assert_as_exact(run(x, on_device(planes), LAUNCH, norm, epilogue), x, weight, norm, epilogue)


def test_importing_paceline_kernels_needs_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import paceline.kernels.gemv"
    subprocess.run([sys.executable, "-c", code], check=True)
