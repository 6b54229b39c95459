"""What a run trains (training.objective): Emu2 itself, or its visual decoder."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from emu2_megatron.config.schema import Config
from emu2_megatron.convert.released import source_of
from emu2_megatron.convert.to_diffusers import from_diffusers
from emu2_megatron.data.tokenizer import Tokenizer, tokenizer_for
from emu2_megatron.model.eva_vit import EvaVisionTransformer
from emu2_megatron.model.sdxl import load_sdxl
from emu2_megatron.model.visual_decoder import build_unet, build_vae
from emu2_megatron.parallel import diffusion, wrap
from emu2_megatron.parallel.topology import Topology
from emu2_megatron.parallel.wrap import Engine
from emu2_megatron.platform.precision import DTYPES


def tokenizer(config: Config) -> Tokenizer | None:
    """Of a run that reads text.

    Raises:
        ConfigError: data.tokenizer is no tokenizer of Emu2.
    """
    return tokenizer_for(config) if config.training.objective == "language" else None


def state_bytes(config: Config) -> int:
    """Of a rank that trains the visual decoder, without its activations: the weights of all networks, gradients, master
    weights and moments."""
    width = DTYPES[config.training.precision].itemsize
    with torch.device("meta"):
        unet = build_unet(config.visual_decoder, config.model.encoder.hidden_size)
        vae = build_vae(config.visual_decoder)
        encoder = EvaVisionTransformer(config.model.encoder)
    of_unet, of_vae, of_encoder = (sum(p.numel() for p in m.parameters()) for m in (unet, vae, encoder))
    return of_unet * (width + 4 + (4 if width < 4 else 0) + 8) + of_vae * 4 + of_encoder * width


def build(config: Config, here: Topology) -> Engine:
    """A rank's share of what is trained, with the weights it begins with; called by all ranks together.

    Raises:
        ConfigError: FP8 is wanted and this machine cannot.
        CheckpointError, ConversionError: what visual_decoder.encoder or .sdxl name is not there, damaged, or of
            another model.
    """
    if config.training.objective == "language":
        return wrap.build(config, here)
    decoder = config.visual_decoder
    source = source_of(Path(decoder.encoder), config.model) if decoder.encoder else None
    fill = partial(_fill, config) if decoder.sdxl else None
    return diffusion.build(config, here, source, fill)


def _fill(config: Config, unet: Any, vae: Any) -> None:
    """Load what visual_decoder.sdxl has."""
    of_unet, of_vae = from_diffusers(Path(config.visual_decoder.sdxl), config.visual_decoder)
    load_sdxl(unet, of_unet, config.training.seed)
    vae.load_state_dict(of_vae)
