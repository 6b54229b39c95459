"""The whole command, with torchrun in it, and what it says when a rank or itself is ended."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from fault_runs import LIMIT, Run, as_if_nothing_was, checkpoints, finish, launch, same

from .conftest import Fault, Straight

LONG = ("training.steps=48",)


def _ranks(launcher: "subprocess.Popen[str]") -> dict[int, psutil.Process]:
    """The rank processes that a launcher has started so far."""
    found = {}
    for process in psutil.Process(launcher.pid).children():
        try:
            environment = process.environ()
        except psutil.Error:
            continue
        if "TORCHELASTIC_RUN_ID" in environment and "RANK" in environment:
            found[int(environment["RANK"])] = process
    return found


def _until(seen: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _ended(launcher: "subprocess.Popen[str]") -> tuple[int, list[str]]:
    """Exit code, and the lines that say why."""
    output, _ = launcher.communicate(timeout=LIMIT)
    return launcher.returncode, [line for line in output.splitlines() if line.startswith("emu2: ")]


@pytest.mark.slow
def test_a_rank_is_killed(shards: str, straight: Straight, tmp_path: Path, fault: Fault) -> None:
    folder = tmp_path / "run"
    with fault("launcher: rank killed"):
        launcher = launch(folder, shards, *LONG)
        _until(lambda: bool(checkpoints(folder)))
        _ranks(launcher)[1].kill()
        code, messages = _ended(launcher)
        assert code == 1 and "emu2: rank 1 was killed by SIGKILL" in messages[-1] and "--resume auto" in messages[-1]
        assert as_if_nothing_was(folder, straight(*LONG))
        finish(folder, shards, *LONG, "--resume", "auto")
        same(folder, straight(*LONG))


@pytest.mark.faults
@pytest.mark.slow
def test_a_rank_dies_at_start(shards: str, tmp_path: Path, straight: Straight, fault: Fault) -> None:
    """The other one waits for it, and the launcher ends that."""
    folder = tmp_path / "run"
    for rank in (0, 1):
        with fault("launcher: rank dies at start"):
            launcher = launch(folder, shards, *LONG)
            _until(lambda launcher=launcher: len(_ranks(launcher)) == 2)
            _ranks(launcher)[rank].kill()
            code, messages = _ended(launcher)
            assert code == 1 and f"emu2: rank {rank} was killed by SIGKILL" in messages[-1]
            assert checkpoints(folder) == []
    finish(folder, shards, *LONG, "--resume", "auto")
    same(folder, straight(*LONG))


@pytest.mark.faults
@pytest.mark.slow
def test_it_is_told_to_end(shards: str, straight: Straight, tmp_path: Path, fault: Fault) -> None:
    folder = tmp_path / "run"
    with fault("launcher: ended"):
        launcher = launch(folder, shards, *LONG)
        _until(lambda: bool(checkpoints(folder)))
        ranks = _ranks(launcher)
        launcher.send_signal(signal.SIGTERM)
        code, messages = _ended(launcher)
        assert code != 0 and messages, "it says nothing"
        assert not any(process.is_running() for process in ranks.values())
        assert as_if_nothing_was(folder, straight(*LONG))
        finish(folder, shards, *LONG, "--resume", "auto")
        same(folder, straight(*LONG))


@pytest.mark.faults
@pytest.mark.slow
def test_it_is_killed(shards: str, straight: Straight, tmp_path: Path, fault: Fault) -> None:
    """Nobody is left to end its ranks: while they go on, a new run does not begin beside them."""
    folder, long = tmp_path / "run", ("training.steps=400",)
    with fault("launcher: killed"):
        launcher = launch(folder, shards, *long)
        _until(lambda: bool(checkpoints(folder)))
        ranks = _ranks(launcher)
        launcher.kill()
        launcher.wait(LIMIT)
        try:
            second = Run(folder, shards, *long, "--resume", "auto")
            assert second.wait() == [2, 2], second.output
            assert f"in use by another run (process {ranks[0].pid}" in second.messages[0]
        finally:
            for process in ranks.values():
                os.kill(process.pid, signal.SIGKILL)
        psutil.wait_procs(list(ranks.values()), LIMIT)
        done = as_if_nothing_was(folder, folder)[-1]
        run = finish(folder, shards, f"training.steps={done + 2}", "--resume", "auto")
        assert f"step {done} is done" in run.output
