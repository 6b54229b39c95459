"""What the visual decoder paints while it is trained: pictures beside what it makes of their embeddings."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from emu2_megatron.config.schema import Config
from emu2_megatron.data.crops import decode_crops, picture_sample
from emu2_megatron.data.sequence import Crop
from emu2_megatron.data.shards import ShardIndex
from emu2_megatron.errors import DataError
from emu2_megatron.model.paint import paint
from emu2_megatron.parallel import average
from emu2_megatron.parallel.diffusion import DiffusionStep
from emu2_megatron.parallel.wrap import Engine
from emu2_megatron.training.writers import Writers

SHOWN, LAST_SHOWN = 8, 32
"""Pictures of a panel, and of the one at the end of a run."""
COLUMNS = 16
"""Of a contact sheet."""
ROWS = ("original", "painted from its embeddings", "from the embeddings of the picture before")


def show(
    config: Config, engine: Engine, sources: list[ShardIndex], writers: Writers | None, step: int, last: bool
) -> dict[str, float]:
    """Paint the first pictures of the data into TensorBoard and, at the end of a run, more of them into `pictures.png`
    beside the log; called by all ranks together.

    Returns:
        On rank 0, what `panel_of` measured.
    """
    count = LAST_SHOWN if last else SHOWN
    panel, scores = panel_of(config, engine, first_pictures(config, sources, count) if writers else [])
    if writers is None or not scores:
        return {}
    for pictures, name in zip(panel, ("original", "painted", "shuffled"), strict=True):
        writers.pictures(step, pictures, name)
    writers.say(
        f"step {step}: painted pictures are {scores['painted_psnr']:.1f} dB from their originals, "
        f"{scores['shuffled_psnr']:.1f} dB if painted from the embeddings of others"
    )
    if last:
        contact_sheet(panel, Path(config.logging.directory) / "pictures.png")
        writers.say(f"pictures: {Path(config.logging.directory) / 'pictures.png'}")
    return scores


def panel_of(config: Config, engine: Engine, pictures: list[Crop]) -> tuple[np.ndarray, dict[str, float]]:
    """Originals, what is painted of them, and what is painted of another's embeddings; called by all ranks together,
    and computed on rank 0 alone, whose pictures count.

    Returns:
        uint8 [3, N, H, W, 3], empty on other ranks; and mean PSNR against the originals, dB: `painted_psnr` and
        `shuffled_psnr`.
    """
    step = engine.step
    assert isinstance(step, DiffusionStep)
    with _averaged(config, engine) as unet:
        if engine.here.rank or not pictures:
            return np.zeros((3, 0, 1, 1, 3), np.uint8), {}
        embeddings_NQE = step.embeddings(pictures)
        original_N3HW = torch.stack([crop.painted_3HW for crop in pictures])
        original_NHW3 = original_N3HW.permute(0, 2, 3, 1)
        seeds = list(range(len(pictures)))
        shown = [original_NHW3] + [
            paint(unet, step.vae, rows_NQE, step.null_QE, seeds).cpu()
            for rows_NQE in (embeddings_NQE, embeddings_NQE.roll(1, 0))
        ]
    found = {name: float(psnr(shown[i], shown[0]).mean()) for i, name in ((1, "painted_psnr"), (2, "shuffled_psnr"))}
    return torch.stack(shown).numpy(), found


def psnr(painted_NHW3: Tensor, original_NHW3: Tensor) -> Tensor:
    """Peak signal to noise ratio of each picture, dB, of uint8 pixels."""
    error_N = (painted_NHW3.double() - original_NHW3.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error_N.clamp(min=1e-12))


def first_pictures(config: Config, sources: list[ShardIndex], count: int) -> list[Crop]:
    """The first usable pictures of the data, cut as in epoch 0: the same in every run."""
    found: list[Crop] = []
    for number in range(len(sources[0])):
        if len(found) == count:
            break
        try:
            sample = picture_sample(sources[0].read(number), config, 0, number)
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
    if config.visual_decoder.ema_decay:
        for name, tensor in average.gathered(engine, unet).items():
            unet.get_parameter(name).data = tensor
    unet.eval()
    try:
        yield unet
    finally:
        unet.train()
        for name, tensor in before.items():
            unet.get_parameter(name).data = tensor
