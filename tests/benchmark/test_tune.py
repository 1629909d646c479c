"""What is tuned and which launch wins, with times made by hand."""

from __future__ import annotations

import pytest
import torch

from paceline.benchmark.shapes import read_shape
from paceline.benchmark.tune import Linear, check_device, compile_ahead, kernels, linears, time_on, tune
from paceline.errors import EngineError, UsageError
from paceline.kernels.gemv_launch import Product, candidates
from paceline.kernels.gpu import gpu
from paceline.models.registry import read_decoder_config

LLAMA = read_decoder_config(read_shape("llama-3.1-8b"))
QKV = Linear(Product("int8", (6144, 4096), 1), gated=False)


def test_the_distinct_linears_of_a_model():
    found = linears(LLAMA, ["dense", "int4"], [1])
    shapes = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
    assert [one.product for one in found] == [
        *(Product("dense", shape, 1) for shape in shapes),
        Product("dense", (128256, 4096), 1),
        *(Product("int4", shape, 1, 128) for shape in shapes),
        Product("int8", (128256, 4096), 1),  # int4's head
    ]
    assert [one.product.shape for one in found if one.gated] == [(28672, 4096)] * 2


def test_several_numbers_of_rows_and_an_expert_is_a_linear_too():
    mixtral = read_decoder_config(
        {
            **read_shape("llama-3.1-8b"),
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        }
    )
    found = linears(mixtral, ["int8"], [1, 16])
    assert {one.product.rows for one in found} == {1, 16}
    assert (28672, 4096) in {one.product.shape for one in found}


def test_weights_of_as_many_columns_share_what_is_compiled():
    wanted = [
        Linear(Product("int8", (rows, 4096), 1), gated) for rows, gated in ((6144, False), (4096, False), (28672, True))
    ]
    found = kernels(wanted, 132)
    assert len(found) == 2 * len(candidates(QKV.product, 132))
    assert {(one.product.shape, one.gated) for one, _ in found} == {((256, 4096), False), ((256, 4096), True)}
    ((odd, _), *_) = kernels([Linear(Product("int8", (50257, 64), 1), gated=False)], 132)
    assert odd.product.shape == (50257, 64)


def test_the_fastest_wins_and_what_fails_is_passed_over():
    tried = []

    def time(linear, launch):
        tried.append(launch)
        if len(tried) == 2:
            raise RuntimeError("out of resource: shared memory")
        return {1: 5e-6, 4: 3e-6}.get(len(tried), 4e-6)

    (found,) = tune([QKV], 132, time)
    assert tried == list(candidates(QKV.product, 132))
    assert (found.launch, found.seconds, found.rule_seconds) == (tried[3], 3e-6, 5e-6)


def test_where_the_rules_own_launch_fails_there_is_no_time_of_it():
    def time(linear, launch):
        if launch == candidates(QKV.product, 132)[0]:
            raise RuntimeError("out of resource")
        return 4e-6

    (found,) = tune([QKV], 132, time)
    assert found.rule_seconds is None


def test_where_all_fail_the_first_reason_is_told():
    def time(linear, launch):
        raise RuntimeError("no\n  kernel image")

    with pytest.raises(EngineError, match=r"no launch of .*int8.* runs here: RuntimeError: no kernel image"):
        list(tune([QKV], 132, time))


def test_without_a_gpu_there_is_nothing_to_tune():
    with pytest.raises(UsageError, match=r"do not run here \(device is cpu\)"):
        check_device(torch.device("cpu"), torch.bfloat16)


@pytest.mark.gpu
def test_on_a_gpu_the_rule_is_at_best_beaten():
    device = torch.device("cuda")
    wanted = [Linear(Product("int8", (3072, 576), 1), gated=True)]
    compile_ahead(wanted, gpu(device).processors, torch.bfloat16, device)
    (found,) = tune(wanted, gpu(device).processors, time_on(device, torch.bfloat16))
    assert found.rule_seconds is not None
    assert 3072 * 576 / 10e12 < found.seconds <= found.rule_seconds < 1e-3
