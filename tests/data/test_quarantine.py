"""When a share of bad samples ends a run: not by chance, and not too late."""

import random

import pytest

from emu2_megatron.data.quarantine import Quarantine
from emu2_megatron.errors import DataError


def _reads_until_the_end(share: float, seed: int, reads: int = 20000) -> int | None:
    draws, quarantine = random.Random(seed), Quarantine(None, 0.05)
    for number in range(1, reads + 1):
        if draws.random() >= share:
            quarantine.good()
            continue
        try:
            quarantine.add("shard", 0, "key", DataError("odd: it is"))
        except DataError:
            return number
    return None


def test_chance_ends_no_run_and_too_many_end_it_soon() -> None:
    """A limit of 5 %: with 3 % bad none of 200 ranks ends; with 10 % all do, within a thousand reads."""
    assert {_reads_until_the_end(0.03, seed, 3000) for seed in range(200)} == {None}
    ends = [_reads_until_the_end(0.10, seed) for seed in range(50)]
    assert all(end is not None and 100 <= end < 2000 for end in ends)


def test_all_may_be_bad_where_that_is_allowed() -> None:
    quarantine = Quarantine(None, 1.0)
    for number in range(500):
        quarantine.add("shard", number, "key", DataError("odd: it is"))
    with pytest.raises(DataError, match="data.max_bad_share: 100 of 100 samples"):
        strict = Quarantine(None, 0.0)
        for number in range(500):
            strict.add("shard", number, "key", DataError("odd: it is"))
