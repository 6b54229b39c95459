"""One rank of any layout, built without the other ranks and without memory, to count what it holds.

The engine's own code runs: process groups over torch's fake backend, whose collectives do nothing, and weights,
gradient buffers and optimizer on the meta device. So what a run of a thousand GPUs allocates is known on a laptop, from
the allocations themselves rather than from formulas.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake" too

from emu2_megatron.config.schema import Config, Fp8Config
from emu2_megatron.config.validate import replica_size
from emu2_megatron.model import parameters
from emu2_megatron.parallel import topology, wrap
from emu2_megatron.platform.on_meta import OnMeta


@dataclass(frozen=True)
class Built:
    """What a rank holds between two steps. Bytes are those of whole allocations, padding included."""

    parameters: int
    """Elements of all parameters: this rank's parts of the decoder, and the encoder."""
    weight_bytes: int
    """Bytes of the parameters; those that are trained lie in buffers padded for the optimizer's shards."""
    gradient_bytes: int
    """Bytes of the gradient buffers."""
    optimizer_bytes: int
    """Bytes of fp32 master weights and Adam's two moments of this rank's shard, as they are after the first step.
    Weights that are fp32 themselves are their own masters."""


def built(config: Config, world_size: int, rank: int) -> Built:
    """Build rank `rank` of a world of `world_size` as a training run would, and count.

    FP8 is left out: weights, gradients and the optimizer's state are the same, and Transformer Engine, which would
    convert the operands, need not be there.

    Process groups, the device and all random states are afterwards what they were before.

    Args:
        config: a configuration validated for this world.
        world_size: TP · CP · PP · DP ranks.
        rank: any of them.

    Raises:
        RuntimeError: this process is part of a process group already.
    """
    config = replace(config, fp8=Fp8Config())
    with _world(world_size, rank), _random_states():
        here = topology.initialize(config)
        with OnMeta():
            engine = wrap.build(config, here, _no_values(config))
            for part in engine.optimizer.chained_optimizers:
                part.init_state_fn(part.optimizer, part.config)
        return count(engine)


def count(engine: wrap.Engine) -> Built:
    """What a rank's engine holds; on one that really trains, after its first step."""
    modules: list[nn.Module] = [*engine.stages, *engine.whole.values()]
    weights = [p for module in modules for p in module.parameters()]
    gradients = [buffer.grad_data for part in engine.wrapped for buffer in part.buffers]
    state: list[Tensor] = []
    for part in engine.optimizer.chained_optimizers:
        state += [p for group in part.param_groups for p in group["params"]]
        state += [of[moment] for of in part.optimizer.state.values() for moment in ("exp_avg", "exp_avg_sq")]
    seen: set[int] = set()  # a master weight may be a view of its weight
    return Built(sum(p.numel() for p in weights), *(_bytes(held, seen) for held in (weights, gradients, state)))


def distinct_ranks(config: Config, world_size: int) -> list[int]:
    """The first rank of every pipeline stage, and the last one too if their shards of the optimizer's state may differ.

    Ranks of a stage are neighbours and hold as many parameters, whatever their tensor-parallel rank. The decoder's
    state is cut evenly, padding included, over replicas and context-parallel ranks, a trained encoder's over the world:
    shards differ only by the padding in them.
    """
    stages = config.parallel.pipeline_parallel_size
    ranks = world_size // stages
    shards = world_size // replica_size(config) * config.parallel.context_parallel_size
    differ = ranks > 1 and (shards > 1 or config.training.train_encoder)
    return [rank for stage in range(stages) for rank in (stage * ranks, *([(stage + 1) * ranks - 1] if differ else []))]


def _bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Bytes of the storages that are not in `seen` yet."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        total += storage.nbytes() * (storage._cdata not in seen)
        seen.add(storage._cdata)
    return total


def _no_values(config: Config) -> parameters.Source:
    shapes = parameters.released_shapes(config.model)
    return lambda name: torch.empty(shapes[name])


@contextmanager
def _world(world_size: int, rank: int) -> Iterator[None]:
    """Be a rank of a world in which nobody else is there."""
    if dist.is_initialized():
        raise RuntimeError("this process is part of a process group already: a fake world needs one of its own")
    real = dist.all_gather_object
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    # megatron-core asks all ranks for their kinds of parameters, so that all have the same (maybe empty) groups. It
    # reads lengths and bytes of the answers, which neither meta tensors nor absent ranks have.
    dist.all_gather_object = _echo
    try:
        yield
    finally:
        dist.all_gather_object = real
        topology.stop()


def _echo(object_list: list[Any], obj: Any, group: Any = None) -> None:
    """`all_gather_object` of a world where all ranks say the same."""
    object_list[:] = [obj] * len(object_list)


@contextmanager
def _random_states() -> Iterator[None]:
    """Put back what `topology.initialize` seeds: torch's generators and megatron-core's states."""
    tracker = get_cuda_rng_tracker()
    states, generator = tracker.get_states(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state()
    try:
        yield
    finally:
        torch.cuda.set_rng_state(cuda)
        torch.set_rng_state(generator)
        tracker.set_states(states)
