"""One optimizer step: gradients, finite check, clip, update.

Under fp16 an overflow of the scaled gradients skips the update (`parallel/loss_scale.py`). The step counts all the
same: its batch is spent and the schedule of the learning rate moves on, so that a run of N steps reads N batches and
ends at the schedule's end; only Adam's own count of updates stays.
"""

import math
import time
from dataclasses import dataclass

from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from emu2_megatron.config.schema import Config
from emu2_megatron.errors import DataError, TrainingDiverged
from emu2_megatron.parallel.three_phase import Prepared, StepOutput
from emu2_megatron.parallel.wrap import Engine
from emu2_megatron.training.schedules import lr_factor


@dataclass
class StepReport:
    """What one optimizer step did."""

    output: StepOutput
    text_loss: float
    image_loss: float
    grad_norm: float | None
    """Norm of all gradients, before clipping; None if they overflowed and the update was skipped."""
    lr_factor: float
    """Share of the peak learning rates that was used."""
    loss_scale: float
    """What the loss was multiplied by in this step's backward pass; 1 unless the precision is fp16."""
    skipped_updates: int
    """Updates skipped since the run began."""


def train_step(engine: Engine, config: Config, batch: Prepared, step: int) -> StepReport:
    """Forward, backward and update on one global batch.

    Args:
        engine: this rank's share of the model.
        batch: from `engine.step.prepare`.
        step: number of the update, from 0.

    Raises:
        DataError: the global batch has nothing to predict; the weights are untouched.
        TrainingDiverged: a loss or the gradient norm is not finite (under fp16: gradients are not, at the smallest loss
            scale); the weights are untouched. All of them are known to all ranks alike, so every rank raises.
    """
    for part in engine.wrapped:
        part.zero_grad_buffer()
    engine.optimizer.zero_grad()
    factor = lr_factor(config.optimizer, step, config.training.steps)
    for group in engine.optimizer.param_groups:
        group["lr"] = group["max_lr"] * factor
        group["weight_decay"] = config.optimizer.weight_decay * group["wd_mult"]

    output = engine.step(batch)
    if not int(output.counts[:2].sum()):
        raise DataError(
            f"step {step}: nothing in the global batch is to be learnt, text or pictures: no sample could be used, or "
            "all of them are prompts; `emu2 data inspect` shows what the model sees; weights are those before"
        )
    text_loss, image_loss = float(output.text_loss), float(output.image_loss)
    if not math.isfinite(text_loss + image_loss):
        hint = "; fp16 ends at 65504, training.precision=bf16 does not" if config.training.precision == "fp16" else ""
        raise TrainingDiverged(
            f"step {step}: losses {text_loss} (text), {image_loss} (image); weights are those before{hint}"
        )
    start = time.perf_counter()
    scale = float(engine.loss_scale.scale) if engine.loss_scale else 1.0
    grad_norm = update(engine, step)
    output.seconds["update"] = time.perf_counter() - start
    skipped = engine.loss_scale.skipped if engine.loss_scale else 0
    return StepReport(output, text_loss, image_loss, grad_norm, factor, scale, skipped)


def update(engine: Engine, step: int) -> float | None:
    """Clip all gradients by one norm over encoder and decoder, and apply them.

    Returns:
        That norm, of unscaled gradients; None if fp16's gradients overflowed anywhere and nothing was applied anywhere.

    Raises:
        TrainingDiverged: the norm is not finite, or gradients overflow at the smallest loss scale; nothing was applied.
    """
    optimizer, scale = engine.optimizer, engine.loss_scale
    overflow = optimizer.prepare_grads()
    if scale is not None:
        if overflow and scale.at_minimum:
            raise TrainingDiverged(
                f"step {step}: gradients are not finite at the smallest loss scale; weights are those before"
            )
        scale.conclude(overflow)
        if overflow:
            return None
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        raise TrainingDiverged(f"step {step}: gradient norm {norm}; weights are those before")
    for part in optimizer.chained_optimizers:
        if part.config.clip_grad > 0 and part.get_parameters():
            clip_grad_by_total_norm_fp32(part.get_parameters(), max_norm=part.config.clip_grad, total_norm=norm)
    optimizer.step_with_ready_grads()
    return norm
