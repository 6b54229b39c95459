"""The squares that the decoders of pictures and of clips are trained on."""

import io
from dataclasses import replace
from pathlib import Path

import clips
import numpy as np
import pytest
import torch
from PIL import Image

from emu2_megatron.config.presets import PRESETS, VIDEO_DECODERS, VISUAL_DECODERS
from emu2_megatron.config.schema import Config, DataConfig, TrainingConfig
from emu2_megatron.data.crops import crop_sample, decode_crops
from emu2_megatron.data.loader import Loader
from emu2_megatron.data.sequence import Crop
from emu2_megatron.data.shards import RawSample, write_shard
from emu2_megatron.data.visuals import EncodedCrop
from emu2_megatron.errors import DataError

MODEL = replace(PRESETS["emu2_tiny"], image_queries=4, frame_queries=4)
CONFIG = Config(
    model=MODEL,
    visual_decoder=VISUAL_DECODERS["emu2_gen_tiny"],
    data=DataConfig(sequence_length=4, packing_buffer=1),
    training=TrainingConfig(objective="visual_decoder", global_batch_size=4, seed=7),
)
CLIPS = replace(
    CONFIG,
    video_decoder=VIDEO_DECODERS["emu2_video_tiny"],
    data=DataConfig(sequence_length=16, packing_buffer=1),
    training=replace(CONFIG.training, objective="video_decoder"),
)


def png(width: int, height: int, seed: int = 0) -> bytes:
    """A smooth picture: what resizes differ in is below a level almost everywhere."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (9 + seed) + i) + np.cos(y / (11 + seed) - i) for i in range(3)]
    file = io.BytesIO()
    Image.fromarray((np.stack(waves, 2) * 60 + 128).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def sample(width: int, height: int, key: str = "a") -> RawSample:
    return RawSample(key, {"kind": "caption", "image": "0.png", "text": "waves"}, {"0.png": png(width, height)})


def film(name: str, key: str = "a") -> RawSample:
    """One of `clips.NAMES`; those made there are 96 x 64, of 40 frames."""
    member = f"0.{name.rpartition('.')[2]}"
    return RawSample(key, {"kind": "caption", "video": member, "text": "a disc"}, {member: clips.clip(name)})


def crop_of(raw: RawSample, epoch: int = 0, index: int = 0, config: Config = CONFIG) -> tuple[EncodedCrop, Crop]:
    found = crop_sample(raw, config, epoch, index)
    assert len(found.tokens_S) == config.data.sequence_length == sum(found.queries) and set(found.queries) == {4}
    (visual,) = found.visuals
    assert isinstance(visual, EncodedCrop)
    (result,) = decode_crops([visual], config)
    assert not isinstance(result, DataError)
    return visual, result[0]


def check_square(visual: EncodedCrop, picture: Image.Image, painted_3HW: torch.Tensor, seen_3HW: torch.Tensor) -> None:
    """As SDXL has it: scale first, then cut, by Pillow's own two calls. Resizing only the square reads the same pixels,
    but for Pillow's rounding of where a pixel's neighbourhood begins: a level or two where it is steep."""
    (down, across), (top, left) = visual.scaled, visual.corner
    whole = np.asarray(picture.resize((across, down), Image.Resampling.BICUBIC)).astype(int)
    got = painted_3HW.permute(1, 2, 0).numpy().astype(int)
    inner = abs(got - whole[top : top + 64, left : left + 64])[3:-3, 3:-3]  # a whole sees beyond the square's edges
    assert inner.max() <= 3 and inner.mean() < 0.6
    assert seen_3HW.shape == (3, 56, 56) and seen_3HW.dtype is torch.uint8
    # The encoder is shown the same square: 8 x 8 parts of it are as bright.
    coarse = [
        np.asarray(Image.fromarray(square.permute(1, 2, 0).numpy()).resize((8, 8), Image.Resampling.BOX)).astype(int)
        for square in (painted_3HW, seen_3HW)
    ]
    assert abs(coarse[0] - coarse[1]).max() <= 2  # means of 64 and of 49 levels; a pixel's shift changes them by 5


@pytest.mark.parametrize(("width", "height"), [(200, 100), (90, 300), (64, 64), (64, 65)])
def test_the_square_is_cut_out_of_the_scaled_picture(width: int, height: int) -> None:
    for index in range(6):
        visual, crop = crop_of(sample(width, height), index=index)
        down, across = visual.scaled
        assert min(visual.scaled) >= 64 and min(visual.scaled) <= 80
        assert down / across == pytest.approx(height / width, rel=0.02) and visual.original == (height, width)
        top, left = crop.corner
        assert 0 <= top <= down - 64 and 0 <= left <= across - 64 and crop.original == (height, width)
        assert crop.painted_T3HW.shape == (1, 3, 64, 64)
        check_square(visual, Image.open(io.BytesIO(png(width, height))), crop.painted_T3HW[0], crop.seen_T3HW[0])


def test_all_frames_of_a_clip_are_cut_alike() -> None:
    """A film of 190 frames: four parts of 47, and the middle of each."""
    visual, crop = crop_of(film("cityCC0.mp4"), index=3, config=CLIPS)
    frames = clips.all_frames(clips.clip("cityCC0.mp4"))
    assert visual.frames == (23, 70, 117, 164) and visual.original == frames[0].shape[:2] and len(frames) == 190
    assert crop.painted_T3HW.shape == (4, 3, 64, 64) and len(crop.seen_T3HW) == 4
    for frame, painted_3HW, seen_3HW in zip(visual.frames, crop.painted_T3HW, crop.seen_T3HW, strict=True):
        check_square(visual, Image.fromarray(frames[frame]), painted_3HW, seen_3HW)


@pytest.mark.parametrize("clip", [False, True], ids=["picture", "clip"])
def test_draws_depend_on_seed_epoch_and_number_alone(clip: bool) -> None:
    raw, config = (film("vp8.webm"), CLIPS) if clip else (sample(300, 100), CONFIG)
    first, again = crop_of(raw, 1, 2, config)[1], crop_of(raw, 1, 2, config)[1]
    assert first.corner == again.corner and first.seed == again.seed and first.painted_T3HW.equal(again.painted_T3HW)
    others = [crop_of(raw, 2, 2, config)[1], crop_of(raw, 1, 3, config)[1],
              crop_of(raw, 1, 2, replace(config, training=replace(config.training, seed=8)))[1]]  # fmt: skip
    assert len({(crop.corner, crop.seed) for crop in [first, *others]}) == 4


def test_small_pictures_and_samples_without_one_are_refused() -> None:
    with pytest.raises(DataError, match=r"^picture is too small: a has 63 x 200 pixels, visual_decoder.min_picture_s"):
        crop_sample(sample(63, 200), CONFIG, 0, 0)
    with pytest.raises(DataError, match="^no picture: b has none of"):
        crop_sample(RawSample("b", {"kind": "text", "text": "words"}), CONFIG, 0, 0)
    broken = sample(100, 100)
    broken.files["0.png"] = broken.files["0.png"][:200]
    with pytest.raises(DataError):
        crop_of(broken)


def test_films_that_make_no_clip_are_refused() -> None:
    with pytest.raises(DataError, match="^no video: a has none of"):
        crop_sample(sample(100, 100), CLIPS, 0, 0)

    def with_decoder(**changes: int) -> Config:
        queries = 4 * changes.get("frames", 4)
        data = replace(CLIPS.data, sequence_length=queries)
        return replace(CLIPS, data=data, video_decoder=replace(CLIPS.video_decoder, **changes))

    with pytest.raises(DataError, match=r"^video has too few frames: a has 40, video_decoder.frames is 41"):
        crop_sample(film("vp8.webm"), with_decoder(frames=41), 0, 0)
    crop_sample(film("vp8.webm"), with_decoder(frames=40), 0, 0)
    with pytest.raises(
        DataError, match=r"^video is too small: a has 96 x 64 pixels, video_decoder.min_picture_size is"
    ):
        crop_sample(film("vp8.webm"), with_decoder(min_picture_size=65), 0, 0)
    visual = crop_sample(film("vp8.webm"), CLIPS, 0, 0).visuals[0]
    assert isinstance(visual, EncodedCrop)
    for bad, reason in [
        (replace(visual, frames=(0, 40)), "video has too few frames: "),
        (replace(visual, data=visual.data[:2000]), "video "),
        (replace(visual, original=(64, 97)), "size is not what the file says: 96 x 64, not 97 x 64"),
    ]:
        (result,) = decode_crops([bad], CLIPS)
        assert isinstance(result, DataError) and str(result).startswith(reason)


@pytest.mark.parametrize("clip", [False, True], ids=["pictures", "clips"])
def test_a_loader_gives_every_slot_a_crop_and_skips_bad_samples(tmp_path: Path, clip: bool) -> None:
    """Three of four can be used: of pictures one is too small, of films one has none."""
    pictures = [sample(100, 80, "s0"), sample(40, 100, "s1"), sample(70, 70, "s2"), sample(64, 90, "s3")]
    films = [film("vp8.webm", "s0"), sample(80, 80, "s1"), film("h264.mp4", "s2"), film("mjpeg.avi", "s3")]
    write_shard(tmp_path / "a.tar", films if clip else pictures)
    config = CLIPS if clip else CONFIG
    config = replace(config, data=replace(config.data, shards=(str(tmp_path / "a.tar"),), max_bad_share=0.0))

    def drawn(slots: list[int], steps: int) -> list[list[tuple[str, tuple[int, int], int]]]:
        with Loader(config, None, slots) as loader:
            steps_of = [next(loader) for _ in range(steps)]
            assert loader.skipped.keys() <= {"no video" if clip else "picture is too small"}
        assert all(len(row.crops) == 1 and not row.pictures for rows in steps_of for row in rows)
        return [[(row.keys[0], row.crops[0].corner, row.crops[0].seed) for row in rows] for rows in steps_of]

    together = drawn([0, 1, 2, 3], 4)
    assert {key for step in together for key, *_ in step} == {"s0", "s2", "s3"}
    # On two ranks each slot has the same pictures, with the same draws.
    halves = zip(drawn([0, 1], 4), drawn([2, 3], 4), strict=True)
    assert [a + b for a, b in halves] == together
