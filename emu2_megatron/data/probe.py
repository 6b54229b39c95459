"""What can be known of a picture or a video without decoding it: its size, and that it is surely bad.

A loader probes before it hands samples out, so that a rank, which decodes whole batches, seldom meets a bad file. What
passes may still prove damaged when it is decoded; what is refused here no decoder could give back whole.
"""

import struct
import zlib

from emu2_megatron.data import video as clips
from emu2_megatron.data.filetypes import PICTURE_FORMATS, VIDEO_FORMATS, container, picture_format
from emu2_megatron.errors import DataError

MAX_PIXELS = 2**26
"""Pictures with more pixels (8192 x 8192) are refused unread: some 200 MB of memory each, or an attack."""
MAX_ASPECT = 50
"""Longer than so many times their width, or the other way around, pictures are refused: they would be squashed to a
square of 448, and strips such as banners, rulers and spacers leave 9 pixels of information across."""


def picture(name: str, data: bytes) -> tuple[int, int]:
    """Width and height of a picture file; nothing is decoded.

    Raises DataError ("reason: detail") if the file is empty, not what its extension says, cut off, damaged as far as
    its structure and checksums show, larger than MAX_PIXELS, or longer than MAX_ASPECT times its width.
    """
    _not_empty(name, data)
    wanted = PICTURE_FORMATS.get(_extension(name))
    found = picture_format(data)
    if wanted is None or found != wanted:
        raise _mismatch(name, found or "no picture that is known", PICTURE_FORMATS)
    width, height = picture_structure(data)
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise DataError(f"picture has an absurd aspect ratio: {width} x {height} pixels, limit {MAX_ASPECT} to 1")
    return width, height


def video(name: str, data: bytes) -> int:
    """How many frames of a video file are shown, at least 1; as `clip`."""
    return len(clip(name, data).times)


def clip(name: str, data: bytes) -> clips.Clip:
    """What a video file shows, from its packets; no frame is decoded.

    Raises DataError ("reason: detail") if the file is empty, not what its extension says, cut off, larger than
    MAX_PIXELS a frame, or the container cannot be read or has no video in it.
    """
    _not_empty(name, data)
    wanted = VIDEO_FORMATS.get(_extension(name))
    found = container(data)
    if wanted is None or found != wanted:
        raise _mismatch(name, found or "no video that is known", VIDEO_FORMATS)
    shown = clips.index(data)
    if shown.width * shown.height > MAX_PIXELS:
        raise DataError(f"video is too large: {shown.width} x {shown.height} pixels, limit {MAX_PIXELS}")
    return shown


def picture_structure(data: bytes) -> tuple[int, int]:
    """Width and height of a picture of any format that `picture_format` knows, whatever its shape.

    Raises DataError if its structure or checksums show that it is damaged or cut off, or if it has over MAX_PIXELS.
    """
    kind = picture_format(data)
    try:
        width, height = _SIZES[kind](data) if kind else (0, 0)
    except (struct.error, IndexError):  # ends within the header
        width = height = 0
    if kind is None or width < 1 or height < 1:
        raise _damaged("it has no readable header")
    if width * height > MAX_PIXELS:
        raise too_large(width, height)
    _CHECKS[kind](data)
    return width, height


def too_large(width: int, height: int) -> DataError:
    """The refusal of a picture with more than MAX_PIXELS."""
    return DataError(f"picture is too large: {width} x {height} pixels, limit {MAX_PIXELS}")


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _not_empty(name: str, data: bytes) -> None:
    if not data:
        raise DataError(f"file is empty: {name}")


def _mismatch(name: str, found: str, known: dict[str, str]) -> DataError:
    return DataError(
        f"file does not match its extension: {name} is {found} inside, legal are {', '.join(f'.{e}' for e in known)}"
    )


def _damaged(detail: str) -> DataError:
    return DataError(f"picture is cut off or damaged: {detail}")


# JPEG: segments of a marker, a length and a body, up to the scans, in which no marker can occur by chance.

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15; between them DHT, JPG and DAC
_BARE = frozenset({0x01, *range(0xD0, 0xD9)})  # markers without a length
_SCAN = frozenset({0xDA})
_EOI = b"\xff\xd9"


def _jpeg_segment(data: bytes, position: int, wanted: frozenset[int]) -> tuple[int, int]:
    """Where the next segment with one of these markers begins and ends; IndexError if there is none."""
    while True:
        if data[position] != 0xFF:
            raise _damaged(f"no JPEG marker at byte {position}")
        marker = data[position + 1]
        if marker == 0xFF:  # a marker may be preceded by any number of these
            position += 1
        elif marker in _BARE:
            position += 2
        else:
            end = position + 2 + (data[position + 2] << 8 | data[position + 3])
            if marker in wanted:
                return position, end
            position = end


def _jpeg_size(data: bytes) -> tuple[int, int]:
    start, _ = _jpeg_segment(data, 2, _FRAMES)
    height, width = struct.unpack_from(">HH", data, start + 5)
    return width, height


def _check_jpeg(data: bytes) -> None:
    # What follows the end mark (zeros, a second picture) does no harm; without one neither Pillow nor DALI decodes,
    # even where nothing but the mark is missing. A preview has a mark of its own, but lies before the scan.
    try:
        _, scan = _jpeg_segment(data, 2, _SCAN)
    except IndexError:
        raise _damaged("a JPEG without a scan") from None
    if data.rfind(_EOI, scan) < 0:
        raise _damaged("a JPEG without its end mark")


# PNG: chunks of a length, a name, a body and a checksum.

_PNG = b"\x89PNG\r\n\x1a\n"


def _png_size(data: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from(">II", data, 16)
    return (width, height) if data[12:16] == b"IHDR" else (0, 0)


def _check_png(data: bytes) -> None:
    position = len(_PNG)
    view = memoryview(data)
    while len(data) >= position + 12:
        end = position + 8 + struct.unpack_from(">I", data, position)[0]
        name = data[position + 4 : position + 8]
        if len(data) < end + 4:
            break
        if zlib.crc32(view[position + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise _damaged(f"the checksum of a PNG chunk {name!r} is wrong")
        if name == b"IEND":
            return
        position = end + 4
    raise _damaged("a PNG without its end chunk")


# WebP: a RIFF file whose first chunk says which of three kinds it is.


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and data[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X" and len(data) >= 30:
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    return 0, 0


def _check_webp(data: bytes) -> None:
    size = 8 + struct.unpack_from("<I", data, 4)[0]
    if len(data) < size:
        raise _damaged(f"a WebP of {len(data)} bytes that says it has {size}")


# GIF: blocks, each a chain of sub-blocks of up to 255 bytes, and a trailer.


def _gif_size(data: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from("<HH", data, 6)
    return width, height


def _check_gif(data: bytes) -> None:
    def after_table(flags: int, position: int) -> int:
        return position + (3 << (flags & 7) + 1 if flags & 0x80 else 0)

    try:
        position = after_table(data[10], 13)
        while data[position] != 0x3B:  # the trailer
            if data[position] == 0x2C:  # a frame: its place, perhaps colours, a code size
                position = after_table(data[position + 9], position + 10) + 1
            elif data[position] == 0x21:  # an extension and its kind
                position += 2
            else:
                raise _damaged(f"no GIF block begins at byte {position}")
            while data[position]:
                position += 1 + data[position]
            position += 1
    except IndexError:
        raise _damaged("a GIF without its trailer") from None


_SIZES = {"JPEG": _jpeg_size, "PNG": _png_size, "WEBP": _webp_size, "GIF": _gif_size}
_CHECKS = {"JPEG": _check_jpeg, "PNG": _check_png, "WEBP": _check_webp, "GIF": _check_gif}
