"""Peak memory of a real run on the CPU against the estimate.

Processes of their own train two steps and report how far their resident memory rose above what the first steps of a
smaller model left. glibc is told to give large blocks back at once (`MALLOC_MMAP_THRESHOLD_`), so that resident memory
is what tensors hold, not what the allocator keeps for later.
"""

import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from emu2_megatron.config.presets import PRESETS
from emu2_megatron.config.schema import (
    Config,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)
from emu2_megatron.data.sequence import START, TEXT_TARGET, VISUAL, VISUAL_TARGET, PackedSequence
from emu2_megatron.parallel import topology, wrap
from emu2_megatron.parallel.estimate_memory import Work, memory
from emu2_megatron.training.step import train_step

ROOT = Path(__file__).parents[2]
PICTURES = 4
"""In a sequence."""


def run_of(sequence_length: int = 512, pipeline_parallel_size: int = 1, **training: Any) -> Config:
    """emu2_small with fewer layers."""
    small = PRESETS["emu2_small"]
    return Config(
        model=replace(
            small, encoder=replace(small.encoder, num_layers=3), decoder=replace(small.decoder, num_layers=6)
        ),
        data=DataConfig(sequence_length=sequence_length),
        parallel=ParallelConfig(pipeline_parallel_size=pipeline_parallel_size),
        training=TrainingConfig(**{"global_batch_size": 1, "micro_batch_size": 1, "precision": "fp32", **training}),
        optimizer=OptimizerConfig(),
    )


RUNS = {
    # Mostly weights, gradients and Adam's moments; then mostly activations; then the encoder's.
    "state": (1, run_of()),
    "bf16": (1, run_of(precision="bf16")),
    "activations": (1, run_of(global_batch_size=4, micro_batch_size=4)),
    "recompute": (1, run_of(global_batch_size=2, micro_batch_size=2, recompute="full")),
    "encoder": (1, run_of(global_batch_size=2, train_encoder=True, encoder_micro_batch_size=8)),
    # Half of Adam's state on each of two replicas. Sequences are short, so that the peak is where gradients are summed,
    # not in the backward pass: without the copy made there a fifth would be missing, and the state that is elsewhere is
    # worth a third.
    "DP2": (2, run_of(sequence_length=128, precision="bf16", global_batch_size=2)),
    # Half of the layers on each of two stages: two micro-batches in flight on the first, a quarter of all each;
    # one on the second, and the logits.
    "PP2": (2, run_of(pipeline_parallel_size=2, global_batch_size=4, micro_batch_size=2)),
}
"""Number of processes, and the run."""


def sequence(run: Config, seed: int) -> PackedSequence:
    generator = np.random.default_rng(seed)
    length, queries, size = run.data.sequence_length, run.model.image_queries, run.model.encoder.image_size
    tokens = generator.integers(0, run.model.decoder.vocab_size, length)
    roles = np.full(length, TEXT_TARGET, np.uint8)
    roles[[0, length - 100]] = START
    for i in range(PICTURES):
        start = 2 + i * (queries + 2)
        roles[start : start + queries] = VISUAL | VISUAL_TARGET
    pixels = list(torch.from_numpy(generator.integers(0, 256, (PICTURES, 3, size, size), dtype=np.uint8)))
    return PackedSequence(tokens, roles, pixels, [queries] * PICTURES)


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the most since `forget_peak`)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def steps(run: Config, here: topology.Topology) -> None:
    """Build a model and train two steps, the peak counted from the first one on."""
    batch = [sequence(run, i) for i in here.slots(run.training.global_batch_size)]
    engine = wrap.build(run, here)
    # Filling weights makes copies for a moment: the steps are what is estimated.
    Path("/proc/self/clear_refs").write_text("5")
    for step in range(2):
        train_step(engine, run, engine.step.prepare(batch), step)


def train(name: str, rank: int, store: str) -> None:
    """In a process of its own: print the rise."""
    torch.set_num_threads(1)
    world_size, run = RUNS[name]
    dist.init_process_group("gloo", rank=rank, world_size=world_size, store=dist.FileStore(store, world_size))
    topology.start()
    here = topology.initialize(run)
    # What is loaded and allocated once in a process, by the first step of any model, is no part of the estimate.
    small = replace(run.model, decoder=replace(run.model.decoder, num_layers=2, ffn_hidden_size=16))
    steps(replace(run, model=small), here)
    gc.collect()
    before = resident("VmRSS")
    steps(run, here)
    print(json.dumps({"rise": resident("VmHWM") - before}))
    dist.barrier()
    topology.stop()


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_peak_within_10_percent(name: str, tmp_path: Path) -> None:
    world_size, run = RUNS[name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536",
                   "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"}  # fmt: skip
    ranks = [
        subprocess.Popen([sys.executable, __file__, name, str(rank), str(tmp_path / "store")], env=environment,
                         cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(world_size)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    stages = run.parallel.pipeline_parallel_size
    estimated = memory(Work(run, world_size // stages, PICTURES, transformer_engine=False))
    for i, (rank, (output, errors)) in enumerate(zip(ranks, said, strict=True)):
        assert rank.returncode == 0, errors
        measured, stage = json.loads(output.splitlines()[-1])["rise"], estimated[i * stages // world_size]
        print(f"{name}, rank {i}: measured {measured / 2**20:.0f} MiB, estimated {stage.total / 2**20:.0f}: {stage}")
        assert measured == pytest.approx(stage.total, rel=0.1)


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]), sys.argv[3])
