"""Disks that are full or cannot be written, as file systems of their own: the kernel's own errors."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_runs import Mounts, Run, checkpoints, finish, log, same, sound

from .conftest import Fault, Stopped, Straight

PAGE = 4096


@pytest.fixture
def mounts() -> Iterator[Mounts]:
    if not Mounts.available():
        pytest.skip("mounting a file system needs root's rights or user namespaces, and this machine gives neither")
    mounts = Mounts()
    yield mounts
    mounts.close()


def _bytes(*folders: Path) -> int:
    """What a tmpfs needs for these folders: whole pages."""
    every = [path for folder in folders for path in folder.rglob("*")]
    return sum(_pages(path) for path in every if path.is_file())


def _pages(file: Path) -> int:
    return -(-file.stat().st_size // PAGE) * PAGE


def _tensors(run: Run) -> int:
    """Bytes that a checkpoint has by what the run says before it writes the first one."""
    words = run.output.split("a checkpoint has ")[1].split()
    assert words[1] == "MB,"
    return int(float(words[0]) * 1e6)


def _full_in_a_save(
    where: str, more: tuple[str, ...],
    stopped: Stopped, straight: Path, mounts: Mounts, shards: str, tmp_path: Path, fault: Fault,
) -> None:  # fmt: skip
    """The disk has too little room for a checkpoint's files in the order they are written: see WHERE."""
    folder = stopped(*more)
    disk, three = folder / "checkpoints", checkpoints(folder)
    tensors = _tensors(finish(tmp_path / "measured", shards, *more))
    # Headers and padding come on top of the tensors' own bytes, which a run makes sure of beforehand.
    last, table = (_pages(three[-1] / name) for name in ("trainer.json", ".metadata"))
    lacking = {"trainer.json": PAGE, "table": last + PAGE, "tensors": last + table + PAGE}
    free = _bytes(three[-1]) - lacking[where] if where in lacking else tensors // 2
    assert where == "beforehand" or tensors < free, "this model has no such point"
    with fault("full disk"):
        mounts.run(f"mount -t tmpfs -o size=1g none {disk}")
        for path in three:
            shutil.copytree(path, mounts.inside(disk) / path.name)
        size = _bytes(*three) + PAGE + free // PAGE * PAGE  # a page for run.lock
        mounts.run(f"mount -o remount,size={size} {disk}")
        run = Run(folder, shards, *more, "--resume", "auto", enter=mounts.enter)
        assert run.wait() == [1, 1] and "Traceback" not in run.output, run.output
        for line in run.messages:
            wanted = "the checkpoint needs" if where == "beforehand" else "No space left on device"
            assert f"cannot save {disk}/step_00000008: " in line and wanted in line, line
        inside = Path(f"/proc/{mounts.shell.pid}/root{folder}")
        assert sound(inside) == [2, 4, 6]
        assert sorted(path.name for path in (inside / "checkpoints").iterdir())[0] == "run.lock"
        assert len(list((inside / "checkpoints").iterdir())) == 4, "what was written of it takes room"

        mounts.run(f"mount -o remount,size=1g {disk}")
        finish(folder, shards, *more, "--resume", "auto", enter=mounts.enter)
        same(inside, straight)


WHERE = ("beforehand", "tensors", "table", "trainer.json")
"""Where there is no room: for the tensors, as is known beforehand; for a part of them; for the last page of the table
of contents, or of trainer.json."""


@pytest.mark.slow
def test_full_while_tensors_are_written(
    stopped: Stopped, straight: Straight, mounts: Mounts, shards: str, tmp_path: Path, fault: Fault
) -> None:
    _full_in_a_save("tensors", (), stopped, straight(), mounts, shards, tmp_path, fault)


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("more", [(), ("checkpoint.asynchronous=true",)], ids=["at once", "background"])
def test_full(
    where: str, more: tuple[str, ...],
    stopped: Stopped, straight: Straight, mounts: Mounts, shards: str, tmp_path: Path, fault: Fault,
) -> None:  # fmt: skip
    _full_in_a_save(where, more, stopped, straight(*more), mounts, shards, tmp_path, fault)


@pytest.mark.faults
@pytest.mark.slow
def test_no_room_for_the_log(
    stopped: Stopped, straight: Straight, mounts: Mounts, shards: str, fault: Fault, tmp_path: Path
) -> None:
    folder = stopped()
    with fault("full disk of the log"):
        mounts.run(f"mount -t tmpfs -o size=16k none {folder}")
        inside = mounts.inside(folder)
        shutil.copy(folder / "log.jsonl", inside / "log.jsonl")
        elsewhere = f"checkpoint.directory={tmp_path}/elsewhere"
        shutil.copytree(folder / "checkpoints", tmp_path / "elsewhere")
        run = Run(folder, shards, elsewhere, "--resume", "auto", enter=mounts.enter)
        codes = run.wait()
        assert codes == [1, 1] and "Traceback" not in run.output, run.output
        assert any("No space left on device" in line for line in run.messages), run.messages
        mounts.run(f"mount -o remount,size=1g {folder}")
        finish(folder, shards, elsewhere, "--resume", "auto", enter=mounts.enter)
        assert log(inside) == log(straight())


@pytest.mark.slow
def test_read_only_from_the_start(
    stopped: Stopped, straight: Straight, mounts: Mounts, shards: str, fault: Fault
) -> None:
    folder = stopped()
    with fault("read-only directory"):
        mounts.run(f"mount --bind {folder} {folder} && mount -o remount,bind,ro {folder}")
        run = Run(folder, shards, "--resume", "auto", enter=mounts.enter)
        assert run.wait() == [2, 2], run.output
        assert run.messages == [f"emu2: logging.directory: {folder} is not writable"]
        finish(folder, shards, "--resume", "auto")
        same(folder, straight())


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("checkpoint.asynchronous=true",)], ids=["at once", "background"])
def test_read_only_from_then_on(
    more: tuple[str, ...], stopped: Stopped, straight: Straight, mounts: Mounts, shards: str, fault: Fault
) -> None:
    """As file systems become after an error: here another one takes the place of the directory."""
    folder = stopped(*more, last=4)
    disk = folder / "checkpoints"
    with fault("read-only directory"):
        run = Run(folder, shards, *more, "--resume", "auto", enter=mounts.enter)
        assert run.until(lambda: "counted: " in run.output), run.output
        mounts.run(f"mount -t tmpfs -o ro none {disk}")
        assert run.wait() == [1, 1] and "Traceback" not in run.output, run.output
        for line in run.messages:
            assert f"cannot save {disk}/step_" in line and "Read-only file system" in line, line
        mounts.run(f"umount {disk}")
        assert sound(folder)[0] == 2
        finish(folder, shards, *more, "--resume", "auto")
        same(folder, straight(*more))
