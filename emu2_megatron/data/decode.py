"""Encoded pictures and videos to pixels, and pixels to what the encoder reads: Emu2's own preprocessing, step by step.

One of two decoders, chosen in `backend`. Pillow and PyAV give to the bit what the released model is given. DALI, where
it is installed, leaves to them what it cannot do. It decodes pictures to the same bits; resized, they differ by at most
2 levels of 256 (0.01 on average) on a CPU and by at most 4 (0.2) on a GPU. Frames of videos, which it converts from YUV
in its own way, are 40 dB away.
"""

import io
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from emu2_megatron.data import dali, probe, video
from emu2_megatron.data.visuals import BoxPicture, Encoded, EncodedPicture
from emu2_megatron.errors import DataError
from emu2_megatron.platform import kernels, threads

logger = logging.getLogger(__name__)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of CLIP's training pixels, RGB, on the scale 0 to 1."""
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of CLIP's training pixels, RGB, on the scale 0 to 1."""

_Resize: TypeAlias = Callable[[np.ndarray], torch.Tensor]
"""uint8 [H, W, 3] to [3, size, size]."""


def backend() -> str:
    """What decodes here: "dali" where it is installed, else "pillow" (with PyAV). The one place that decides."""
    return "dali" if kernels.has_dali() else "pillow"


def decode(visuals: Sequence[Encoded], size: int) -> list[torch.Tensor | DataError]:
    """Decodes pictures, frames of videos and boxes, each squashed to a square without regard to its aspect ratio.

    As the released model does: conversion to RGB (alpha dropped) and a bicubic resize with antialiasing, no crop. Of a
    moving GIF or WebP the first picture counts. EXIF rotation is not applied: the reference does not.
    Uses `threads.count` threads, and may be called from any thread.

    Args:
        visuals: what to decode, from many samples at once if possible; may be empty.
        size: height and width of the result.

    Returns:
        For each, in order, uint8 [pictures, 3, size, size], contiguous, RGB; on the GPU with CUDA and DALI, else on the
        CPU. Or a DataError with the reason: it is no picture or video, damaged, cut off, larger than
        `probe.MAX_PIXELS`, or lacks a frame that is wanted. One that is bad does no harm to the others.
    """
    if backend() == "pillow":
        return threads.in_threads(partial(_decode, size=size, resize=partial(_resize, size=size)), visuals)
    done = dali.decode(visuals, size)
    rest = [place for place in range(len(visuals)) if not isinstance(done.get(place), torch.Tensor)]
    alone = partial(_decode, size=size, resize=lambda pixels: dali.resize(torch.from_numpy(pixels), size))
    for place, result in zip(rest, threads.in_threads(alone, [visuals[place] for place in rest]), strict=True):
        refusal = done.get(place)
        if isinstance(result, torch.Tensor) and isinstance(refusal, DataError):
            _warn_once(type(visuals[place]).__name__, refusal)
        done[place] = dali.to_device(result) if isinstance(result, torch.Tensor) else result
    return [done[place] for place in range(len(visuals))]


def _decode(visual: Encoded, size: int, resize: _Resize) -> torch.Tensor | DataError:
    """By Pillow and PyAV."""
    try:
        if isinstance(visual, EncodedPicture):
            return _picture(visual.data, size)[None]
        if isinstance(visual, BoxPicture):
            return box_picture(visual.box_xyxy, size)[None]
        frames = video.frames(visual.data, visual.frames, resize)
        return torch.stack(frames) if frames else torch.empty(0, 3, size, size, dtype=torch.uint8)
    except DataError as error:
        return error


def _picture(data: bytes, size: int) -> torch.Tensor:
    with opened(data) as picture:
        return _square(picture, size)


@contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """A picture file as RGB, by Pillow.

    Raises:
        DataError: it is no picture, damaged, cut off, or larger than `probe.MAX_PIXELS`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP", "GIF")) as picture:
            width, height = picture.size
            if width * height > probe.MAX_PIXELS:
                raise probe.too_large(width, height)
            yield _rgb(picture)
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError as error:  # whose message is an address in memory
        raise DataError("picture cannot be decoded: neither JPEG nor PNG, WebP or GIF, or its header is bad") from error
    # Pillow documents no common base for what damaged files raise (OSError, SyntaxError, ValueError, struct.error ...).
    except Exception as error:
        raise DataError(f"picture cannot be decoded: {type(error).__name__}: {error}") from error


def prepare(picture: Image.Image, size: int) -> torch.Tensor:
    """An opened picture as `decode` gives it: uint8 [3, size, size]."""
    return _square(_rgb(picture), size)


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        # 16 bits of grey. Pillow's own conversion takes all above 255 for white, here and in the released
        # preprocessing, which thereby loses such pictures; DALI scales them, and so do we.
        picture = Image.fromarray(np.rint(np.asarray(picture) / 257).astype(np.uint8))
    return picture.convert("RGB")


def _square(picture: Image.Image, size: int) -> torch.Tensor:
    # Across first, then down: what Pillow 11, and so the released preprocessing, does with every picture. Pillow 13
    # takes tall pictures the other way around, which rounds differently: up to 10 levels at edges.
    across = picture.resize((size, picture.height), Image.Resampling.BICUBIC)
    square = across.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1)))


_warned: set[str] = set()


def _warn_once(kind: str, refusal: DataError) -> None:
    # One such file is nothing; if it is all of them, this is why decoding is slow.
    if kind not in _warned:
        _warned.add(kind)
        logger.warning("DALI cannot decode an %s that Pillow or PyAV can, others may follow: %s", kind, refusal)


def _resize(pixels_HW3: np.ndarray, size: int) -> torch.Tensor:
    return _square(Image.fromarray(pixels_HW3), size)


def box_picture(box_xyxy: tuple[float, float, float, float], size: int) -> torch.Tensor:
    """The outline of a box, white on black, uint8 [3, size, size]; left, top, right, bottom are shares, 0 to 1.

    To the pixel what Emu2-Gen's `cv2.rectangle(zeros, (x0, y0), (x1, y1), (255, 255, 255), 3)` draws at corners rounded
    to pixels: OpenCV's thickness 3 is 5 pixels wide, two to each side of the line, with corners cut: white is what is
    at most two steps, across and down together, outside the box, and at most two inside.
    """
    x0, y0, x1, y1 = (round(share * size) for share in box_xyxy)
    steps = torch.arange(size)
    x, y = steps[None], steps[:, None]
    outside = (x0 - x).clamp(min=0) + (x - x1).clamp(min=0) + (y0 - y).clamp(min=0) + (y - y1).clamp(min=0)
    deep_inside = (x > x0 + 2) & (x < x1 - 2) & (y > y0 + 2) & (y < y1 - 2)
    outline = (outside <= 2) & ~deep_inside
    return (outline.to(torch.uint8) * 255).expand(3, size, size).contiguous()


def normalize(pixels_I3HW: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(pixels / 255 - mean) / std with CLIP's constants: uint8 [I, 3, H, W] to `dtype` [I, 3, H, W].

    Runs on the pixels' device, in float32 before the cast.
    """
    mean_311, std_311 = _constants(pixels_I3HW.device)
    normal_I3HW = torch.empty(pixels_I3HW.shape, dtype=dtype, device=pixels_I3HW.device)
    # A CPU takes one picture at a time: its float32 stays in the cache, and in memory that malloc has at hand.
    step = 1 if pixels_I3HW.device.type == "cpu" else max(1, len(pixels_I3HW))
    for pixels, normal in zip(pixels_I3HW.split(step), normal_I3HW.split(step), strict=True):
        normal.copy_(pixels.float().div_(255).sub_(mean_311).div_(std_311))
    return normal_I3HW


@lru_cache  # making them anew would make a GPU wait
def _constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = torch.tensor([CLIP_MEAN, CLIP_STD], device=device).view(2, 3, 1, 1)
    return mean, std
