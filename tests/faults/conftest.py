"""What the fault tests share: shards, a run without faults to compare with, and the tally of what was injected."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import fault_runs
import pytest

from emu2_megatron.checkpoint import files

SCENARIOS = {
    "kill": "SIGKILL of one rank or both, at a random moment",
    "kill in a save": "the same, while a checkpoint is being written",
    "kill in a background save": "the same, while one is being written in the background",
    "end": "SIGTERM to all ranks at a random moment",
    "launcher: rank killed": "SIGKILL of a rank that the launcher started",
    "launcher: ended": "SIGTERM to the launcher",
    "launcher: killed": "SIGKILL of the launcher, whose ranks live on",
    "launcher: rank dies at start": "SIGKILL of a rank before it has joined the others",
    "full disk": "no room left for a checkpoint: before it begins, in tensors, in the last files",
    "full disk of the log": "no room left for the log",
    "read-only directory": "a directory that cannot be written, from the start or from then on",
    "damaged checkpoint": "a file of the newest checkpoint is cut off, has a flipped bit, or is missing",
    "dangerous checkpoint": "a table of contents that runs code, or refers to other files",
    "NaN in a checkpoint": "a weight or moment of the newest checkpoint is not a number",
    "leftovers": "folders of interrupted saves and deletions",
    "damaged data": "a shard is cut off, has flipped bits, or is missing",
    "two runs": "two runs in one directory",
    "wrong --resume": "a path that is no checkpoint",
}
"""What is done to runs. Every scenario is injected at least once by `make faults`."""
OF_GUARDS = ("NaN in a gradient", "NaN in a picture", "a rank that sleeps")
"""Scenarios that tests/training/test_stopping.py and test_guards.py inject, and that are not counted here."""

_TALLY = pytest.StashKey[dict[str, list[int]]]()

Fault = Callable[[str], AbstractContextManager[None]]
Straight = Callable[..., Path]
Stopped = Callable[..., Path]


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Fault:
    """`with fault(SCENARIO):` around an injection and all that is checked after it."""
    tally = request.config.stash.setdefault(_TALLY, {name: [0, 0] for name in SCENARIOS})

    @contextmanager
    def inject(scenario: str) -> Iterator[None]:
        tally[scenario][0] += 1
        yield
        tally[scenario][1] += 1

    return inject


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> dict[str, list[int]]:
    """By scenario: how many were injected and survived in this session so far."""
    return request.config.stash.get(_TALLY, {name: [0, 0] for name in SCENARIOS})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    tally = terminalreporter.config.stash.get(_TALLY, {})
    injected, survived = (sum(counts[i] for counts in tally.values()) for i in (0, 1))
    if injected:
        terminalreporter.section("faults")
        for name, (was, did) in tally.items():
            if was:
                terminalreporter.line(f"{was:4} injected {did:4} survived  {name}: {SCENARIOS[name]}")
        terminalreporter.line(f"{injected} faults injected, {survived} survived")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Captioned pictures and interleaved pages."""
    folder = tmp_path_factory.mktemp("shards") / "tar"
    command = [sys.executable, "tools/make_shards.py", "--input", "examples/data", "--output", str(folder)]
    subprocess.run(command, cwd=fault_runs.ROOT, check=True, capture_output=True)
    return f"{folder}/i*.tar"


@pytest.fixture(scope="session")
def straight(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """The folder of a run to which nothing happens, given what it is started with; run once for all tests."""
    runs: dict[tuple[str, ...], Path] = {}

    def run(*more: str) -> Path:
        if more not in runs:
            runs[more] = tmp_path_factory.mktemp("straight") / "run"
            fault_runs.finish(runs[more], shards, *more)
        return runs[more]

    return run


@pytest.fixture
def stopped(straight: Straight, tmp_path: Path) -> Stopped:
    """A copy of that folder as it was when a run had got to its checkpoint of step 6 (or `last`), and no further."""

    def copy(*more: str, last: int = 6) -> Path:
        folder = tmp_path / "run"
        shutil.copytree(straight(*more), folder)
        for path in fault_runs.checkpoints(folder):
            if files.step_of(path) > last:
                shutil.rmtree(path)
        return folder

    return copy
