"""One process as a world of one, for tests that build model parts without spawning."""

from collections.abc import Iterator

import harness
import pytest
import torch

from emu2_megatron.parallel import topology


@pytest.fixture(scope="module")  # not "package": that is the whole session where folders have no __init__.py
def world_of_one() -> Iterator[topology.Topology]:
    """Process groups of a single rank."""
    topology.start("gloo")
    yield topology.initialize(harness.config())
    topology.stop()


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small operations gain nothing from two threads, and wait for each other on a machine that does other things."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
