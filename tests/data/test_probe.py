"""What probing finds: sizes as Pillow's, every kind of damage that can be seen, and nothing wrong with good files."""

import io
from collections.abc import Callable

import clips
import pytest
from clips import encode
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from emu2_megatron.data import probe
from emu2_megatron.data.filetypes import VIDEO_FORMATS
from emu2_megatron.errors import DataError

SMALL = Image.linear_gradient("L").resize((24, 20)).convert("RGB")
KINDS = {"0.jpg": "JPEG", "0.png": "PNG", "0.webp": "WEBP", "0.gif": "GIF"}

GOOD: dict[str, tuple[str, Callable[[], bytes]]] = {
    "progressive": ("a.jpeg", lambda: encode(SMALL, "JPEG", progressive=True)),
    "restart markers": ("a.jpg", lambda: encode(SMALL, "JPEG", restart_marker_blocks=1)),
    "grey": ("a.jpg", lambda: encode(SMALL.convert("L"), "JPEG")),
    "CMYK": ("a.jpg", lambda: encode(SMALL.convert("CMYK"), "JPEG")),
    "two pictures in one": ("a.jpg", lambda: encode(SMALL, "MPO", save_all=True, append_images=[SMALL.rotate(9)])),
    "preview": ("a.jpg", lambda: encode(SMALL, "JPEG", exif=b"Exif\0\0" + encode(SMALL.resize((8, 8)), "JPEG"))),
    "fill bytes": ("a.jpg", lambda: b"\xff\xd8\xff\xff\xff" + encode(SMALL, "JPEG")[3:]),
    "zeros after a JPEG": ("a.jpg", lambda: encode(SMALL, "JPEG") + bytes(700)),
    "garbage after a JPEG": ("a.jpg", lambda: encode(SMALL, "JPEG") + b"garbage"),
    "capitals": ("A.B.JPG", lambda: encode(SMALL, "JPEG")),
    "palette": ("a.png", lambda: encode(SMALL.convert("P"))),
    "alpha": ("a.png", lambda: encode(SMALL.convert("RGBA"))),
    "garbage after a PNG": ("a.png", lambda: encode(SMALL) + b"garbage"),
    "moving PNG": ("a.png", lambda: encode(SMALL, save_all=True, append_images=[SMALL.rotate(9)])),
    "lossless": ("a.webp", lambda: encode(SMALL, "WEBP", lossless=True)),
    "extended": ("a.webp", lambda: encode(SMALL.convert("RGBA"), "WEBP", exif=b"Exif\0\0MM")),
    "moving WebP": ("a.webp", lambda: encode(SMALL, "WEBP", save_all=True, append_images=[SMALL.rotate(9)])),
    "moving GIF": ("a.gif", lambda: encode(SMALL, "GIF", save_all=True, append_images=[SMALL.rotate(9)], comment="hi")),
    "one pixel": ("a.png", lambda: encode(Image.new("RGB", (1, 1)))),
    "50 to 1": ("a.png", lambda: encode(Image.new("RGB", (500, 10)))),
}


@pytest.mark.parametrize("path", clips.PHOTOS, ids=lambda path: path.name)
def test_photos(path) -> None:
    assert probe.picture(path.name, path.read_bytes()) == Image.open(path).size


@pytest.mark.parametrize("case", GOOD)
def test_good_pictures(case: str) -> None:
    name, make = GOOD[case]
    picture = Image.open(io.BytesIO(make()))
    picture.load()
    assert probe.picture(name, make()) == picture.size


@pytest.mark.parametrize("name", clips.NAMES)
def test_frames_are_counted_without_decoding(name: str) -> None:
    assert probe.video(name, clips.clip(name)) == len(clips.all_frames(clips.clip(name)))


@pytest.mark.parametrize("name", KINDS)
def test_cut_off_pictures(name: str) -> None:
    """Whatever is cut off, by a byte or by half: wherever Pillow or DALI would fail, and a missing end mark besides."""
    data = encode(clips.photo().resize((60, 50)), KINDS[name])
    end = {"0.jpg": 1, "0.png": 1, "0.webp": 1, "0.gif": 1}[name]
    for length in (*range(1, 40), len(data) // 2, len(data) - 12, len(data) - end):
        with pytest.raises(DataError, match="^picture is cut off or damaged: |^file does not match its extension: "):
            probe.picture(name, data[:length])


@pytest.mark.parametrize("name", ["0.jpg", "0.png", "0.webp", "0.gif", "0.mp4", "0.webm"])
def test_empty_files(name: str) -> None:
    with pytest.raises(DataError, match=f"^file is empty: {name}$"):
        (probe.video if name[2:] in VIDEO_FORMATS else probe.picture)(name, b"")


def test_wrong_extensions() -> None:
    files = {name: encode(SMALL, kind) for name, kind in KINDS.items()}
    for name in files:
        for other, data in files.items():
            if other != name:
                with pytest.raises(DataError, match=f"^file does not match its extension: {name} is {KINDS[other]} in"):
                    probe.picture(name, data)
        with pytest.raises(DataError, match="^file does not match its extension: .*is no video that is known inside"):
            probe.video("0.mp4", files[name])
    with pytest.raises(DataError, match="^file does not match its extension: 0.webm is mp4 inside, legal are .mp4, "):
        probe.video("0.webm", clips.clip("h264.mp4"))
    with pytest.raises(DataError, match="^file does not match its extension: 0.jpg is no picture that is known"):
        probe.picture("0.jpg", b"<html>404</html>")
    for name in ("0.bmp", "jpg.txt", ""):
        with pytest.raises(DataError, match="^file does not match its extension: "):
            probe.picture(name, files["0.png"])


@pytest.mark.parametrize("size", [(8193, 8192), (2**31 - 1, 2**31 - 1), (30000, 30000)])
def test_bombs(size: tuple[int, int]) -> None:
    with pytest.raises(DataError, match=f"^picture is too large: {size[0]} x {size[1]} pixels, limit 67108864"):
        probe.picture("0.png", clips.png(*size))


def test_absurd_shapes() -> None:
    for size in ((20000, 10), (10, 501)):
        with pytest.raises(
            DataError, match=f"^picture has an absurd aspect ratio: {size[0]} x {size[1]} pixels, limit"
        ):
            probe.picture("0.png", encode(Image.new("RGB", size)))
    for size in ((0, 5), (5, 0)):
        with pytest.raises(DataError, match="^picture is cut off or damaged: it has no readable header"):
            probe.picture("0.png", clips.png(*size))


def test_a_video_of_absurd_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "MAX_PIXELS", 96 * 64 - 1)
    with pytest.raises(DataError, match="^video is too large: 96 x 64 pixels, limit 6143"):
        probe.video("0.mp4", clips.clip("h264.mp4"))


def test_every_flipped_byte_of_a_png_is_noticed() -> None:
    data = encode(SMALL)
    for i in range(len(data)):
        with pytest.raises(DataError):
            probe.picture("0.png", data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :])


def test_a_jpeg_without_a_scan() -> None:
    data = encode(SMALL, "JPEG")
    scan = data.index(b"\xff\xda")
    for content in (data[:scan], data[:scan] + b"\xff\xd9", data[: scan + 12]):
        with pytest.raises(DataError, match="^picture is cut off or damaged: a JPEG without "):
            probe.picture("0.jpg", content)


def test_what_is_refused_could_not_be_decoded_whole() -> None:
    """Cut anywhere, a JPEG or WebP that probing refuses is one that Pillow refuses, and the other way around."""
    for name in ("0.jpg", "0.webp"):
        data = encode(clips.photo().resize((40, 30)), KINDS[name])
        for length in range(len(data) - 200, len(data) + 1):
            try:
                Image.open(io.BytesIO(data[:length])).load()
                whole = True
            except OSError:
                whole = False
            try:
                probe.picture(name, data[:length])
            except DataError:
                assert not whole, length
            else:
                assert whole, length


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_files_give_a_value_or_a_data_error(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*KINDS, "0.mp4", "0.webm", "0.avi"]))
    if name in KINDS:
        content, call = bytearray(encode(SMALL, KINDS[name])), probe.picture
    else:
        content, call = (
            bytearray(clips.clip({"0.mp4": "h264.mp4", "0.webm": "vp8.webm", "0.avi": "mpeg4.avi"}[name])),
            probe.video,
        )
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 3000) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert call(name, bytes(content[: data.draw(st.integers(1, len(content)))]))
    except DataError as error:
        assert ": " in str(error) and "\n" not in str(error)


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=300),
    st.sampled_from(
        [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x20\0\0\0WEBPVP8 ", b"GIF89a", b"\0\0\0\x18ftyp"]
    ),
    st.sampled_from([*KINDS, "0.mp4", "0.webm", "0.avi", "0", ""]),
)
def test_random_bytes_give_a_value_or_a_data_error(content: bytes, start: bytes, name: str) -> None:
    for call in (probe.picture, probe.video):
        try:
            call(name, start + content)
        except DataError:
            pass
