"""A permutation of any size, the same everywhere, and without visible order."""

from collections import Counter
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu2_megatron.data.shuffle import _network, position

KEYS = st.lists(st.integers(-(2**70), 2**70), max_size=4).map(tuple)


def chi_square_is_small(observed: Counter[object], outcomes: int) -> bool:
    """Whether equally likely outcomes explain the counts: chi-square at most 5 standard deviations above its mean.
    Outcomes that were never seen count."""
    expected = observed.total() / outcomes
    chi_square = sum((n - expected) ** 2 for n in observed.values()) / expected
    chi_square += (outcomes - len(observed)) * expected
    freedom = outcomes - 1
    return chi_square < freedom + 5 * (2 * freedom) ** 0.5


@given(n=st.one_of(st.integers(1, 70), st.integers(1, 3000)), key=KEYS)
def test_every_position_once(n: int, key: tuple[int, ...]) -> None:
    assert sorted(position(i, n, key) for i in range(n)) == list(range(n))


@pytest.mark.parametrize("n", sorted({2**bits + d for bits in range(1, 15) for d in (-1, 0, 1)}))
def test_every_position_once_around_powers_of_two(n: int) -> None:
    assert sorted(position(i, n, (n, 5)) for i in range(n)) == list(range(n))


def test_known_answers() -> None:
    """Written down once: another Python, platform or version of this project must not reorder anybody's data."""
    assert [position(i, 10, (0,)) for i in range(10)] == [8, 9, 7, 5, 3, 1, 4, 0, 6, 2]
    assert [position(i, 7, (1234, 0, 3)) for i in range(7)] == [0, 3, 5, 2, 1, 4, 6]
    assert [position(i, 160_000_000, (1234, 0, 3)) for i in (0, 1, 2, 159_999_999)] == [
        79483757,
        16360501,
        63399614,
        83733069,
    ]
    assert [position(i, 2**40, (-1, 2**64)) for i in (0, 1, 2**40 - 1)] == [74866847179, 119698496359, 233606747583]
    assert [position(i, 2**64, ()) for i in (0, 2**64 - 1)] == [2804878435755033326, 18318478177446275312]


@pytest.mark.parametrize("n", [5000, 2**20 + 1, 2**40])
def test_the_same_in_numpys_arithmetic(n: int) -> None:
    """The network forwards, all numbers at once, in 64-bit integers that wrap around by themselves."""
    half, round_keys = _network(n, (3, 1))
    assert 2 ** (2 * half - 2) < n <= 2 ** (2 * half)
    start = np.random.default_rng(0).integers(0, n, 2000, dtype=np.uint64)
    shift, low = np.uint64(half), np.uint64(2**half - 1)
    now, walking = start.copy(), np.ones(len(start), bool)
    while walking.any():
        left, right = now[walking] >> shift, now[walking] & low
        for round_key in round_keys:
            z = right + np.uint64(round_key)
            z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ (z ^ z >> np.uint64(31)) & low
        now[walking] = left << shift | right
        walking[walking] = now[walking] >= n
    assert now.tolist() == [position(int(i), n, (3, 1)) for i in start]


@given(i=st.integers(0, 2**40 - 1), key=KEYS)
def test_large_sizes_can_be_undone(i: int, key: tuple[int, ...]) -> None:
    """Two numbers that met in one position could not both be brought back."""
    n = 2**40 - 12345
    i = min(i, n - 1)
    there = position(i, n, key)
    assert 0 <= there < n
    half, round_keys = _network(n, key)
    low, mask = 2**half - 1, 2**64 - 1
    back = n  # the walk backwards ends where it is in range again
    now = there
    while back >= n:
        left, right = now >> half, now & low
        for round_key in reversed(round_keys):
            z = (left + round_key) & mask
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
            left, right = right ^ ((z ^ (z >> 31)) & low), left
        back = now = left << half | right
    assert back == i


def test_keys_and_sizes_give_other_permutations() -> None:
    n = 500
    keys = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (-1,), (10,), (2**80,)]
    orders = [tuple(position(i, n, key) for i in range(n)) for key in keys]
    orders.append(tuple(position(i, n + 1, ()) for i in range(n)))
    for one, other in permutations(orders, 2):
        # Of two random orders of n numbers, one number is expected where the other has it; 10 are one in ten million.
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 10


@pytest.mark.parametrize("n", [2, 3, 5, 8, 13, 100])
def test_all_positions_are_equally_likely(n: int) -> None:
    for i in {0, n // 2, n - 1}:
        assert chi_square_is_small(Counter(position(i, n, (seed, 7)) for seed in range(100 * n)), n)


@pytest.mark.parametrize("n", [4, 6])
def test_all_orders_are_equally_likely(n: int) -> None:
    orders = Counter(tuple(position(i, n, (seed,)) for i in range(n)) for seed in range(10_000))
    assert chi_square_is_small(orders, len(list(permutations(range(n)))))


@pytest.mark.parametrize("n", [1000, 20_000])
def test_neighbours_part(n: int) -> None:
    """Two neighbours are next to each other with probability 2 / n; how far they are apart has a triangular
    distribution, whose tenths are equally full."""
    order = [position(i, n, (n,)) for i in range(n)]
    apart = [abs(a - b) for a, b in pairwise(order)]
    assert sum(d == 1 for d in apart) < 12  # 2 are expected
    # P(distance <= d) = 1 - (1 - d / n)²
    assert chi_square_is_small(Counter(int(10 * (1 - (1 - d / n) ** 2)) for d in apart), 10)


@pytest.mark.parametrize(("i", "n"), [(-1, 5), (5, 5), (0, 0), (3, -1), (0, 2**64 + 1)])
def test_out_of_range(i: int, n: int) -> None:
    with pytest.raises(ValueError, match="range"):
        position(i, n, (0,))
