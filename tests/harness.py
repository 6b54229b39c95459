"""Runs a function on N gloo processes of this machine, and builds small batches for them."""

import hashlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from emu2_megatron.config.schema import (
    Config,
    DataConfig,
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)
from emu2_megatron.data.sequence import PADDING, START, TEXT_TARGET, VISUAL, VISUAL_TARGET, PackedSequence

# Forked from a server that has the imports done, a process starts in milliseconds instead of seconds.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["emu2_megatron.training.step"])

LENGTH, QUERIES = 24, 4
MODEL = ModelConfig(
    preset="emu2_tiny",
    encoder=EncoderConfig(image_size=56, num_layers=2, hidden_size=28, num_attention_heads=2, ffn_hidden_size=56),
    decoder=DecoderConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=48,
        # Odd, so that tensor parallelism has padding rows to get wrong.
        vocab_size=101,
        max_position_embeddings=64,
    ),
    image_queries=QUERIES,
    frame_queries=QUERIES,
)
"""Small enough for eight processes on two cores; every dimension differs from every other."""


def config(
    tp: int = 1, pp: int = 1, layout: tuple[int, ...] | None = None, optimizer: OptimizerConfig | None = None,
    vpp: int = 1, cp: int = 1, sp: bool = False, overlap: bool = False, layers: int = 4, **training: Any,
) -> Config:  # fmt: skip
    """A run of MODEL, with so many decoder layers; `training` overrides fields of TrainingConfig."""
    settings = {"steps": 3, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32",
                "encoder_micro_batch_size": 3, "image_loss_weight": 0.5, **training}  # fmt: skip
    return Config(
        model=replace(MODEL, decoder=replace(MODEL.decoder, num_layers=layers)),
        data=DataConfig(sequence_length=LENGTH),
        parallel=ParallelConfig(
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            virtual_pipeline_parallel_size=vpp,
            pipeline_layout=layout,
            context_parallel_size=cp,
            sequence_parallel=sp,
            overlap_gradients=overlap,
        ),
        training=TrainingConfig(**settings),
        optimizer=optimizer
        or OptimizerConfig(decoder_lr=1e-3, projection_lr=2e-3, encoder_lr=5e-4, clip_grad=1.0, warmup_steps=2),
    )


def sequence(generator: np.random.Generator, pictures: int, text: bool = True) -> PackedSequence:
    """A row of random tokens with `pictures` random pictures; the second is only to be looked at, not predicted."""
    tokens = generator.integers(0, 90, LENGTH)
    roles = np.full(LENGTH, TEXT_TARGET if text else 0, np.uint8)
    roles[0] = 0
    for i in range(pictures):
        start = 2 + 7 * i
        roles[start : start + QUERIES + 2] = 0
        roles[start + 1 : start + 1 + QUERIES] = VISUAL | (0 if i == 1 else VISUAL_TARGET)
    pixels = list(torch.from_numpy(generator.integers(0, 256, (pictures, 3, 56, 56), dtype=np.uint8)))
    return PackedSequence(tokens, roles, pixels, [QUERIES] * pictures)


def sample_seed(*numbers: int) -> int:
    """A seed of 32 bits out of what names a sample."""
    return int.from_bytes(hashlib.sha256(str(numbers).encode()).digest()[:4], "little")


def batch(pictures: list[int], seed: int, text: bool = True) -> list[PackedSequence]:
    """A global batch; sequence i has `pictures[i]` pictures."""
    generator = np.random.default_rng(seed)
    return [sequence(generator, count, text) for count in pictures]


SAMPLES = [[0, 8, 15], [0], [0, 1, 8, 22], [0, 15, 22], [0, 22], [0, 1, 8, 15], [], []]
"""Of the sequences of a packed batch: where samples start, between pictures and not where context parallelism cuts (at
multiples of 3); the last sequences are one sample each, one of them marked so."""
PADDED = {2, 5}
"""Sequences whose last sample is padding."""


def pack(sequences: list[PackedSequence]) -> list[PackedSequence]:
    """Mark the tokens of a batch as SAMPLES and PADDED have it."""
    for i, sequence in enumerate(sequences):
        roles, starts = sequence.roles_S, SAMPLES[i]
        assert not (roles[starts] & VISUAL).any()
        roles[starts] = START
        if i in PADDED:
            assert not (roles[starts[-1] :] & VISUAL).any()
            roles[starts[-1] :] = PADDING
            roles[starts[-1]] |= START
    return sequences


def run(
    world_size: int, function: Callable[..., dict[str, Any]], *args: Any, timeout: float = 120
) -> list[dict[str, Any]]:
    """Call `function(rank, *args)` in `world_size` processes joined by gloo; returns their results by rank.

    Results are dicts of tensors, numbers and strings. A process that fails ends the run with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            _processes.Process(target=_work, args=(function, rank, world_size, folder, args), daemon=False)
            for rank in range(world_size)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout)
        hung = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
        for rank in hung:
            workers[rank].kill()
        errors = [path.read_text() for path in sorted(Path(folder).glob("error_*"))]
        if errors or hung:
            raise AssertionError("\n".join(errors) or f"ranks {hung} did not end within {timeout} s")
        return [torch.load(Path(folder) / f"result_{rank}", weights_only=True) for rank in range(world_size)]


def _work(function: Callable[..., Any], rank: int, world_size: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        dist.init_process_group(
            "gloo", rank=rank, world_size=world_size, store=dist.FileStore(f"{folder}/store", world_size)
        )
        torch.save(function(rank, *args), f"{folder}/result_{rank}")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error_{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)  # peers waiting in a collective fail at once instead of at their timeout
