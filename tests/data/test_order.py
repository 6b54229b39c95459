"""Which slot reads what: every sample once an epoch, sources in their shares, nothing but counts."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu2_megatron.config.schema import DataConfig
from emu2_megatron.data.order import sample_at, shares, source_at, sources_of_step


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2))
def test_slots_together_visit_every_sample_once_an_epoch(num_slots: int, num_samples: int, epochs: int) -> None:
    visited: Counter[tuple[int, int]] = Counter()
    for slot in range(num_slots):
        cursor = 0
        while (visit := sample_at(slot, cursor, num_slots, num_samples, (3, 0)))[0] <= epochs:
            visited[visit] += 1
            cursor += 1
        assert cursor > epochs  # no slot is ever without samples, however few there are
    if num_samples >= num_slots:
        assert visited == Counter({(e, i): 1 for e in range(epochs + 1) for i in range(num_samples)})
    else:
        assert sum(visited.values()) == num_slots * (epochs + 1)
        assert {i for e, i in visited if e == 0} == set(range(num_samples))


def test_order_is_a_fresh_permutation_each_epoch_seed_and_source() -> None:
    def order(seed: int, source: int, epoch: int) -> list[int]:
        return [sample_at(0, epoch * 50 + i, 1, 50, (seed, source))[1] for i in range(50)]

    orders = [order(0, 0, 0), order(0, 0, 1), order(1, 0, 0), order(0, 1, 0), list(range(50))]
    assert order(0, 0, 0) == orders[0]
    assert all(sorted(each) == orders[-1] for each in orders)
    assert len({tuple(each) for each in orders}) == 5


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.integers(0, 5000), st.integers(0, 10**6))
def test_every_run_of_draws_has_the_shares(weights: list[float], slot: int, start: int) -> None:
    """A golden-ratio sequence leaves less than log(draws) of a part too much or too little in any interval."""
    total = sum(weights)
    drawn = Counter(source_at(slot, start + k, weights) for k in range(500))
    for source, weight in enumerate(weights):
        assert abs(drawn[source] - 500 * weight / total) < 7  # ln 500 = 6.2, for both ends together


def test_slots_do_not_draw_in_step() -> None:
    """At any draw, the slots of a batch are spread over the sources as the draws of one slot are."""
    for draw in (0, 1, 77):
        drawn = Counter(source_at(slot, draw, (1, 1, 2)) for slot in range(400))
        assert all(abs(drawn[source] - share) < 8 for source, share in enumerate((100, 100, 200)))


@given(st.integers(1, 12), st.lists(st.integers(1, 30), min_size=1, max_size=4))
def test_a_step_has_exactly_its_samples(num_slots: int, quotas: list[int]) -> None:
    of_slot: Counter[tuple[int, int]] = Counter()
    steps = 2 * num_slots
    for step in range(steps):
        dealt = [list(sources_of_step(slot, step, num_slots, quotas)) for slot in range(num_slots)]
        assert Counter(source for sources in dealt for source in sources) == Counter(dict(enumerate(quotas)))
        sizes = [len(sources) for sources in dealt]
        assert max(sizes) - min(sizes) <= 1 or len(quotas) > 1
        for slot, sources in enumerate(dealt):
            of_slot.update((source, slot) for source in sources)
    # Over the steps every slot gets as many of each source: what num_slots steps deal out goes round evenly.
    for source, quota in enumerate(quotas):
        assert {of_slot[source, slot] for slot in range(num_slots)} == {quota * steps // num_slots}


@pytest.mark.parametrize(
    ("given_as", "wanted"),
    [({}, [1.0]), ({"weights": (3.0, 1.0)}, [0.75, 0.25]), ({"samples_per_step": (12800, 6400, 3200, 800)}, None)],
)
def test_shares(given_as: dict[str, tuple[float, ...]], wanted: list[float] | None) -> None:
    found = shares(DataConfig(**given_as))  # type: ignore[arg-type]
    assert found == (wanted or [12800 / 23200, 6400 / 23200, 3200 / 23200, 800 / 23200])
