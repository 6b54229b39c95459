"""Rows of fixed length out of samples of any length."""

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu2_megatron.data.packing import pack_row
from emu2_megatron.data.samples import Sample

PAD = 99


class _List:
    """A SampleStream over a list."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self.left = list(samples)

    def peek(self) -> Sample:
        return self.left[0]

    def advance(self) -> None:
        self.left.pop(0)


def _sample(key: str, tokens: list[int], pictures: int = 0) -> Sample:
    pixels = [np.full((3, 2, 2), ord(key) % 256, dtype=np.uint8)] * pictures
    roles = [0, *[5] * pictures, *[2] * (len(tokens) - 1 - pictures)]
    return Sample(key, np.array(tokens, dtype=np.int64), np.array(roles, dtype=np.uint8), pixels, [1] * pictures)


def test_a_row_closes_at_the_first_sample_that_does_not_fit() -> None:
    a, b, c, d = _sample("a", [1, 10, 11], 1), _sample("b", [1, 12], 1), _sample("c", [1, 13, 14]), _sample("d", [1])
    stream = _List([a, b, c, d])
    row = pack_row(stream, 7, PAD)
    assert row.tokens_S.tolist() == [1, 10, 11, 1, 12, PAD, PAD] and row.tokens_S.dtype == np.int64
    assert row.roles_S.tolist() == [0, 5, 2, 0, 5, 0, 0] and row.roles_S.dtype == np.uint8
    assert (row.keys, row.queries) == (["a", "b"], [1, 1])
    assert [int(pixels_3HW[0, 0, 0]) for pixels_3HW in row.pictures] == [97, 98]
    assert stream.left == [c, d]  # d would have fitted, but order is kept; c starts the next row


def test_a_full_row_asks_for_no_further_sample() -> None:
    stream = _List([_sample("a", [1, 10]), _sample("b", [1])])
    assert pack_row(stream, 3, PAD).tokens_S.tolist() == [1, 10, 1]
    assert stream.left == []  # had it looked for a third, the list would have raised IndexError


def test_a_sample_longer_than_a_row_is_an_error_not_an_endless_loop() -> None:
    with pytest.raises(ValueError, match="4 tokens does not fit a row of 3"):
        pack_row(_List([_sample("a", [1, 2, 3, 4])]), 3, PAD)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=30), st.integers(9, 20))
def test_rows_are_the_stream_cut_as_late_as_possible(shapes: list[tuple[int, int]], length: int) -> None:
    samples = [
        _sample(chr(97 + i), [1, *range(100 * i + 100, 100 * i + 99 + n)], min(pictures, n - 1))
        for i, (n, pictures) in enumerate(shapes)
    ]
    # Each of the last samples fills a row alone, so that no test runs out of samples; they are not looked at.
    stream = _List([*samples, _sample("~", [1] * length), _sample("~", [1] * length)])
    rows = []
    while len(stream.left) > 2:
        rows.append(pack_row(stream, length, PAD))
    packed = [token for row in rows for token in row.tokens_S.tolist() if token != PAD]
    assert packed == [token for sample in samples for token in sample.tokens_S.tolist()]
    assert [key for row in rows for key in row.keys] == [sample.key for sample in samples]
    size = {sample.key: len(sample.tokens_S) for sample in samples}
    for row, following in zip(rows, rows[1:], strict=False):
        assert sum(size[key] for key in row.keys) + size[following.keys[0]] > length
    for row in rows:
        used = sum(size[key] for key in row.keys)
        assert row.tokens_S.shape == row.roles_S.shape == (length,)
        assert (row.tokens_S[used:] == PAD).all() and not row.roles_S[used:].any()
        assert row.roles_S[0] == 0  # nothing precedes the first token: it is no target
        assert sum(row.queries) == (row.roles_S & 1).sum() and len(row.pictures) == len(row.queries)
