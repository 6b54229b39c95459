"""Both implementations of an op."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from emu2_megatron.platform import library


@pytest.fixture(params=["compiled", "reference"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A test runs with the compiled ops, and again with the references."""
    if request.param == "compiled" and library.problem:
        pytest.skip(f"compiled ops: {library.problem}")
    monkeypatch.setattr(library, "enabled", request.param == "compiled")
    return str(request.param)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch.ops.emu2; a test of the compiled ops alone."""
    if library.problem:
        pytest.skip(f"compiled ops: {library.problem}")
    monkeypatch.setattr(library, "enabled", True)
    return torch.ops.emu2


@pytest.fixture
def on_threads() -> Any:
    """Calls a function on 1, 2, 3 and again 2 threads; returns its four results."""
    before = torch.get_num_threads()

    def results(function: Callable[[], Any]) -> list[Any]:
        out = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            out.append(function())
        return out

    yield results
    torch.set_num_threads(before)
