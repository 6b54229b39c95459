"""The fake world allocates what real worlds do, and leaves no trace."""

import math
from dataclasses import asdict, replace
from typing import Any

import harness
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from emu2_megatron.config.schema import Config, ParallelConfig, TrainingConfig
from emu2_megatron.parallel import fake_world, topology, wrap
from emu2_megatron.training.step import train_step

# Worked out by hand from the published sizes: decoder and projections are the difference.
ENCODER_37B, TOTAL_37B = 4_350_093_568, 36_906_513_152
# Whole on every tensor-parallel rank: two norms a layer and the final one, both projections.
NORMS_37B, PROJECTIONS_37B = (2 * 60 + 1) * 6656, 2 * 1792 * 6656


def worker(_rank: int, config: Config) -> dict[str, Any]:
    """What a real rank holds after a real step."""
    here = topology.initialize(config)
    engine = wrap.build(config, here)
    train_step(engine, config, engine.step.prepare([harness.batch([1] * 8, 0)[i] for i in here.slots(8)]), 0)
    return asdict(fake_world.count(engine))


LAYOUTS = {
    "one process": (1, {"train_encoder": True, "precision": "bf16"}),
    "TP2 SP, fp32": (2, {"tp": 2, "sp": True}),
    "TP2 SP": (2, {"tp": 2, "sp": True, "precision": "bf16", "train_encoder": True}),
    "DP2, overlap": (2, {"overlap": True, "precision": "bf16", "train_encoder": True}),
    "PP2 uneven DP2, fp32": (4, {"pp": 2, "layout": (3, 1), "train_encoder": True}),
    "PP2 VPP2 DP2, overlap": (4, {"pp": 2, "vpp": 2, "overlap": True, "precision": "bf16"}),
    "TP2 PP2": (4, {"tp": 2, "pp": 2, "precision": "bf16", "train_encoder": True}),
    "CP2 DP2": (4, {"cp": 2, "precision": "bf16"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_real_worlds_hold_the_same(name: str) -> None:
    world_size, settings = LAYOUTS[name]
    config = harness.config(**settings)
    real = [fake_world.Built(**result) for result in harness.run(world_size, worker, config)]
    assert [fake_world.built(config, world_size, rank) for rank in range(world_size)] == real


def test_one_rank_by_hand() -> None:
    """Nothing is cut or replicated on one rank: 4 bytes a gradient sum, 12 for master and moments, 2 a weight."""
    D, E, F, V = 32, 28, 48, 101
    matrices = 4 * (4 * D * D + 3 * D * F) + 2 * V * D + 2 * E * D
    vectors = (4 * 2 + 1) * D
    # In buffers every parameter starts at a multiple of 64 elements, and the end is one of 128: each vector of 32 and
    # each table of 101 rows of 32 leaves 32 elements empty.
    padded = matrices + vectors + 9 * 32 + 2 * 32
    padded += -padded % 128

    config = harness.config(precision="bf16")
    bf16 = fake_world.built(config, 1, 0)
    encoder = bf16.parameters - matrices - vectors
    assert bf16 == fake_world.Built(
        parameters=matrices + vectors + encoder,
        weight_bytes=2 * (padded + encoder),
        gradient_bytes=4 * padded,
        optimizer_bytes=12 * (matrices + vectors),
    )
    # fp32 weights are their own masters.
    fp32 = fake_world.built(replace(config, training=replace(config.training, precision="fp32")), 1, 0)
    assert fp32 == replace(bf16, weight_bytes=2 * bf16.weight_bytes, optimizer_bytes=8 * (matrices + vectors))


def config_37b(train_encoder: bool = False, **parallel: Any) -> Config:
    return Config(parallel=ParallelConfig(**parallel), training=TrainingConfig(train_encoder=train_encoder))


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_37b_adds_up(tp: int) -> None:
    """One replica of four stages: the encoder is on every rank, norms and projections on every tensor-parallel one."""
    config = config_37b(tensor_parallel_size=tp, pipeline_parallel_size=4)
    ranks = [fake_world.built(config, 4 * tp, rank) for rank in range(4 * tp)]
    decoder = sum(rank.parameters - ENCODER_37B for rank in ranks)
    assert decoder == TOTAL_37B - ENCODER_37B + (tp - 1) * (NORMS_37B + PROJECTIONS_37B)
    # Every dimension of the 37B is a multiple of 64: no padding.
    assert sum(rank.gradient_bytes for rank in ranks) == 4 * decoder
    assert sum(rank.optimizer_bytes for rank in ranks) == 12 * decoder


@pytest.mark.slow
def test_37b_on_1024_ranks() -> None:
    """TP4 PP4 DP64, encoder trained: a rank keeps 1/64 of its decoder's state and 1/1024 of the encoder's."""
    config = config_37b(train_encoder=True, tensor_parallel_size=4, pipeline_parallel_size=4, sequence_parallel=True)
    for rank in fake_world.distinct_ranks(config, 1024):
        built = fake_world.built(config, 1024, rank)
        shard = (built.parameters - ENCODER_37B) / 64 + ENCODER_37B / 1024
        # The padding of the encoder's 836 parameters and of both buffers' ends: below 64 elements each, on all ranks.
        assert built.optimizer_bytes == pytest.approx(12 * shard, abs=12 * 838 * 64)
        assert 0 <= built.gradient_bytes - 4 * built.parameters < 4 * 2 * 128 * 1024
        assert 0 <= built.weight_bytes - 2 * built.parameters < 2 * 2 * 128 * 1024


@pytest.mark.parametrize(
    ("world_size", "settings", "wanted"),
    [
        (1, {"train_encoder": True}, [0]),
        (4, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, [0, 2]),
        (4, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "train_encoder": True}, [0, 1, 2, 3]),
        (8, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, [0, 3, 4, 7]),
        (4, {"context_parallel_size": 4}, [0, 3]),
    ],
)
def test_distinct_ranks(world_size: int, settings: dict[str, Any], wanted: list[int]) -> None:
    assert fake_world.distinct_ranks(config_37b(**settings), world_size) == wanted


def test_ranks_of_a_stage_differ_in_shards_alone() -> None:
    """TP2 PP2 DP4, encoder trained: all 16 ranks against the first of their stage."""
    config = harness.config(tp=2, pp=2, precision="bf16", train_encoder=True)
    ranks = [fake_world.built(config, 16, rank) for rank in range(16)]
    for stage in (ranks[:8], ranks[8:]):
        assert {replace(rank, optimizer_bytes=0) for rank in stage} == {replace(stage[0], optimizer_bytes=0)}


def _state() -> list[Any]:
    """Whatever a fake world could leave behind."""
    return [
        dist.is_initialized(),
        parallel_state.model_parallel_is_initialized(),
        dist.all_gather_object,
        torch.get_rng_state().tolist(),
        {name: state.tolist() for name, state in get_cuda_rng_tracker().get_states().items()},
        torch.empty(1).device,
        torch.get_default_device(),
        torch.zeros(1).item(),
    ]


@pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning")
def test_no_trace_is_left() -> None:
    torch.manual_seed(5)
    before, config = _state(), harness.config(tp=2, pp=2)
    assert fake_world.built(config, 4, 3) == fake_world.built(config, 4, 3)
    assert _state() == before
    with pytest.raises(RuntimeError, match="world"):
        fake_world.built(config, 6, 0)
    assert _state() == before

    config = harness.config()
    topology.start("gloo")
    try:
        with pytest.raises(RuntimeError, match="a fake world needs one of its own"):
            fake_world.built(config, 1, 0)
        here = topology.initialize(config)
        engine = wrap.build(config, here)
        report = train_step(engine, config, engine.step.prepare(harness.batch([1] * 8, 0)), 0)
        # 101 equally likely tokens, nearly: a world with real numbers.
        assert report.text_loss == pytest.approx(math.log(101), rel=0.05)
    finally:
        topology.stop()
