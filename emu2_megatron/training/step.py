"""One optimizer step: gradients, finite check, clip, update."""

import math
import time
from dataclasses import dataclass

from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from emu2_megatron.config.schema import Config
from emu2_megatron.errors import TrainingDiverged
from emu2_megatron.parallel.three_phase import Prepared, StepOutput
from emu2_megatron.parallel.wrap import Engine
from emu2_megatron.training.schedules import lr_factor


@dataclass
class StepReport:
    """What one optimizer step did."""

    output: StepOutput
    text_loss: float
    image_loss: float
    grad_norm: float
    """Norm of all gradients, before clipping."""
    lr_factor: float
    """Share of the peak learning rates that was used."""


def train_step(engine: Engine, config: Config, batch: Prepared, step: int) -> StepReport:
    """Forward, backward and update on one global batch.

    Args:
        engine: this rank's share of the model.
        batch: from `engine.step.prepare`.
        step: number of the update, from 0.

    Raises:
        TrainingDiverged: a loss or the gradient norm is not finite; the weights are untouched. Both are sums over all
            ranks, so every rank raises.
    """
    for part in engine.wrapped:
        part.zero_grad_buffer()
    engine.optimizer.zero_grad()
    factor = lr_factor(config.optimizer, step, config.training.steps)
    for group in engine.optimizer.param_groups:
        group["lr"] = group["max_lr"] * factor
        group["weight_decay"] = config.optimizer.weight_decay * group["wd_mult"]

    output = engine.step(batch)
    text_loss, image_loss = float(output.text_loss), float(output.image_loss)
    if not math.isfinite(text_loss + image_loss):
        raise TrainingDiverged(
            f"step {step}: losses {text_loss} (text), {image_loss} (image); weights are those before"
        )
    start = time.perf_counter()
    grad_norm = update(engine.optimizer, step)
    output.seconds["update"] = time.perf_counter() - start
    return StepReport(output, text_loss, image_loss, grad_norm, factor)


def update(optimizer: ChainedOptimizer, step: int) -> float:
    """Clip all gradients by one norm over encoder and decoder, and apply them. Returns that norm.

    Raises:
        TrainingDiverged: the norm is not finite; nothing was applied.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        raise TrainingDiverged(f"step {step}: gradient norm {norm}; weights are those before")
    for part in optimizer.chained_optimizers:
        if part.config.clip_grad > 0 and part.get_parameters():
            clip_grad_by_total_norm_fp32(part.get_parameters(), max_norm=part.config.clip_grad, total_norm=norm)
    optimizer.step_with_ready_grads()
    return norm
