"""Where a run begins: from nothing, from another run's weights, or where it stopped."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

from emu2_megatron.checkpoint import files
from emu2_megatron.checkpoint.load import load, load_weights
from emu2_megatron.config.schema import Config
from emu2_megatron.data.loader import Loader
from emu2_megatron.errors import CheckpointError, ConfigError
from emu2_megatron.parallel.wrap import Engine
from emu2_megatron.training.launch import checkpoint_directory, resume


@contextmanager
def only_run(config: Config) -> Iterator[None]:
    """Hold the lock of the checkpoint directory; called by all ranks together.

    Raises:
        ConfigError: another run holds it.
    """
    problem, lock = [""], None
    if dist.get_rank() == 0:
        lock, problem[0] = _locked(checkpoint_directory(config))
    dist.broadcast_object_list(problem, src=0)
    try:
        if problem[0]:
            raise ConfigError(f"checkpoint.directory: {problem[0]}")
        yield
    finally:
        if lock:
            lock.close()


def _locked(directory: Path) -> tuple[IO[str] | None, str]:
    """Take the lock of a directory, which goes with the process, and clear away what an interrupted run left there.

    Returns:
        The open file, and what is wrong.
    """
    try:
        lock = open(directory / "run.lock", "a+")  # noqa: SIM115  (held as long as the run)
    except OSError as error:
        return None, f"{directory} cannot be used: {error}"
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        return lock, f"{directory} is in use by another run ({lock.read()}); legal: one each"
    except OSError as error:
        print(f"{directory} has no locks ({error.strerror}): see that no other run uses it", flush=True)
        return lock, ""
    if gone := files.remove_leftovers(directory):
        print(f"removed what an interrupted run left in {directory}: {', '.join(gone)}", flush=True)
    try:
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
    except OSError:  # a full disk: who has the lock is a courtesy, the lock itself needs no room
        pass
    return lock, ""


def begin(config: Config, engine: Engine, loader: Loader) -> tuple[dict[str, Any], list[str]]:
    """Fill engine and loader from what the configuration says; called by all ranks together.

    Checkpoints in the directory that are later than what is resumed from get another name: this run saves those steps
    again.

    Returns:
        What the checkpoint's trainer.json says (of `step`, the steps that are done, if there is none), and what there
        is to say about it.

    Raises:
        CheckpointError: what was asked for cannot be loaded.
    """
    found = _candidates(config)
    for path in found:
        try:
            trainer = load(path, engine)
            loader.load_state(trainer["data"])
            moved = _set_aside(config, int(trainer["step"]))
            return trainer, [f"resumed from {path}: step {trainer['step']} is done", *moved]
        except CheckpointError as error:
            if path == found[-1] or not config.checkpoint.older_if_damaged:
                raise CheckpointError(f"{error}{_hint(config, path, found)}") from error
            if dist.get_rank() == 0:
                print(f"{error}; trying an older checkpoint", flush=True)
    if source := config.checkpoint.initialize_from:
        return {"step": 0}, load_weights(source, engine)[1]
    return {"step": 0}, []


def _set_aside(config: Config, step: int) -> list[str]:
    """Make room for the checkpoints of later steps; returns what there is to say about it."""
    result: list[Any] = [[], ""]
    if dist.get_rank() == 0:
        directory = checkpoint_directory(config)
        try:
            result[0] = [
                f"{path.stem} is later than that: it is kept as {path}" for path in files.set_aside(directory, step)
            ]
        except (CheckpointError, OSError) as error:
            result[1] = str(error)
    dist.broadcast_object_list(result, src=0)
    if result[1]:
        raise ConfigError(f"checkpoint.resume: {result[1]}")
    return list(result[0])


def _candidates(config: Config) -> list[Path]:
    """What to resume from, the best first; the same on all ranks."""
    found: list[Any] = [[]]
    if dist.get_rank() == 0:
        wanted = resume(config)
        directory = checkpoint_directory(config)
        found = [list(reversed(files.complete(directory))) if wanted == "auto" else [Path(wanted)] if wanted else []]
    dist.broadcast_object_list(found, src=0)
    return list(found[0])


def _hint(config: Config, path: Path, found: list[Path]) -> str:
    older = found[found.index(path) + 1 :]
    return f"; checkpoint.older_if_damaged=true goes on from {older[0].name}" if older else ""
