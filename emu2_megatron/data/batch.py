"""Index tensors of a micro-batch, derived from nothing but the roles of its tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from emu2_megatron.data.sequence import TEXT_TARGET, VISUAL, VISUAL_TARGET


@dataclass(frozen=True)
class Targets:
    """Who predicts what in a micro-batch; a flat position is `s * B + b`, visual rows count in (b, s) order."""

    text_labels_SB: Tensor
    """int64 [S, B] id that position s predicts, 0 where it predicts none."""
    text_mask_SB: Tensor
    """int64 [S, B] 1 where it predicts one."""
    visual_positions_R: Tensor
    """int64 [R] flat position of every visual token."""
    predictor_positions_T: Tensor
    """int64 [T] flat position before every regressed token."""
    predicted_rows_T: Tensor
    """int64 [T] the visual row of that token."""


def targets(tokens_BS: Tensor, roles_BS: Tensor) -> Targets:
    """Labels and positions of both losses.

    The position before a target predicts it, so for a picture whose `[IMG]` is at p, position p + j predicts its
    embedding j + 1 (Emu2's image generation reads the same positions).
    """
    B, S = tokens_BS.shape
    is_text_SB = (roles_BS & TEXT_TARGET).bool().T
    mask_SB = torch.zeros(S, B, dtype=torch.long)
    mask_SB[:-1] = is_text_SB[1:]
    labels_SB = torch.zeros(S, B, dtype=torch.long)
    labels_SB[:-1] = torch.where(is_text_SB[1:], tokens_BS.T[1:], 0)

    b_R, s_R = (roles_BS & VISUAL).bool().nonzero(as_tuple=True)
    regressed_R = (roles_BS[b_R, s_R] & VISUAL_TARGET).bool()
    positions_R = s_R * B + b_R
    return Targets(
        text_labels_SB=labels_SB,
        text_mask_SB=mask_SB,
        visual_positions_R=positions_R,
        predictor_positions_T=positions_R[regressed_R] - B,
        predicted_rows_T=regressed_R.nonzero().flatten(),
    )
