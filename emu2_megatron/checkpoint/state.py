"""What a checkpoint holds, by name and by shard, whatever the layout.

Decoder tensors keep megatron-core's names with global layer numbers (`decoder.layers.17.mlp.linear_fc1.weight`), cut
over tensor-parallel ranks; encoder tensors keep the released names under `visual.`.
"""

from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from emu2_megatron.parallel.wrap import Engine


def sharded_weights(engine: Engine) -> list[dict[str, Any]]:
    """For every part of the decoder on this rank, and last for the encoder: its own parameter names to this rank's
    shards, which know their global names. Exactly one rank stores each piece."""
    metadata = {
        # One name a layer, instead of one tensor over all layers: readable, and independent of how layers are staged.
        "non_homogeneous_layers": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    parts: list[dict[str, Any]] = [stage.sharded_state_dict(metadata=metadata) for stage in engine.stages]
    if "output_layer.weight" in parts[-1]:
        # The vocabulary's padding depends on the layout. megatron-core's embedding says so itself.
        parts[-1]["output_layer.weight"].allow_shape_mismatch = True
    encoder = {
        name: encoder_shard(name, weight, engine) for name, weight in engine.encoder.state_dict(keep_vars=True).items()
    }
    return [*parts, encoder]


def encoder_shard(name: str, weight: Tensor, engine: Engine) -> ShardedTensor:
    """A tensor of the encoder: every rank has the whole of it, the first one stores it."""
    return ShardedTensor.from_rank_offsets(f"visual.{name}", weight, replica_id=engine.here.rank)
