"""Small pictures and videos made on the spot, for tests."""

import io
import json
import struct
import tempfile
import zlib
from pathlib import Path

import av
import numpy as np
from PIL import Image


def picture(format: str = "PNG", size: tuple[int, int] = (40, 30), seed: int = 0, mode: str = "RGB") -> bytes:
    """A picture of size (width, height), noisy enough that its file is mostly pixels; PNG, JPEG, WEBP or GIF."""
    width, height = size
    pixels_HW3 = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW3).convert(mode).save(buffer, format)
    return buffer.getvalue()


def video(
    frames: int, container: str = "mp4", codec: str = "libx264", size: tuple[int, int] = (64, 48), movflags: str = ""
) -> bytes:
    """A video of so many frames at 10 a second; frame i is noise above and of the shade 10 * i below. `movflags` are
    FFmpeg's for MP4 and MOV: "faststart" puts the table of contents before the pictures."""
    options = {"movflags": movflags} if movflags else {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "video")
        with av.open(str(path), "w", format=container, options=options) as output:
            stream = output.add_stream(codec, rate=10)
            stream.width, stream.height = size
            stream.pix_fmt = "yuv420p"
            rng = np.random.default_rng(0)
            for number in range(frames):
                pixels_HW3 = np.full((size[1], size[0], 3), 10 * number % 256, dtype=np.uint8)
                pixels_HW3[: size[1] // 2] = rng.integers(0, 256, (size[1] // 2, size[0], 3))
                output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels_HW3, format="rgb24")))
            output.mux(stream.encode(None))
        return path.read_bytes()


def audio(container: str = "mp4", codec: str = "aac") -> bytes:
    """A second of silence, without pictures."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=48000)
        for _ in range(46):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            frame.sample_rate = 48000
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def png(width: int, height: int, rows: bytes, depth: int = 8) -> bytes:
    """A gray PNG whose header claims this size, around these rows (a filter byte before each), whatever they hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def jpeg_of_size(width: int, height: int) -> bytes:
    """A sound JPEG whose header claims another size."""
    jpeg = picture("JPEG")
    place = jpeg.index(b"\xff\xc0") + 5  # start of frame: marker, length, precision; then height and width
    return jpeg[:place] + struct.pack(">HH", height, width) + jpeg[place + 4 :]


def safetensors(dtype: str, shape: list[int], data: bytes) -> bytes:
    """A safetensors file of one tensor `rows_QE`."""
    table = json.dumps({"rows_QE": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    return struct.pack("<Q", len(table)) + table + data
