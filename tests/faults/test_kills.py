"""Ranks that are killed: whatever was saved before is sound, and the run goes on as if nothing had been."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_runs import Run, as_if_nothing_was, finish, same, unfinished

from .conftest import Fault, Straight

SEED = int(os.environ.get("EMU2_FAULT_SEED", random.randrange(10**6)))
LAYOUTS = {
    "DP2": (),
    "PP2, background": ("parallel.pipeline_parallel_size=2", "checkpoint.asynchronous=true"),
}


def _lines(folder: Path) -> int:
    log = folder / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.is_file() else 0


def _being_saved(folder: Path, number: int) -> Callable[[], bool]:
    """Whether this run is writing its so many-th checkpoint, or a later one."""
    begun, met = time.time(), set()

    def seen() -> bool:
        try:
            met.update(p.name for p in unfinished(folder) if p.stat().st_ctime > begun and any(p.glob("__*")))
        except FileNotFoundError:  # renamed meanwhile
            pass
        return len(met) >= number

    return seen


def _kill_one(run: Run, moment: str, luck: random.Random) -> None:
    """Wait for a moment, and a random while, and kill rank 0, rank 1 or both."""
    if moment == "in a save":
        assert run.until(_being_saved(run.folder, luck.randint(1, 3))), run.output
        time.sleep(luck.uniform(0, 0.02))
    elif moment == "after a step":
        # What was logged of lost steps is dropped first.
        run.until(lambda: "counted: " in run.output)
        lines, more = _lines(run.folder), luck.randint(1, 5)
        assert run.until(lambda: _lines(run.folder) >= lines + more), run.output
        time.sleep(luck.uniform(0, 0.1))
    else:
        time.sleep(luck.uniform(0, 1.5))
    run.kill(*luck.choice([(0,), (1,), (0, 1)]))


def _killed_and_resumed(
    kills: int, name: str, shards: str, tmp_path: Path, straight_run: Straight, fault: Fault
) -> None:
    print(f"EMU2_FAULT_SEED={SEED}")
    layout = (*LAYOUTS[name], f"training.steps={6 * kills + 8}")
    luck, straight = random.Random(SEED), straight_run(*layout)
    moments = (["in a save"] * 2 + ["after a step", "at the start"]) * kills
    moments = moments[:kills]
    luck.shuffle(moments)
    folder, saved, inside, resumed = tmp_path / "run", 0, 0, 0
    for moment in moments:
        kind = "kill" if moment != "in a save" else f"kill in a {'background ' * ('background' in name)}save"
        with fault(kind):
            run = Run(folder, shards, *layout, "--resume", "auto")
            _kill_one(run, moment, luck)
            if moment == "at the start":
                # Ranks wait half an hour for others to join: to end those is the launcher's part.
                time.sleep(1)
                run.kill(0, 1, how=signal.SIGTERM)
            codes = run.wait()
            assert -signal.SIGKILL in codes and 0 not in codes, (moment, codes, run.output)
            # A survivor says in one line what happened to it.
            survivors = [rank for rank, code in enumerate(codes) if code not in (-signal.SIGKILL, -signal.SIGTERM)]
            assert [codes[rank] for rank in survivors] == [1] * len(survivors), run.output
            assert len(run.messages) == len(survivors) and "Traceback" not in run.output, run.output
            assert all("another rank ended" in message for message in run.messages)
            steps = as_if_nothing_was(folder, straight) or [0]
            assert steps[-1] >= saved, "a complete checkpoint was lost"
            saved = steps[-1]
            inside, resumed = inside + bool(unfinished(folder)), resumed + ("resumed from" in run.output)
    print(f"{kills} kills, {inside} of them in a save, of runs of which {resumed} were resumed ones")
    # Of a few kills none may meet a save; of many, some do.
    assert min(inside, resumed) >= kills // 5, "these kills prove little"
    finish(folder, shards, *layout, "--resume", "auto")
    same(folder, straight)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_few_kills(name: str, shards: str, straight: Straight, tmp_path: Path, fault: Fault) -> None:
    _killed_and_resumed(4, name, shards, tmp_path, straight, fault)


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_twenty_kills(name: str, shards: str, straight: Straight, tmp_path: Path, fault: Fault) -> None:
    _killed_and_resumed(20, name, shards, tmp_path, straight, fault)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_told_to_end(name: str, shards: str, straight: Straight, tmp_path: Path, fault: Fault) -> None:
    """SIGTERM to all, as from SLURM: nothing is lost but unsaved steps, of which there may be none."""
    luck, folder, layout = random.Random(SEED), tmp_path / "run", (*LAYOUTS[name], "training.steps=32")
    with fault("end"):
        run = Run(folder, shards, *layout)
        assert run.until(lambda: _lines(folder) >= 3), run.output
        time.sleep(luck.uniform(0, 0.2))
        run.kill(0, 1, how=signal.SIGTERM)
        assert 0 not in run.wait(), run.output
        assert as_if_nothing_was(folder, straight(*layout))[-1] >= 2
        finish(folder, shards, *layout, "--resume", "auto")
        same(folder, straight(*layout))
