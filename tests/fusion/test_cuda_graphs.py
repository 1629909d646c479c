"""The bookkeeping of captured calls, over a device that captures by remembering; with CUDA's own where there is one."""

from __future__ import annotations

import logging
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.fusion.cuda_graphs import MOST_FAILURES, Counts, CudaRecorder, GraphPool, Limits


class Remembered:
    """Replays by computing again, into the tensors that the capture returned."""

    def __init__(self, call):
        self.call = call
        self.outputs = call()

    def replay(self):
        with torch.inference_mode():  # in which either kind of tensor can be written
            for old, new in zip(self.outputs, self.call(), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)


class FakeRecorder:
    def __init__(self, pool_bytes=0, failing=()):
        self.pool_bytes, self.failing = pool_bytes, set(failing)
        self.held, self.recorded, self.released, self.followed = 0, 0, 0, 0
        self.busy = False

    def capturing(self):
        return self.busy

    def follow(self):
        self.followed += 1

    def record(self, call):
        self.recorded += 1
        self.held += self.pool_bytes
        if self.recorded in self.failing:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return Remembered(call)

    def held_bytes(self):
        return self.held

    def release(self):
        self.held = 0
        self.released += 1


def double(x, *others):
    return [2 * x, *others]


def filled(n, value=1.0, dtype=torch.float32):
    return torch.full((n,), value, dtype=dtype)


@pytest.fixture
def recorder():
    return FakeRecorder()


def test_the_second_call_of_its_shapes_is_captured_and_the_third_replayed(recorder):
    pool = GraphPool(double, recorder)
    for step in range(4):
        (y,) = pool(filled(3, step))
        assert torch.equal(y, filled(3, 2.0 * step))
        pool.check_invariants()
    assert pool.counts == Counts(replayed=2, eager=2, captured=1)
    assert recorder.recorded == 1
    assert recorder.followed == 3  # the first touches no buffer


def test_shapes_dtypes_and_numbers_make_the_key(recorder):
    pool = GraphPool(lambda x, n: [x * n, n], recorder)
    calls = [
        (filled(3), 2),
        (filled(4), 2),
        (filled(3, dtype=torch.float64), 2),
        (filled(3), 3),
        (filled(3), 2.0),
        (filled(3)[None], 2),
    ]
    for _ in range(3):
        for x, n in calls:
            y, number = pool(x, n)
            assert torch.equal(y, x * n)
            assert type(number) is type(n)
            pool.check_invariants()
    assert pool.counts == Counts(replayed=6, eager=12, captured=6)


def test_outputs_are_the_callers_to_keep(recorder):
    pool = GraphPool(lambda x: [x, 2 * x, x[1:]], recorder)
    kept = [pool(filled(3, step)) for step in range(5)]
    for step, (same, twice, part) in enumerate(kept):
        assert torch.equal(same, filled(3, step))
        assert torch.equal(twice, filled(3, 2.0 * step))
        assert torch.equal(part, filled(2, step))


def test_inputs_may_have_gaps_and_outputs_need_not_be_tensors(recorder):
    pool = GraphPool(lambda x, y: [x + y, x.shape[0], None], recorder)
    wide = torch.arange(24.0).view(4, 6)
    for _ in range(3):
        total, rows, nothing = pool(wide[:, ::2], wide[:, 1::2])
        assert torch.equal(total, wide[:, ::2] + wide[:, 1::2])
        assert (rows, nothing) == (4, None)
    assert pool.counts.replayed == 1


def test_smaller_inputs_share_the_buffers_of_larger_ones(recorder):
    pool = GraphPool(double, recorder)
    for n in (1000, 10, 500):
        pool(filled(n), filled(n), filled(n, dtype=torch.int64))
        pool(filled(n), filled(n), filled(n, dtype=torch.int64))
        pool.check_invariants()
    assert pool.held_bytes() == (2 * 1024) * 4 + 1024 * 8
    for _ in range(2):
        pool(filled(2000))
    assert pool.held_bytes() == (2 * 1024) * 4 + 1024 * 8  # two of 1,000 are as large
    for _ in range(2):
        pool(filled(3000))
    pool.check_invariants()
    for n in (10, 3000, 1000):  # in the old buffer and in the new
        inputs = [filled(n, 3.0)] + ([filled(n), filled(n, dtype=torch.int64)] if n != 3000 else [])
        assert torch.equal(pool(*inputs)[0], filled(n, 6.0))
    assert pool.counts.replayed == 3


def test_the_graph_not_used_for_longest_goes(recorder):
    pool = GraphPool(double, recorder, Limits(graphs=2))
    for n in (1, 1, 2, 2, 1, 3, 3):  # 2 goes
        pool(filled(n))
        pool.check_invariants()
    assert pool.counts == Counts(replayed=1, eager=6, captured=3, evicted=1)
    pool(filled(1))
    pool(filled(3))
    assert pool.counts.replayed == 3
    pool(filled(2))  # seen before: captured at once
    assert (pool.counts.captured, pool.counts.evicted) == (4, 2)


def test_past_the_bytes_all_graphs_go_and_the_last_is_captured_again():
    recorder = FakeRecorder(pool_bytes=10_000)
    pool = GraphPool(double, recorder, Limits(nbytes=25_000))
    for n in (1, 1, 2, 2, 3, 3):
        pool(filled(n))
        pool.check_invariants()
    assert recorder.released == pool.counts.released == 1
    assert pool.held_bytes() == 10_000 + 256
    pool(filled(3))
    assert pool.counts.replayed == 1
    pool(filled(1))  # captured anew
    assert pool.counts.captured == 5


def test_a_graph_larger_than_the_limit_is_refused():
    recorder = FakeRecorder(pool_bytes=10_000)
    pool = GraphPool(double, recorder, Limits(nbytes=5_000))
    for _ in range(4):
        assert torch.equal(pool(filled(3))[0], filled(3, 2.0))
        pool.check_invariants()
    assert list(pool.failures.values()) == ["its graph takes 10256 bytes, and the limit is 5000"]
    assert recorder.recorded == 2
    assert pool.held_bytes() == 0


def test_a_capture_that_fails_leaves_the_function_and_the_reason(caplog):
    recorder = FakeRecorder(pool_bytes=100, failing=[1, 3])
    pool = GraphPool(double, recorder)
    for n in (1, 2, 3):
        for step in range(4):
            assert torch.equal(pool(filled(n, step))[0], filled(n, 2.0 * step))
            pool.check_invariants()
    assert list(pool.failures.values()) == ["operation not permitted when stream is capturing"] * 2
    assert recorder.recorded == 3
    assert pool.counts == Counts(replayed=2, eager=10, captured=1)
    assert "without a CUDA graph" in caplog.text


def test_after_many_failures_nothing_is_captured(caplog):
    recorder = FakeRecorder(failing=range(1, 100))
    pool = GraphPool(double, recorder)
    for n in range(40):
        pool(filled(n))
        pool(filled(n))
        pool.check_invariants()
    assert recorder.recorded == len(pool.failures) == MOST_FAILURES
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


def test_an_error_of_the_function_is_the_callers(recorder):
    def fail(x):
        raise ValueError("no")

    pool = GraphPool(fail, recorder)
    for _ in range(3):
        with pytest.raises(ValueError, match="no"):
            pool(filled(1))
        pool.check_invariants()
    assert not pool.failures


@pytest.mark.parametrize("first", [False, True])
def test_calls_in_inference_mode_and_out_of_it_share_a_graph(recorder, first):
    weight = torch.ones(3, requires_grad=True)
    pool = GraphPool(lambda x: [x * weight], recorder)
    for step in range(6):
        with torch.inference_mode(first == (step % 4 < 2)):
            (y,) = pool(filled(3, step))
            assert torch.equal(y, filled(3, step))
            assert not y.requires_grad
    assert pool.counts == Counts(replayed=4, eager=2, captured=1)


def test_calls_under_autocast_have_graphs_of_their_own(recorder):
    weight = torch.ones(3, 3)
    pool = GraphPool(lambda x: [x @ weight], recorder)
    for _ in range(3):
        assert pool(torch.ones(3, 3))[0].dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert pool(torch.ones(3, 3))[0].dtype == torch.bfloat16
        pool.check_invariants()
    assert pool.counts.captured == 2


def test_inside_the_callers_own_capture_it_is_the_function(recorder):
    pool = GraphPool(double, recorder)
    pool(filled(1))
    recorder.busy = True
    for _ in range(3):
        pool(filled(1))
    assert pool.counts == Counts(eager=4)
    recorder.busy = False
    pool(filled(1))
    assert pool.counts.captured == 1


def test_clearing_gives_everything_back():
    recorder = FakeRecorder(pool_bytes=100)
    pool = GraphPool(double, recorder)
    for _ in range(3):
        pool(filled(3))
    pool.clear()
    pool.check_invariants()
    assert pool.held_bytes() == 0
    assert torch.equal(pool(filled(3))[0], filled(3, 2.0))


def test_threads_take_turns(recorder):
    def slow(x):
        time.sleep(0.001)  # in which the other thread would write the buffer
        return [2 * x]

    pool = GraphPool(slow, recorder)
    wrong = []

    def run(value):
        for _ in range(20):
            if not torch.equal(pool(filled(3, value))[0], filled(3, 2.0 * value)):
                wrong.append(value)

    threads = [threading.Thread(target=run, args=(value,)) for value in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool.counts.captured == 1


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 300), st.sampled_from([torch.float32, torch.int64])), max_size=25),
    graphs=st.integers(1, 4),
    nbytes=st.integers(0, 20_000),
)
def test_any_order_of_calls_keeps_the_invariants(sizes, graphs, nbytes):
    pool = GraphPool(double, FakeRecorder(pool_bytes=700, failing=[4]), Limits(graphs, nbytes))
    for step, (n, dtype) in enumerate(sizes):
        x = filled(n, step, dtype)
        y, same = pool(x, x)
        assert torch.equal(y, 2 * x)
        assert torch.equal(same, x)
        pool.check_invariants()
    counts = pool.counts
    assert counts.replayed + counts.eager == len(sizes)


@pytest.mark.gpu
def test_cuda_graphs_replay_on_any_stream_and_share_memory():
    weight = torch.randn(256, 256, device="cuda")

    def run(x):
        return [torch.relu(x @ weight), x]

    pool = GraphPool(run, CudaRecorder(torch.device("cuda")))
    side = torch.cuda.Stream()
    kept = []
    for step in range(12):
        rows = (512, 16, 128)[step % 3]
        x = torch.full((rows, 256), float(step), device="cuda")
        if step % 2:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                kept.append((x, *pool(x)))
            torch.cuda.current_stream().wait_stream(side)
        else:
            kept.append((x, *pool(x)))
        pool.check_invariants()
    for x, y, same in kept:
        torch.testing.assert_close(y, torch.relu(x @ weight))
        assert torch.equal(same, x)
    assert pool.counts == Counts(replayed=6, eager=6, captured=3)
    pool.clear()
    assert pool.held_bytes() == 0


@pytest.mark.gpu
def test_a_function_that_waits_for_the_device_is_left_alone():
    pool = GraphPool(lambda x: [x * x.sum().item()], CudaRecorder(torch.device("cuda")))
    for _ in range(4):
        assert torch.equal(pool(torch.ones(3, device="cuda"))[0], torch.full((3,), 3.0, device="cuda"))
    assert len(pool.failures) == 1


@pytest.mark.gpu
def test_inside_a_capture_of_the_callers():
    pool = GraphPool(lambda x: [2 * x], CudaRecorder(torch.device("cuda")))
    x = torch.ones(3, device="cuda")
    for _ in range(3):
        pool(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (y,) = pool(x)
    x.fill_(5)
    graph.replay()
    assert torch.equal(y, torch.full((3,), 10.0, device="cuda"))
