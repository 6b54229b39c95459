"""What a run finds in its directory, or is pointed to."""

import shutil
import time
from pathlib import Path

import pytest
from fault_runs import Run, as_if_nothing_was, checkpoints, finish, log, same, unfinished

from emu2_megatron.checkpoint import files

from .conftest import Fault, Stopped, Straight


@pytest.mark.slow
def test_two_runs(stopped: Stopped, straight: Straight, shards: str, tmp_path: Path, fault: Fault) -> None:
    """The second ends at once, says who has the directory, and changes nothing in it."""
    long = ("training.steps=48",)
    folder = tmp_path / "run"
    with fault("two runs"):
        first = Run(folder, shards, *long)
        assert first.until(lambda: (folder / "log.jsonl").is_file() and bool(checkpoints(folder)))
        first.out = folder.with_name("first.out")  # what it prints goes on there
        folder.with_name("run.out").rename(first.out)
        second = Run(folder, shards, *long, "--resume", "auto", "training.seed=2")
        assert second.wait() == [2, 2], second.output
        (message,) = second.messages
        assert "checkpoint.directory" in message and f"in use by another run (process {first.ranks[0].pid}" in message
        assert first.wait() == [0, 0], first.output
        assert "seed: 1234" in (folder / "config.yaml").read_text()
        same(folder, straight(*long))


@pytest.mark.slow
def test_leftovers(stopped: Stopped, straight: Straight, shards: str, fault: Fault) -> None:
    """Of saves and deletions that were cut off, at steps that this run saves again and at others: gone afterwards."""
    folder = stopped()
    left = folder / "checkpoints"
    with fault("leftovers"):
        shutil.copytree(left / "step_00000004", left / "step_00000008.unfinished")
        shutil.copytree(left / "step_00000004", left / "step_00000007.unfinished")
        (left / "step_00000007.unfinished" / files.TRAINER).unlink()
        (left / "step_00000002.unfinished").mkdir()  # where retention will move step 2
        (left / "step_00000002.unfinished" / "__0_0.distcp").touch()
        (folder / "log.jsonl.tmp").write_text("{")
        with (folder / "log.jsonl").open("a") as stream:
            stream.write('{"step": 13, "text_l')
        run = finish(folder, shards, "--resume", "auto", "checkpoint.keep_last=2")
        assert "step 6 is done" in run.output and "removed what an interrupted run left" in run.output
        assert unfinished(folder) == [] and [files.step_of(path) for path in checkpoints(folder)] == [10, 12]
        same(folder, straight())


WRONG = {
    "nowhere": ("nowhere", "nowhere is not a complete checkpoint: it has no trainer.json"),
    "the directory": ("checkpoints", "one of its folders is meant, the latest is step_00000006"),
    "a file": ("log.jsonl", "log.jsonl is not a complete checkpoint: it has no trainer.json"),
    "an unfinished one": ("checkpoints/step_00000007.unfinished", "is not a complete checkpoint"),
    "of another model": ("checkpoints/step_00000006", "cannot be loaded into this model"),
    "of other data": ("checkpoints/step_00000006", "the saved place in the data is of another order"),
}
OTHERWISE = {"of another model": "model.decoder.hidden_size=64", "of other data": "training.seed=2"}


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_path(name: str, stopped: Stopped, straight: Straight, shards: str, fault: Fault) -> None:
    """One line, which names the path; nothing in the directory is touched."""
    folder = stopped()
    (folder / "checkpoints" / "step_00000007.unfinished").mkdir()
    path, message = WRONG[name]
    more = [OTHERWISE[name]] if name in OTHERWISE else []
    with fault("wrong --resume"):
        elsewhere = [f"logging.directory={folder}-2"]
        run = Run(folder, shards, *elsewhere, *more, "--resume", str(folder / path))
        codes = run.wait()
        assert 0 not in codes and "Traceback" not in run.output, run.output
        assert run.messages and all(message in line for line in run.messages), run.messages
        assert name == "of other data" or all(str(folder / path) in line for line in run.messages), run.messages
        assert as_if_nothing_was(folder, straight())[-1] == 6 and log(folder) == log(straight())


@pytest.mark.faults
@pytest.mark.slow
def test_back_to_an_older_one(stopped: Stopped, straight: Straight, shards: str, fault: Fault) -> None:
    """What is later is kept under another name, however often one goes back, and its steps can be saved again."""
    folder = stopped()
    with fault("leftovers"):
        older = str(folder / "checkpoints" / "step_00000002")
        for _ in range(2):
            finish(folder, shards, "--resume", older)
            same(folder, straight())
        names = sorted(path.name for path in (folder / "checkpoints").glob("*.aside*"))
        assert names[:2] == ["step_00000004.aside", "step_00000004.aside1"] and len(names) == 7


@pytest.mark.faults
@pytest.mark.slow
def test_back_while_a_later_one_is_read(stopped: Stopped, shards: str, fault: Fault) -> None:
    folder = stopped()
    with fault("two runs"), files.reading(folder / "checkpoints" / "step_00000006"):
        run = Run(folder, shards, "--resume", str(folder / "checkpoints" / "step_00000002"))
        assert run.wait() == [2, 2], run.output
        assert "step_00000006 is in the way and is being read" in run.messages[0]
        assert [files.step_of(path) for path in checkpoints(folder)] == [2, 4, 6]


@pytest.mark.faults
@pytest.mark.slow
def test_a_run_that_is_done(stopped: Stopped, straight: Straight, shards: str, fault: Fault) -> None:
    """Started again by a scheduler that does not know: it ends well, and changes nothing."""
    folder = stopped(last=12)
    before = time.time()
    with fault("leftovers"):
        run = finish(folder, shards, "--resume", "auto")
        assert "step 12 is done" in run.output and "nothing is left to do" in run.output
        assert all(path.stat().st_mtime < before for path in checkpoints(folder))
        same(folder, straight())
