"""Index tensors of a micro-batch, derived from nothing but the roles of its tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from emu2_megatron.data.sequence import START, TEXT_TARGET, VISUAL, VISUAL_TARGET
from emu2_megatron.ops.interleave import visual_slots


@dataclass(frozen=True)
class Targets:
    """Who predicts what in a micro-batch; a flat position is `s * B + b`, visual rows count in (b, s) order."""

    text_labels_SB: Tensor
    """int64 [S, B] id that position s predicts, 0 where it predicts none."""
    text_mask_SB: Tensor
    """int64 [S, B] 1 where it predicts one."""
    visual_rows_R: Tensor
    """int64 [R] the visual rows that go to a position held."""
    visual_slots_SB: Tensor
    """int32 [S, B] which of those goes there, or that it is text (`ops/interleave.py`)."""
    predictor_positions_T: Tensor
    """int64 [T] flat position before every regressed token."""
    predicted_rows_T: Tensor
    """int32 [T] the visual row of that token."""


@dataclass(frozen=True)
class Share:
    """The positions of a sequence that a rank holds."""

    tokens: Tensor
    """int64 positions whose tokens and logits it has (context parallelism)."""
    hidden: Tensor
    """int64 positions whose hidden states it has between layers (sequence parallelism takes a part of `tokens`)."""


def share(length: int, cp_rank: int = 0, cp_size: int = 1, sp_rank: int = 0, sp_size: int = 1) -> Share:
    """What a rank holds of a sequence of `length` tokens.

    Under context parallelism a sequence is cut into 2 * cp_size chunks and rank r holds chunks r and
    2 * cp_size - 1 - r, so that each rank has as many pairs of positions to attend to. Sequence parallelism takes
    contiguous parts of that.
    """
    chunks = torch.arange(length).chunk(2 * cp_size)
    tokens = torch.cat([chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]]) if cp_size > 1 else torch.arange(length)
    return Share(tokens, tokens.chunk(sp_size)[sp_rank])


def cu_seqlens(roles_BS: Tensor) -> Tensor | None:
    """Where the samples of a micro-batch end, for attention that keeps them apart; from whole sequences, uint8 [B, S].

    Returns:
        int32 [samples + 1], under the name FlashAttention and megatron-core have for it: tokens of all samples so far,
        sequence after sequence; from 0 to B * S. Every sequence begins a sample, and so does its padding. None if each
        sequence is a single sample: then there is nothing to keep apart.
    """
    B, S = roles_BS.shape
    starts_BS = (roles_BS & START).bool()
    starts_BS[:, 0] = True
    if int(starts_BS.sum()) == B:
        return None
    return F.pad(starts_BS.flatten().nonzero().flatten(), (0, 1), value=B * S).int()


def targets(tokens_BS: Tensor, roles_BS: Tensor, held: Share | None = None) -> Targets:
    """Labels and positions of both losses, as far as they concern the positions a rank holds.

    The position before a target predicts it, so for a picture whose `[IMG]` is at p, position p + j predicts its
    embedding j + 1 (Emu2's image generation reads the same positions).

    Args:
        tokens_BS, roles_BS: int64 and uint8 [B, S], whole sequences.
        held: the positions held; None for all. S of the labels is then len(held.tokens); slots and flat positions
            count in held.hidden, while visual rows still count those of the whole micro-batch.
    """
    B, S = tokens_BS.shape
    held = held or share(S)
    is_text_SB = (roles_BS & TEXT_TARGET).bool().T
    mask_SB = torch.zeros(S, B, dtype=torch.long)
    mask_SB[:-1] = is_text_SB[1:]
    labels_SB = torch.zeros(S, B, dtype=torch.long)
    labels_SB[:-1] = torch.where(is_text_SB[1:], tokens_BS.T[1:], 0)

    place_S = torch.full((S,), -1)
    place_S[held.hidden] = torch.arange(len(held.hidden))
    b_R, s_R = (roles_BS & VISUAL).bool().nonzero(as_tuple=True)
    here_R = place_S[s_R] >= 0
    # A regressed token is never the first one, so s - 1 is a position.
    regressed_R = (roles_BS[b_R, s_R] & VISUAL_TARGET).bool()
    predicts_R = regressed_R & (place_S[s_R - 1] >= 0)
    return Targets(
        text_labels_SB=labels_SB[held.tokens],
        text_mask_SB=mask_SB[held.tokens],
        visual_rows_R=here_R.nonzero().flatten(),
        visual_slots_SB=visual_slots((place_S[s_R] * B + b_R)[here_R], len(held.hidden), B),
        predictor_positions_T=(place_S[s_R - 1] * B + b_R)[predicts_R],
        predicted_rows_T=predicts_R.nonzero().flatten().int(),
    )
