"""One process as a world of one, for tests that build model parts without spawning."""

from collections.abc import Iterator

import harness
import pytest
from one_thread import one_thread  # noqa: F401  (a fixture)

from emu2_megatron.parallel import topology


@pytest.fixture(scope="module")  # not "package": that is the whole session where folders have no __init__.py
def world_of_one() -> Iterator[topology.Topology]:
    """Process groups of a single rank."""
    topology.start("gloo")
    yield topology.initialize(harness.config())
    topology.stop()
