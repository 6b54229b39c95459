"""Which checkpoints are complete, sound, and may go."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from emu2_megatron.checkpoint import files
from emu2_megatron.errors import CheckpointError

SAYS = {"format": files.FORMAT, "step": 1, "data": {}, "files": {}}


def make(directory: Path, step: int, finite: bool = True, data: bytes = b"tensors") -> Path:
    path = files.folder(directory, step)
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(data)
    table = {"__0_0.distcp": files.checksum(path / "__0_0.distcp")}
    state = {"format": files.FORMAT, "step": step, "data": {}, "files": table, "finite": finite}
    (path / files.TRAINER).write_text(files.trainer_text(state))
    return path


def test_complete_ones_in_order(tmp_path: Path) -> None:
    paths = [make(tmp_path, step) for step in (20, 5, 123456789)]
    make(tmp_path, 7).rename(tmp_path / "step_00000007.unfinished")
    (make(tmp_path, 9) / files.TRAINER).unlink()
    (tmp_path / "step_by_step").mkdir()
    assert files.complete(tmp_path) == [paths[1], paths[0], paths[2]]
    assert files.complete(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("steps", "keep_last", "keep_every", "not_finite", "gone"),
    [
        ((1, 2, 3, 4), 0, 0, (), ()),
        ((1, 2, 3, 4), 1, 0, (), (1, 2, 3)),
        ((1, 2, 3, 4), 2, 0, (), (1, 2)),
        ((1, 2, 3, 4), 9, 0, (), ()),
        ((10, 20, 30, 40, 50), 1, 20, (), (10, 30)),
        ((1, 2, 3, 4), 1, 0, (4,), (1, 2)),  # 3 is the latest that one can go on from
        ((1, 2, 3, 4), 2, 0, (3, 4), (1,)),
        ((1, 2, 3, 4), 1, 0, (1, 2, 3, 4), (1, 2, 3)),
        ((1, 2, 3, 4), 2, 0, (4,), (1, 2)),
    ],
)
def test_surplus(
    tmp_path: Path, steps: tuple[int, ...], keep_last: int, keep_every: int, not_finite: tuple[int, ...],
    gone: tuple[int, ...],
) -> None:  # fmt: skip
    for step in steps:
        make(tmp_path, step, finite=step not in not_finite)
    found = files.surplus(files.complete(tmp_path), keep_last, keep_every)
    assert [files.step_of(path) for path in found] == list(gone)


def hold(path: Path, ready: "multiprocessing.synchronize.Event", done: "multiprocessing.synchronize.Event") -> None:
    with files.reading(path):
        ready.set()
        done.wait(30)


def test_what_is_being_read_stays(tmp_path: Path) -> None:
    path = make(tmp_path, 1)
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    reader = context.Process(target=hold, args=(path, ready, done))
    reader.start()
    assert ready.wait(30)
    assert not files.delete(path) and path.is_dir()
    done.set()
    reader.join()
    assert files.delete(path) and list(tmp_path.iterdir()) == []
    assert files.delete(path)  # somebody else did
    with pytest.raises(CheckpointError, match="no trainer.json"), files.reading(path):
        pass


def test_damage_is_named(tmp_path: Path) -> None:
    path = make(tmp_path, 1, data=bytes(10**7))
    table = files.read_trainer(path)["files"]
    file = path / "__0_0.distcp"
    assert files.verify(path, table) == []
    with open(file, "r+b") as stream:
        stream.seek(9_000_000)
        stream.write(b"\1")
    assert files.verify(path, table) == [f"{file} is damaged: its checksum is not that of what was written"]
    os.truncate(file, 5)
    assert files.verify(path, table) == [f"{file} has 5 bytes, 10000000 were written"]
    file.unlink()
    assert files.verify(path, table) == [f"{file}: No such file or directory"]
    # Ranks share the files.
    many = {f"{name}": {"bytes": 1, "crc32": 0} for name in range(5)}
    shares = [files.verify(path, many, share, 2) for share in range(2)]
    assert [len(share) for share in shares] == [3, 2] and len({*shares[0], *shares[1]}) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged"),
        ("[]", "damaged: it lacks"),
        ('{"step": 1}', "damaged: it lacks data, files, format"),
        ('{"step": 1, "data": {}, "files": {}, "format": 99}', "of format 99, this version reads 1"),
        ('{"step": 1, "data": {}, "files": {}, "format": 1}', "damaged: its checksum"),
        (files.trainer_text(SAYS).replace('"step": 1', '"step": 2'), "damaged: its checksum"),
        (files.trainer_text({**SAYS, "files": {"../../dev/zero": {}}}), "outside of its folder: ../../dev/zero"),
        (files.trainer_text({**SAYS, "files": {"/dev/zero": {}}}), "outside of its folder: /dev/zero"),
    ],
)
def test_a_marker_that_says_nothing(tmp_path: Path, text: str, message: str) -> None:
    (make(tmp_path, 1) / files.TRAINER).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        files.read_trainer(files.folder(tmp_path, 1))


def test_what_a_marker_says_is_read_back(tmp_path: Path) -> None:
    path = make(tmp_path, 1)
    (path / files.TRAINER).write_text(files.trainer_text({**SAYS, "optimizer": {"loss_scale": 0.1}}))
    assert files.read_trainer(path) == {**SAYS, "optimizer": {"loss_scale": 0.1}}


def test_later_ones_are_set_aside(tmp_path: Path) -> None:
    """Complete or not; all of them, or none while one is read."""
    for step in (1, 2, 3):
        make(tmp_path, step)
    (tmp_path / "step_00000004").mkdir()
    (tmp_path / "step_00000003.aside").mkdir()
    with files.reading(tmp_path / "step_00000003"), pytest.raises(CheckpointError, match="step_00000003 is in the way"):
        files.set_aside(tmp_path, 1)
    assert files.complete(tmp_path) == [tmp_path / f"step_0000000{step}" for step in (1, 2, 3)]
    moved = files.set_aside(tmp_path, 1)
    assert [path.name for path in moved] == ["step_00000002.aside", "step_00000003.aside1", "step_00000004.aside"]
    assert [path.name for path in files.complete(tmp_path)] == ["step_00000001"] and all(p.is_dir() for p in moved)
    assert files.set_aside(tmp_path, 1) == []


def test_leftovers(tmp_path: Path) -> None:
    make(tmp_path, 1)
    for name in ("step_00000002.unfinished", "step_00000003.aside", "other.unfinished"):
        make(tmp_path, 2).rename(tmp_path / name)
    assert files.remove_leftovers(tmp_path) == ["step_00000002.unfinished"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.unfinished", "step_00000001", "step_00000003.aside"]
    assert files.remove_leftovers(tmp_path / "nowhere") == []


def test_a_damaged_marker_is_not_finite(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make(tmp_path, step)
    (tmp_path / "step_00000003" / files.TRAINER).write_text("{")
    assert files.surplus(files.complete(tmp_path), 1, 0) == [tmp_path / "step_00000001"]


def test_one_that_is_replaced_while_a_reader_waits_for_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader has the old file open by then: it must not read the folder under a lock that protects nothing."""
    path = make(tmp_path, 1)
    monkeypatch.setattr(files, "_lock", lambda file, how: (path / files.TRAINER).unlink() or True)
    with pytest.raises(CheckpointError, match="it has no trainer.json"), files.reading(path):
        pass


def test_the_directory_in_place_of_a_checkpoint(tmp_path: Path) -> None:
    make(tmp_path, 1), make(tmp_path, 12)
    with pytest.raises(CheckpointError, match="one of its folders is meant, the latest is step_00000012"):
        files.read_trainer(tmp_path)


def test_a_kill_while_deleting_leaves_no_half_of_a_checkpoint(tmp_path: Path) -> None:
    """The name goes first: here the process dies when the first file is about to go."""
    path = make(tmp_path, 1)
    code = (
        "import os, shutil, sys; from pathlib import Path; from emu2_megatron.checkpoint import files\n"
        "shutil.rmtree = lambda path: os._exit(9)\n"
        f"files.delete(Path({str(path)!r}))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 9
    assert files.complete(tmp_path) == [] and not path.exists()
