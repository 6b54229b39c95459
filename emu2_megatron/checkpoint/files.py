"""The folders of checkpoints: which are complete, which are sound, which may go.

    <directory>/step_00000400/
        .metadata, __0_0.distcp, ...    torch's distributed checkpoint (torch_dist): a file or more of every rank
        trainer.json                    written last; a folder that has it, under this name, is complete

A checkpoint is written under the name `step_00000400.unfinished`, synced, and renamed. Whoever reads one holds a shared
lock on its trainer.json, and what is being read is neither deleted nor renamed. trainer.json has checksums of all other
files and one of itself.
"""

import fcntl
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from emu2_megatron.errors import CheckpointError

TRAINER = "trainer.json"
FORMAT = 1
"""Version of what trainer.json says and of the tensors' names."""
UNFINISHED = ".unfinished"
ASIDE = ".aside"
"""Ends the name of a checkpoint that a run went back behind: kept, and never resumed from."""
_OWN = "checksum"
"""The key in trainer.json of the CRC-32 of all the rest in it."""
_BLOCK = 2**22
_PIECE = 2**18
"""Bytes written at a time."""
_NAME = re.compile(r"step_\d{8,}")


def folder(directory: str | Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return Path(directory) / f"step_{step:08d}"


def complete(directory: Path) -> list[Path]:
    """The complete checkpoints in a directory, oldest first."""
    found = [path for path in directory.glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in found if (path / TRAINER).is_file()), key=step_of)


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(path.name.removeprefix("step_"))


def read_trainer(path: Path) -> dict[str, Any]:
    """What trainer.json says.

    Raises:
        CheckpointError: it is missing, damaged, or of a newer format.
    """
    file = path / TRAINER
    if not file.is_file():
        raise CheckpointError(_incomplete(path))
    try:
        state = json.loads(file.read_text())
        missing = {"format", "step", "files", "data"} - set(state)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if missing:
        raise CheckpointError(f"{file} is damaged: it lacks {', '.join(sorted(missing))}")
    if state["format"] != FORMAT:
        raise CheckpointError(f"{file} is of format {state['format']}, this version reads {FORMAT}")
    if state.pop(_OWN, None) != _crc(state):
        raise CheckpointError(f"{file} is damaged: its checksum is not that of what was written")
    if strange := [name for name in state["files"] if Path(name).name != name]:
        raise CheckpointError(f"{file} names a file outside of its folder: {strange[0]}")
    return dict(state)


def _incomplete(path: Path) -> str:
    hint = ""
    if inside := complete(path) if path.is_dir() else []:
        hint = f"; one of its folders is meant, the latest is {inside[-1].name}"
    return f"{path} is not a complete checkpoint: it has no {TRAINER}{hint}"


def trainer_text(state: dict[str, Any]) -> str:
    """What trainer.json has to contain to say `state`: all of it, and its checksum."""
    return json.dumps({**state, _OWN: _crc(state)}, indent=1)


def _crc(state: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Keep a checkpoint from being deleted meanwhile. Raises CheckpointError if it is gone."""
    file = None
    try:
        file = open(path / TRAINER, "rb")  # noqa: SIM115  (closed below, after the caller's work)
        _lock(file, fcntl.LOCK_SH)
        # Whoever deletes it holds the lock: when that is had at last, the file may be another one, or none.
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(path / TRAINER)):
            raise FileNotFoundError
    except OSError as error:
        if file:
            file.close()
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        raise CheckpointError(_incomplete(path) if missing else f"{path} cannot be read: {error}") from error
    with file:
        yield


def checksum(file: Path) -> dict[str, int]:
    """Size and CRC-32 of a file."""
    size = crc = 0
    with open(file, "rb") as stream:
        while block := stream.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return {"bytes": size, "crc32": crc}


def verify(path: Path, files: dict[str, dict[str, int]], share: int = 0, shares: int = 1) -> list[str]:
    """What is wrong with the files of a checkpoint, each named; nothing if they are as they were written.

    Args:
        files: `files` of trainer.json.
        share, shares: look at every `shares`-th file only, so that ranks can share the work.
    """
    wrong = []
    for name in sorted(files)[share::shares]:
        try:
            found = checksum(path / name)
        except OSError as error:
            wrong.append(f"{path / name}: {error.strerror or error}")
            continue
        if found["bytes"] != files[name]["bytes"]:
            wrong.append(f"{path / name} has {found['bytes']} bytes, {files[name]['bytes']} were written")
        elif found != files[name]:
            wrong.append(f"{path / name} is damaged: its checksum is not that of what was written")
    return wrong


def append(file: IO[bytes], data: bytes | memoryview, crc32: int = 0) -> int:
    """Append all of `data` to an unbuffered file.

    In pieces: for a large one Linux looks for as large runs of free pages, which took four times as long (ext4,
    kernel 6), and one call writes 2 GiB at most.

    Returns:
        `crc32`, the CRC-32 of what was written before, continued over `data`.
    """
    view = memoryview(data).cast("B")
    for start in range(0, len(view), _PIECE):
        piece = view[start : start + _PIECE]
        crc32 = zlib.crc32(piece, crc32)
        while piece:
            piece = piece[file.write(piece) :]
    return crc32


def sync(path: Path) -> None:
    """Make the names in a folder, or the content of a file, outlive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def surplus(checkpoints: Sequence[Path], keep_last: int, keep_every: int) -> list[Path]:
    """Which checkpoints may be deleted.

    Kept are the latest `keep_last` (0: all), those of every `keep_every`-th step (0: none for that), and the latest
    whose weights are finite.

    Args:
        checkpoints: complete ones, oldest first.
    """
    if keep_last == 0:
        return []
    old = [path for path in checkpoints[:-keep_last] if not keep_every or step_of(path) % keep_every]
    newer = checkpoints[-keep_last:]
    if not any(_finite(path) for path in newer):
        newest = next((path for path in reversed(checkpoints) if _finite(path)), None)
        old = [path for path in old if path != newest]
    return old


def delete(path: Path) -> bool:
    """Delete a checkpoint, unless it is being read. A kill in the middle leaves an unfinished one.

    Returns:
        Whether it is gone.
    """
    try:
        with open(path / TRAINER, "rb+") as file:  # NFS wants a file that is open for writing
            if not _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
                return False
            gone = path.with_name(path.name + UNFINISHED)
            if gone.exists():  # of a save that was cut off
                shutil.rmtree(gone)
            path.rename(gone)
            sync(path.parent)  # a power failure must not leave the name and take files
            shutil.rmtree(gone)
    except FileNotFoundError:
        return True
    return True


def set_aside(directory: Path, step: int) -> list[Path]:
    """Rename the checkpoints of later steps than this one, complete or not: a run that goes on from here saves those
    steps again.

    Returns:
        Their new names.

    Raises:
        CheckpointError: one of them is being read.
    """
    moved = []
    later = [path for path in directory.glob("step_*") if _NAME.fullmatch(path.name) and step_of(path) > step]
    if being_read := [path for path in later if _is_read(path)]:
        raise CheckpointError(f"{being_read[0]} is in the way and is being read: try again later, or move it elsewhere")
    for path in sorted(later, key=step_of):
        number = 0
        while (aside := path.with_name(f"{path.name}{ASIDE}{number or ''}")).exists():
            number += 1
        path.rename(aside)
        moved.append(aside)
    return moved


def _is_read(path: Path) -> bool:
    """Whether somebody holds the lock of a checkpoint, as far as the file system knows."""
    try:
        with open(path / TRAINER, "rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no file to lock, or no locks
        return False
    return False


def remove_leftovers(directory: Path) -> list[str]:
    """Delete what interrupted saves and deletions left; only for the one run that uses the directory.

    Returns:
        The names of what is gone.
    """
    found = sorted(directory.glob("step_*" + UNFINISHED))
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in found if not path.exists()]


def _finite(path: Path) -> bool:
    """Whether it can be read and says that all its numbers are finite."""
    try:
        return bool(read_trainer(path).get("finite"))
    except CheckpointError:
        return False


def _lock(file: IO[bytes], how: int) -> bool:
    """Whether the lock was had. Where a file system has no locks, nothing is deleted."""
    try:
        fcntl.flock(file, how)
    except OSError:
        return bool(how & fcntl.LOCK_SH)
    return True
