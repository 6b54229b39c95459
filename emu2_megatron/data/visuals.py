"""What a sample has to show before anything is decoded: read by the loader, decoded by `data/decode.py`."""

from dataclasses import dataclass
from typing import TypeAlias

from emu2_megatron.data.sequence import Features


@dataclass(frozen=True)
class EncodedPicture:
    """A picture file: JPEG, PNG, WebP and what else Pillow reads safely."""

    data: bytes


@dataclass(frozen=True)
class EncodedVideo:
    """A video file, of which evenly spaced frames are wanted."""

    data: bytes
    frames: int
    """How many: so many pictures of a sequence."""


@dataclass(frozen=True)
class BoxPicture:
    """The outline of a box, white on black: how Emu2-Gen is told where something belongs."""

    box_xyxy: tuple[float, float, float, float]
    """Left, top, right, bottom as shares of the picture's width and height, 0 to 1."""


Visual: TypeAlias = EncodedPicture | EncodedVideo | BoxPicture | Features
"""One or, for a video, several pictures of a sequence."""
