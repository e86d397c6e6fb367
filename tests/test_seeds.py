"""Named streams: uniform, independent of batch composition, and the same on every machine for ever."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tiltlm.seeds import Stream, stream


def kolmogorov_smirnov(x: Tensor) -> float:
    """Largest gap between the empirical distribution of `x` and the uniform one, times √n (2.3 at p = 5e-5)."""
    ordered, n = x.sort().values, len(x)
    rank = torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum((rank[1:] - ordered).max(), (ordered - rank[:-1]).max()) * n**0.5)


def correlation(x: Tensor, y: Tensor) -> float:
    """In standard errors of an independent pair (1/√n)."""
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1] * len(x) ** 0.5)


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_numbers_are_uniform_over_rows_and_over_steps(seed):
    """Kolmogorov–Smirnov down one step, along one row and over all; a slight bend is told apart."""
    grid = stream(seed, "uniform").uniform(range(2000), 50)
    for x in (grid[:, 7], stream(seed, "row").uniform([3], 5000)[0], grid.flatten()):
        assert kolmogorov_smirnov(x) < 2.3
    assert kolmogorov_smirnov(grid.flatten() ** 1.05) > 2.3


def test_every_bit_counts_the_low_ones_too():
    """The fraction that is left after 2^20 bins is uniform as well."""
    x = stream(0, "bits").uniform(range(20_000), 1)[:, 0]
    assert kolmogorov_smirnov((x * 2**20) % 1) < 2.3


def test_neighbouring_rows_steps_and_streams_are_uncorrelated():
    grid = stream(5).uniform(range(300), 300)
    other = stream(6).uniform(range(300), 300)
    for a, b in ((grid[:-1], grid[1:]), (grid[:, :-1], grid[:, 1:]), (grid, grid.t()), (grid, other)):
        assert abs(correlation(a.flatten(), b.flatten())) < 4
    assert abs(correlation(grid.flatten(), (grid + 20 * other).flatten())) > 4


def test_a_row_s_numbers_do_not_depend_on_who_else_asks():
    s = stream(3, "x")
    grid = s.uniform(range(10), 6)
    assert torch.equal(s.uniform([7, 2, 2], 6), grid[[7, 2, 2]])
    assert torch.equal(s.uniform(torch.tensor([4]), [5, 0]), grid[4:5, [5, 0]])
    assert torch.equal(s.uniform([9], 3), grid[9:, :3])
    assert grid.unique().numel() == 60


def test_rows_and_steps_may_be_very_large():
    assert stream(0).uniform([2**40, 2**62], [2**33]).unique().numel() == 2


def test_golden_numbers():
    """Pinned: a refactor that moves one of these moves every published result."""
    s = stream(0, "rollouts")
    assert s.key == 0xEB08643907DA571C
    assert s.uniform([0, 5], [0, 3]).flatten().tolist() == [
        0.15937197691250515, 0.28236158200650896, 0.4315882178971723, 0.009946392688066186,
    ]  # fmt: skip
    assert stream(42, "pairs", 3).child("x").uniform([1], 1).item() == 0.4481563167420842


def test_the_hash_is_splitmix64_applied_once_per_coordinate():
    """The same number in Python's own whole numbers, the published finaliser written out."""

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    golden, s = 0x9E3779B97F4A7C15, stream(7, "x")
    for row, step in ((0, 0), (3, 5), (2**40, 2**33)):
        z = mix((mix((s.key + (row + 1) * golden) % 2**64) + (step + 1) * golden) % 2**64)
        assert s.uniform([row], [step]).item() == pytest.approx((z // 2**12 + 0.5) / 2**52, abs=2**-53)


def test_numbers_lie_in_the_open_interval():
    x = stream(1).uniform(range(1000), 100)
    assert x.dtype == torch.float64 and x.shape == (1000, 100) and x.min() > 0 and x.max() < 1


@pytest.mark.parametrize("hash_value", [0, 1, 2**11 - 1, 2**63, 2**64 - 2**11 - 1, 2**64 - 1])
def test_the_open_interval_is_open_at_both_ends_for_every_hash(hash_value):
    """The stream whose hash at (row 0, step 0) is `hash_value`, found by running the hash backwards."""
    x = Stream(key_with_first_hash(hash_value)).uniform([0], 1).item()
    assert 0 < x < 1 and abs(x - hash_value / 2**64) < 2**-52


def key_with_first_hash(value: int) -> int:
    """The key for which entry (0, 0) hashes to `value`: both SplitMix64 rounds undone."""
    golden = 0x9E3779B97F4A7C15
    for _ in range(2):
        value = (unmix(value) - golden) % 2**64
    return value


def unmix(z: int) -> int:
    """The inverse of SplitMix64's finaliser (each xor-shift and each odd multiplication is a bijection)."""
    z = unshift(z, 31) * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
    z = unshift(z, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64
    return unshift(z, 30)


def unshift(z: int, by: int) -> int:
    x = z
    for _ in range(64 // by + 1):
        x = z ^ (x >> by)
    return x


def test_child_streams_differ_from_their_parent_and_from_each_other():
    parent = stream(0)
    keys = {parent.key} | {parent.child(name).key for name in ("a", "b", "ab", 1, 2, 12)}
    keys |= {parent.child("a", "b").key, parent.child("b", "a").key, parent.child(1, 2).key, stream(1).key}
    assert len(keys) == 11
    assert parent.child("a", 1) == stream(0).child("a", 1)


def test_one_name_with_a_slash_is_not_two_names():
    assert stream(0).child("a/b") != stream(0).child("a", "b")


def test_seeds_are_told_apart():
    assert len({stream(seed, "x").key for seed in range(1000)}) == 1000
    assert stream(-1).key == stream(2**64 - 1).key


def test_a_permutation_is_one_and_depends_on_the_name():
    a, b = stream(0, "a").permutation(100), stream(0, "b").permutation(100)
    assert a.sort().values.tolist() == list(range(100)) and not torch.equal(a, b)
    assert torch.equal(a, stream(0, "a").permutation(100))


def test_generators_are_the_stream_s_own():
    s, other = stream(0, "g"), stream(0, "h")
    draws = [torch.rand(3, generator=x.generator()).tolist() for x in (s, s, other)]
    assert draws[0] == draws[1] != draws[2]
    assert s.numpy().random() == s.numpy().random() != other.numpy().random()


def test_seed_everything_seeds_torch_s_global_generator():
    with torch.random.fork_rng(devices=[]):
        stream(0, "g").seed_everything()
        first = torch.rand(3)
        stream(0, "g").seed_everything()
        assert torch.equal(torch.rand(3), first)
        stream(0, "h").seed_everything()
        assert not torch.equal(torch.rand(3), first)


def test_the_yardstick_knows_a_uniform_sample_from_a_bent_one():
    """√n·D of an even grid is 1/(2√n); of x² it is √n/4."""
    grid = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    assert kolmogorov_smirnov(grid) == pytest.approx(0.5 / 20, abs=1e-9)
    assert kolmogorov_smirnov(grid**2) == pytest.approx(20 / 4, rel=0.01)
    assert math.isclose(correlation(grid, grid), 20, rel_tol=1e-6)
