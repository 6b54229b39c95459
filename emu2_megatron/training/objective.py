"""What a run trains (training.objective): Emu2 itself, or its decoder of pictures or of clips."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from emu2_megatron.checkpoint import files
from emu2_megatron.checkpoint.load import check_files
from emu2_megatron.config.schema import Config, trained_decoder
from emu2_megatron.convert.released import source_of
from emu2_megatron.convert.to_diffusers import from_diffusers
from emu2_megatron.data.tokenizer import Tokenizer, tokenizer_for
from emu2_megatron.model.eva_vit import EvaVisionTransformer
from emu2_megatron.model.parameters import Source
from emu2_megatron.model.sdxl import load_sdxl
from emu2_megatron.model.video_decoder import load_2d
from emu2_megatron.model.visual_decoder import build_vae
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
    """Of a rank that trains a decoder of pictures or clips, without its activations: the weights of all networks,
    gradients, master weights and moments."""
    width = DTYPES[config.training.precision].itemsize
    with torch.device("meta"):
        unet = diffusion.KINDS[config.training.objective].build(config)
        vae = build_vae(trained_decoder(config))
        encoder = EvaVisionTransformer(config.model.encoder)
    of_unet, of_vae, of_encoder = (sum(p.numel() for p in m.parameters()) for m in (unet, vae, encoder))
    return of_unet * (width + 4 + (4 if width < 4 else 0) + 8) + of_vae * 4 + of_encoder * width


def build(config: Config, here: Topology) -> Engine:
    """A rank's share of what is trained, with the weights it begins with; called by all ranks together.

    Raises:
        ConfigError: FP8 is wanted and this machine cannot.
        CheckpointError, ConversionError: what the decoder's encoder, sdxl or sd21 name is not there, damaged, or of
            another model.
    """
    if config.training.objective == "language":
        return wrap.build(config, here)
    decoder = trained_decoder(config)
    source = _encoder_at(Path(decoder.encoder), config) if decoder.encoder else None
    clips = config.training.objective == "video_decoder"
    begins = config.video_decoder.sd21 if clips else config.visual_decoder.sdxl
    load = load_2d if clips else partial(load_sdxl, seed=config.training.seed)

    def fill(network: Any, vae: Any) -> None:
        of_unet, of_vae = from_diffusers(Path(begins), decoder)
        load(network, of_unet)
        vae.load_state_dict(of_vae)

    return diffusion.build(config, here, source, fill if begins else None)


def _encoder_at(path: Path, config: Config) -> Source:
    """Weights that a decoder is trained on the embeddings of; of a checkpoint, whose files are what was written."""
    if (path / files.TRAINER).is_file():
        with files.reading(path):
            check_files(path, files.read_trainer(path)["files"])
    return source_of(path, config.model)
