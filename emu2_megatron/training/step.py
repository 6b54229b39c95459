"""One optimizer step: gradients, is it sound, clip, update.

An update is applied on all ranks or on none. Under fp16 an overflow of the scaled gradients skips it, which is part of
training (`parallel/loss_scale.py`); a loss or gradient that is not finite, or a spike, skips it too and is a problem,
which `training/guards.py` counts. Either way the step counts: its batch is spent and the schedule of the learning rate
moves on, so that a run of N steps reads N batches and ends at the schedule's end; only Adam's count of updates stays.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from emu2_megatron.config.schema import Config, trained_decoder
from emu2_megatron.errors import DataError
from emu2_megatron.parallel import average
from emu2_megatron.parallel.step import Batch, StepOutput
from emu2_megatron.parallel.wrap import Engine
from emu2_megatron.training.schedules import lr_factor


@dataclass
class StepReport:
    """What one optimizer step did."""

    output: StepOutput
    text_loss: float
    image_loss: float
    grad_norm: float | None
    """Norm of all gradients, before clipping; None if nothing was applied."""
    lr_factor: float
    """Share of the peak learning rates that was used."""
    loss_scale: float
    """What the loss was multiplied by in this step's backward pass; 1 unless the precision is fp16."""
    skipped_updates: int
    """Updates skipped because of fp16's overflows since the run began."""
    problem: str = ""
    """Why nothing was applied, if not for an overflow; the same on all ranks."""
    finite: bool = True
    """Whether the losses and, if they were needed, the gradients were numbers (an overflow aside)."""


def train_step(
    engine: Engine,
    config: Config,
    batch: Batch,
    step: int,
    flags: Sequence[bool] = (),
    judge: Callable[[float, float], str] = lambda text_loss, image_loss: "",
) -> StepReport:
    """Forward, backward and, unless there is a problem, update on one global batch.

    Args:
        engine: this rank's share of the model.
        batch: from `engine.step.prepare`.
        step: number of the update, from 0.
        flags: see `ThreePhaseStep`.
        judge: says what is wrong with finite losses, text and image, or nothing; alike on all ranks.

    Raises:
        DataError: the global batch has nothing to predict; the weights are untouched.
    """
    for part in engine.wrapped:
        part.zero_grad_buffer()
    engine.optimizer.zero_grad()
    factor = lr_factor(config.optimizer, step, config.training.steps)
    for group in engine.optimizer.param_groups:
        group["lr"] = group["max_lr"] * factor
        group["weight_decay"] = config.optimizer.weight_decay * group["wd_mult"]

    output = engine.step(batch, flags=flags)
    if not int(output.counts[:2].sum()):
        raise DataError(
            f"step {step + 1}: nothing in the global batch is to be learnt, text or pictures: no sample could be used, "
            "or all of them are prompts; `emu2 data inspect` shows what the model sees; weights are those before"
        )
    engine.step.entered("update")
    start = time.perf_counter()
    text_loss, image_loss = float(output.text_loss), float(output.image_loss)
    scale = float(engine.loss_scale.scale) if engine.loss_scale else 1.0
    grad_norm: float | None = None
    if math.isfinite(text_loss + image_loss):
        problem = judge(text_loss, image_loss)
    else:
        hint = "; fp16 ends at 65504, training.precision=bf16 does not" if config.training.precision == "fp16" else ""
        problem = f"losses {text_loss} (text), {image_loss} (image){hint}"
    finite = bool(math.isfinite(text_loss + image_loss))
    if not problem:
        grad_norm, problem = update(engine)
        finite = not problem
    output.seconds["update"] = time.perf_counter() - start
    skipped = engine.loss_scale.skipped if engine.loss_scale else 0
    return StepReport(output, text_loss, image_loss, grad_norm, factor, scale, skipped, problem, finite)


def update(engine: Engine) -> tuple[float | None, str]:
    """Clip all gradients by one norm over encoder and decoder, and apply them.

    Returns:
        That norm, of unscaled gradients, and what is wrong with it. Unless it is a number and nothing is wrong, nothing
        was applied anywhere: None and nothing wrong is an overflow of fp16's gradients.
    """
    optimizer, scale = engine.optimizer, engine.loss_scale
    overflow = optimizer.prepare_grads()
    if scale is not None:
        if overflow and scale.at_minimum:
            return None, "gradients are not finite at the smallest loss scale"
        scale.conclude(overflow)
        if overflow:
            return None, ""
    # All ranks compute it from the same sum, so they agree.
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        return None, f"gradient norm {norm}"
    for part in optimizer.chained_optimizers:
        if part.config.clip_grad > 0 and part.get_parameters():
            clip_grad_by_total_norm_fp32(part.get_parameters(), max_norm=part.config.clip_grad, total_norm=norm)
    optimizer.step_with_ready_grads()
    if engine.average:
        average.update(engine, trained_decoder(engine.step.config).ema_decay)
    return norm, ""
