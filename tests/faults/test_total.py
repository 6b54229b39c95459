"""Runs last: the number of faults."""

import pytest

from .conftest import OF_GUARDS, SCENARIOS


@pytest.mark.faults
@pytest.mark.slow
def test_every_fault_was_injected_and_survived(tally: dict[str, list[int]]) -> None:
    """With `make faults`, which runs all of this folder."""
    assert not set(OF_GUARDS) & set(SCENARIOS)
    assert [name for name, (injected, survived) in tally.items() if not injected or survived < injected] == []
    injected = sum(count for count, _ in tally.values())
    print(f"{injected} faults injected and survived")
    assert injected >= 90
