"""Frames by number are those of decoding everything in order; counts without decoding are those of decoding."""

import io
import struct

import av
import clips
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu2_megatron.data import video
from emu2_megatron.data.filetypes import container
from emu2_megatron.errors import DataError


def same(frame: np.ndarray) -> np.ndarray:
    return frame


@pytest.mark.parametrize("name", clips.NAMES)
def test_frames_are_those_of_decoding_in_order(name: str) -> None:
    data = clips.clip(name)
    expected = clips.all_frames(data)
    count = len(expected)
    assert len(video.index(data).times) == count
    generator = np.random.default_rng(0)
    chosen = [np.linspace(0, count - 1, 8).round().astype(int), np.sort(generator.integers(0, count, 5))]
    chosen += [[0], [count - 1], [count // 2 - 1, count // 2 - 1, count // 2]]
    for wanted in chosen:
        got = video.frames(data, list(map(int, wanted)), same)
        assert len(got) == len(wanted)
        assert all(np.array_equal(frame, expected[i]) for frame, i in zip(got, wanted, strict=True)), wanted
    # The frames differ, so that a neighbour would be noticed.
    assert not any(np.array_equal(a, b) for a, b in zip(expected[:20], expected[1:21], strict=True)) or name in (
        "display-dual-monitors.webm",  # nothing moves for a while
    )


@pytest.mark.parametrize("name", ["h264.mp4", "h264_uneven.mkv", "vp8.webm"])
def test_every_single_frame(name: str) -> None:
    expected = clips.all_frames(clips.clip(name))
    for i, frame in enumerate(expected):
        assert np.array_equal(video.frames(clips.clip(name), [i], same)[0], frame), i


def test_decoding_begins_at_a_key_frame() -> None:
    """With key frames at 0, 15 and 30, number 35 does not depend on what is in the first 30."""
    data = bytearray(clips.clip("vp8.webm"))
    with av.open(io.BytesIO(bytes(data))) as opened:
        packets = [bytes(packet) for packet in opened.demux(video=0) if packet.size]
    for packet in packets[:30]:
        start = bytes(data).index(packet)
        data[start + 3 : start + len(packet)] = bytes(len(packet) - 3)
    (got,) = video.frames(bytes(data), [35], same)
    assert np.array_equal(got, clips.all_frames(clips.clip("vp8.webm"))[35])
    with pytest.raises(DataError):
        video.frames(bytes(data), [5], same)


def test_hidden_frames_do_not_count() -> None:
    plain, hidden = clips.clip("vp8.webm"), clips.clip("vp8_hidden.webm")
    assert video.index(plain).hidden == 0 and video.index(hidden).hidden == 3
    assert len(video.index(hidden).times) == len(video.index(plain).times) == 40
    for a, b in zip(clips.all_frames(plain), video.frames(hidden, range(40), same), strict=True):
        assert np.array_equal(a, b)


def test_what_the_index_says() -> None:
    clip = video.index(clips.clip("vp9_bt709.webm"))
    assert (clip.codec, clip.width, clip.height, clip.pixel_format, clip.colorspace) == ("vp9", 96, 64, "yuv420p", 1)
    assert {video.index(clips.clip(name)).codec for name in clips.NAMES} == {
        "vp8", "vp9", "h264", "hevc", "av1", "mpeg4", "mjpeg"
    }  # fmt: skip


def test_the_colour_matrix_is_applied() -> None:
    """BT.709 and BT.601 from the same YUV: red differs by 20 levels."""
    data = clips.clip("vp9_bt709.webm")
    with av.open(io.BytesIO(data)) as opened:
        frame = next(opened.decode(video=0))
        wanted, other = (frame.to_ndarray(format="rgb24", src_colorspace=name) for name in ("ITU709", "ITU601"))
    (got,) = video.frames(data, [0], same)
    assert np.array_equal(got, wanted) and np.abs(got.astype(int) - other).max() > 10


def test_frames_that_are_not_there() -> None:
    for name in ("h264.mp4", "h264.avi"):  # by time, and in order
        assert video.frames(clips.clip(name), [], same) == []
        with pytest.raises(DataError, match="^video has too few frames: number 40 is wanted, 40 are there"):
            video.frames(clips.clip(name), [3, 40], same)
    for wanted in ([2, 1], [-1]):
        with pytest.raises(ValueError, match="counted from 0 and not descending"):
            video.frames(clips.clip("h264.mp4"), wanted, same)


def test_fewer_frames_than_packets() -> None:
    """Packets in the middle are damaged beyond recognition: DataError, or frames in their places; never others."""
    data = bytearray(clips.clip("vp8.webm"))
    with av.open(io.BytesIO(bytes(data))) as opened:
        packet = [packet for packet in opened.demux(video=0) if packet.size][15]
    start = bytes(data).index(bytes(packet))
    data[start + 3 : start + 60] = bytes(57)  # a key frame's start code and more
    expected = clips.all_frames(clips.clip("vp8.webm"))
    assert np.array_equal(video.frames(bytes(data), [3], same)[0], expected[3])
    with pytest.raises(DataError, match="^video "):
        video.frames(bytes(data), [20], same)


@pytest.mark.parametrize("name", clips.NAMES)
def test_cut_off_files(name: str) -> None:
    data = clips.clip(name)
    for share in (0.0, 0.05, 0.5, 0.95):
        with pytest.raises(DataError, match="^video is cut off: |^video cannot be read: "):
            video.index(data[: int(share * len(data))])
    with pytest.raises(DataError, match="^video is cut off: "):
        video.index(data[:-1])


@pytest.mark.parametrize("name", ["h264.mp4", "vp8.webm", "mjpeg.avi"])
def test_what_follows_the_end_does_no_harm(name: str) -> None:
    for rest in (bytes(1000), b"\xff" * 50, b"x"):
        assert len(video.index(clips.clip(name) + rest).times) == 40


def test_a_live_recording_does_not_say_its_size() -> None:
    data = clips.clip("vp8.webm")
    at = data.index(b"\x18\x53\x80\x67")
    assert data[at + 4] == 1  # eight bytes of size
    live = data[: at + 5] + b"\xff" * 7 + data[at + 12 :]
    assert video._size("matroska", live) == len(live) and len(video.index(live).times) == 40


def test_a_long_mp4_says_its_size_in_eight_bytes() -> None:
    data = clips.clip("h264.mp4")
    at = data.index(b"mdat") - 4
    (size,) = struct.unpack_from(">I", data, at)
    long = data[:at] + struct.pack(">I4sQ", 1, b"mdat", size + 8) + data[at + 8 :]
    assert video._size("mp4", long) == len(long)
    assert video._size("mp4", long[:-9]) == len(long)


def test_containers_by_their_beginning() -> None:
    kinds = {"mp4": "mp4", "mov": "mp4", "webm": "matroska", "mkv": "matroska", "avi": "avi"}
    for name in clips.NAMES:
        assert container(clips.clip(name)) == kinds[name.rpartition(".")[2]]
    for data in (
        b"",
        b"RIFF\0\0\0\0WEBPVP8 ",
        b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n",
        b"ffconcat version 1.0\nfile x\n",
    ):
        assert container(data) is None
        with pytest.raises(DataError, match="^video cannot be read: it begins like none of mp4"):
            video.frames(data, [0], same)


def test_sound_alone_is_no_video() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        stream = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    with pytest.raises(DataError, match="^video cannot be read: there is no video in it"):
        video.index(buffer.getvalue())


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_videos_decode_or_are_a_data_error(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["h264.mp4", "vp8.webm", "vp9.webm", "mpeg4.avi", "mjpeg.avi", "h264_uneven.mkv"]))
    content = bytearray(clips.clip(name))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, min(len(content) - 1, 4000)))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    for call in (
        lambda: len(video.index(bytes(content)).times),
        lambda: len(video.frames(bytes(content), [0, 9], same)),
    ):
        try:
            assert call() > 0
        except DataError as error:
            assert str(error).startswith("video ")


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=400),
    st.sampled_from([b"", b"\0\0\0\x18ftypisom", b"\x1a\x45\xdf\xa3", b"RIFF\x20\0\0\0AVI LIST", b"\0\0\0\x08moov"]),
)
def test_random_bytes_are_a_data_error(content: bytes, start: bytes) -> None:
    for call in (lambda: video.index(start + content), lambda: video.frames(start + content, [0], same)):
        with pytest.raises(DataError, match="^video "):
            call()
