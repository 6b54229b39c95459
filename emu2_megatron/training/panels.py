"""What a decoder paints while it is trained: pictures, or frames of clips, beside what it makes of their embeddings."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from emu2_megatron.config.schema import Config, trained_decoder
from emu2_megatron.data.crops import crop_sample, decode_crops
from emu2_megatron.data.decode import prepare
from emu2_megatron.data.sequence import Crop
from emu2_megatron.data.shards import ShardIndex
from emu2_megatron.errors import DataError
from emu2_megatron.model import film
from emu2_megatron.model.paint import paint
from emu2_megatron.parallel import average
from emu2_megatron.parallel.diffusion import DiffusionStep
from emu2_megatron.parallel.wrap import Engine
from emu2_megatron.training.writers import Writers

SHOWN = {"visual_decoder": (8, 32), "video_decoder": (2, 2)}
"""Pictures or clips of a panel, and of the one at the end of a run."""
FILM_RATE = 4
"""Frames a second of `clip.mp4`: those of a clip are seconds apart."""
PIXELS = 2 * 1024**2
"""Painted at once."""
MOST_READ = 1000
"""Samples that are looked at for a panel."""
COLUMNS = 16
"""Of a contact sheet."""
ROWS = ("original", "painted from its embeddings", "from the embeddings of the one before")


def show(
    config: Config, engine: Engine, sources: list[ShardIndex], writers: Writers | None, step: int, last: bool
) -> None:
    """Paint the first pictures or clips of the data into TensorBoard and, at the end of a run, more of them into
    `pictures.png` beside the log; of clips, the first into `clip.mp4`, original and painted side by side. What is
    measured goes into the log. Called by all ranks together; a file that cannot be written is said, and does no harm.
    """
    count = SHOWN[config.training.objective][last]
    panel, scores = panel_of(config, engine, first_crops(config, sources, count) if writers else [])
    if writers is None or not scores:
        return
    try:
        writers.log({"step": step, **scores})
        for shown, name in zip(panel, ("original", "painted", "shuffled"), strict=True):
            writers.pictures(step, shown.reshape(-1, *shown.shape[2:]), name)
        if last:
            _write_files(config, panel, writers)
    except OSError as error:
        writers.say(f"step {step}: what was painted cannot be written: {error}")
    writers.say(
        f"step {step}: painted pictures are {scores['painted_psnr']:.1f} dB from their originals, "
        f"{scores['shuffled_psnr']:.1f} dB if painted from the embeddings of others"
    )


def _write_files(config: Config, panel: np.ndarray, writers: Writers) -> None:
    folder = Path(config.logging.directory)
    contact_sheet(panel.reshape(3, -1, *panel.shape[3:]), folder / "pictures.png")
    writers.say(f"pictures: {folder / 'pictures.png'}")
    if config.training.objective == "video_decoder":
        original_THW3, painted_THW3, _ = torch.from_numpy(panel[:, 0])
        film.write(folder / "clip.mp4", torch.cat([original_THW3, painted_THW3], dim=2), FILM_RATE)
        writers.say(f"original and painted clip: {folder / 'clip.mp4'}")


def panel_of(config: Config, engine: Engine, crops: list[Crop]) -> tuple[np.ndarray, dict[str, float]]:
    """Originals, what is painted of them, and what is painted of another's embeddings; called by all ranks together,
    and computed on rank 0 alone, whose crops count.

    Returns:
        uint8 [3, N, T, H, W, 3], empty on other ranks (a picture is T = 1); and mean PSNR against the originals, dB:
        `painted_psnr` and `shuffled_psnr`; of clips also `steadiness` of painted ones and originals.
    """
    step = engine.step
    assert isinstance(step, DiffusionStep)
    with _averaged(config, engine) as unet:
        if engine.here.rank or not crops:
            return np.zeros((3, 0, 1, 1, 1, 3), np.uint8), {}
        seen_NT3HW = torch.stack([crop.seen_T3HW for crop in crops])
        embeddings_NTQE = step.embeddings(seen_NT3HW.flatten(0, 1)).unflatten(0, seen_NT3HW.shape[:2])
        original_NT3HW = torch.stack([crop.painted_T3HW for crop in crops])
        shown = [original_NT3HW.permute(0, 1, 3, 4, 2)] + [
            _painted(step, unet, rows_NTQE).cpu() for rows_NTQE in (embeddings_NTQE, embeddings_NTQE.roll(1, 0))
        ]
        panel = torch.stack(shown)
        frames = panel.flatten(1, 2)
        found = {name: float(psnr(frames[i], frames[0]).mean()) for i, name in ((1, "painted"), (2, "shuffled"))}
        scores = {f"{name}_psnr": value for name, value in found.items()}
        if config.training.objective == "video_decoder":
            scores |= steadiness(step, shown[0], "original") | steadiness(step, shown[1], "painted")
    return panel.numpy(), scores


def _painted(step: DiffusionStep, unet: Any, embeddings_NTQE: Tensor) -> Tensor:
    """uint8 [N, T, H, W, 3] by the step's networks; the noise is the same in every call. A few at a time: decoding a
    picture of 1024 x 1024 takes 3 GiB."""
    clips = step.config.training.objective == "video_decoder"
    size, at_once = (step.decoder.image_size,) * 2, 1 if clips else max(1, PIXELS // step.decoder.image_size**2)
    painted = []
    for start in range(0, len(embeddings_NTQE), at_once):
        rows = embeddings_NTQE[start : start + at_once]
        seeds = list(range(start, start + len(rows)))
        if clips:
            painted.append(film.render(step.network.module, step.vae, step.scheduler, rows, step.null_QE, seeds, size))
        else:
            painted.append(paint(unet, step.vae, rows[:, 0], step.null_QE, seeds)[:, None])
    return torch.cat(painted)


def steadiness(step: DiffusionStep, clips_NTHW3: Tensor, name: str) -> dict[str, float]:
    """How alike successive frames of clips are (`model/film.py`), in the mean over clips: `<name>_neighbour_psnr`, dB,
    left out where nothing moves, and `<name>_neighbour_cosine`, of what the encoder makes of the frames."""
    size = step.config.model.encoder.image_size
    seen_I3HW = torch.stack([prepare(Image.fromarray(frame), size) for frame in clips_NTHW3.flatten(0, 1).numpy()])
    features_NTX = step.embeddings(seen_I3HW).flatten(1).unflatten(0, clips_NTHW3.shape[:2])
    found = {
        f"{name}_neighbour_psnr": np.mean([film.neighbour_psnr(clip_THW3) for clip_THW3 in clips_NTHW3]),
        f"{name}_neighbour_cosine": np.mean([film.neighbour_cosine(features_TX) for features_TX in features_NTX]),
    }
    return {key: float(value) for key, value in found.items() if math.isfinite(value)}


def psnr(painted_NHW3: Tensor, original_NHW3: Tensor) -> Tensor:
    """Peak signal to noise ratio of each picture, dB, of uint8 pixels."""
    error_N = (painted_NHW3.double() - original_NHW3.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error_N.clamp(min=1e-12))


def first_crops(config: Config, sources: list[ShardIndex], count: int) -> list[Crop]:
    """The first usable pictures or clips of the data, cut as in epoch 0: the same in every run."""
    found: list[Crop] = []
    for number in range(min(MOST_READ, len(sources[0]))):
        if len(found) == count:
            break
        try:
            sample = crop_sample(sources[0].read(number), config, 0, number)
        except DataError:  # the loader counts and lists it
            continue
        (result,) = decode_crops(sample.visuals, config)  # type: ignore[arg-type]
        found += [] if isinstance(result, DataError) else result
    return found


def contact_sheet(panel: np.ndarray, path: Path) -> None:
    """Write a panel as a picture: a column for each picture, a row for each of ROWS; more pictures than COLUMNS go on
    below."""
    height, width = panel.shape[2:4]
    margin, line = 4, 14
    blocks = np.array_split(panel, range(COLUMNS, panel.shape[1], COLUMNS), axis=1)
    rows = [(said, pictures) for block in blocks for said, pictures in zip(ROWS, block, strict=True)]
    across = min(COLUMNS, panel.shape[1]) * (width + margin) + margin
    sheet = Image.new("RGB", (across, len(rows) * (height + margin + line) + margin), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (said, pictures) in enumerate(rows):
        top = margin + row * (height + margin + line)
        draw.text((margin, top), said, fill="black")
        for column, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (margin + column * (width + margin), top + line))
    sheet.save(path)


@contextmanager
def _averaged(config: Config, engine: Engine) -> Iterator[Any]:
    """The UNet, with the average of its weights if there is one, for as long as the block."""
    unet: Any = engine.whole["unet"]
    engine.settle()
    before = {name: p.data for name, p in unet.named_parameters()}
    if trained_decoder(config).ema_decay:
        for name, tensor in average.gathered(engine, unet).items():
            unet.get_parameter(name).data = tensor
    unet.eval()
    try:
        yield unet
    finally:
        unet.train()
        for name, tensor in before.items():
            unet.get_parameter(name).data = tensor
