"""The visual decoder of a folder, whichever kind of folder it is."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from emu2_megatron.checkpoint.files import TRAINER
from emu2_megatron.config.schema import VisualDecoderConfig
from emu2_megatron.convert.command import run_config
from emu2_megatron.convert.decoder_checkpoint import from_checkpoint
from emu2_megatron.convert.diffusers_config import decoder_of
from emu2_megatron.convert.to_diffusers import from_diffusers, open_diffusers


@dataclass(frozen=True)
class Decoder:
    """Not loaded yet."""

    config: VisualDecoderConfig
    load: Callable[[], tuple[dict[str, Tensor], dict[str, Tensor]]]
    """Tensors of UNet and VAE by diffusers' names, on the CPU."""


def decoder_at(folder: Path, width: int) -> Decoder:
    """A checkpoint of a run that trains one, or a folder in diffusers' layout.

    Args:
        folder: such as step_00008000; or Emu2-Gen's, an export, or any other with `unet/` and `vae/`.
        width: E of the embeddings that it is to paint.

    Raises:
        ConfigError, CheckpointError, ConversionError: there is none, or it reads embeddings of another width.
    """
    if (folder / TRAINER).is_file():
        config = run_config(folder, None).visual_decoder
        return Decoder(config, partial(from_checkpoint, folder, config, width))
    config = decoder_of(folder, width)
    open_diffusers(folder, config, width)
    return Decoder(config, partial(from_diffusers, folder, config, width))
