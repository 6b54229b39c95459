"""Bytes of a picture to pixels, and pixels to what the encoder reads: Emu2's own preprocessing, step by step."""

import io
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from emu2_megatron.errors import DataError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of CLIP's training pixels, RGB, on the scale 0 to 1."""
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of CLIP's training pixels, RGB, on the scale 0 to 1."""
MAX_PIXELS = 2**26
"""Pictures with more pixels (8192 x 8192) are refused unread: some 200 MB of memory each, or an attack."""


def decode_image(data: bytes, size: int) -> torch.Tensor:
    """Decodes a JPEG, PNG or WebP file to uint8 [3, size, size], RGB.

    As the released model does: PIL's conversion to RGB (alpha dropped), then a bicubic resize of the whole picture to
    a square, without crop and without keeping the aspect ratio. EXIF rotation is not applied: the reference does not.

    Raises DataError with the reason if the file is no picture, damaged, cut off or larger than MAX_PIXELS.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise DataError(f"picture is too large: {width} x {height} pixels, limit {MAX_PIXELS}")
            square = picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    except (DataError, MemoryError):
        raise
    # Pillow documents no common base for what damaged files raise (OSError, SyntaxError, ValueError, struct.error ...).
    except Exception as error:
        raise DataError(f"picture cannot be decoded: {type(error).__name__}: {error}") from error
    return torch.from_numpy(np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1)))


def normalize(pixels_I3HW: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(pixels / 255 - mean) / std with CLIP's constants: uint8 [I, 3, H, W] to `dtype` [I, 3, H, W].

    Runs on the pixels' device, in float32 before the cast.
    """
    mean_311, std_311 = _constants(pixels_I3HW.device)
    return ((pixels_I3HW.float() / 255 - mean_311) / std_311).to(dtype)


@lru_cache  # making them anew would make a GPU wait
def _constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = torch.tensor([CLIP_MEAN, CLIP_STD], device=device).view(2, 3, 1, 1)
    return mean, std
