"""Learning-rate schedules as plain functions of the step."""

import math
from collections.abc import Callable

from emu2_megatron.config.schema import OptimizerConfig

_STEEPNESS = 99
"""Makes a logarithmic warm-up pass half of the peak after a tenth of its steps, log 10 / log 100 rounded."""

DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}
"""optimizer.lr_schedule to the share of the way from floor to peak, given progress in [0, 1]."""
WARMUPS: dict[str, Callable[[float], float]] = {
    "linear": lambda share: share,
    "log": lambda share: math.log1p(_STEEPNESS * share) / math.log1p(_STEEPNESS),
}
"""optimizer.warmup_shape to the share of the peak, given the share of the warm-up that is done, above 0 and up to 1."""


def warmup_steps(config: OptimizerConfig, steps: int) -> int:
    """Steps of warm-up in a run of `steps`."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return round((config.warmup_ratio or 0.0) * steps)


def lr_factor(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of update `step` (from 0) in a run of `steps`, as a share of the peak.

    Warm-up is never 0: update i of w uses what WARMUPS has for (i + 1) / w. The decay starts right after it and would
    reach `min_lr_ratio` at update `steps`, one past the last.
    """
    warmup = warmup_steps(config, steps)
    if step < warmup:
        return WARMUPS[config.warmup_shape]((step + 1) / warmup)
    progress = (step - warmup) / max(steps - warmup, 1)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * DECAYS[config.lr_schedule](min(progress, 1.0))
