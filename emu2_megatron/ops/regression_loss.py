"""The regression loss of visual embeddings: mean squared error in the encoder's own space (Emu2 §2.3)."""

from typing import Any

import torch
from torch import Tensor

from emu2_megatron.platform import library


def regression_loss(
    predicted_TE: Tensor, target_RE: Tensor, rows_T: Tensor, denominator: Tensor, gradient_scale: Tensor
) -> Tensor:
    """Sum of squared differences over a denominator, with each prediction compared to a row of the targets.

    The compiled op computes the gradient beside the loss, in one pass over the predictions and without a copy of the
    targets. It is stored in the predictions' dtype, and gradients of a mean are too small for fp16; so
    `gradient_scale`, what the loss is going to be multiplied by before the backward pass (loss scale times weight),
    is multiplied in before rounding. The loss itself is not multiplied by it. If the gradient that comes back turns out
    to be another, the stored one is corrected by their quotient.

    Args:
        predicted_TE: [T, E] outputs of `project_down`.
        target_RE: [R, E] visual embeddings, same dtype; no gradient flows into them.
        rows_T: int32 [T] the row of `target_RE` each prediction is compared with; a prediction with a negative one is
            not read, and its gradient is 0.
        denominator: one fp32 number on the device, the same for all ranks and micro-batches.
        gradient_scale: one fp32 number on the device, not 0.

    Returns:
        fp32 scalar (fp64 of fp64): accumulated in fp32 in a fixed order; 0, with a gradient, when T is 0. It can be
        differentiated once.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; by the compiled op on the CPU, a row out of range or a
            gradient_scale of 0. (On CUDA the former ends the process, and the latter makes gradients nan.)
    """
    if not library.serves(predicted_TE):
        return regression_loss_reference(predicted_TE, target_RE, rows_T, denominator, gradient_scale)
    loss: Tensor = torch.ops.emu2.regression_loss(
        predicted_TE,
        target_RE.detach(),
        rows_T,
        _wide(denominator, predicted_TE),
        _wide(gradient_scale, predicted_TE),
        predicted_TE.requires_grad and torch.is_grad_enabled(),
    )[0]
    return loss


def regression_loss_reference(
    predicted_TE: Tensor, target_RE: Tensor, rows_T: Tensor, denominator: Tensor, gradient_scale: Tensor
) -> Tensor:
    """`regression_loss` in plain PyTorch, whose gradients are wide until the last step: it needs no gradient_scale."""
    R, E = target_RE.shape
    padded_RE = torch.cat([target_RE.detach(), target_RE.new_zeros(1, E)])
    target_TE = padded_RE.index_select(0, torch.where(rows_T >= 0, rows_T, R))
    error_TE = torch.where(
        (rows_T >= 0)[:, None], _wide(predicted_TE, predicted_TE) - _wide(target_TE, predicted_TE), 0
    )
    return error_TE.square().sum() / _wide(denominator, predicted_TE).view(())


def _wide(tensor: Tensor, predicted_TE: Tensor) -> Tensor:
    """In the dtype that is accumulated in."""
    return tensor.double() if predicted_TE.dtype is torch.float64 else tensor.float()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *_, gradient_scale, needs_gradient = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or backward would be handed zeros for it, as large as the gradient itself
    ctx.has_gradient = needs_gradient
    ctx.save_for_backward(output[1], gradient_scale)


def _backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, None, None, None, None, None]:
    if upstream is None:  # a gradient of zero, to autograd
        return None, None, None, None, None, None
    if not ctx.has_gradient:
        raise RuntimeError("emu2::regression_loss: it was told that no gradient is needed")
    gradient, folded = ctx.saved_tensors
    if not _equal(upstream, folded):
        gradient = torch.ops.emu2.rescale(gradient, upstream, folded)
    return gradient, None, None, None, None, None


def _equal(upstream: Tensor, folded: Tensor) -> bool:
    """Whether two numbers are known to be equal. On a GPU, knowing would mean to wait; in a trace they have no value
    yet (what tracing puts in a tensor's place is of a class of its own)."""
    if upstream.device.type != "cpu" or type(upstream) is not Tensor or torch.compiler.is_compiling():
        return False
    return bool(upstream == folded)


def _fake(
    predicted: Tensor, target: Tensor, slot: Tensor, denominator: Tensor, gradient_scale: Tensor, needs_gradient: bool
) -> tuple[Tensor, Tensor]:
    return denominator.new_empty(()), predicted.new_empty(predicted.shape if needs_gradient else (0,))


def _fake_rescale(gradient: Tensor, upstream: Tensor, folded: Tensor) -> Tensor:
    return gradient.new_empty(gradient.shape)


if not library.problem:
    torch.library.register_fake("emu2::regression_loss", _fake)
    torch.library.register_fake("emu2::rescale", _fake_rescale)
    torch.library.register_autograd("emu2::regression_loss", _backward, setup_context=_setup)
