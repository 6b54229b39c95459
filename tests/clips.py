"""Pictures and videos for tests, encoded on the spot."""

import io
import struct
import zlib
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
from PIL import Image

DATA = Path(__file__).parents[1] / "examples" / "data"
PHOTOS = sorted(path for path in DATA.rglob("*") if path.suffix in (".jpg", ".png"))
VIDEOS = sorted(path for path in (DATA / "videos").iterdir() if path.suffix != ".json")

_MADE: dict[str, dict[str, object]] = {
    "vp8.webm": {"codec": "libvpx", "deadline": "realtime"},
    "vp8_uneven.webm": {"codec": "libvpx", "deadline": "realtime", "uneven": True},
    "vp9.webm": {"codec": "libvpx-vp9", "cpu-used": "6", "auto-alt-ref": "1", "lag-in-frames": "16"},
    "vp9_bt709.webm": {"codec": "libvpx-vp9", "cpu-used": "6", "colorspace": 1},
    "h264.mp4": {"codec": "libx264", "bf": "3"},
    "h264_uneven.mkv": {"codec": "libx264", "bf": "3", "uneven": True},
    "h264_open.mov": {"codec": "libx264", "x264-params": "open-gop=1:bframes=3:keyint=10"},
    "h264_late.mp4": {"codec": "libx264", "bf": "2", "start": 50},
    "h264.avi": {"codec": "libx264", "bf": "2"},
    "hevc.mp4": {"codec": "libx265", "x265-params": "log-level=none:open-gop=1:keyint=10"},
    "av1.mp4": {"codec": "libsvtav1", "preset": "12"},
    "mpeg4.avi": {"codec": "mpeg4", "bf": "2"},
    "mjpeg.avi": {"codec": "mjpeg"},
}
"""Every container, B-frames, uneven times, open groups of pictures, a late start, a colour matrix that is named."""

NAMES = [*_MADE, "vp8_hidden.webm", *(path.name for path in VIDEOS)]
"""All videos that `clip` knows."""


@cache
def clip(name: str) -> bytes:
    """One of NAMES as a file; those made here have 40 frames."""
    if name == "vp8_hidden.webm":
        return with_hidden_frames(clip("vp8.webm"))
    if name in _MADE:
        return make(name.rpartition(".")[2], **_MADE[name])  # type: ignore[arg-type]
    return (DATA / "videos" / name).read_bytes()


def make(
    extension: str,
    codec: str,
    count: int = 40,
    uneven: bool = False,
    start: int = 0,
    colorspace: int = 2,
    **options: str,
) -> bytes:
    """A video of a disc that moves over grey noise, 96 x 64, with a key frame every 15; `options` are the encoder's."""
    noise = np.random.default_rng(0).integers(0, 120, (64, 96, 1), dtype=np.uint8).repeat(3, 2)
    y, x = np.mgrid[:64, :96]
    buffer = io.BytesIO()
    container = "matroska" if extension == "mkv" else extension
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.gop_size = 96, 64, 15
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.colorspace = colorspace
        ticks = 40 if container in ("webm", "matroska") else 1
        stream.codec_context.time_base = Fraction(1, 25 * ticks)
        time = start * ticks
        for i in range(count):
            pixels = noise.copy()
            pixels[(x - 2 * i - 8) ** 2 + (y - 48 + i) ** 2 < 200] = (250 - 4 * i, 100 + 3 * i, 90)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, stream.codec_context.time_base
            time += ticks * (1 + (i * 7 % 3 if uneven else 0))
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def with_hidden_frames(vp8: bytes) -> bytes:
    """A VP8 video in which each key frame comes twice, first not to be shown: as an encoder's own references are."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(vp8)) as source, av.open(buffer, "w", format="webm") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if not packet.size:
                continue
            data = bytes(packet)
            hidden = [(packet.pts, bytes([data[0] & ~0x10]) + data[1:])] if packet.is_keyframe else []
            for time, content in [*hidden, (packet.pts + 1, data)]:
                copy = av.Packet(content)
                copy.pts = copy.dts = time
                copy.time_base, copy.is_keyframe, copy.stream = packet.time_base, packet.is_keyframe, stream
                output.mux(copy)
    return buffer.getvalue()


def all_frames(data: bytes) -> list[np.ndarray]:
    """Every frame of a video, uint8 [H, W, 3], decoded from the first to the last."""
    with av.open(io.BytesIO(data)) as opened:
        return [frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)]


def encode(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """A picture as a file."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG, RGB, sound in its structure, of which only the first rows are there: `data`, filter bytes included."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def photo() -> Image.Image:
    """512 x 483, RGB."""
    return Image.open(DATA / "images" / "gc_duck.jpg").convert("RGB")


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, infinite if equal."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")
