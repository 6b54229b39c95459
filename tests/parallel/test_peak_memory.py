"""Peak memory of a real run on the CPU against the estimate.

A process of its own trains two steps and reports how far its resident memory rose above what imports took. glibc is
told to give large blocks back at once (`MALLOC_MMAP_THRESHOLD_`), so that resident memory is what tensors hold, not
what the allocator keeps for later.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from emu2_megatron.config.presets import PRESETS
from emu2_megatron.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
from emu2_megatron.data.sequence import TEXT_TARGET, VISUAL, VISUAL_TARGET, PackedSequence
from emu2_megatron.parallel.estimate_memory import Work, memory

ROOT = Path(__file__).parents[2]
PICTURES = 4
"""In a sequence."""


def _model() -> ModelConfig:
    """emu2_small with fewer layers."""
    small = PRESETS["emu2_small"]
    return replace(small, encoder=replace(small.encoder, num_layers=3), decoder=replace(small.decoder, num_layers=6))


RUNS = {
    # Mostly weights, gradients and Adam's moments; then mostly activations; then the encoder's.
    "state": TrainingConfig(precision="fp32", global_batch_size=1, micro_batch_size=1),
    "bf16": TrainingConfig(precision="bf16", global_batch_size=1, micro_batch_size=1),
    "activations": TrainingConfig(precision="fp32", global_batch_size=4, micro_batch_size=4),
    "recompute": TrainingConfig(precision="fp32", global_batch_size=2, micro_batch_size=2, recompute="full"),
    "encoder": TrainingConfig(
        precision="fp32", global_batch_size=2, micro_batch_size=1, train_encoder=True, encoder_micro_batch_size=8
    ),
}


def config(name: str) -> Config:
    return Config(
        model=_model(), data=DataConfig(sequence_length=512), training=RUNS[name], optimizer=OptimizerConfig()
    )


def sequence(run: Config, seed: int) -> PackedSequence:
    generator = np.random.default_rng(seed)
    length, queries, size = run.data.sequence_length, run.model.image_queries, run.model.encoder.image_size
    tokens = generator.integers(0, run.model.decoder.vocab_size, length)
    roles = np.full(length, TEXT_TARGET, np.uint8)
    roles[0] = 0
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


def train(name: str) -> None:
    """In the process of its own: print the rise."""
    import torch

    from emu2_megatron.parallel import topology, wrap
    from emu2_megatron.training.step import train_step

    torch.set_num_threads(1)
    run = config(name)
    topology.start("gloo")
    here = topology.initialize(run)
    torch.randn(64, 64) @ torch.randn(64, 64)  # what the first product allocates for itself belongs to the imports
    batch = [sequence(run, i) for i in range(run.training.global_batch_size)]
    before = resident("VmRSS")
    engine = wrap.build(run, here)
    # Filling weights makes copies for a moment: the steps are what is estimated.
    Path("/proc/self/clear_refs").write_text("5")
    for step in range(2):
        train_step(engine, run, engine.step.prepare(batch), step)
    print(json.dumps({"rise": resident("VmHWM") - before}))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_peak_within_15_percent(name: str) -> None:
    run = config(name)
    done = subprocess.run(
        [sys.executable, __file__, name],
        env={**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536",
             "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"},
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])["rise"]
    [estimated] = memory(Work(run, 1, PICTURES, transformer_engine=False))
    print(f"{name}: measured {measured / 2**20:.0f} MiB, estimated {estimated.total / 2**20:.0f} MiB: {estimated}")
    assert measured == pytest.approx(estimated.total, rel=0.15)


if __name__ == "__main__":
    train(sys.argv[1])
