"""Pictures and videos through DALI (dynamic mode), in the rank's own process: on its GPU, or by the same code on a CPU.

What DALI cannot do is left to Pillow and PyAV (`data/decode.py`), and so is what it gets wrong. Known of DALI 2.4, and
why the code is as it is:

- A process that is forked after DALI's first use hangs: nothing here may run before the last fork, and no worker
  process may decode. DALI is imported on first use.
- One bad item fails its whole batch, without saying which: the items are tried again one by one.
- An empty batch counts as one item: none is ever made.
- Frames past the end of a video are black unless padded, and hidden frames of VP8 count as frames: numbers are checked
  against the packets first, and a video with hidden frames is left to PyAV.
- Videos are converted to RGB by BT.601 whatever they say: those that say otherwise are left to PyAV.
- On the CPU it decodes VP8, VP9 and Motion JPEG alone, and names a codec it lacks on stderr only.
- Its resize on the CPU takes ten times as long as PyTorch's, which is also nearer to Pillow's: the CPU takes PyTorch's.
- A JPEG with flipped bits decodes to garbage without an error, where Pillow may notice. So may Pillow not: nothing but
  checksums of one's own could tell.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch

from emu2_megatron.data import probe, video
from emu2_megatron.data.filetypes import picture_format
from emu2_megatron.data.visuals import Encoded, EncodedPicture, EncodedVideo
from emu2_megatron.errors import ConfigError, DataError
from emu2_megatron.platform import threads

PICTURE_FORMATS = frozenset({"JPEG", "PNG", "WEBP"})
VIDEO_CODECS = {
    "cpu": frozenset({"vp8", "vp9", "mjpeg"}),
    "gpu": frozenset({"vp8", "vp9", "mjpeg", "h264", "hevc", "av1"}),
}
"""By DALI's device, in FFmpeg's names."""

_PIXELS = 2**21
"""Decoded at once for each thread: a batch small enough for malloc to keep its memory, large enough for all threads."""
_BT601 = frozenset({2, 5, 6})
"""Colour spaces that DALI's conversion fits; 2 is "not said", which FFmpeg takes for BT.601 as well."""

_loading = threading.Lock()


class _Item(NamedTuple):
    """Something DALI should be able to decode."""

    place: int
    """Which of the visuals it is."""
    pixels: int
    """When decoded, all frames together."""
    data: bytes
    frames: tuple[int, ...]
    """Of a video; empty for a picture."""


def decode(visuals: Sequence[Encoded], size: int) -> dict[int, torch.Tensor | DataError]:
    """Those of the visuals that are for DALI, by their place: uint8 [pictures, 3, size, size] on the rank's device, or
    what DALI said of one it could not decode.

    May be called from any thread, and from several at once.
    """
    items = [item for place, visual in enumerate(visuals) if (item := _item(place, visual)) is not None]
    done: dict[int, torch.Tensor | DataError] = {}
    for function, wanted in (
        (_pictures, [item for item in items if not item.frames]),
        (_videos, [item for item in items if item.frames]),
    ):
        for batch in _batches(wanted):
            results = _each(partial(function, size=size), batch)
            done.update(zip((item.place for item in batch), results, strict=True))
    return done


def to_device(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels that were decoded on the CPU, where `decode` has its results."""
    if _device() == "cpu":
        return pixels
    from emu2_megatron.platform import device

    return device.to_device(pixels)


def resize(pixels_HW3: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 [H, W, 3] to contiguous [3, size, size] on the CPU: bicubic, antialiased, as Pillow but for rounding."""
    pixels_13HW = pixels_HW3.permute(2, 0, 1)[None]
    squashed = torch.nn.functional.interpolate(pixels_13HW, size=(size, size), mode="bicubic", antialias=True)
    return squashed[0].contiguous()


def _item(place: int, visual: Encoded) -> _Item | None:
    try:
        if isinstance(visual, EncodedPicture) and picture_format(visual.data) in PICTURE_FORMATS:
            width, height = probe.picture_structure(visual.data)
            return _Item(place, width * height, visual.data, ())
        if isinstance(visual, EncodedVideo) and visual.frames:
            clip = video.index(visual.data)
            fits = (
                clip.codec in VIDEO_CODECS[_device()]
                and clip.pixel_format in ("yuv420p", "yuvj420p")
                and clip.colorspace in _BT601
                and not clip.hidden
                and max(visual.frames) < len(clip.times)
                and min(visual.frames) >= 0
                and clip.width * clip.height <= probe.MAX_PIXELS
            )
            pixels = clip.width * clip.height * len(visual.frames)
            return _Item(place, pixels, visual.data, visual.frames) if fits else None
    except DataError:
        pass  # Pillow or PyAV will say what is wrong
    return None


def _batches(items: list[_Item]) -> Iterator[list[_Item]]:
    """The items in order, some at a time; none of the lists is empty."""
    batch: list[_Item] = []
    for item in items:
        if batch and sum(other.pixels for other in batch) + item.pixels > _PIXELS * max(4, threads.count()):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _each(function: Callable[[list[_Item]], list[torch.Tensor]], batch: list[_Item]) -> list[torch.Tensor | DataError]:
    try:
        return [*function(batch)]
    except (ConfigError, MemoryError):
        raise
    except Exception as error:  # mostly RuntimeError, but DALI does not say which it raises
        if len(batch) == 1:
            return [DataError(f"DALI: {' '.join(str(error).split())}")]
    return [result for item in batch for result in _each(function, [item])]


def _pictures(batch: list[_Item], size: int) -> list[torch.Tensor]:
    with _dali() as (ndd, types):
        pixels = ndd.decoders.image(
            _encoded(ndd, batch),
            device=_device(),
            output_type=types.RGB,
            adjust_orientation=False,  # the released preprocessing does not turn pictures either
            jpeg_fancy_upsampling=True,  # of the GPU: as libjpeg does it, whose decoder the CPU has
        )
        return [pixels_3HW[None] for pixels_3HW in _resized(ndd, types, pixels, size)]


def _videos(batch: list[_Item], size: int) -> list[torch.Tensor]:
    with _dali() as (ndd, types):
        frames = [np.array(item.frames, np.int32) for item in batch]
        pixels = ndd.decoders.video(
            _encoded(ndd, batch), device=_device(), frames=ndd.as_batch(frames, device="cpu"), pad_mode="edge"
        )
        return _resized(ndd, types, pixels, size)


def _encoded(ndd: Any, batch: list[_Item]) -> Any:
    return ndd.as_batch([np.frombuffer(item.data, np.uint8) for item in batch], device="cpu")


def _resized(ndd: Any, types: Any, batch: Any, size: int) -> list[torch.Tensor]:
    """A batch of [H, W, 3] or [frames, H, W, 3] as contiguous tensors with 3, size, size last."""
    if _device() == "cpu":
        pixels = _views(batch)
        parts = [part for tensor in pixels for part in (tensor if tensor.ndim == 4 else tensor[None])]
        squares = iter(threads.in_threads(partial(resize, size=size), parts))
        return [
            torch.stack([next(squares) for _ in tensor]) if tensor.ndim == 4 else next(squares) for tensor in pixels
        ]
    square = ndd.resize(batch, size=[float(size), float(size)], interp_type=types.INTERP_CUBIC, antialias=True)
    return [pixels.movedim(-1, -3).contiguous() for pixels in _views(square)]


def _views(batch: Any) -> list[torch.Tensor]:
    """A batch's items as PyTorch tensors in DALI's memory. The batch is of no use afterwards."""
    views = [tensor.torch() for tensor in batch.tensors]
    vars(batch).clear()  # of reference cycles: until they are found, memory and decoders would pile up
    return views


@contextmanager
def _dali() -> Iterator[tuple[Any, Any]]:
    """DALI's dynamic mode and its types; on CUDA with this rank's device, and PyTorch's stream, as DALI's too.

    One stream for both orders everything: DALI's memory is not reused before PyTorch has copied from it.
    """
    with _loading:
        modules = _load()
    if _device() == "cpu":
        yield modules
        return
    from emu2_megatron.platform import device

    with torch.cuda.device(device.device()):  # a new thread starts on device 0
        modules[0].set_current_stream(torch.cuda.current_stream())
        yield modules


@cache
def _load() -> tuple[Any, Any]:
    try:
        import nvidia.dali.experimental.dynamic as ndd
        import nvidia.dali.types as types
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"nvidia.dali is installed and does not import: {error}; mend it (pip install -e .[dali]), or uninstall it "
            "and pictures and videos are decoded by Pillow and PyAV"
        ) from error
    dynamic: Any = ndd  # which has no types
    dynamic.set_num_threads(threads.count())
    return dynamic, types


def _device() -> str:
    return "gpu" if torch.cuda.is_available() else "cpu"
