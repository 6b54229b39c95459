"""Reading a checkpoint into any layout."""

from collections.abc import Sequence
from math import isqrt
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader

from emu2_megatron.checkpoint import adam, files, metadata
from emu2_megatron.checkpoint.pieces import Reading
from emu2_megatron.checkpoint.state import State, random_states, resumed, set_random_states, weights, whole
from emu2_megatron.errors import CheckpointError
from emu2_megatron.model.eva_vit import resize_positions
from emu2_megatron.parallel.wrap import Engine

_POSITIONS = "visual.pos_embed"
"""The one tensor whose shape depends on the size of pictures."""
_MASTER = "optimizer.param."


def load_weights(path: str | Path, engine: Engine) -> dict[str, Any]:
    """Fill a rank's share of the weights, whatever layout they were saved from; called by all ranks together.

    If they were trained on pictures of another size (model.encoder.image_size), the encoder's position table is resized
    to this run's. The optimizer's fp32 masters are refreshed from the weights.

    Returns:
        What its trainer.json says.

    Raises:
        CheckpointError: the folder is missing, incomplete or damaged, or its tensors are not this model's.
    """
    path = Path(path)
    with files.reading(path):
        trainer = files.read_trainer(path)
        check_files(path, trainer["files"])
        _load_weights(path, engine)
    engine.optimizer.reload_model_params()
    return trainer


def load(path: str | Path, engine: Engine) -> dict[str, Any]:
    """Everything a run needs to go on as if it had not stopped; arguments, result and errors as of `load_weights`.

    A checkpoint without an optimizer's state (a converted one) is refused.
    """
    path = Path(path)
    with files.reading(path):
        trainer = files.read_trainer(path)
        check_files(path, trainer["files"])
        shapes = _load_weights(path, engine)
        if not any(name.startswith("optimizer.") for name in shapes):
            raise CheckpointError(
                f"{path} has weights alone, no optimizer's state: nothing to resume; start from it with "
                "checkpoint.initialize_from"
            )
        engine.optimizer.reload_model_params()
        adam.make_moments(engine)
        # A master of a run whose weights were fp32 is that weight; so is, the other way round, an fp32 weight a master.
        state = {_stored_as(name, shapes): pieces for name, pieces in resumed(engine).items() if _wanted(name, shapes)}
        state |= {
            _MASTER + name: pieces
            for name, pieces in weights(engine).items()
            if pieces.dtype is torch.float32 and _MASTER + name in shapes
        }
        random = {name: pieces for name, pieces in random_states(engine).items() if name in shapes}
        _read(path, {**state, **random})
    set_random_states(random)
    adam.restore_scalars(engine, trainer["optimizer"])
    return trainer


def check_files(path: Path, table: dict[str, dict[str, int]]) -> None:
    """Compare all files with what was written; the ranks share the work, and all raise CheckpointError if one finds
    anything wrong."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found: list[Any] = [None] * world_size
    dist.all_gather_object(found, files.verify(path, table, rank, world_size))
    if wrong := [problem for of_rank in found for problem in of_rank]:
        raise CheckpointError("; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""))


def _load_weights(path: Path, engine: Engine) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all tensors in the checkpoint."""
    shapes = metadata.check(path)
    state = weights(engine)
    positions = engine.encoder.pos_embed
    table = shapes.get(_POSITIONS, ())
    resizes = table != positions.shape and _is_table(table, positions.shape[2])
    if resizes:
        # In fp32, so that it is rounded once, after it was resized.
        state[_POSITIONS] = whole(torch.empty(table, dtype=torch.float32, device=positions.device))
    missing = sorted(set(state) - set(shapes))
    wrong = sorted(name for name in set(state) & set(shapes) if tuple(state[name].shape) != shapes[name])
    if missing or wrong:
        raise CheckpointError(f"{path} cannot be loaded into this model: {_listed(missing, wrong, state, shapes)}")
    _read(path, state)
    if resizes:
        (stored,) = state[_POSITIONS].boxes.values()
        positions.data.copy_(resize_positions(stored, positions.shape[1] - 1))
    return shapes


def _read(path: Path, state: State) -> None:
    try:
        state_dict_loader.load(state, storage_reader=FileSystemReader(path), planner=Reading())
    except (Exception, CheckpointException) as error:  # torch's CheckpointException is no Exception
        raise CheckpointError(f"{path} cannot be loaded into this model: {error}") from error


def _listed(missing: Sequence[str], wrong: Sequence[str], state: State, shapes: dict[str, tuple[int, ...]]) -> str:
    lines = [f"{name} has shape {list(shapes[name])}, the model wants {list(state[name].shape)}" for name in wrong]
    lines += [f"it has no {name}" for name in missing]
    return "; ".join(lines[:3]) + (f"; and {len(lines) - 3} more" if len(lines) > 3 else "")


def _wanted(name: str, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Scales and random states may be missing: of another recipe, or more ranks."""
    return name.startswith("optimizer.") or name in shapes


def _stored_as(name: str, shapes: dict[str, tuple[int, ...]]) -> str:
    weight = name.removeprefix(_MASTER)
    return weight if name.startswith(_MASTER) and name not in shapes else name


def _is_table(shape: tuple[int, ...], width: int) -> bool:
    """Whether this is a position table of an encoder of this width: CLS and a square of patches."""
    if len(shape) != 3 or shape[0] != 1 or shape[1] < 2 or shape[2] != width:
        return False
    return isqrt(shape[1] - 1) ** 2 == shape[1] - 1
