"""Products of any number of rows against plain torch: the kernels in Triton's interpreter on a CPU, where torch's own
product stands for cuBLAS; on a GPU where there is one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from paceline.formats import fp8, int4, int8
from paceline.kernels import cuda_linear as module
from paceline.kernels.add_norm import add_norm_ref
from paceline.kernels.cuda_linear import cuda_linear, kernel_refusal, linear_norm
from paceline.kernels.gemv import PLAIN, Epilogue, Planes, gemv_ref
from paceline.kernels.gemv_float32 import MOST_ROWS, float32_gemv
from paceline.kernels.gemv_launch import Launch
from paceline.kernels.norm import NormWeights

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []  # so that `make test-gpu` has them
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@pytest.fixture(autouse=True)
def _few_rows(triton_device, monkeypatch):
    """Up to 20 rows are the kernel's."""
    torch.manual_seed(0)
    monkeypatch.setattr(module, "SMALL_ROWS", 20)


def tensor(*shape, dtype=torch.float16, factor=1.0):
    return (torch.randn(shape) * factor).to(DEVICE, dtype)


def dense(rows, columns, dtype=torch.float16):
    return Planes("dense", (rows, columns), tensor(rows, columns, dtype=dtype, factor=0.1))


def packed(format, rows, columns):
    weight = format.pack(tensor(rows, columns, factor=0.1))
    return replace(weight.planes, most_rows=20), weight.unpack()


def wide(t):
    return None if t is None else t.float()


def assert_as_exact(found, plain, exact):
    assert found.shape == exact.shape
    assert found.dtype == plain.dtype
    error, allowed = (found.float() - exact).norm(), (plain.float() - exact).norm()
    assert error <= 2 * allowed + 1e-6 * exact.norm(), f"{error} wrong, plain torch {allowed}"


def check(x, planes, epilogue=PLAIN, weight=None):
    weight = planes.values if weight is None else weight
    wider = replace(epilogue, bias_N=wide(epilogue.bias_N), residual_TN=wide(epilogue.residual_TN))
    exact, plain = gemv_ref(x.float(), weight.float(), None, wider), gemv_ref(x, weight, None, epilogue)
    assert_as_exact(cuda_linear(x, planes, epilogue), plain, exact)


def check_norm(x, planes, norm, weight=None, launch=None, **options):
    weight = planes.values if weight is None else weight
    wider = replace(norm, weight_C=wide(norm.weight_C), bias_C=wide(norm.bias_C))
    bias, residual = options.get("bias_N"), options.get("residual_TN")
    exact = add_norm_ref(x.float() @ weight.float().T, wider, residual_TC=wide(residual), bias_C=wide(bias))
    plain = add_norm_ref(x @ weight.T, norm, residual_TC=residual, bias_C=bias)
    found = linear_norm(x, planes, norm, keep_sum=True, launch=launch, **options)
    for each in zip(found, plain, exact, strict=True):
        assert_as_exact(*each)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 19, 20, 21, 40])
def test_few_rows_and_many(tokens, dtype):
    """A view of wider rows, as is the residual."""
    x, planes = tensor(tokens, 120, dtype=dtype)[:, 10:106], dense(50, 96, dtype)
    assert (kernel_refusal(x, planes) is None) == (tokens <= 20)
    residual = tensor(tokens, 60, dtype=dtype)[:, 3:53]
    check(x, planes, Epilogue(tensor(50, dtype=dtype), "gelu", False, residual))
    check(x, planes)


def test_of_a_large_weight_as_many_rows_as_were_measured_are_the_kernels(monkeypatch):
    monkeypatch.setattr(module, "SMALL_WEIGHT", 48 * 64 - 1)
    assert kernel_refusal(tensor(64, 64), dense(48, 64)) is None
    assert kernel_refusal(tensor(65, 64), dense(48, 64)) == "65 rows, and the kernel takes 64"


@pytest.mark.parametrize("tokens", [3, 21])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu", "quick_gelu", "tanh", None])
def test_every_activation(tokens, activation):
    x, planes, bias = tensor(tokens, 64), dense(48, 64), tensor(48)
    check(x, planes, Epilogue(bias, activation))
    check(x, planes, Epilogue(None, activation, False, tensor(tokens, 48)))
    check(x, planes, Epilogue(bias, activation, False, tensor(tokens, 48)))
    if activation is not None:
        check(x, planes, Epilogue(bias, activation, True, tensor(tokens, 24)))


@pytest.mark.parametrize("tokens", [5, 23])
@pytest.mark.parametrize("format", [int8, fp8, int4], ids=lambda format: format.__name__.rpartition(".")[2])
def test_packed_weights(format, tokens):
    planes, weight = packed(format, 40, 256)
    x = tensor(tokens, 256)
    check(x, planes, Epilogue(tensor(40), "gelu", False, tensor(tokens, 40)), weight)
    check_norm(x, planes, NormWeights(tensor(40), None, 1e-5, False), weight, residual_TN=tensor(tokens, 40))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 17, 22])
@pytest.mark.parametrize("centred", [True, False])
def test_a_norm_behind_bias_and_residual(tokens, centred, dtype):
    x, planes = tensor(tokens, 96, dtype=dtype), dense(50, 96, dtype)
    norm = NormWeights(tensor(50, dtype=dtype), tensor(50, dtype=dtype), 1e-5, centred)
    check_norm(x, planes, norm, bias_N=tensor(50, dtype=dtype), residual_TN=tensor(tokens, 50, dtype=dtype))
    check_norm(x, planes, replace(norm, weight_C=None, bias_C=None))


@pytest.mark.parametrize("split", [1, 2, 4])
def test_a_norm_adds_the_parts_of_a_split_product(split):
    """Three steps of K: among four parts one has none."""
    x, planes = tensor(18, 96), dense(50, 96)
    launch = Launch(16, 32, 4, stages=2, split=split, block_m=16)
    norm = NormWeights(tensor(50), tensor(50), 1e-5, True)
    check_norm(x, planes, norm, launch=launch, bias_N=tensor(50), residual_TN=tensor(18, 50))


def test_rows_in_blocks_of_any_size():
    x, planes = tensor(20, 64), dense(40, 64)
    epilogue = Epilogue(tensor(40), "silu", True, tensor(20, 20))
    results = [
        cuda_linear(x, planes, epilogue, launch=Launch(16, 32, 4, stages=2, block_m=rows)) for rows in (16, 32, 128)
    ]
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])
    check(x, planes, epilogue)


@pytest.mark.parametrize("tokens", [MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", None])
def test_few_rows_in_float32_and_many(tokens, activation, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "float32_gemv", lambda *args: seen.append(args) or float32_gemv(*args))
    x, planes = tensor(tokens, 70, dtype=torch.float32)[:, 3:67], dense(40, 64, torch.float32)
    assert kernel_refusal(x, planes) is not None
    check(x, planes, Epilogue(tensor(40, dtype=torch.float32), activation))
    norm = NormWeights(tensor(40, dtype=torch.float32), None, 1e-5, True)
    check_norm(x, planes, norm, residual_TN=tensor(tokens, 40, dtype=torch.float32))
    assert len(seen) == (2 if tokens == MOST_ROWS else 0)


@pytest.mark.skipif(DEVICE == "cuda", reason="there its GELU is the one that is meant")
def test_a_cpus_addmm_activation_is_not_asked(monkeypatch):
    """Its GELU is by erf, which float16 does not tell from that by tanh."""
    monkeypatch.delattr(torch, "_addmm_activation")
    check(tensor(21, 64), dense(40, 64), Epilogue(tensor(40), "gelu_tanh"))
    monkeypatch.setattr(torch, "_addmm_activation", None, raising=False)
    check(tensor(21, 64), dense(40, 64), Epilogue(tensor(40), "gelu_tanh"))


def test_no_rows_give_no_rows():
    x, planes = tensor(0, 64), dense(40, 64)
    assert cuda_linear(x, planes, Epilogue(activation="gelu")).shape == (0, 40)
    y, total = linear_norm(x, planes, NormWeights(None, None, 1e-5, True), keep_sum=True)
    assert y.shape == total.shape == (0, 40)
