"""Videos through PyAV: which frames a file shows, and the pixels of some of them.

A frame's number is its place in the order of showing, which is the order in which a decoder gives frames out. Rotation
that a file asks for is not applied, as it is not for pictures; a file's colour matrix is.
"""

import bisect
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from emu2_megatron.data.filetypes import container
from emu2_megatron.errors import DataError

Result = TypeVar("Result")

av.logging.set_libav_level(av.logging.PANIC)  # FFmpeg would write to stderr, naming no sample; errors are raised


@dataclass(frozen=True)
class Clip:
    """What the packets of a video say."""

    codec: str
    """FFmpeg's name of it: vp8, vp9, av1, h264, hevc, mjpeg ..."""
    width: int
    height: int
    pixel_format: str
    """FFmpeg's name, such as yuv420p."""
    colorspace: int
    """Matrix from YUV to RGB, AVCOL_SPC_*: 1 is BT.709, 2 not said, 5 and 6 BT.601."""
    times: list[int | None]
    """Time at which each frame is shown, in the order of packets; None where the container does not say."""
    key_times: list[int | None]
    """Those of `times` at which decoding can start."""
    hidden: int
    """Packets that are decoded but not shown."""


def index(data: bytes) -> Clip:
    """What can be known of a video without decoding it.

    Raises DataError if the file is cut off, cannot be read, or has no frame.
    """
    kind = container(data)
    if kind is not None and (size := _size(kind, data)) > len(data):
        raise DataError(f"video is cut off: {len(data)} bytes of at least {size}")
    try:
        with _open(data) as opened:
            return _index(opened, _stream(opened))
    except (DataError, MemoryError):
        raise
    # PyAV's errors are of many kinds (FFmpegError has OSError and ValueError below it), and not all are its own.
    except Exception as error:
        raise _unreadable(error) from error


def frames(data: bytes, wanted: Sequence[int], use: Callable[[np.ndarray], Result]) -> list[Result]:
    """`use` of each wanted frame, uint8 [H, W, 3], RGB: the frames that decoding the whole file in order would give.

    A container with times is entered at the last key frame before each wanted frame; what time cannot find is found by
    decoding from the start. Only one frame in full size is kept at a time.

    Args:
        data: the file.
        wanted: numbers of frames from 0, not descending.
        use: what becomes of a frame; a frame that is wanted twice in a row is used once.

    Raises:
        DataError: the file is damaged or has fewer frames.
        ValueError: `wanted` is not as it must be.
    """
    if any(later < earlier for earlier, later in zip(wanted, wanted[1:], strict=False)) or min(wanted, default=0) < 0:
        raise ValueError(f"frames are counted from 0 and not descending, got {list(wanted)}")
    try:
        with _open(data) as opened:
            found = _by_time(opened, _stream(opened), wanted, use)
        if found is None:
            with _open(data) as opened:
                found = _in_order(opened, _stream(opened), wanted, use)
    except (DataError, MemoryError):
        raise
    except Exception as error:
        raise _unreadable(error) from error
    return found


def _open(data: bytes) -> InputContainer:
    # Only the container it looks like: among the others are playlists, which name files to open.
    kind = container(data)
    if kind is None:
        raise DataError("video cannot be read: it begins like none of mp4, mov, webm, mkv and avi")
    return av.open(io.BytesIO(data), mode="r", format=kind)


def _stream(opened: InputContainer) -> VideoStream:
    stream = opened.streams.best("video")  # not a cover picture, if there is anything else
    if not isinstance(stream, VideoStream):
        raise DataError("video cannot be read: there is no video in it")
    stream.codec_context.thread_count = 1  # clips are decoded beside each other
    return stream


def _index(opened: InputContainer, stream: VideoStream) -> Clip:
    context = stream.codec_context
    codec = context.codec.canonical_name
    has_times = opened.format.name != "avi"  # AVI knows the order of decoding only, and PyAV makes times of it
    shown: list[tuple[int | None, bool]] = []
    hidden = 0
    for packet in opened.demux(stream):
        if not packet.size:  # the last one, which tells a decoder to give out what it holds
            continue
        if packet.is_corrupt:
            raise DataError(f"video is cut off: after {len(shown)} frames")
        # A VP8 frame says in one bit whether it is shown: others are references made up by the encoder. VP9 and AV1
        # packets hold those together with a frame that is shown. Discarded is what an edit list leaves out.
        if packet.is_discard or (codec == "vp8" and not memoryview(packet)[0] & 0x10):
            hidden += 1
        else:
            shown.append((packet.pts if has_times else None, packet.is_keyframe))
    if not shown:
        raise DataError("video cannot be read: it has no frames")
    return Clip(
        codec=codec,
        width=context.width,
        height=context.height,
        pixel_format=context.pix_fmt or "",
        colorspace=int(context.colorspace),
        times=[time for time, _ in shown],
        key_times=[time for time, key in shown if key],
        hidden=hidden,
    )


def _by_time(
    opened: InputContainer, stream: VideoStream, wanted: Sequence[int], use: Callable[[np.ndarray], Result]
) -> list[Result] | None:
    """The wanted frames, or None if times do not lead to them."""
    clip = _index(opened, stream)
    _long_enough(len(clip.times), wanted)
    times = sorted(time for time in clip.times if time is not None)
    keys = sorted(time for time in clip.key_times if time is not None)
    if len(set(times)) != len(clip.times) or not keys:
        return None
    found: list[Result] = []
    decoder: Iterator[av.VideoFrame] = iter(())
    last: int | None = None
    for number, same in itertools.groupby(wanted):
        key = keys[max(0, bisect.bisect_right(keys, times[number]) - 1)]
        if last is None or key > last:
            opened.seek(key, stream=stream, backward=True)
            decoder, last = opened.decode(stream), None
        for frame in decoder:
            if frame.pts is None or (last is not None and frame.pts <= last):
                return None
            last = frame.pts
            if last >= times[number]:
                break
        if last != times[number]:
            return None
        found += [use(_pixels(frame))] * len(list(same))
    return found


def _in_order(
    opened: InputContainer, stream: VideoStream, wanted: Sequence[int], use: Callable[[np.ndarray], Result]
) -> list[Result]:
    found: list[Result] = []
    count = 0
    for count, frame in enumerate(opened.decode(stream), 1):
        if count - 1 in wanted:
            found += [use(_pixels(frame))] * wanted.count(count - 1)
        if len(found) == len(wanted):
            break
    _long_enough(count, wanted)
    return found


def _pixels(frame: av.VideoFrame) -> np.ndarray:
    if frame.is_corrupt:
        raise DataError(f"video is damaged: the frame at {frame.time} s cannot be decoded whole")
    pixels: np.ndarray = frame.to_ndarray(format="rgb24")
    return pixels


def _long_enough(count: int, wanted: Sequence[int]) -> None:
    if wanted and wanted[-1] >= count:
        raise DataError(f"video has too few frames: number {wanted[-1]} is wanted, {count} are there, counted from 0")


def _unreadable(error: Exception) -> DataError:
    return DataError(f"video cannot be read: {type(error).__name__}: {error}")


def _size(kind: str, data: bytes) -> int:
    """Bytes that a file must at least have by the sizes of its outermost parts; FFmpeg reads a cut file to its end."""
    if kind == "avi":
        return 8 + int.from_bytes(data[4:8], "little")
    part_size = _element_size if kind == "matroska" else _box_size
    position = 0
    while position + 8 <= len(data):
        size = part_size(data, position)
        if size is None:
            return len(data)
        position += size
    return position


def _box_size(data: bytes, position: int) -> int | None:
    """Size of an MP4 box with its header, or None if it ends with the file or is none."""
    size = int.from_bytes(data[position : position + 4], "big")
    if size == 1:
        size = int.from_bytes(data[position + 8 : position + 16], "big")
    return max(size, 8) if size and data[position + 4 : position + 8].isalnum() else None


def _element_size(data: bytes, position: int) -> int | None:
    """Size of an EBML header or a Matroska segment with its own header, or None if it does not say, or is neither."""
    start = position + 4
    if data[position:start] not in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):
        return None
    width = 9 - data[start].bit_length()  # as many bytes as zeros before the first one, and that one
    unknown = (1 << 7 * width) - 1
    size = int.from_bytes(data[start : start + width], "big") & unknown
    return None if size == unknown else 4 + width + size
