"""What the data system hands to a training step: packed sequences."""

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch

# What a token is, as bits of `roles_S`. A target is something the position before it has to predict.
VISUAL = 1
"""The token's input row is a visual embedding (`<image>` or `[gIMG]`)."""
TEXT_TARGET = 2
"""The token is predicted through the vocabulary (cross-entropy)."""
VISUAL_TARGET = 4
"""The token's visual embedding is regressed (mean squared error); goes with VISUAL."""
START = 32
"""The first token of a sample, and of the padding: nothing before it belongs to what follows. (8 and 16 are
`parallel/exchange.py`'s.)"""
PADDING = 64
"""The token belongs to no sample."""


@dataclass(frozen=True)
class Features:
    """The visual embeddings of a picture, computed beforehand by `emu2 embed`."""

    rows_QE: torch.Tensor
    """[Q, E] in the dtype of the run."""
    encoder: str
    """Fingerprint of the encoder they are from (`model/parameters.fingerprint`)."""


@dataclass(frozen=True)
class Crop:
    """A square of a picture, for the visual decoder; or the same square of T frames, for the video decoder. A picture
    is T = 1."""

    seen_T3HW: torch.Tensor
    """uint8, at the encoder's image size."""
    painted_T3HW: torch.Tensor
    """uint8, at the decoder's image_size."""
    original: tuple[int, int]
    """Height and width of the picture or video it is from, pixels."""
    corner: tuple[int, int]
    """Top and left of the square in the scaled picture, pixels."""
    seed: int
    """32 bits; of all that training draws for it."""


Picture: TypeAlias = torch.Tensor | Features
"""A uint8 tensor [3, H, W], RGB, already resized to the encoder's image size, not normalised; or what the encoder
makes of it."""


@dataclass
class PackedSequence:
    """One row of a batch: tokens, what each of them is, and the pictures behind the visual ones.

    The visual tokens of the row, first to last, are the embeddings of `pictures`, first to last: picture i owns the
    next `queries[i]` of them, so `sum(queries) == count of VISUAL`. The first token is never a target: nothing precedes
    it.
    """

    tokens_S: np.ndarray
    """int64 [S] token ids, padded with the pad token."""
    roles_S: np.ndarray
    """uint8 [S] bits VISUAL, TEXT_TARGET, VISUAL_TARGET, START, PADDING; 0 for unsupervised text."""
    pictures: list[Picture] = field(default_factory=list)
    """The pictures, in the order of their embeddings."""
    queries: list[int] = field(default_factory=list)
    """Visual embeddings of each picture."""
    keys: list[str] = field(default_factory=list)
    """Keys of the samples in this row, for logs and diagnosis."""
    shards: list[str] = field(default_factory=list)
    """The shard that each of these samples is from."""
    crops: list[Crop] = field(default_factory=list)
    """For the decoders of pictures and of clips, instead of `pictures`: one."""
