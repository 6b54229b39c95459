"""Preprocessing against independent formulations; hostile files only ever raise DataError."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from emu2_megatron.data.decode import decode_image, normalize
from emu2_megatron.errors import DataError


def _encode(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def test_whole_picture_is_squashed_channels_first() -> None:
    picture = Image.new("RGB", (40, 10), (200, 0, 0))
    picture.paste((0, 0, 100), (20, 0, 40, 10))
    pixels_3HW = decode_image(_encode(picture), 8).numpy()
    assert pixels_3HW.shape == (3, 8, 8) and pixels_3HW.dtype == np.uint8 and pixels_3HW.flags.c_contiguous
    # 40 x 10 to 8 x 8 without a crop: both halves are there. Bicubic reaches 2 * 40/8 = 10 source pixels to each side,
    # and the centres of columns 0 and 7 (2.5 and 37.5) are further than that from the edge at 20.
    assert (pixels_3HW[:, :, 0] == [[200], [0], [0]]).all() and (pixels_3HW[:, :, 7] == [[0], [0], [100]]).all()


def test_resize_is_bicubic_convolution(example_data: Path) -> None:
    """Against the separable filter computed in float64 with matrices: the definition, not Pillow's code."""
    data = (example_data / "images" / "skl_china.jpg").read_bytes()
    source_HW3 = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.float64)

    def filter_matrix(old: int, new: int) -> np.ndarray:
        scale = old / new  # > 1: the cubic (a = -0.5) is stretched by it, which is what antialiases
        distance = np.abs((np.arange(old) + 0.5)[None] - ((np.arange(new) + 0.5) * scale)[:, None]) / scale
        weights = np.where(
            distance < 1,
            (1.5 * distance - 2.5) * distance**2 + 1,
            np.where(distance < 2, ((-0.5 * distance + 2.5) * distance - 4) * distance + 2, 0),
        )
        return weights / weights.sum(axis=1, keepdims=True)

    height, width, _ = source_HW3.shape
    wide = np.clip(np.rint(np.einsum("nw,hwc->hnc", filter_matrix(width, 56), source_HW3)), 0, 255)
    expected = np.clip(np.einsum("nh,hwc->cnw", filter_matrix(height, 56), wide), 0, 255)
    # Half a level of rounding, and Pillow's fixed-point weights (22 bits) may turn a tie the other way in the
    # horizontal pass: one level more, in few places.
    difference = np.abs(decode_image(data, 56) - expected)
    assert difference.max() <= 1.6
    assert difference.mean() <= 0.3  # 0.25 is the mean of rounding alone


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_formats_agree_with_pillow(kind: str, example_data: Path) -> None:
    data = _encode(Image.open(example_data / "images" / "gc_duck.jpg"), kind)
    expected_HW3 = Image.open(io.BytesIO(data)).convert("RGB").resize((28, 28), Image.Resampling.BICUBIC)
    assert np.array_equal(decode_image(data, 28), np.asarray(expected_HW3).transpose(2, 0, 1))


def test_exif_rotation_is_not_applied() -> None:
    picture = Image.new("RGB", (32, 32))
    picture.paste((255, 255, 255), (0, 0, 16, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees"
    turned, plain = _encode(picture, "JPEG", exif=exif), _encode(picture, "JPEG")
    assert turned != plain
    assert np.array_equal(decode_image(turned, 16), decode_image(plain, 16))


@pytest.mark.parametrize(
    ("mode", "color", "rgb"),
    [("L", 77, (77, 77, 77)), ("RGBA", (1, 2, 3, 0), (1, 2, 3)), ("1", 1, (255, 255, 255)), ("LA", (9, 0), (9, 9, 9))],
)
def test_other_modes_become_rgb_and_alpha_is_dropped(mode: str, color: object, rgb: tuple[int, int, int]) -> None:
    pixels_3HW = decode_image(_encode(Image.new(mode, (5, 7), color)), 4)
    assert (pixels_3HW == np.array(rgb).reshape(3, 1, 1)).all()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x20\0\0\0WEBP"]))
def test_random_bytes_are_a_data_error(data: bytes, magic: bytes) -> None:
    with pytest.raises(DataError, match="^picture cannot be decoded: |^picture is too large: "):
        decode_image(magic + data, 8)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_pictures_decode_or_are_a_data_error(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP"]))
    encoded = bytearray(_encode(Image.linear_gradient("L").resize((24, 24)), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert decode_image(bytes(encoded), 8).shape == (3, 8, 8)
    except DataError:
        pass  # as it should be; anything else fails the test


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_and_empty_files(kind: str, example_data: Path) -> None:
    data = _encode(Image.open(example_data / "images" / "gc_duck.jpg"), kind)
    for length in (0, 10, len(data) // 2):
        with pytest.raises(DataError, match="picture cannot be decoded: "):
            decode_image(data[:length], 8)


def _png_header(width: int, height: int) -> bytes:
    chunks = b"\x89PNG\r\n\x1a\n"
    for name, body in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(100))),
        (b"IEND", b""),
    ):
        chunks += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return chunks


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(8193, 8192), (10000, 10000), (2**31 - 1, 2**31 - 1), (2**26 + 1, 1), (0, 5)])
def test_absurd_sizes_are_refused_before_decoding(size: tuple[int, int]) -> None:
    refusal = "^picture is too large: |^picture cannot be decoded: (DecompressionBomb|Unidentified)"
    with pytest.raises(DataError, match=refusal):
        decode_image(_png_header(*size), 8)


def test_the_limit_is_stated(make_png: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emu2_megatron.data.decode.MAX_PIXELS", 48)
    assert decode_image(make_png(size=(8, 6)), 4).shape == (3, 4, 4)
    with pytest.raises(DataError, match="^picture is too large: 7 x 7 pixels, limit 48"):
        decode_image(make_png(size=(7, 7)), 4)


def test_normalize_against_float64() -> None:
    pixels_I3HW = torch.arange(256, dtype=torch.uint8).repeat(2 * 3).view(2, 3, 16, 16)
    mean = np.array([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
    std = np.array([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)
    expected = (pixels_I3HW.numpy().astype(np.float64) / 255 - mean) / std
    # float32 rounds by 2^-24 relative. Quotient, mean and difference, each at most 1, err by 6e-8 each and are divided
    # by 0.26; std and the last quotient, at most 2.7, add 2 * 2.7 * 6e-8: 1.0e-6 together.
    result = normalize(pixels_I3HW, torch.float32)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, rtol=0, atol=1.1e-6)
    # bfloat16 keeps 8 bits: its rounding is at most 2^-9 relative; the bound is twice that.
    result = normalize(pixels_I3HW, torch.bfloat16)
    assert result.dtype == torch.bfloat16
    np.testing.assert_allclose(result.float().numpy(), expected, rtol=2**-8, atol=1e-6)
