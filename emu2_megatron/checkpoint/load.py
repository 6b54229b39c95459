"""Reading a checkpoint into any layout."""

import json
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from emu2_megatron.checkpoint import metadata
from emu2_megatron.checkpoint.save import TRAINER
from emu2_megatron.checkpoint.state import sharded_weights
from emu2_megatron.errors import CheckpointError
from emu2_megatron.parallel.wrap import Engine


def load_weights(path: str | Path, engine: Engine) -> tuple[int, list[int]]:
    """Fill a rank's share of the weights, whatever layout they were saved from; called by all ranks together.

    The optimizer's fp32 masters are refreshed from the weights.

    Returns:
        (updates done, samples consumed by every slot), as given to `save`.

    Raises:
        CheckpointError: the folder is missing, incomplete or damaged, or its tensors are not this model's.
    """
    step, cursors = _trainer_state(Path(path))
    metadata.check(Path(path))
    try:
        loaded: dict[str, Any] = dist_checkpointing.load({"weights": sharded_weights(engine)}, str(path))
    except (Exception, CheckpointException) as error:  # torch's CheckpointException is no Exception
        raise CheckpointError(f"{path} cannot be loaded into this model: {error}") from error
    modules: list[nn.Module] = [*engine.stages, engine.encoder]
    for module, weights in zip(modules, loaded["weights"], strict=True):
        module.load_state_dict(weights)
    engine.optimizer.reload_model_params()
    return step, cursors


def _trainer_state(path: Path) -> tuple[int, list[int]]:
    trainer = path / TRAINER
    if not trainer.is_file():
        raise CheckpointError(f"{path} is not a complete checkpoint: it has no {TRAINER}")
    try:
        state = json.loads(trainer.read_text())
        return int(state["step"]), [int(cursor) for cursor in state["cursors"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{trainer} is damaged: {error!r}") from error
