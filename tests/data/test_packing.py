"""Rows of fixed length out of a pool of samples."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emu2_megatron.data.packing import Cost, assemble, choose, total
from emu2_megatron.data.samples import Sample
from emu2_megatron.data.sequence import PADDING, START

PAD = 99
_costs = st.builds(Cost, st.integers(1, 30), st.integers(0, 4))


def _sample(key: str, tokens: list[int], pictures: int = 0) -> tuple[Sample, list[torch.Tensor]]:
    roles = [START, *[5] * pictures, *[2] * (len(tokens) - 1 - pictures)]
    decoded = [torch.full((3, 2, 2), ord(key), dtype=torch.uint8)] * pictures
    return Sample(key, np.array(tokens), np.array(roles, dtype=np.uint8), [], [1] * pictures), decoded


def test_a_row_by_hand() -> None:
    row = assemble([_sample("a", [1, 10, 11], 1), _sample("b", [1, 12], 1)], 8, PAD)
    assert row.tokens_S.tolist() == [1, 10, 11, 1, 12, PAD, PAD, PAD] and row.tokens_S.dtype == np.int64
    assert row.roles_S.tolist() == [START, 5, 2, START, 5, START | PADDING, PADDING, PADDING]
    assert row.roles_S.dtype == np.uint8
    assert (row.keys, row.queries) == (["a", "b"], [1, 1])
    assert [int(pixels_3HW[0, 0, 0]) for pixels_3HW in row.pictures] == [97, 98]  # type: ignore[index]


def test_rows_without_padding_and_without_samples() -> None:
    full = assemble([_sample("a", [1, 10])], 2, PAD)
    assert (full.tokens_S.tolist(), full.roles_S.tolist()) == ([1, 10], [START, 2])
    empty = assemble([], 2, PAD)
    assert (empty.tokens_S.tolist(), empty.roles_S.tolist()) == ([PAD, PAD], [START | PADDING, PADDING])
    with pytest.raises(ValueError, match="3 tokens do not fit a row of 2"):
        assemble([_sample("a", [1, 10, 11])], 2, PAD)


@pytest.mark.parametrize(
    ("pool", "row", "ratio", "chosen"),
    [  # a row of 20 tokens
        ([(5, 0), (3, 9)], (0, 0), 0.1, 0),  # an empty row takes the oldest, whatever it is
        ([(21, 0), (3, 9)], (0, 0), 0.1, 1),  # if it fits
        ([(5, 0), (8, 0)], (10, 2), 0.1, 1),  # nothing behind, nothing too many: the longer one, 2/20 against 5/20
        ([(5, 0), (8, 2)], (10, 2), 0.1, 0),  # 5/20 against 2/20 + two too many of the two that are due
        ([(5, 0), (4, 1)], (10, 0), 0.1, 1),  # 5/20 + (1.5 / 2) / 2 against 6/20 + (0.4 / 2) / 2
        ([(5, 0), (5, 0)], (10, 0), 0.0, 0),  # equals: the older one
        ([(11, 0)], (10, 0), 0.0, None),
        ([], (0, 0), 0.0, None),
    ],
)
def test_what_goes_in_next(pool: list[tuple[int, int]], row: tuple[int, int], ratio: float, chosen: int | None) -> None:
    assert choose([Cost(*cost) for cost in pool], Cost(*row), 20, ratio) == chosen


@given(st.lists(_costs), _costs, st.integers(1, 40), st.floats(0, 1))
def test_what_is_chosen_fits(pool: list[Cost], row: Cost, length: int, ratio: float) -> None:
    index = choose(pool, row, length, ratio)
    fitting = [cost for cost in pool if row.tokens + cost.tokens <= length]
    assert not fitting if index is None else pool[index] in fitting


def test_rows_from_a_pool_are_fuller_and_more_even() -> None:
    """A tenth of pages with 8 pictures, half text, the rest captions: against rows in the order of the data."""
    generator = np.random.default_rng(0)
    stream = [
        Cost(600 + int(generator.integers(100)), 8) if kind < 0.1
        else Cost(int(generator.integers(20, 300)), 0) if kind < 0.6
        else Cost(70 + int(generator.integers(40)), 1)
        for kind in generator.random(20000)
    ]  # fmt: skip

    def rows(buffer: int) -> tuple[float, float]:
        """Share of the rows that is filled, and standard deviation of the pictures of a row."""
        left, used, pool = iter(stream), Cost(0, 0), []
        fill, pictures = [], []
        while len(fill) < 1000:
            row = Cost(0, 0)
            while True:
                pool += [next(left) for _ in range(buffer - len(pool))]
                seen = total([used, row, *pool])
                index = choose(pool, row, 1024, seen.pictures / seen.tokens)
                if index is None:
                    break
                row = total([row, pool.pop(index)])
            used = total([used, row])
            fill.append(row.tokens / 1024)
            pictures.append(row.pictures)
        return float(np.mean(fill)), float(np.std(pictures))

    (plain, uneven), (full, even) = rows(1), rows(16)
    print(f"in order: {plain:.3f} full, pictures +- {uneven:.2f}; from a pool of 16: {full:.3f}, +- {even:.2f}")
    assert full > 0.98 > plain + 0.1
    assert even < 0.7 * uneven
