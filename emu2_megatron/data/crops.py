"""Pictures for the visual decoder: a random square of each, once as the encoder reads it and once as it is painted.

As Emu2 trains its decoder (arXiv 2312.13286, §2.3): pictures that are too small are left out, the rest is scaled at
random with its aspect ratio kept, and a random square is cut out. The decoder is told the original size and the place
of the cut, as SDXL is (arXiv 2307.01952, §2.2).
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image

from emu2_megatron.config.schema import Config
from emu2_megatron.data import probe
from emu2_megatron.data.decode import opened
from emu2_megatron.data.samples import Sample
from emu2_megatron.data.sequence import START, VISUAL, VISUAL_TARGET, Crop
from emu2_megatron.data.shards import PICTURE_EXTENSIONS, RawSample
from emu2_megatron.data.visuals import EncodedCrop
from emu2_megatron.errors import DataError
from emu2_megatron.platform import threads


def picture_sample(raw: RawSample, config: Config, epoch: int, index: int) -> Sample:
    """A square of a sample's picture, as a sample of Q visual tokens; of several pictures, one is drawn.

    What is drawn at random depends on (training.seed, epoch, index) alone.

    Args:
        raw: a sample of any kind.
        epoch, index: how often the data was seen before, and the sample's number.

    Raises:
        DataError: "reason: detail"; it has no picture, or a small or surely bad one.
    """
    names = sorted(name for name in raw.files if name.rpartition(".")[2].lower() in PICTURE_EXTENSIONS)
    if not names:
        raise DataError(f"no picture: {raw.key} has none of {', '.join(PICTURE_EXTENSIONS)}")
    wanted = config.visual_decoder
    # The 2 keeps this stream apart from the order of the data (no number) and from what sequences draw (1).
    draw = np.random.default_rng([config.training.seed, 2, epoch, index])
    name = names[draw.integers(len(names))]
    width, height = probe.picture(name, raw.files[name])
    if min(width, height) < wanted.min_picture_size:
        raise DataError(
            f"picture is too small: {raw.key} has {width} x {height} pixels, visual_decoder.min_picture_size is "
            f"{wanted.min_picture_size}"
        )
    side = round(wanted.image_size * draw.uniform(1, wanted.largest_scale))
    down, across = (max(wanted.image_size, round(n * side / min(width, height))) for n in (height, width))
    top, left = (int(draw.integers(n - wanted.image_size + 1)) for n in (down, across))
    seed = int(draw.integers(2**32))
    visual = EncodedCrop(raw.files[name], (height, width), (down, across), (top, left), seed)
    queries = config.model.image_queries
    roles_S = np.full(queries, VISUAL | VISUAL_TARGET, dtype=np.uint8)
    roles_S[0] |= START
    return Sample(raw.key, np.zeros(queries, dtype=np.int64), roles_S, [visual], [queries])


def decode_crops(visuals: Sequence[EncodedCrop], config: Config) -> list[list[Crop] | DataError]:
    """Decodes and cuts; for each, in order, a list of the one crop, or what is wrong with the picture."""
    sizes = config.visual_decoder.image_size, config.model.encoder.image_size
    return threads.in_threads(partial(_decode, sizes=sizes), visuals)


def _decode(visual: EncodedCrop, sizes: tuple[int, int]) -> list[Crop] | DataError:
    (height, width), (top, left), painted = visual.original, visual.corner, sizes[0]
    down, across = height / visual.scaled[0], width / visual.scaled[1]
    box = (left * across, top * down, min(width, (left + painted) * across), min(height, (top + painted) * down))
    try:
        with opened(visual.data) as picture:
            squares = [picture.resize((size, size), Image.Resampling.BICUBIC, box=box) for size in sizes]
    except DataError as error:
        return error
    painted_3HW, seen_3HW = (torch.from_numpy(np.asarray(square).transpose(2, 0, 1).copy()) for square in squares)
    return [Crop(seen_3HW, painted_3HW, visual.original, visual.corner, visual.seed)]
