"""Writing a checkpoint: `<directory>/step_00000400/` with torch_dist tensors and `trainer.json`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from emu2_megatron.checkpoint.state import sharded_weights
from emu2_megatron.errors import CheckpointError
from emu2_megatron.parallel.wrap import Engine

TRAINER = "trainer.json"
"""Written last: a folder that has it is complete."""


def folder(directory: str | Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return Path(directory) / f"step_{step:08d}"


def save(directory: str | Path, engine: Engine, step: int, data: dict[str, Any]) -> Path:
    """Write weights and the place in the data; called by all ranks together.

    Args:
        directory: folder of checkpoints.
        step: updates done.
        data: the place in the data of all slots, as JSON (`data/loader.py`).

    Returns:
        The checkpoint's folder. It appears under its final name only when complete.

    Raises:
        CheckpointError: the folder cannot be written, or a checkpoint of this step is already there.
    """
    final = folder(directory, step)
    unfinished = final.with_name(final.name + ".unfinished")

    def prepare() -> None:
        if final.exists():
            raise FileExistsError(f"{final} is already there")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)

    def finish() -> None:
        (unfinished / TRAINER).write_text(json.dumps({"step": step, "data": data}))
        unfinished.rename(final)

    _on_rank_0(prepare, engine, step)
    engine.settle()
    try:
        dist_checkpointing.save({"weights": sharded_weights(engine)}, str(unfinished))
    except (Exception, CheckpointException) as error:  # torch's CheckpointException is no Exception
        raise CheckpointError(f"cannot save step {step}: {error}") from error
    _on_rank_0(finish, engine, step)
    return final


def _on_rank_0(action: Callable[[], None], engine: Engine, step: int) -> None:
    """Do something on rank 0 while the others wait; if it fails, it fails on all of them."""
    problem = [""]
    if engine.here.rank == 0:
        try:
            action()
        except OSError as error:
            problem = [str(error)]
    dist.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise CheckpointError(f"cannot save step {step}: {problem[0]}")
