"""DALI on the CPU against Pillow and PyAV, and every trap of DALI that `data/dali.py` steps around.

Tolerances: pictures are decoded to the same bits; resized they differ by at most 2 levels of 256, and by 0.01 on
average. Frames, converted from YUV by other code, are at least 40 dB from PyAV's, resized.
"""

import gc
import io
import logging
import subprocess
import sys

import clips
import numpy as np
import pytest
import torch
from clips import encode
from PIL import Image, ImageCms

from emu2_megatron.data import dali, decode, video
from emu2_megatron.data.visuals import EncodedPicture, EncodedVideo
from emu2_megatron.errors import ConfigError, DataError

NATIVE = [
    name for name in clips.NAMES if name.split("_")[0].split(".")[0] in ("vp8", "vp9", "mjpeg", "display-dual-monitors")
]
LEFT = {"vp9_bt709.webm", "vp8_hidden.webm"}
"""Videos of a codec that DALI has, which it gets wrong all the same."""


def through_dali(*visuals: EncodedPicture | EncodedVideo, size: int = 64) -> list[torch.Tensor]:
    """What DALI itself makes of them; nothing may be left to Pillow and PyAV."""
    results = dali.decode(visuals, size)
    assert sorted(results) == list(range(len(visuals)))
    assert all(isinstance(result, torch.Tensor) for result in results.values()), results
    return [result for result in results.values() if isinstance(result, torch.Tensor)]


def pillow(data: bytes, size: int) -> torch.Tensor:
    result = decode._decode(EncodedPicture(data), size, lambda _: torch.empty(0))
    assert isinstance(result, torch.Tensor)
    return result


@pytest.mark.parametrize("size", [448, 224, 56])
def test_photos(size: int) -> None:
    files = [path.read_bytes() for path in clips.PHOTOS]
    differences = []
    for got, data in zip(through_dali(*map(EncodedPicture, files), size=size), files, strict=True):
        difference = (got.int() - pillow(data, size).int()).abs()
        assert difference.max() <= 2
        differences.append(difference.float().mean().item())
    assert max(differences) <= 0.01


def pictures() -> dict[str, bytes]:
    """Every kind of file that DALI is given."""
    photo, exif = clips.photo(), Image.Exif()
    alpha = photo.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(photo.size))
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey16 = Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (50, 60), dtype=np.uint16))
    return {
        **{f"jpeg {q} {s}": encode(photo, "JPEG", quality=q, subsampling=s) for q in (30, 90) for s in (0, 1, 2)},
        "jpeg odd": encode(photo.crop((0, 0, 101, 77)), "JPEG"),
        "jpeg progressive": encode(photo, "JPEG", progressive=True),
        "jpeg restart": encode(photo, "JPEG", restart_marker_blocks=4),
        "jpeg grey": encode(photo.convert("L"), "JPEG"),
        "jpeg cmyk": encode(photo.convert("CMYK"), "JPEG"),
        "jpeg rgb": encode(photo, "JPEG", keep_rgb=True),
        "jpeg exif": encode(photo, "JPEG", exif=exif),
        "jpeg icc": encode(photo, "JPEG", icc_profile=profile),
        "jpeg and garbage": encode(photo, "JPEG") + b"garbage" * 20,
        "two jpegs": encode(photo, "MPO", save_all=True, append_images=[photo.rotate(90)]),
        **{f"png {mode}": encode(photo.convert(mode)) for mode in ("RGB", "L", "1", "P")},
        "png alpha": encode(alpha),
        "png grey alpha": encode(alpha.convert("LA")),
        "png palette alpha": encode(photo.convert("P"), transparency=bytes(range(256))),
        "png 4 colours": encode(photo.quantize(4)),
        "png one colour transparent": encode(photo, transparency=(1, 2, 3)),
        "png exif": encode(photo, exif=exif),
        "png 16 bits of grey": encode(grey16),
        "png moving": encode(photo, save_all=True, append_images=[photo.rotate(90)]),
        "webp": encode(photo, "WEBP"),
        "webp lossless": encode(photo, "WEBP", lossless=True),
        "webp alpha": encode(alpha, "WEBP", lossless=True, exact=True),
        "webp exif": encode(photo, "WEBP", exif=exif),
        "webp icc": encode(photo, "WEBP", icc_profile=profile),
        "webp moving": encode(photo, "WEBP", save_all=True, append_images=[photo.rotate(30)]),
        **{f"{kind} 1 x 1": encode(Image.new("RGB", (1, 1), (9, 99, 199)), kind) for kind in ("JPEG", "PNG", "WEBP")},
        "20000 x 10": encode(Image.effect_noise((20000, 10), 50), "JPEG"),
    }


def test_decoded_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the resize: CMYK, palettes, alpha, 16 bits, rotation, 1 x 1 and the rest."""
    monkeypatch.setattr(dali, "resize", lambda pixels_HW3, size: pixels_HW3.clone())
    files = pictures()
    got = through_dali(*map(EncodedPicture, files.values()))
    for name, pixels, data in zip(files, got, files.values(), strict=True):
        with Image.open(io.BytesIO(data)) as picture:
            assert np.array_equal(pixels[0].numpy(), np.asarray(decode._rgb(picture))), name


def test_resized_within_two_levels() -> None:
    files = pictures()
    for name, got, data in zip(files, through_dali(*map(EncodedPicture, files.values())), files.values(), strict=True):
        assert (got.int() - pillow(data, 64).int()).abs().max() <= 2, name


@pytest.mark.parametrize("name", [name for name in NATIVE if name not in LEFT])
def test_videos(name: str) -> None:
    data = clips.clip(name)
    count = len(video.index(data).times)
    wanted = tuple(np.linspace(0, count - 1, 8).round().astype(int).tolist())
    expected = decode._decode(EncodedVideo(data, wanted), 224, lambda pixels: decode._resize(pixels, 224))
    (got,) = through_dali(EncodedVideo(data, wanted), size=224)
    assert got.is_contiguous() and got.shape == (8, 3, 224, 224) and got.dtype == torch.uint8
    assert isinstance(expected, torch.Tensor)
    for a, b in zip(got, expected, strict=True):
        assert clips.psnr(a.numpy(), b.numpy()) >= 40


@pytest.mark.parametrize("name", ["vp8.webm", "vp8_uneven.webm", "vp9.webm", "mjpeg.avi"])
def test_every_frame_is_the_one_that_was_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time, at full size: nearer to PyAV's frame of that number than to any other."""
    monkeypatch.setattr(dali, "resize", lambda pixels_HW3, size: pixels_HW3.clone())
    data, expected = clips.clip(name), clips.all_frames(clips.clip(name))
    for i in range(0, 40, 3):
        ((got,),) = through_dali(EncodedVideo(data, (i,)))
        distances = [clips.psnr(got.numpy(), frame) for frame in expected]
        assert np.argmax(distances) == i and distances[i] >= 30


@pytest.mark.parametrize("name", clips.NAMES)
def test_what_is_left_to_pyav(name: str) -> None:
    """Codecs that DALI lacks on the CPU, hidden frames, another colour matrix: then PyAV's pixels come out."""
    visual = EncodedVideo(clips.clip(name), (0, 30))
    assert (0 in dali.decode([visual], 64)) == (name in NATIVE and name not in LEFT)
    (got,) = decode.decode([visual], 64)
    assert isinstance(got, torch.Tensor)
    if name not in NATIVE or name in LEFT:
        frames = video.frames(visual.data, visual.frames, lambda pixels: dali.resize(torch.from_numpy(pixels), 64))
        assert torch.equal(got, torch.stack(frames))


def test_codecs_that_dali_lacks_fail_and_fall_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Should DALI be given one all the same, PyAV decodes it, and the log says so, once."""
    visuals = [EncodedVideo(clips.clip("vp8.webm"), (3,)), EncodedVideo(clips.clip("h264.mp4"), (3,))]
    expected = decode.decode(visuals, 64)
    monkeypatch.setitem(dali.VIDEO_CODECS, "cpu", frozenset({"vp8", "h264"}))
    monkeypatch.setattr(decode, "_warned", set())
    raw = dali.decode(visuals, 64)
    assert isinstance(raw[0], torch.Tensor) and isinstance(raw[1], DataError) and str(raw[1]).startswith("DALI: ")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            for a, b in zip(decode.decode(visuals, 64), expected, strict=True):
                assert isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
    assert [record.message.partition(",")[0] for record in caplog.records] == [
        "DALI cannot decode an EncodedVideo that Pillow or PyAV can"
    ]


def test_no_black_frames_past_the_end() -> None:
    """DALI gives black ones; here there is an error."""
    for wanted in ((40,), (0, 1000)):
        (result,) = decode.decode([EncodedVideo(clips.clip("vp8.webm"), wanted)], 64)
        assert isinstance(result, DataError) and str(result).startswith("video has too few frames: ")


def test_one_bad_picture_fails_its_batch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PNG whose checksums are right, and most of whose rows are missing: it passes the probe, and DALI raises."""
    good = [encode(clips.photo().resize((40 + i, 50)), kind) for i in range(3) for kind in ("JPEG", "PNG", "WEBP")]
    bad = clips.png(40, 50, bytes(200))
    calls = []
    real = dali._pictures
    monkeypatch.setattr(dali, "_pictures", lambda batch, size: (calls.append(len(batch)), real(batch, size))[1])
    results = dali.decode([EncodedPicture(data) for data in (*good[:4], bad, *good[4:])], 32)
    assert isinstance(results[4], DataError)
    assert calls == [10] + [1] * 10
    alone = through_dali(*map(EncodedPicture, good), size=32)
    for got, expected in zip([results[i] for i in range(10) if i != 4], alone, strict=True):
        assert isinstance(got, torch.Tensor) and torch.equal(got, expected)
    (last_word,) = decode.decode([EncodedPicture(bad)], 32)
    assert isinstance(last_word, DataError) and str(last_word).startswith("picture cannot be decoded: ")


def test_truncated_pictures_never_reach_dali(capfd: pytest.CaptureFixture[str]) -> None:
    """It would say so on stderr, naming no sample."""
    cut = [EncodedPicture(encode(clips.photo(), kind)[:-400]) for kind in ("JPEG", "PNG", "WEBP")]
    assert dali.decode(cut, 32) == {}
    assert all(isinstance(result, DataError) for result in decode.decode(cut, 32))
    assert capfd.readouterr().err == ""


def test_what_pillow_decodes_and_dali_does_not() -> None:
    """A PNG without its end chunk, and GIF: Pillow has the last word."""
    for data in (encode(clips.photo())[:-12], encode(clips.photo(), "GIF")):
        assert dali.decode([EncodedPicture(data)], 32) == {}
        (got,) = decode.decode([EncodedPicture(data)], 32)
        assert isinstance(got, torch.Tensor) and torch.equal(got, pillow(data, 32))


def test_a_flipped_jpeg_may_pass() -> None:
    """Known and documented: no error from DALI where Pillow has one. Should this fail, DALI has learned to check."""
    data = bytearray(encode(clips.photo(), "JPEG", quality=90, subsampling=0))
    for k in range(300, len(data) - 2, 997):
        data[k] ^= 0x10
    assert isinstance(decode._decode(EncodedPicture(bytes(data)), 32, lambda _: torch.empty(0)), DataError)
    through_dali(EncodedPicture(bytes(data)))


def test_batches_are_never_empty_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali.threads, "count", lambda: 1)
    monkeypatch.setattr(dali, "_PIXELS", 100)
    items = [dali._Item(place, pixels, b"", ()) for place, pixels in enumerate([300, 100, 1, 500, 400, 1])]
    assert [[item.place for item in batch] for batch in dali._batches(items)] == [[0, 1], [2], [3], [4], [5]]
    assert list(dali._batches([])) == []
    assert dali.decode([], 32) == {} and dali.decode([EncodedVideo(clips.clip("vp8.webm"), ())], 32) == {}


def test_nothing_waits_for_the_garbage_collector() -> None:
    """DALI's batches and their items refer to each other: memory and decoders would pile up until they are found."""
    visuals = [EncodedPicture(clips.encode(clips.photo())), EncodedVideo(clips.clip("vp8.webm"), (1, 2))]
    visuals += [EncodedPicture(clips.png(40, 50, bytes(200)))]
    decode.decode(visuals, 32)
    gc.collect()
    gc.disable()
    try:
        decode.decode(visuals, 32)
        left = [kind.__name__ for kind in map(type, gc.get_objects()) if str(kind.__module__).startswith("nvidia.dali")]
        assert left.count("Batch") == left.count("Tensor") == left.count("Invocation") == 0
    finally:
        gc.enable()


def test_a_broken_installation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    dali._load.cache_clear()
    monkeypatch.setitem(sys.modules, "nvidia.dali.types", None)
    with pytest.raises(ConfigError, match="^nvidia.dali is installed and does not import: .*uninstall it"):
        dali.decode([EncodedPicture(encode(clips.photo()))], 32)
    dali._load.cache_clear()


def test_dali_is_not_imported_before_it_is_used() -> None:
    """Workers are forked after this import, and a fork after DALI's first use hangs."""
    script = (
        "import sys; from emu2_megatron.data import dali, decode, probe, video; assert decode.backend() == 'dali'\n"
        "from emu2_megatron.data.visuals import BoxPicture; decode.decode([BoxPicture((0, 0, 1, 1))], 32)\n"
        "assert not [name for name in sys.modules if name.startswith('nvidia.dali')]"
    )
    subprocess.run([sys.executable, "-c", script], cwd=clips.DATA.parents[1], check=True)
