"""What a sample has to show before anything is decoded: probed by the loader, decoded by `data/decode.py`."""

from dataclasses import dataclass
from typing import TypeAlias

from emu2_megatron.data.sequence import Features


@dataclass(frozen=True)
class EncodedPicture:
    """A picture file."""

    data: bytes


@dataclass(frozen=True)
class EncodedVideo:
    """A video file, of which some frames are wanted."""

    data: bytes
    frames: tuple[int, ...]
    """Which, counted from 0 in the order they are shown; ascending. So many pictures of a sequence."""


@dataclass(frozen=True)
class BoxPicture:
    """The outline of a box, white on black: how Emu2-Gen is told where something belongs."""

    box_xyxy: tuple[float, float, float, float]
    """Left, top, right, bottom as shares of the picture's width and height, 0 to 1."""


@dataclass(frozen=True)
class EncodedCrop:
    """A picture or video file, and which square of it is wanted."""

    data: bytes
    frames: tuple[int, ...]
    """Of a video: which are wanted, as in `EncodedVideo`. Empty for a picture."""
    original: tuple[int, int]
    """Height and width of the picture, pixels."""
    scaled: tuple[int, int]
    """Height and width of the picture when it is cut."""
    corner: tuple[int, int]
    """Top and left of the square in the scaled picture."""
    seed: int
    """32 bits; of all that training draws for it."""


Encoded: TypeAlias = EncodedPicture | EncodedVideo | BoxPicture
"""What decoding makes pictures of: one, or as many as the frames of a video."""

Visual: TypeAlias = Encoded | Features | EncodedCrop
"""All that can stand in a sample; features are one picture each, and stay as they are. A crop stands alone."""
