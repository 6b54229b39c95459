"""A decoder of pictures or clips, wherever it lies: in diffusers' layout, or in a checkpoint of its run."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from torch import Tensor

from emu2_megatron.checkpoint import files
from emu2_megatron.config.schema import Config, VideoDecoderConfig, VisualDecoderConfig
from emu2_megatron.convert.command import run_config
from emu2_megatron.convert.decoder_checkpoint import from_checkpoint
from emu2_megatron.convert.diffusers_config import decoder_of
from emu2_megatron.convert.stored import open_checkpoint
from emu2_megatron.convert.to_diffusers import from_diffusers, open_diffusers
from emu2_megatron.errors import CheckpointError, ConfigError, ConversionError

Sizes = TypeVar("Sizes", VisualDecoderConfig, VideoDecoderConfig)


@dataclass(frozen=True)
class Decoder(Generic[Sizes]):
    """A decoder whose weights are not read yet."""

    config: Sizes
    load: Callable[[], tuple[dict[str, Tensor], dict[str, Tensor]]]
    """Tensors of UNet and VAE by diffusers' names, on the CPU; compares their files with the checksums there are."""


def decoder_at(folder: Path, width: int) -> Decoder[VisualDecoderConfig]:
    """Look for a visual decoder, without reading its weights.

    Args:
        folder: with `unet/` and `vae/`, such as Emu2-Gen's or an export; or a checkpoint such as step_00008000, whose
            run's configuration lies beside it.
        width: E of the embeddings that it is to read.

    Raises:
        ConfigError: diffusers is not installed, or a checkpoint has no configuration.
        CheckpointError, ConversionError: there is none, or it reads another width.
    """
    _require_diffusers()
    if (folder / files.TRAINER).is_file():
        return _of_run(folder, _run_of(folder, "visual_decoder", width).visual_decoder, width)
    config, reads = decoder_of(folder)
    _check_width(folder / "unet", reads, width)
    open_diffusers(folder, config, width)
    return Decoder(config, lambda: from_diffusers(folder, config, width))


def film_decoder_at(folder: Path, width: int) -> Decoder[VideoDecoderConfig]:
    """Look for a video decoder, in a checkpoint; arguments and errors as of `decoder_at`."""
    _require_diffusers()
    if not (folder / files.TRAINER).is_file():
        raise ConversionError(f"{folder} is no checkpoint: give one of a run that trained a video decoder")
    return _of_run(folder, _run_of(folder, "video_decoder", width).video_decoder, width)


def _require_diffusers() -> None:
    if importlib.util.find_spec("diffusers") is None:
        raise ConfigError("the visual decoder needs diffusers: pip install 'emu2-megatron[diffusion]'")


def _run_of(folder: Path, objective: str, width: int) -> Config:
    """The configuration of the run that wrote a checkpoint."""
    run = run_config(folder, None)
    if run.training.objective != objective:
        raise ConversionError(f"{folder} is of a run with training.objective {run.training.objective}, not {objective}")
    _check_width(folder, run.model.encoder.hidden_size, width)
    return run


def _of_run(folder: Path, config: Sizes, width: int) -> Decoder[Sizes]:
    open_checkpoint(folder)

    def load() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        with files.reading(folder):
            if wrong := files.verify(folder, files.read_trainer(folder)["files"], 0, 1):
                raise CheckpointError(wrong[0])
            return from_checkpoint(folder, config, width)

    return Decoder(config, load)


def _check_width(what: Path, reads: int, width: int) -> None:
    if reads != width:
        raise ConversionError(
            f"{what} reads embeddings of width {reads}, the model's have {width}: give the decoder that was trained on "
            "them"
        )
