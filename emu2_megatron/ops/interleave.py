"""Merging visual embeddings into the token embeddings of the first pipeline stage."""

import torch
from torch import Tensor


def interleave(text_SBD: Tensor, visual_RD: Tensor, positions_R: Tensor) -> Tensor:
    """Replace rows of the text embeddings by visual embeddings.

    Args:
        text_SBD: [S, B, D] embeddings of all token ids, visual placeholders included.
        visual_RD: [R, D] projected visual embeddings, same dtype.
        positions_R: int64 [R] distinct flat rows `s * B + b` they go to.

    Returns:
        [S, B, D]; row `positions_R[r]` is `visual_RD[r]`, the others are unchanged. Gradients flow to both.
    """
    S, B, D = text_SBD.shape
    return torch.index_copy(text_SBD.reshape(S * B, D), 0, positions_R, visual_RD).view(S, B, D)
