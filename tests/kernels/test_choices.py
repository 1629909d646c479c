"""What is told of the kernels: the same questions that the layers ask, also of GPUs that are not here."""

from __future__ import annotations

import pytest
import torch

from paceline.config import AttentionConfig, NormConfig
from paceline.errors import UsageError
from paceline.formats import FORMATS, Weight, int4, pack
from paceline.formats.dense import DenseWeight
from paceline.formats.fp8 import pack as pack_fp8
from paceline.kernels import Choice, explain, gemv
from paceline.kernels import gpu as module
from paceline.kernels.choices import fallbacks
from paceline.kernels.gpu import GPU
from paceline.layers.attention import Attention
from paceline.layers.linear import Linear
from paceline.layers.norm import Norm

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HOPPER = GPU("NVIDIA H100", 132, (9, 0))
TURING = GPU("NVIDIA T4", 40, (7, 5))
AMD = GPU("AMD Instinct MI300X", 304)
NO_TRITON = GPU("NVIDIA H100", 132, (9, 0), triton="Triton is not installed")


class Told:
    """An LLM's place."""

    def __init__(self, *choices: Choice) -> None:
        self.told = choices

    def choices(self, rows: int) -> tuple[Choice, ...]:
        return self.told


def dense(rows: int = 64, columns: int = 96, dtype: torch.dtype = torch.bfloat16) -> DenseWeight:
    return DenseWeight(torch.zeros(rows, columns, dtype=dtype))


def attention(head_dim: int) -> Attention:
    config = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=head_dim, scale=1.0)
    qkv, out = Linear(dense(4 * head_dim, 96)), Linear(dense(96, 2 * head_dim))
    return Attention(config, qkv, out, device=CPU)


def kernels(choices: list[Choice]) -> list[tuple[str, str]]:
    return [(one.kernel, one.reason) for one in choices]


def test_equal_operations_are_one_line_that_counts_them():
    layer = (Choice("norm", "torch"), Choice("linear", "Triton", "", 2), Choice("norm", "torch"))
    found = explain(Told(*layer, *layer), rows=4)
    assert found == (Choice("norm", "torch", count=4), Choice("linear", "Triton", count=4))


def test_as_text_it_is_a_table():
    found = explain(Told(Choice("norm", "torch's rms_norm", "device is cpu", 61), Choice("head", "Triton")))
    assert str(found).splitlines() == [
        "operation       kernel            why nothing better",
        "norm       61x  torch's rms_norm  device is cpu",
        "head       1x   Triton            -",
    ]


def test_a_step_has_a_row():
    with pytest.raises(UsageError, match="at least 1 row, got 0"):
        explain(Told(), rows=0)


@pytest.mark.parametrize(
    ("gpu", "dtype", "rows", "expected"),
    [
        (HOPPER, torch.bfloat16, 1, ("Triton GEMV, what follows included", "")),
        (HOPPER, torch.bfloat16, 65, ("torch's F.linear", "65 rows, and the kernel takes 64")),
        (HOPPER, torch.float32, 1, ("torch's F.linear", "dtype is torch.float32")),
        (TURING, torch.float16, 1, ("Triton GEMV, what follows included", "")),
        (TURING, torch.bfloat16, 1, ("torch's F.linear", "compute capability 7.5 has no bfloat16")),
        (NO_TRITON, torch.bfloat16, 1, ("torch's F.linear", "Triton is not installed")),
    ],
)
def test_a_linear_on_a_gpu(gpu, dtype, rows, expected, monkeypatch):
    monkeypatch.setattr(module, "gpu", lambda device: gpu)
    weight = DenseWeight(torch.zeros(64, 96, dtype=dtype, device="meta"))
    (choice,) = Linear(weight).choices(rows, dtype, CUDA, "qkv")
    assert choice.operation.startswith("qkv 64 x 96, ")
    assert (choice.kernel, choice.reason) == expected


@pytest.mark.parametrize(
    ("gpu", "takes"), [(HOPPER, True), (GPU("NVIDIA A10", 72, (8, 6)), True), (TURING, False), (AMD, False)]
)
def test_int4_needs_a_matrix_unit_that_takes_8_columns(gpu, takes, monkeypatch):
    monkeypatch.setattr(module, "gpu", lambda device: gpu)
    monkeypatch.setattr(gemv, "gpu", lambda device: gpu)
    monkeypatch.setattr(int4, "int4_refusal", lambda rows, device: "on a GPU")
    (choice,) = Linear(int4.pack(torch.rand(64, 512))).choices(1, torch.float16, CUDA, "up")
    assert ("Triton" in choice.kernel) == takes
    assert ("compute capability 8.0" in choice.reason) != takes


def test_odd_columns_have_no_words_for_the_kernel(monkeypatch):
    monkeypatch.setattr(module, "gpu", lambda device: HOPPER)
    (choice,) = Linear(pack_fp8(torch.ones(8, 30))).choices(1, torch.bfloat16, CUDA, "up")
    assert choice.operation == "up 8 x 30, 9.07 bits a value"
    assert choice.kernel == "unpacked, then torch's F.linear"


@pytest.mark.parametrize(
    ("gpu", "dim", "attends", "reason"),
    [
        (HOPPER, 128, "Triton split-KV decode", ""),
        (HOPPER, 512, "torch, planned on the host", "heads of 512 are larger than 256"),
        (NO_TRITON, 128, "torch, planned on the host", "Triton is not installed"),
    ],
)
def test_a_decodes_attention_on_a_gpu(gpu, dim, attends, reason, monkeypatch):
    monkeypatch.setattr(module, "gpu", lambda device: gpu)
    qkv, turned, attended, prompts, out = attention(dim).choices(1, torch.bfloat16, CUDA)
    assert (attended.kernel, attended.reason) == (attends, reason)
    one_launch = "Triton, all chunks in one launch"
    assert (prompts.kernel, prompts.reason) == (attends if reason else one_launch, reason)
    assert attended.operation == f"attention, 2 heads, 1 kv heads of {dim}"
    assert qkv.operation.startswith("qkv ")
    assert out.operation.startswith("out ")
    turns = "in the attention's kernel" if dim == 128 else "Triton, one kernel"
    assert turned.kernel == ("torch, an operation each" if gpu.triton else turns)


def test_a_norm_on_a_gpu(monkeypatch):
    monkeypatch.setattr(module, "gpu", lambda device: HOPPER)
    small, large = (Norm(NormConfig(1e-5), torch.ones(size)) for size in (64, 20_000))
    assert kernels(small.choices(1, torch.bfloat16, CUDA)) == [("Triton, a row a program", "")]
    assert kernels(large.choices(1, torch.bfloat16, CUDA)) == [
        ("torch's rms_norm", "20000 channels, and the kernel takes 16384")
    ]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 300])
def test_on_the_cpu_what_is_told_is_what_runs(format, rows, monkeypatch):
    """The op that a product calls is the one that is named."""
    weight = pack(torch.randn(128, 128), format, dtype=torch.float32, device="cpu")
    called = ops_of(weight, rows)
    kernel, reason = weight.route(rows)
    names = {
        "oneDNN's packed linear": "mkldnn::_linear_pointwise",
        "torch's _weight_int8pack_mm": "aten::_weight_int8pack_mm",
        "torch's _weight_int4pack_mm_for_cpu": "aten::_weight_int4pack_mm_for_cpu",
        "torch's F.linear": "aten::linear",
        "unpacked, then torch's F.linear": "aten::linear",
        "rounded, unpacked, then torch's F.linear": "aten::linear",
    }
    assert names[kernel] in called
    assert not called & (set(names.values()) - {names[kernel]})
    assert bool(reason) == ("F.linear" in kernel)


def ops_of(weight: Weight, rows: int) -> set[str]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        weight.matmul(torch.randn(rows, weight.shape[1]))
    return {event.key for event in profiled.key_averages()}


def test_int4s_words_are_unpacked_where_torchs_op_does_not_take_them():
    weight = pack(torch.randn(30, 128), "int4", dtype=torch.float32, device="cpu")
    kernel, reason = weight.route(1)
    assert kernel == "unpacked, then torch's F.linear"
    assert reason.startswith("its rows are not a multiple of ")


def test_fallbacks_are_told_by_their_reason():
    layer = (
        Choice("norm", "torch", "Triton is not installed"),
        Choice("qkv", "torch", "Triton is not installed"),
        Choice("out", "torch", "17 rows"),
        Choice("down", "Triton"),
    )
    assert fallbacks([*layer, *layer]) == [
        "norm, qkv: torch, since Triton is not installed",
        "out: torch, since 17 rows",
    ]
