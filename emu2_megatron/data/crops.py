"""Pictures for the visual decoder and clips for the video decoder: a random square of each, once as the encoder reads
it and once as it is painted.

As Emu2 trains its visual decoder (arXiv 2312.13286, §2.3): pictures that are too small are left out, the rest is scaled
at random with its aspect ratio kept, and a random square is cut out. The decoder is told the original size and the
place of the cut, as SDXL is (arXiv 2307.01952, §2.2). Of a video, frames that are evenly spread over it make a clip,
all cut alike; how the video decoder's clips were made is not published.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image

from emu2_megatron.config.schema import Config, queries_of, trained_decoder
from emu2_megatron.data import probe, video
from emu2_megatron.data.decode import opened
from emu2_megatron.data.samples import Sample, frame_indices
from emu2_megatron.data.sequence import START, VISUAL, VISUAL_TARGET, Crop
from emu2_megatron.data.shards import PICTURE_EXTENSIONS, VIDEO_EXTENSIONS, RawSample
from emu2_megatron.data.visuals import EncodedCrop
from emu2_megatron.errors import DataError, NotWanted
from emu2_megatron.platform import threads


def crop_sample(raw: RawSample, config: Config, epoch: int, index: int) -> Sample:
    """A square of a sample's picture or of frames of its video, whichever the run's decoder is trained on, as a sample
    of visual tokens; of several, one is drawn.

    What is drawn at random depends on (training.seed, epoch, index) alone.

    Args:
        raw: a sample of any kind.
        epoch, index: how often the data was seen before, and the sample's number.

    Raises:
        DataError: "reason: detail"; it has no picture or video, a small or surely bad one, or too few frames.
    """
    objective, wanted, queries = config.training.objective, trained_decoder(config), queries_of(config)
    what, extensions = ("video", VIDEO_EXTENSIONS) if objective == "video_decoder" else ("picture", PICTURE_EXTENSIONS)
    names = sorted(name for name in raw.files if name.rpartition(".")[2].lower() in extensions)
    if not names:
        raise NotWanted(f"no {what}: {raw.key} has none of {', '.join(extensions)}")
    # The 2 keeps this stream apart from the order of the data (no number) and from what sequences draw (1).
    draw = np.random.default_rng([config.training.seed, 2, epoch, index])
    name = names[draw.integers(len(names))]
    frames: tuple[int, ...] = ()
    if what == "video":
        clip = probe.clip(name, raw.files[name])
        width, height = clip.width, clip.height
        if len(clip.times) < len(queries):
            raise NotWanted(
                f"video has too few frames: {raw.key} has {len(clip.times)}, {objective}.frames is {len(queries)}"
            )
        frames = frame_indices(len(clip.times), len(queries))
    else:
        width, height = probe.picture(name, raw.files[name])
    if min(width, height) < wanted.min_picture_size:
        raise NotWanted(
            f"{what} is too small: {raw.key} has {width} x {height} pixels, {objective}.min_picture_size is "
            f"{wanted.min_picture_size}"
        )
    side = round(wanted.image_size * draw.uniform(1, wanted.largest_scale))
    down, across = (max(wanted.image_size, round(n * side / min(width, height))) for n in (height, width))
    top, left = (int(draw.integers(n - wanted.image_size + 1)) for n in (down, across))
    seed = int(draw.integers(2**32))
    visual = EncodedCrop(raw.files[name], frames, (height, width), (down, across), (top, left), seed)
    roles_S = np.full(sum(queries), VISUAL | VISUAL_TARGET, dtype=np.uint8)
    roles_S[0] |= START
    return Sample(raw.key, np.zeros(sum(queries), dtype=np.int64), roles_S, [visual], queries)


def decode_crops(visuals: Sequence[EncodedCrop], config: Config) -> list[list[Crop] | DataError]:
    """Decodes and cuts; for each, in order, a list of the one crop, or what is wrong with the picture or video."""
    sizes = trained_decoder(config).image_size, config.model.encoder.image_size
    return threads.in_threads(partial(_decode, sizes=sizes), visuals)


def _decode(visual: EncodedCrop, sizes: tuple[int, int]) -> list[Crop] | DataError:
    try:
        if visual.frames:
            squares = video.frames(
                visual.data, visual.frames, lambda pixels_HW3: _cut(Image.fromarray(pixels_HW3), visual, sizes)
            )
        else:
            with opened(visual.data) as picture:
                squares = [_cut(picture, visual, sizes)]
    except DataError as error:
        return error
    painted_T3HW, seen_T3HW = map(torch.stack, zip(*squares, strict=True))
    return [Crop(seen_T3HW, painted_T3HW, visual.original, visual.corner, visual.seed)]


def _cut(picture: Image.Image, visual: EncodedCrop, sizes: tuple[int, int]) -> list[torch.Tensor]:
    """The square as it is painted and as it is seen, uint8 [3, size, size]."""
    (height, width), (top, left), painted = visual.original, visual.corner, sizes[0]
    if picture.size != (width, height):
        raise DataError(f"size is not what the file says: {picture.width} x {picture.height}, not {width} x {height}")
    down, across = height / visual.scaled[0], width / visual.scaled[1]
    box = (left * across, top * down, min(width, (left + painted) * across), min(height, (top + painted) * down))
    squares = [picture.resize((size, size), Image.Resampling.BICUBIC, box=box) for size in sizes]
    return [torch.from_numpy(np.asarray(square).transpose(2, 0, 1).copy()) for square in squares]
