"""Turns steps into log records."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from emu2_megatron.config.schema import Config
from emu2_megatron.parallel import topology
from emu2_megatron.platform import gpus
from emu2_megatron.platform.device import device
from emu2_megatron.training.guards import z_scores
from emu2_megatron.training.step import StepReport


def mean_predictor_loss(moments: Tensor) -> float:
    """Mean squared error of a model that predicts, for every dimension, the mean of all regressed embeddings.

    Args:
        moments: fp64 [2 E + 1] sum v | sum v² | count, over all ranks.
    """
    count = moments[-1].clamp(min=1)
    mean_E, square_E = (moments[:-1] / count).chunk(2)
    return float((square_E - mean_E.square()).mean())


def peak(config: Config, formula: str) -> tuple[float, str]:
    """FLOP/s that MFU is a share of, the mean over ranks, and what it is and counts, in words; `formula` are those of a
    step's FLOPs. Called by all ranks together: a rank that shares its cores is measured while the others are busy too.
    """
    dist.barrier()
    mine, source = gpus.peak_flops(config.training.precision, device().type)
    total = torch.tensor([mine], dtype=torch.float64, device=device())
    dist.all_reduce(total, group=topology.world_group())
    mean = float(total) / dist.get_world_size()
    precision = config.training.precision
    if config.fp8.recipe != "none":
        precision += "'s peak, also for what is multiplied in FP8"
    return mean, (
        f"MFU = FLOPs of a step / seconds / ranks / {mean / 1e12:.4g} TFLOP/s ({precision}; {source})\n"
        f"FLOPs of a step = {formula}\n"
        "counted: all positions of all sequences; the encoder by the pictures it really encoded"
    )


@dataclass
class Meter:
    """Collects the steps of one record. Losses of several steps are averaged over targets, not over steps.

    `padding_share` of a record: padding tokens per token. `encoder_balance`: what the replicas encoded, as a share of
    what they could have while the busiest of each step did (1: all had equally many pictures, or nobody had any).
    Within a replica pictures are shared out evenly, to within one.
    """

    config: Config
    peak: float
    """FLOP/s of a rank at best."""
    flops: Callable[[int, int, int, int], float]
    """`Step.flops`."""
    steps: int = 0
    """Steps taken in."""
    z_scores: list[float] = field(default_factory=list)
    """Of the latest record: by rank, how much slower than the others it was in its own work (`guards.z_scores`)."""
    _started: float = field(default_factory=time.perf_counter)
    _sums: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    _targets: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    """What `_sums` are over: the counts of steps without a problem."""
    _counts: Tensor = field(default_factory=lambda: torch.zeros(6, dtype=torch.int64))
    _could_encode: int = 0
    _moments: Tensor | float = 0.0
    _seconds: dict[str, float] = field(default_factory=dict)

    @property
    def _parts(self) -> tuple[str, ...]:
        objective = self.config.training.objective
        return ("decoder", "projection", "encoder") if objective == "language" else (objective,)

    def add(self, report: StepReport) -> None:
        """Take in one step."""
        output = report.output
        counts, by_replica = output.counts.cpu().tensor_split([6])
        self.steps += 1
        if not report.problem:
            self._sums += torch.tensor([report.text_loss, report.image_loss]).double() * counts[:2]
            self._targets += counts[:2]
            self._moments = self._moments + output.moments
        self._counts += counts
        self._could_encode += int(by_replica.max()) * len(by_replica)
        for phase, seconds in output.seconds.items():
            self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    def record(self, step: int, report: StepReport, skipped: int, skipped_steps: int = 0) -> dict[str, Any]:
        """Everything worth logging since the last record; called by all ranks together. There were steps since.

        The gradient norm is None if the latest update was skipped; the losses are None if all of them had a problem.

        Args:
            step: updates done.
            report: the latest step.
            skipped: samples this rank has skipped since the run began.
            skipped_steps: steps whose update was skipped for a problem since the run began.
        """
        rank, world_size = dist.get_rank(), dist.get_world_size()
        others = torch.zeros(1 + world_size, dtype=torch.float64)
        others[0], others[1 + rank] = skipped, self._seconds.get("own", 0.0)
        moments = torch.zeros_like(report.output.moments) + self._moments
        shared = torch.cat([others.to(device()), moments])
        dist.all_reduce(shared, group=topology.world_group())
        elapsed = time.perf_counter() - self._started
        self.z_scores = z_scores(shared[1 : 1 + world_size].tolist(), elapsed)
        slowest = max(range(world_size), key=self.z_scores.__getitem__)
        learnt = bool(self._targets.any())
        losses = (self._sums / self._targets.clamp(min=1)).tolist() if learnt else [None, None]
        regressed, pictures, sequences, encoded, padding = (int(n) for n in self._counts[1:])
        tokens = sequences * self.config.data.sequence_length
        achieved = self.flops(sequences, pictures, encoded, regressed) / elapsed / dist.get_world_size()
        of_text = {"text_loss": losses[0]} if self.config.training.objective == "language" else {}
        return {
            "step": step,
            **of_text,
            "image_loss": losses[1],
            "mean_predictor_image_loss": mean_predictor_loss(shared[1 + world_size :]) if learnt else None,
            "grad_norm": report.grad_norm,
            "loss_scale": report.loss_scale,
            "skipped_updates": report.skipped_updates,
            "skipped_steps": skipped_steps,
            **{f"lr_{part}": getattr(self.config.optimizer, f"{part}_lr") * report.lr_factor for part in self._parts},
            "padding_share": padding / tokens,
            "encoder_balance": encoded / self._could_encode if encoded else 1.0,
            "tokens_per_second": tokens / elapsed,
            "images_per_second": pictures / elapsed,
            "tflops_per_second": achieved / 1e12,
            "mfu": achieved / self.peak,
            "slowest_rank": slowest,
            "slowest_rank_z": self.z_scores[slowest],
            "step_seconds": elapsed / self.steps,
            **{f"{phase}_seconds": seconds / self.steps for phase, seconds in self._seconds.items()},
            "skipped_samples": int(shared[0]),
        }
