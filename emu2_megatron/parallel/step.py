"""What a training step is to the loop around it, whatever it trains."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from emu2_megatron.config.schema import Config
from emu2_megatron.data.sequence import PackedSequence
from emu2_megatron.platform.device import synchronize


@dataclass
class StepOutput:
    """What a forward and backward pass found out; the same on every rank except `moments` and what follows it.

    The decoders of pictures and clips have no text; their `image_loss` is that of the predicted noise (or v), and
    samples stand where embeddings do.
    """

    text_loss: Tensor
    """fp32 scalar: mean cross-entropy over all text targets of the global batch, 0 if there are none."""
    image_loss: Tensor
    """fp32 scalar: mean squared error over all regressed elements of the global batch, 0 if there are none."""
    counts: Tensor
    """int64 [6 + DP]: text targets, regressed embeddings, pictures, sequences of the global batch; those of the
    pictures that were encoded, not loaded as features; padding tokens; and the pictures that each replica encoded."""
    moments: Tensor
    """fp64 [2 E + 1]: over the regressed embeddings v of this rank's sequences, sum v | sum v² | count."""
    seconds: dict[str, float]
    """Wall time of each phase on this rank; of encoding ahead of time, only what was waited for. `own`: what this rank
    took of it by itself, without waiting for others, in loading and encoding."""
    losses_M2: Tensor = field(default_factory=lambda: torch.zeros(0, 2))
    """fp32 [M, 2], on the last stage: what each micro-batch adds to the losses, as far as this rank computes it."""
    finite_R: Tensor = field(default_factory=lambda: torch.ones(0, dtype=torch.bool))
    """bool [R]: whether each of the replica's gathered embeddings is finite."""
    flags: Tensor = field(default_factory=lambda: torch.zeros(0))
    """fp32: on how many ranks each flag was up; the same on every rank."""


class Batch(Protocol):
    """A global batch, as far as it is prepared."""

    seconds: dict[str, float]
    """Wall time so far."""
    own: list[PackedSequence]
    """The sequences that this rank loaded."""

    def bad_sequences(self, finite_R: Tensor, replica_rank: int) -> list[int]:
        """Numbers, within the replica, of the sequences that show an embedding which this rank made and is not finite.

        Args:
            finite_R: `StepOutput.finite_R`.
            replica_rank: this rank's.
        """


class Step(Protocol):
    """Forward and backward of a global batch."""

    config: Config
    entered: Callable[[str], None]
    """Told every phase when it begins."""
    flops_formula: str
    """How `flops` counts, in words."""

    def frozen(self) -> dict[str, str]:
        """What a checkpoint does not hold and a resumed run must have unchanged: fingerprints by name."""

    def flops(self, sequences: int, pictures: int, encoded: int, regressed: int) -> float:
        """Model FLOPs of a step over all ranks, given what the global batch has of all this."""

    def prepare(self, own: list[PackedSequence]) -> Any:
        """Everything before the forward pass; gives a `Batch`."""

    def __call__(self, batch: Any, *, flags: Sequence[bool] = ()) -> StepOutput:
        """Forward and backward; gradients end up where the optimizer expects them."""


class Clock:
    """Splits a step's wall time into phases."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self._last = time.perf_counter()

    def own(self) -> None:
        """What was done since the last lap was this rank's own work."""
        synchronize()
        self.seconds["own"] = self.seconds.get("own", 0.0) + time.perf_counter() - self._last

    def add(self, phase: str) -> None:
        """A part of a phase ends."""
        before = self.seconds.get(phase, 0.0)
        self.lap(phase)
        self.seconds[phase] += before

    def lap(self, phase: str) -> None:
        """A phase ends."""
        synchronize()
        now = time.perf_counter()
        self.seconds[phase], self._last = now - self._last, now
