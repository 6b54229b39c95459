"""What the benchmarks share: synthetic sequences, ranks to run on, FLOPs, interleaved timing, the line with the ratio.

Speed is a ratio of two things measured in one run. The variants take turns, forwards in one round and backwards in the
next, so that a machine that slows down for a while slows all of them; the ratio is taken within each round, and the
median of all rounds is what counts.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from emu2_megatron.config.schema import Config
from emu2_megatron.data.decode import normalize
from emu2_megatron.data.sequence import TEXT_TARGET, VISUAL, VISUAL_TARGET, PackedSequence
from emu2_megatron.parallel.step import StepOutput
from emu2_megatron.parallel.wrap import Engine
from emu2_megatron.platform.device import BACKEND, activate, device, synchronize, to_device
from emu2_megatron.platform.precision import DTYPES
from emu2_megatron.training.step import StepReport, train_step


def arguments(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """A benchmark's command line; `rounds` is how often each variant is timed by default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"times each variant is timed (default {rounds})")
    return parser


# The engine's two entry points, named in one place.


def forward_backward(engine: Engine, own: list[PackedSequence], force_all_reduce: bool = False) -> StepOutput:
    """Losses and summed gradients of one global batch; `own` are this rank's sequences."""
    for part in engine.wrapped:
        part.zero_grad_buffer()
    return engine.step(engine.step.prepare(own), force_all_reduce)


def whole_step(engine: Engine, config: Config, own: list[PackedSequence]) -> StepReport:
    """Forward, backward, clipping and update."""
    return train_step(engine, config, engine.step.prepare(own), 0)


def sequences(config: Config, count: int, pictures: int, seed: int = 0) -> list[PackedSequence]:
    """Random rows with `pictures` random pictures each, evenly spread; everything but the markers is predicted."""
    generator = np.random.default_rng(seed)
    length, queries, size = config.data.sequence_length, config.model.image_queries, config.model.encoder.image_size
    rows = []
    for _ in range(count):
        roles = np.full(length, TEXT_TARGET, np.uint8)
        roles[0] = 0
        for start in (1 + i * (length - 1) // pictures for i in range(pictures)):
            roles[start : start + queries + 2] = 0  # [IMG], the visual embeddings, [/IMG]
            roles[start + 1 : start + 1 + queries] = VISUAL | VISUAL_TARGET
        pixels = list(torch.from_numpy(generator.integers(0, 256, (pictures, 3, size, size), dtype=np.uint8)))
        tokens = generator.integers(0, config.model.decoder.vocab_size, length)
        rows.append(PackedSequence(tokens, roles, pixels, [queries] * pictures))
    return rows


def encode(encoder: Any, own: list[PackedSequence], precision: str) -> torch.Tensor:
    """Visual embeddings [R, E] of all pictures, in one chunk."""
    pixels = torch.stack([picture for sequence in own for picture in sequence.pictures])
    rows_RE: torch.Tensor = encoder(
        normalize(to_device(pixels), DTYPES[precision]), [q for sequence in own for q in sequence.queries]
    )
    return rows_RE


def flops(function: Callable[[], Any]) -> float:
    """FLOPs of all matrix products of a call, 2 m n k each, summed over the ranks; causal attention counts in full."""
    # The fused attention of CPUs has no formula in the counter; its plain form is two matrix products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    total = torch.tensor(float(counter.get_total_flops()), dtype=torch.float64, device=device())
    dist.all_reduce(total)
    return float(total)


def encoder_flops(engine: Engine, own: list[PackedSequence], precision: str, trained: bool) -> float:
    """FLOPs of encoding all ranks' pictures: forward, and backward if the encoder is trained."""

    def run() -> None:
        rows_RE = encode(engine.encoder, own, precision)
        if trained:
            rows_RE.backward(torch.zeros_like(rows_RE))

    return flops(run)


def timed(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round, the slowest rank's; a first round is run and dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name in list(variants)[:: 1 if number % 2 else -1]:
            dist.barrier()
            start = time.perf_counter()
            variants[name]()
            synchronize()
            dist.barrier()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def quotient(numerator: list[float], denominator: list[float]) -> float:
    """Median over the rounds of numerator / denominator."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def phases(seconds: dict[str, float]) -> str:
    """The times of a step's phases, for printing."""
    return ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())


def report(ratios: list[tuple[str, float, float]]) -> int:
    """Print the line of every (name, value, target); returns the exit status, 1 if any is below its target."""
    for name, value, target in ratios:
        print(f"RATIO {name} {value:.3f} target {target}")
    return int(any(value < target for _, value, target in ratios))


def on_ranks(world_size: int, threads: int, function: Callable[..., Any], *args: Any) -> Any:
    """Call `function(*args)` in processes joined by a process group; returns rank 0's result. What fails, raises."""
    with tempfile.TemporaryDirectory() as folder:
        result = multiprocessing.get_context("spawn").SimpleQueue()
        multiprocessing.spawn(_work, (world_size, threads, folder, result, function, args), nprocs=world_size)
        return result.get()


def _work(
    rank: int, world_size: int, threads: int, folder: str, result: Any, function: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(threads)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    activate()
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    dist.init_process_group(BACKEND, rank=rank, world_size=world_size, store=store)
    value = function(*args)
    if rank == 0:
        result.put(value)
    dist.barrier()
    dist.destroy_process_group()
