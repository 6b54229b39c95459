"""Preprocessing against independent formulations, by both decoders; what is bad becomes a DataError in its place."""

import io
import struct
from concurrent.futures import ThreadPoolExecutor

import clips
import numpy as np
import pytest
import torch
from clips import encode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from emu2_megatron.data import decode as module
from emu2_megatron.data import probe
from emu2_megatron.data.decode import box_picture, decode, normalize
from emu2_megatron.data.visuals import BoxPicture, Encoded, EncodedPicture, EncodedVideo
from emu2_megatron.errors import DataError
from emu2_megatron.platform import kernels, threads

FORMATS = ["JPEG", "PNG", "WEBP", "GIF"]


@pytest.fixture(autouse=True, params=["pillow", "dali"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything here holds for both; DALI is among what the tests need, so that it is never left out."""
    monkeypatch.setattr(module, "backend", lambda: request.param)
    return str(request.param)


def one(data: bytes, size: int) -> np.ndarray:
    (pixels,) = decode([EncodedPicture(data)], size)
    if isinstance(pixels, DataError):
        raise pixels
    assert pixels.shape == (1, 3, size, size) and pixels.dtype == torch.uint8 and pixels.is_contiguous()
    return pixels[0].numpy()


def test_whole_picture_is_squashed_channels_first() -> None:
    picture = Image.new("RGB", (40, 10), (200, 0, 0))
    picture.paste((0, 0, 100), (20, 0, 40, 10))
    pixels_3HW = one(encode(picture), 8)
    # 40 x 10 to 8 x 8 without a crop: both halves are there. Bicubic reaches 2 * 40/8 = 10 source pixels to each side,
    # and the centres of columns 0 and 7 (2.5 and 37.5) are further than that from the edge at 20.
    assert (pixels_3HW[:, :, 0] == [[200], [0], [0]]).all() and (pixels_3HW[:, :, 7] == [[0], [0], [100]]).all()


def bicubic(source_HW3: np.ndarray, size: int) -> np.ndarray:
    """The separable filter computed in float64 with matrices, [3, size, size]: the definition, not Pillow's code."""

    def filter_matrix(old: int) -> np.ndarray:
        stretch = max(1, old / size)  # the cubic (a = -0.5) is stretched by it, which is what antialiases
        centres = (np.arange(size) + 0.5) * old / size
        distance = np.abs((np.arange(old) + 0.5)[None] - centres[:, None]) / stretch
        weights = np.where(
            distance < 1,
            (1.5 * distance - 2.5) * distance**2 + 1,
            np.where(distance < 2, ((-0.5 * distance + 2.5) * distance - 4) * distance + 2, 0),
        )
        return weights / weights.sum(axis=1, keepdims=True)

    height, width, _ = source_HW3.shape
    wide_HSC = np.clip(np.rint(filter_matrix(width) @ source_HW3.astype(np.float64)), 0, 255)
    return np.clip(filter_matrix(height) @ wide_HSC.transpose(2, 0, 1), 0, 255)


@pytest.mark.parametrize(
    ("name", "size"),
    [("skl_china", 56), ("skl_china", 448), ("gc_eiffeltower", 224), ("std_allium_oreophilum", 448), ("gc_bulb", 448)],
)
def test_resize_is_bicubic_convolution(name: str, size: int) -> None:
    """Wide and tall, smaller and larger: always across first, in whole levels from 0 to 255, then down."""
    data = (clips.DATA / "images" / f"{name}.jpg").read_bytes()
    expected = bicubic(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), size)
    # Half a level of rounding, and fixed-point weights (Pillow 22 bits, PyTorch 16) may turn a tie the other way in the
    # horizontal pass, or both: one level more, in few places.
    difference = np.abs(one(data, size) - expected)
    assert difference.max() <= 1.7
    assert difference.mean() <= 0.3  # 0.25 is the mean of rounding alone


def released(picture: Image.Image, size: int) -> np.ndarray:
    """What the released preprocessing makes of a picture that is at least as wide as it is tall."""
    return np.asarray(picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_agree_with_pillow(kind: str, backend: str) -> None:
    data = encode(clips.photo(), kind)
    difference = np.abs(one(data, 28).astype(int) - released(Image.open(io.BytesIO(data)), 28))
    assert difference.max() <= (1 if backend == "dali" and kind != "GIF" else 0)


def test_exif_rotation_is_not_applied() -> None:
    picture = Image.new("RGB", (32, 32))
    picture.paste((255, 255, 255), (0, 0, 16, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees"
    for kind in ("JPEG", "PNG", "WEBP"):
        turned, plain = encode(picture, kind, exif=exif), encode(picture, kind)
        assert turned != plain
        assert np.array_equal(one(turned, 16), one(plain, 16))


@pytest.mark.parametrize(
    ("mode", "color", "rgb"),
    [
        ("L", 77, (77, 77, 77)),
        ("RGBA", (1, 2, 3, 0), (1, 2, 3)),
        ("1", 1, (255, 255, 255)),
        ("LA", (9, 0), (9, 9, 9)),
        ("I;16", 128 * 257, (128, 128, 128)),
        ("I;16", 60000, (233, 233, 233)),
    ],
)
def test_other_modes_become_rgb_and_alpha_is_dropped(mode: str, color: object, rgb: tuple[int, int, int]) -> None:
    pixels_3HW = one(encode(Image.new(mode, (5, 7), color)), 4)
    assert (pixels_3HW == np.array(rgb).reshape(3, 1, 1)).all()


def test_the_first_picture_of_a_moving_one() -> None:
    second = Image.new("RGB", (20, 20), (0, 0, 250))
    for kind in ("GIF", "WEBP", "PNG"):
        first = Image.new("RGB", (20, 20), (250, 0, 0))
        data = encode(
            first, kind, save_all=True, append_images=[second], **({"lossless": True} if kind == "WEBP" else {})
        )
        assert (one(data, 8) == [[[250]], [[0]], [[0]]]).all(), kind


def test_boxes_are_drawn_as_opencv_does() -> None:
    """cv2.rectangle(zeros((24, 24)), (5, 6), (18, 16), 255, 3) by OpenCV 4.10, and a box that is a point."""
    rows = """
        ........................ 4x
        .....##############.....
        ....################....
        ...##################... 3x
        ...#####........#####... 5x
        ...##################... 3x
        ....################....
        .....##############.....
        ........................ 5x"""
    expected = [
        [255 * (c == "#") for c in row]
        for row, _, times in (line.strip().partition(" ") for line in rows.strip().split("\n"))
        for _ in range(int(times.rstrip("x") or 1))
    ]
    (pixels,) = decode([BoxPicture((5 / 24, 6 / 24, 18 / 24, 16 / 24))], 24)
    assert isinstance(pixels, torch.Tensor) and pixels.shape == (1, 3, 24, 24) and pixels.is_contiguous()
    assert all(channel.tolist() == expected for channel in pixels[0])
    x, y = np.mgrid[:12, :12]
    diamond = np.abs(x - 5) + np.abs(y - 5) <= 2
    assert np.array_equal(box_picture((5 / 12, 5 / 12, 5 / 12, 5 / 12), 12)[0].numpy() > 0, diamond)
    whole = box_picture((0.0, 0.0, 1.0, 1.0), 12)[0].numpy() > 0  # OpenCV's corner at 12 is outside
    assert np.array_equal(whole, ~((x > 2) & (x < 10) & (y > 2) & (y < 10)))


def visuals() -> list[Encoded]:
    """Good and bad, of all kinds."""
    png = encode(clips.photo().resize((90, 60)))
    return [
        EncodedPicture(encode(clips.photo().resize((64, 50)), "JPEG")),
        EncodedPicture(b""),
        EncodedVideo(clips.clip("vp8.webm"), (0, 20, 20, 39)),
        EncodedPicture(png[: len(png) // 2]),
        BoxPicture((0.1, 0.2, 0.5, 0.9)),
        EncodedPicture(png),
        EncodedVideo(clips.clip("h264.mp4"), (3, 40)),
        EncodedPicture(flipped(encode(clips.photo(), "JPEG"))),
        EncodedVideo(clips.clip("h264.mp4")[:900], (0,)),
        EncodedPicture(encode(clips.photo().resize((31, 33)), "GIF")),
        EncodedVideo(clips.clip("vp8_hidden.webm"), (39,)),
        EncodedPicture(clips.clip("h264.mp4")),
        EncodedPicture(encode(clips.photo().resize((500, 500)), "WEBP")),
        EncodedVideo(png, (0,)),
        EncodedVideo(clips.clip("mjpeg.avi"), ()),
    ]


def flipped(jpeg: bytes) -> bytes:
    """The second half of a JPEG's scan without sense, its end mark in place."""
    return jpeg[: len(jpeg) // 2] + b"\x55" * 2000 + b"\xff\xd9"


REASONS = {
    1: "picture cannot be decoded",
    3: "picture cannot be decoded",
    6: "video has too few frames",
    8: "video cannot be read",
    11: "picture cannot be decoded",
    13: "video cannot be read",
}
LENGTHS = {0: 1, 2: 4, 4: 1, 5: 1, 7: 1, 9: 1, 10: 1, 12: 1, 14: 0}


def check(results: list[torch.Tensor | DataError]) -> None:
    assert len(results) == len(REASONS) + len(LENGTHS)
    for place, result in enumerate(results):
        if place in REASONS:
            assert isinstance(result, DataError) and str(result).startswith(f"{REASONS[place]}: "), (place, result)
            assert "\n" not in str(result) and " at 0x" not in str(result)
        else:
            assert isinstance(result, torch.Tensor) and result.shape == (LENGTHS[place], 3, 32, 32), (place, result)
            assert result.dtype == torch.uint8 and result.is_contiguous()


def test_good_and_bad_together_keep_their_order() -> None:
    together = decode(visuals(), 32)
    check(together)
    for result, visual in zip(together, visuals(), strict=True):
        (alone,) = decode([visual], 32)
        assert type(alone) is type(result)
        assert torch.equal(alone, result) if isinstance(alone, torch.Tensor) else str(alone) == str(result)
    video = together[2]
    assert isinstance(video, torch.Tensor) and torch.equal(video[1], video[2]) and not torch.equal(video[0], video[1])


def test_nothing_to_decode() -> None:
    assert decode([], 32) == []


def test_from_several_threads_at_once() -> None:
    """As the loader calls it: from a thread of its own, while another does so too; several rounds."""
    expected = decode(visuals(), 32)
    with ThreadPoolExecutor(2) as pool:
        for results in pool.map(lambda _: decode(visuals(), 32), range(6)):
            check(results)
            for a, b in zip(results, expected, strict=True):
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else str(a) == str(b)


def test_what_is_no_picture() -> None:
    (error,) = decode([EncodedPicture(b"junk")], 16)
    assert isinstance(error, DataError)
    assert str(error).startswith("picture cannot be decoded: neither JPEG nor PNG, WebP or GIF")


STARTS = [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x20\0\0\0WEBP", b"GIF89a"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.sampled_from(STARTS))
def test_random_bytes_are_a_data_error(data: bytes, start: bytes) -> None:
    with pytest.raises(DataError, match="^picture cannot be decoded: |^picture is too large: "):
        one(start + data, 8)
    (video,) = decode([EncodedVideo(start + data, (0,))], 8)
    assert isinstance(video, DataError)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_pictures_decode_or_are_a_data_error(data: st.DataObject) -> None:
    encoded = bytearray(encode(Image.linear_gradient("L").resize((24, 24)), data.draw(st.sampled_from(FORMATS))))
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        one(bytes(encoded), 8)
    except DataError:
        pass  # as it should be; anything else fails the test


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_and_empty_files(kind: str) -> None:
    data = encode(clips.photo(), kind)
    for length in (0, 10, len(data) // 2):
        with pytest.raises(DataError, match="picture cannot be decoded: "):
            one(data[:length], 8)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(8193, 8192), (10000, 10000), (2**31 - 1, 2**31 - 1), (2**26 + 1, 1), (0, 5)])
def test_absurd_sizes_are_refused_before_decoding(size: tuple[int, int]) -> None:
    refusal = "^picture is too large: |^picture cannot be decoded: (DecompressionBomb|neither)"
    with pytest.raises(DataError, match=refusal):
        one(clips.png(*size), 8)


def test_the_limit_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "MAX_PIXELS", 48)
    assert one(encode(Image.new("RGB", (8, 6))), 4).shape == (3, 4, 4)
    with pytest.raises(DataError, match="^picture is too large: 7 x 7 pixels, limit 48"):
        one(encode(Image.new("RGB", (7, 7))), 4)


def test_a_gif_may_have_a_picture_larger_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(encode(Image.new("RGB", (9, 9)), "GIF"))
    data[6:10] = struct.pack("<HH", 2, 2)
    monkeypatch.setattr(probe, "MAX_PIXELS", 48)
    with pytest.raises(DataError, match="^picture is too large: 9 x 9 pixels, limit 48"):
        one(bytes(data), 4)


def test_the_decoder_is_chosen_by_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the fixture's choice
    assert kernels.has_dali() and module.backend() == "dali"
    monkeypatch.setattr(kernels, "has_dali", lambda: False)
    assert module.backend() == "pillow"


def test_threads_are_shared_out_among_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(12)))
    for ranks, expected in (("1", 12), ("4", 3), ("100", 1), ("0", 12)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert threads.count() == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert threads.in_threads(lambda x: 2 * x, range(50)) == list(range(0, 100, 2))
    assert threads.in_threads(lambda x: 2 * x, []) == []


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
    # A batch is what its pictures are, and an empty one is empty.
    assert torch.equal(result[1:], normalize(pixels_I3HW[1:], torch.bfloat16))
    assert normalize(pixels_I3HW[:0], torch.float32).shape == (0, 3, 16, 16)
