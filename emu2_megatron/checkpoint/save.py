"""Writing checkpoints, at once or in the background (`checkpoint/files.py`: what is written, and how it is safe)."""

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from emu2_megatron.checkpoint import adam, files
from emu2_megatron.checkpoint.pieces import Writing
from emu2_megatron.checkpoint.state import State, stored
from emu2_megatron.checkpoint.writer import Writer
from emu2_megatron.config.schema import CheckpointConfig
from emu2_megatron.errors import CheckpointError
from emu2_megatron.parallel import topology
from emu2_megatron.parallel.wrap import Engine

_PROBE = 2**26
"""Most bytes to measure the speed of a disk with."""


class Saver:
    """Saves a run's checkpoints. All ranks make one together and call its methods together, at the same steps.

    With checkpoint.asynchronous, `save` copies what is stored into memory and returns; a thread writes it, and what
    goes wrong there is raised, on all ranks alike, by the next `save` or by `finish`.
    """

    def __init__(self, config: CheckpointConfig, directory: Path, engine: Engine, say: Callable[[str], None]) -> None:
        """`directory` is where checkpoints go; `say` prints a line, on rank 0 only."""
        self.config, self.directory, self.engine, self.say = config, directory, engine, say
        # Its own group: a thread must not talk in one in which the training loop does.
        self.group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="emu2-checkpoint")
        self._pending: Future[None] | None = None
        self._copies: State = {}
        self._told = self._told_undeleted = False

    def save(self, step: int, rest: dict[str, Any]) -> Path:
        """Write a checkpoint.

        Args:
            step: updates done.
            rest: what trainer.json says besides, as JSON.

        Returns:
            The checkpoint's folder. It appears under this name only when it is complete.

        Raises:
            CheckpointError: it cannot be written, or one of this step is already there; nothing else is touched.
        """
        self.finish()
        final = files.folder(self.directory, step)
        self.engine.settle()
        adam.make_moments(self.engine)
        state = stored(self.engine)
        background = self._prepare(final, state)
        trainer = {"format": files.FORMAT, "step": step, "optimizer": adam.scalars(self.engine), **rest}
        if background:
            # The same memory every time: new pages would cost more than the copy.
            self._copies = {name: pieces.copied(self._copies.get(name)) for name, pieces in state.items()}
            self._pending = self._thread.submit(self._write, final, self._copies, trainer)
        else:
            self._write(final, state, trainer)
        return final

    def finish(self) -> None:
        """Wait for what is being written. Raises CheckpointError as `save`."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _prepare(self, final: Path, state: State) -> bool:
        """Make room; whether to write in the background."""
        unfinished = _unfinished(final)
        mine = sum(pieces.nbytes for pieces in state.values())
        local = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        # A copy, and as much again for what the loop needs meanwhile.
        fits = 2 * mine * local < psutil.virtual_memory().available
        of_ranks = topology.of_all_ranks((mine, fits), self.group)
        sizes = [size for size, _ in of_ranks]
        total = sum(sizes)
        background = self.config.asynchronous and all(fits for _, fits in of_ranks)

        def make_folder() -> None:
            self.directory.mkdir(parents=True, exist_ok=True)
            files.sync(self.directory.parent)
            if final.exists():
                raise FileExistsError(f"{final} is already there")
            shutil.rmtree(unfinished, ignore_errors=True)
            free = shutil.disk_usage(self.directory).free
            if free < total:
                raise OSError(f"{self.directory} has {_size(free)} free, the checkpoint needs {_size(total)}")
            unfinished.mkdir()
            if not self._told:
                speed = _write_speed(unfinished / "probe", min(_PROBE, total))
                self.say(
                    f"a checkpoint has {_size(total)}, written in about {max(sizes) / speed:.0f} s if each rank writes "
                    f"{_size(int(speed))} a second, as rank 0 does alone; {self.directory} has {_size(free)} free"
                )
                if self.config.asynchronous and not background:
                    self.say("checkpoint.asynchronous: not enough host memory for a copy; the run waits for each save")

        self._on_rank_0(make_folder, final)
        self._told = True
        return background

    def _write(self, final: Path, state: State, trainer: dict[str, Any]) -> None:
        """Write, check in, rename. All ranks succeed or all raise."""
        unfinished = _unfinished(final)
        try:
            self._write_files(unfinished, final, state, trainer)
        except CheckpointError:
            if dist.get_rank() == 0:  # what it takes may be what is missing
                shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def _write_files(self, unfinished: Path, final: Path, state: State, trainer: dict[str, Any]) -> None:
        rank = dist.get_rank()
        try:
            writer = Writer(unfinished, rank)
            save(state, storage_writer=writer, planner=Writing(), process_group=self.group)
        except CheckpointException as error:  # no Exception: what ranks failed by, on all ranks alike
            failed, (first, _) = min(error.failures.items())
            raise CheckpointError(f"cannot save {final}: rank {failed}: {first}") from error
        finite = all(pieces.finite for pieces in state.values())
        of_ranks = topology.of_all_ranks((writer.checksums, finite), self.group)

        def check_in() -> None:
            everything = {".metadata": files.checksum(unfinished / ".metadata")}
            for of_rank, _ in of_ranks:
                everything |= of_rank
            trainer["finite"] = all(finite for _, finite in of_ranks)
            trainer["files"] = dict(sorted(everything.items()))  # not in the order in which threads were done
            marker = unfinished / files.TRAINER
            marker.write_text(files.trainer_text(trainer))
            files.sync(marker)
            files.sync(unfinished)
            unfinished.rename(final)
            files.sync(self.directory)
            self._delete_surplus()

        self._on_rank_0(check_in, final)

    def _delete_surplus(self) -> None:
        """What cannot be deleted is said once; the new checkpoint is there all the same."""
        try:
            for path in files.surplus(files.complete(self.directory), self.config.keep_last, self.config.keep_every):
                files.delete(path)
        except OSError as error:
            if not self._told_undeleted:
                self.say(f"checkpoint.keep_last: cannot delete an old checkpoint: {error}")
            self._told_undeleted = True

    def _on_rank_0(self, action: Callable[[], None], final: Path) -> None:
        """Do something on rank 0 while the others wait; if it fails, whatever by, it fails on all of them."""
        problem = [""]
        if dist.get_rank() == 0:
            try:
                action()
            except Exception as error:
                problem = [str(error) or repr(error)]
        dist.broadcast_object_list(problem, src=0, group=self.group)
        if problem[0]:
            raise CheckpointError(f"cannot save {final}: {problem[0]}")


def _unfinished(final: Path) -> Path:
    return final.with_name(final.name + files.UNFINISHED)


def _size(number: int) -> str:
    """Bytes, for a person."""
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _write_speed(file: Path, size: int) -> float:
    """Bytes a second of writing and syncing so many."""
    data = bytes(size)
    start = time.perf_counter()
    with open(file, "wb", buffering=0) as stream:
        files.append(stream, data)
        os.fsync(stream.fileno())
    file.unlink()
    return len(data) / (time.perf_counter() - start)
