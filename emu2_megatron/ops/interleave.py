"""Merging visual embeddings into the token embeddings of the first pipeline stage.

What stands where is a map of slots, int32, one for each row of text: the number of the visual row that goes there, TEXT
to leave the row of text, or NOTHING for a row of zeros (where tensor-parallel ranks hold parts of a sum, exactly one of
them writes a visual row).
"""

from typing import Any

import torch
from torch import Tensor

from emu2_megatron.platform import library

TEXT, NOTHING = -1, -2
"""Slots that name no visual row (csrc/cuda/kernels.h has the same)."""


def visual_slots(positions_R: Tensor, S: int, B: int) -> Tensor:
    """The slots of a micro-batch.

    Args:
        positions_R: int64 [R], on the CPU: the flat row `s * B + b` each visual row goes to.

    Returns:
        int32 [S, B]

    Raises:
        ValueError: a position is not one of the S * B, or two visual rows go to the same.
    """
    slots = torch.full((S * B,), TEXT, dtype=torch.int32)
    if len(positions_R) and not 0 <= int(positions_R.min()) <= int(positions_R.max()) < S * B:
        raise ValueError(f"visual rows go to {positions_R.tolist()}, legal: 0 to {S * B - 1}")
    slots[positions_R] = torch.arange(len(positions_R), dtype=torch.int32)
    if int((slots >= 0).sum()) != len(positions_R):
        raise ValueError(f"two visual rows go to the same place: {positions_R.tolist()}")
    return slots.view(S, B)


def interleave(text_SBD: Tensor, visual_RD: Tensor, slots_SB: Tensor) -> Tensor:
    """Replace rows of the text embeddings by visual embeddings.

    Args:
        text_SBD: [S, B, D] embeddings of all token ids, visual placeholders included; or [N, D].
        visual_RD: [R, D] projected visual embeddings, same dtype.
        slots_SB: int32 [S, B] (or [N]) from `visual_slots`; each visual row in it at most once.

    Returns:
        Of text's shape: row i is `visual_RD[slots[i]]`, text's, or 0. Gradients flow to both; a visual row that no slot
        names gets zeros.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; by the compiled op on the CPU, a slot out of range or a
            row that is named twice. (On CUDA a slot out of range ends the process.)
    """
    if not library.serves(text_SBD):
        return interleave_reference(text_SBD, visual_RD, slots_SB)
    out: Tensor = torch.ops.emu2.interleave(text_SBD, visual_RD, slots_SB)
    return out


def interleave_reference(text_SBD: Tensor, visual_RD: Tensor, slots_SB: Tensor) -> Tensor:
    """`interleave` in plain PyTorch."""
    R, D = visual_RD.shape
    slots_SB = slots_SB.view(text_SBD.shape[:-1])
    rows_SB = torch.where(slots_SB >= 0, slots_SB, R)  # R: a row of zeros below the visual ones
    padded_RD = torch.cat([visual_RD, visual_RD.new_zeros(1, D)])
    merged_SBD = padded_RD.index_select(0, rows_SB.flatten()).view(text_SBD.shape)
    return torch.where((slots_SB == TEXT)[..., None], text_SBD, merged_SBD)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    _, visual, slot = inputs
    ctx.save_for_backward(slot)
    ctx.visual_rows = visual.shape[0]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    (slot,) = ctx.saved_tensors
    return *torch.ops.emu2.interleave_backward(gradient, slot, ctx.visual_rows), None


def _fake(text: Tensor, visual: Tensor, slot: Tensor) -> Tensor:
    return text.new_empty(text.shape)


def _fake_backward(gradient: Tensor, slot: Tensor, visual_rows: int) -> tuple[Tensor, Tensor]:
    return gradient.new_empty(gradient.shape), gradient.new_empty((visual_rows, gradient.shape[-1]))


if not library.problem:
    torch.library.register_fake("emu2::interleave", _fake)
    torch.library.register_fake("emu2::interleave_backward", _fake_backward)
    torch.library.register_autograd("emu2::interleave", _backward, setup_context=_setup)
