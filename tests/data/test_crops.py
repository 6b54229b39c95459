"""The squares that the visual decoder is trained on."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from emu2_megatron.config.presets import PRESETS, VISUAL_DECODERS
from emu2_megatron.config.schema import Config, DataConfig, TrainingConfig
from emu2_megatron.data.crops import decode_crops, picture_sample
from emu2_megatron.data.loader import Loader
from emu2_megatron.data.sequence import Crop
from emu2_megatron.data.shards import RawSample, write_shard
from emu2_megatron.data.visuals import EncodedCrop
from emu2_megatron.errors import DataError

MODEL = replace(PRESETS["emu2_tiny"], image_queries=4)
CONFIG = Config(
    model=MODEL,
    visual_decoder=VISUAL_DECODERS["emu2_gen_tiny"],
    data=DataConfig(sequence_length=4, packing_buffer=1),
    training=TrainingConfig(objective="visual_decoder", global_batch_size=4, seed=7),
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


def crop_of(raw: RawSample, epoch: int = 0, index: int = 0, config: Config = CONFIG) -> tuple[EncodedCrop, Crop]:
    found = picture_sample(raw, config, epoch, index)
    assert len(found.tokens_S) == 4 and found.queries == [4]
    (visual,) = found.visuals
    assert isinstance(visual, EncodedCrop)
    (result,) = decode_crops([visual], config)
    assert not isinstance(result, DataError)
    return visual, result[0]


@pytest.mark.parametrize(("width", "height"), [(200, 100), (90, 300), (64, 64), (64, 65)])
def test_the_square_is_cut_out_of_the_scaled_picture(width: int, height: int) -> None:
    """As SDXL has it: scale first, then cut, by Pillow's own two calls. Resizing only the square reads the same pixels,
    but for Pillow's rounding of where a pixel's neighbourhood begins: a level or two where it is steep."""
    for index in range(6):
        visual, crop = crop_of(sample(width, height), index=index)
        down, across = visual.scaled
        assert min(visual.scaled) >= 64 and min(visual.scaled) <= 80
        assert down / across == pytest.approx(height / width, rel=0.02) and visual.original == (height, width)
        top, left = crop.corner
        assert 0 <= top <= down - 64 and 0 <= left <= across - 64 and crop.original == (height, width)
        picture = Image.open(io.BytesIO(png(width, height)))
        whole = np.asarray(picture.resize((across, down), Image.Resampling.BICUBIC)).astype(int)
        wanted = whole[top : top + 64, left : left + 64]
        got = crop.painted_3HW.permute(1, 2, 0).numpy().astype(int)
        inner = abs(got - wanted)[3:-3, 3:-3]  # at its edges a resize of the whole sees beyond the square
        assert inner.max() <= 3 and inner.mean() < 0.6
        assert crop.seen_3HW.shape == (3, 56, 56) and crop.seen_3HW.dtype is torch.uint8
        # The encoder is shown the same square.
        seen = Image.fromarray(crop.seen_3HW.permute(1, 2, 0).numpy()).resize((64, 64), Image.Resampling.BICUBIC)
        assert abs(np.asarray(seen).astype(int) - got)[3:-3, 3:-3].mean() < 3


def test_draws_depend_on_seed_epoch_and_number_alone() -> None:
    raw = sample(300, 100)
    first, again = crop_of(raw, 1, 2)[1], crop_of(raw, 1, 2)[1]
    assert first.corner == again.corner and first.seed == again.seed and first.painted_3HW.equal(again.painted_3HW)
    others = [crop_of(raw, 2, 2)[1], crop_of(raw, 1, 3)[1],
              crop_of(raw, 1, 2, replace(CONFIG, training=replace(CONFIG.training, seed=8)))[1]]  # fmt: skip
    assert len({(crop.corner, crop.seed) for crop in [first, *others]}) == 4


def test_small_pictures_and_samples_without_one_are_refused() -> None:
    with pytest.raises(DataError, match=r"^picture is too small: a has 63 x 200 pixels, visual_decoder.min_picture_s"):
        picture_sample(sample(63, 200), CONFIG, 0, 0)
    with pytest.raises(DataError, match="^no picture: b has none of"):
        picture_sample(RawSample("b", {"kind": "text", "text": "words"}), CONFIG, 0, 0)
    broken = sample(100, 100)
    broken.files["0.png"] = broken.files["0.png"][:200]
    with pytest.raises(DataError):
        crop_of(broken)


def test_a_loader_gives_every_slot_a_picture_and_skips_bad_ones(tmp_path: Path) -> None:
    sizes = [(100, 80), (80, 100), (40, 100), (70, 70), (64, 90), (128, 66)]
    write_shard(tmp_path / "a.tar", [sample(*size, key=f"s{i}") for i, size in enumerate(sizes)])
    config = replace(CONFIG, data=replace(CONFIG.data, shards=(str(tmp_path / "a.tar"),), max_bad_share=0.5))

    def drawn(slots: list[int], steps: int) -> list[list[tuple[str, tuple[int, int], int]]]:
        with Loader(config, None, slots) as loader:
            steps_of = [next(loader) for _ in range(steps)]
            assert loader.skipped.keys() <= {"picture is too small"}
        assert all(len(row.crops) == 1 and not row.pictures for rows in steps_of for row in rows)
        return [[(row.keys[0], row.crops[0].corner, row.crops[0].seed) for row in rows] for rows in steps_of]

    together = drawn([0, 1, 2, 3], 5)
    assert {key for step in together for key, *_ in step} == {"s0", "s1", "s3", "s4", "s5"}
    # On two ranks each slot has the same pictures, with the same draws.
    halves = zip(drawn([0, 1], 5), drawn([2, 3], 5), strict=True)
    assert [a + b for a, b in halves] == together
