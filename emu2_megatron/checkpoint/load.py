"""Reading a checkpoint into any layout."""

import json
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from emu2_megatron.checkpoint import metadata
from emu2_megatron.checkpoint.save import TRAINER
from emu2_megatron.checkpoint.state import encoder_shard, sharded_weights
from emu2_megatron.errors import CheckpointError
from emu2_megatron.model.eva_vit import resize_positions
from emu2_megatron.parallel.wrap import Engine

_POSITIONS = "pos_embed"
"""The one tensor of the encoder whose shape depends on the size of pictures."""


def load_weights(path: str | Path, engine: Engine) -> tuple[int, dict[str, Any]]:
    """Fill a rank's share of the weights, whatever layout they were saved from; called by all ranks together.

    If they were trained on pictures of another size (model.encoder.image_size), the encoder's position table is resized
    to this run's. The optimizer's fp32 masters are refreshed from the weights.

    Returns:
        (updates done, the place in the data), as given to `save`.

    Raises:
        CheckpointError: the folder is missing, incomplete or damaged, or its tensors are not this model's.
    """
    step, data = _trainer_state(Path(path))
    shapes = metadata.check(Path(path))
    weights = sharded_weights(engine)
    positions = engine.encoder.pos_embed
    stored = shapes.get(f"visual.{_POSITIONS}", ())
    if stored != positions.shape and _is_table(stored, positions.shape[2]):
        # In fp32, so that it is rounded once, after it was resized.
        table_1PE = torch.empty(stored, dtype=torch.float32, device=positions.device)
        weights[-1][_POSITIONS] = encoder_shard(_POSITIONS, table_1PE, engine)
    try:
        loaded: dict[str, Any] = dist_checkpointing.load({"weights": weights}, str(path))
    except (Exception, CheckpointException) as error:  # torch's CheckpointException is no Exception
        raise CheckpointError(f"{path} cannot be loaded into this model: {error}") from error
    encoder = loaded["weights"][-1]
    encoder[_POSITIONS] = resize_positions(encoder[_POSITIONS], positions.shape[1] - 1)
    modules: list[nn.Module] = [*engine.stages, engine.encoder]
    for module, tensors in zip(modules, loaded["weights"], strict=True):
        module.load_state_dict(tensors)
    engine.optimizer.reload_model_params()
    return step, data


def _is_table(shape: tuple[int, ...], width: int) -> bool:
    """Whether this is a position table of an encoder of this width: CLS and a square of patches."""
    if len(shape) != 3 or shape[0] != 1 or shape[1] < 2 or shape[2] != width:
        return False
    return isqrt(shape[1] - 1) ** 2 == shape[1] - 1


def _trainer_state(path: Path) -> tuple[int, dict[str, Any]]:
    trainer = path / TRAINER
    if not trainer.is_file():
        raise CheckpointError(f"{path} is not a complete checkpoint: it has no {TRAINER}")
    try:
        state = json.loads(trainer.read_text())
        return int(state["step"]), dict(state["data"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{trainer} is damaged: {error!r}") from error
