"""The kernels under the sanitizers, with buffers of exactly the size they ask for."""

from collections.abc import Callable
from pathlib import Path

import pytest
from emulation import FAR, driver_cases, link, run_driver


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizer_is_silent(sanitizer: str, objects: Callable[[str], dict[str, Path]], tmp_path: Path) -> None:
    """`address` has undefined behaviour in it. test_mutations.py shows that they would speak up."""
    driver = link(list(objects(sanitizer).values()), tmp_path / "driver", sanitizer, library=False)
    for multiprocessors, seed in ((1, 1), (2, 0), (3, 5)):
        done = run_driver(driver, [*driver_cases(), FAR], multiprocessors, seed)
        assert done.returncode == 0, f"{multiprocessors} blocks, seed {seed}\n{done.stdout}{done.stderr[-4000:]}"
