"""uniform(seed, position): uniform, and independent across seeds, positions and streams."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from paceline.sampling.random import MASK, bits64, mix64, uniform, uniforms

N = 4096


def series(axis: str, n: int = N) -> np.ndarray:
    """n numbers along one axis, the other two held: how the sampler uses them."""
    calls = {
        "seed": lambda i: uniform(i, 7),
        "position": lambda i: uniform(7, i),
        "stream": lambda i: uniform(7, 7, i),
        "diagonal": lambda i: uniform(i, i),
        "antidiagonal": lambda i: uniform(i, n - i),
    }
    return np.array([calls[axis](i) for i in range(n)])


@pytest.mark.parametrize("axis", ["seed", "position", "stream", "diagonal", "antidiagonal"])
def test_uniform_along_every_axis(axis: str) -> None:
    numbers = series(axis)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert stats.kstest(numbers, "uniform").pvalue > 1e-3
    counts, _ = np.histogram(numbers, bins=64, range=(0, 1))
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("axis", ["seed", "position", "stream"])
def test_neighbours_are_independent(axis: str) -> None:
    """Pairs (x_i, x_i+lag) fill the unit square evenly: chi-square over an 8 by 8 grid."""
    numbers = series(axis)
    for lag in (1, 2, 16):
        grid, _, _ = np.histogram2d(numbers[:-lag], numbers[lag:], bins=8, range=((0, 1), (0, 1)))
        assert stats.chisquare(grid.ravel()).pvalue > 1e-3, (axis, lag)


def test_neighbouring_seeds_do_not_replay_each_other_shifted() -> None:
    base = [uniform(5, position) for position in range(200)]
    for seed in (4, 6, 5 + 2**32, -5):
        other = {uniform(seed, position) for position in range(400)}
        assert not other & set(base)
    for stream in (1, 2):
        other = {uniform(5 - stream, position, stream) for position in range(400)}
        assert not other & set(base)


def test_each_input_bit_flips_half_the_output() -> None:
    for bit in range(64):
        for flipped in (bits64(99 ^ 1 << bit, 3), bits64(99, 3 ^ 1 << bit), bits64(99, 3, 1 << bit)):
            assert 12 <= (bits64(99, 3) ^ flipped).bit_count() <= 52, bit


def test_the_mixer_is_splitmix64() -> None:
    """The first outputs of the published generator from state 0 are the mixer at multiples of its increment."""
    golden = 0x9E3779B97F4A7C15
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [mix64(i * golden % 2**64) for i in (1, 2, 3)] == expected


def test_every_64_bit_seed_counts_and_negative_seeds_wrap() -> None:
    assert uniform(2**63, 1) != uniform(0, 1)
    assert uniform(-1, 1) == uniform(2**64 - 1, 1)


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_arrays_of_numbers_are_the_numbers_one_by_one(stream: int) -> None:
    pairs = [(seed, position) for seed in (0, 1, 7, 2**63, 2**64 - 1, -1, 2**70 + 5) for position in (0, 1, 9, 2**40)]
    seeds = np.array([seed & MASK for seed, _ in pairs], dtype=np.uint64)
    positions = np.array([position for _, position in pairs])
    assert uniforms(seeds, positions, stream).tolist() == [uniform(*pair, stream) for pair in pairs]
