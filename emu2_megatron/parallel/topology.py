"""Who this rank is, and the process groups it talks in.

One *replica* is a whole decoder: TP × CP × PP ranks. Within a replica every rank loads and encodes its own part of the
replica's sequences; the data-parallel replicas hold the same weights and different sequences. The encoder is whole on
every rank, so for it the whole world is data-parallel.
"""

import os
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from emu2_megatron.config.schema import Config
from emu2_megatron.platform import device

T = TypeVar("T")


@dataclass(frozen=True)
class Topology:
    """This rank's place. `replica_rank` counts the TP × CP × PP ranks that share one decoder."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    cp_rank: int
    cp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    replica_rank: int
    replica_size: int
    replica: dist.ProcessGroup | None = None
    """The ranks of this rank's replica."""

    @property
    def first_stage(self) -> bool:
        """Whether this rank embeds tokens."""
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        """Whether this rank computes losses."""
        return self.pp_rank == self.pp_size - 1

    def slots(self, global_batch_size: int) -> list[int]:
        """Sequences of the global batch that this rank loads: every `replica_size`-th one of its replica's share."""
        share = global_batch_size // self.dp_size
        return list(range(self.dp_rank * share + self.replica_rank, (self.dp_rank + 1) * share, self.replica_size))


def initialize(config: Config) -> Topology:
    """Create megatron-core's process groups for a validated configuration.

    Precondition: `torch.distributed` is initialised with TP · PP · DP ranks.
    """
    parallel = config.parallel
    virtual = parallel.virtual_pipeline_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        create_gloo_process_groups=False,
    )
    # The model has no dropout; megatron-core's layers ask for the tracker's states all the same.
    tensor_parallel.model_parallel_cuda_manual_seed(config.training.seed)
    dp_rank, dp_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    replica = _replica_group(parallel.tensor_parallel_size * parallel.context_parallel_size, dp_rank, dp_size)
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel.tensor_parallel_size,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel.context_parallel_size,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel.pipeline_parallel_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        replica=replica,
        replica_rank=dist.get_rank(replica),
        replica_size=dist.get_world_size(replica),
    )


def _replica_group(inner: int, dp_rank: int, dp_size: int) -> dist.ProcessGroup:
    """The group of all ranks with this data-parallel rank; called by all ranks together.

    megatron-core numbers ranks with TP and CP (`inner`) innermost, then DP, then PP.
    """
    world = range(dist.get_world_size())
    groups: list[dist.ProcessGroup] = [
        dist.new_group([rank for rank in world if rank // inner % dp_size == d]) for d in range(dp_size)
    ]
    return groups[dp_rank]


def start(backend: str = device.BACKEND) -> None:
    """Join the process group that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT: torchrun sets
    them), or be a world of one."""
    device.activate()
    if dist.is_initialized():
        return
    if "RANK" in os.environ:
        store, rank, world_size = next(rendezvous("env://"))
        # torchrun's store outlives a restart, and the addresses in it the processes they were of: under the same names
        # ranks would wait for the dead.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        own = PrefixStore(f"emu2_attempt_{attempt}", store)
        dist.init_process_group(backend, store=own, rank=rank, world_size=world_size)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, rank=0, world_size=1, store=store)


def stop() -> None:
    """Destroy what `initialize` and `start` created."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


class Pipeline(NamedTuple):
    """The stages that this rank's data flows through; ranks of the world."""

    group: dist.ProcessGroup
    previous: int
    next: int
    last: int


def pipeline() -> Pipeline:
    """This rank's."""
    return Pipeline(
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_pipeline_model_parallel_prev_rank(),
        parallel_state.get_pipeline_model_parallel_next_rank(),
        parallel_state.get_pipeline_model_parallel_last_rank(),
    )


def of_all_ranks(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """What each rank of a group (None: of the world) gives, by rank; called by all of them together."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def world_group() -> dist.ProcessGroup:
    """All ranks, as the group object in which megatron-core sums gradient norms."""
    group: dist.ProcessGroup = parallel_state.get_intra_distributed_optimizer_instance_group()
    return group


def encoder_groups() -> ProcessGroupCollection:
    """Process groups under which the encoder is data-parallel over the world and parallel in no other way."""
    # Expert parallelism is not used, so this group holds this rank alone.
    alone = parallel_state.get_expert_model_parallel_group()
    groups: Any = ProcessGroupCollection()
    for name in ("tp", "pp", "cp", "ep", "mp", "expt_dp", "tp_ep_pp"):
        setattr(groups, name, alone)
    for name in ("dp", "dp_cp", "intra_dist_opt"):
        setattr(groups, name, world_group())
    return groups
