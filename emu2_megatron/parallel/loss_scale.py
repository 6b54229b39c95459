"""The loss scale of fp16: one for all that is trained, because a step is applied as a whole or not at all.

fp16 holds nothing below 2^-24 and nothing above 65504. The loss is multiplied by a scale before the backward pass, so
that small gradients survive it, and gradients are divided by it, in fp32, before they are measured, clipped and applied
(arXiv 1710.03740). Where the scale was too large, gradients are infinite: the update is skipped and the scale halved.
"""

from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.grad_scaler import DynamicGradScaler

from emu2_megatron.config.schema import TrainingConfig

MINIMUM = 1.0
"""Gradients that are not finite even without any scale are the model's fault."""


class SharedLossScale(DynamicGradScaler):
    """A dynamic loss scale that several optimizers share.

    megatron-core gives each optimizer a scaler and updates it when that optimizer has looked at its gradients. With
    two of them, decoder and encoder, one could apply its update while the other skips, and the next backward pass has
    but one scale.
    """

    def __init__(self, training: TrainingConfig) -> None:
        # Hysteresis 1 halves the scale at every overflow; megatron-core's default of 2 would let the first one pass.
        super().__init__(training.initial_loss_scale, MINIMUM, 2.0, 0.5, training.loss_scale_window, hysteresis=1)
        self.skipped = 0
        """Updates skipped since the run began."""

    def update(self, found_inf: bool) -> None:
        """Nothing: one optimizer has looked at its gradients, others still have to be unscaled by the same scale."""

    def conclude(self, found_inf: bool) -> None:
        """All have looked: halve the scale if any gradient was not finite, double it after enough good steps."""
        super().update(found_inf)
        self.skipped += found_inf

    def as_json(self) -> dict[str, float]:
        """All that the next steps depend on."""
        return {"scale": float(self.scale), "growth_tracker": self._growth_tracker, "skipped": self.skipped}

    def restore(self, saved: dict[str, float]) -> None:
        """Continue from an `as_json`."""
        self._scale.fill_(saved["scale"])
        self._growth_tracker = int(saved["growth_tracker"])
        self.skipped = int(saved["skipped"])

    @property
    def at_minimum(self) -> bool:
        """Whether halving is over."""
        return float(self.scale) <= MINIMUM


def share(optimizer: ChainedOptimizer, training: TrainingConfig) -> SharedLossScale | None:
    """Give all optimizers of the chain one loss scale; None, and nothing done, unless the precision is fp16."""
    if training.precision != "fp16":
        return None
    scale = SharedLossScale(training)
    for part in optimizer.chained_optimizers:
        part.grad_scaler = scale
    return scale
