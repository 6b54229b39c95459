"""Where models for inference come from: a checkpoint of any layout, or a folder of Hugging Face's form; and the visual
decoder, from a folder of diffusers' or a checkpoint of its run."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from emu2_megatron.checkpoint import files
from emu2_megatron.checkpoint.load import check_files
from emu2_megatron.config.schema import Config, DataConfig, TrainingConfig, VideoDecoderConfig, VisualDecoderConfig
from emu2_megatron.convert import from_hf
from emu2_megatron.convert.command import run_config
from emu2_megatron.convert.decoders import decoder_at, film_decoder_at
from emu2_megatron.convert.released import source_of_checkpoint, source_of_folder
from emu2_megatron.errors import ConfigError
from emu2_megatron.inference.model import InferenceModel, for_inference
from emu2_megatron.model import video_decoder
from emu2_megatron.model.visual_decoder import build_unet, build_vae
from emu2_megatron.parallel import topology
from emu2_megatron.platform.device import device
from emu2_megatron.platform.precision import DTYPES

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel


@dataclass(frozen=True)
class Found:
    """A model that lies somewhere, not loaded yet."""

    config: Config
    """In the layout and precision it is to be loaded in; `data.tokenizer` is its tokenizer, or empty."""
    load: Callable[[], InferenceModel]
    """This rank's model; called by all ranks together. `topology.stop` ends it."""


def find(
    checkpoint: Path | None = None,
    folder: Path | None = None,
    config: str | None = None,
    tokenizer: Path | None = None,
    precision: str | None = None,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
) -> Found:
    """Look for a model, without reading its weights.

    Args:
        checkpoint: of a run or of `emu2 convert from-hf`, such as step_00000400; or:
        folder: released or exported, with `config.json`.
        config: the run's configuration; None looks in the checkpoint's folder and its run's.
        tokenizer: None takes the one that is there.
        precision: bf16, fp16 or fp32; None takes the run's, or the folder's.

    Raises:
        ConfigError, CheckpointError, ConversionError: there is none, or it cannot be cut like that.
    """
    if (checkpoint is None) == (folder is None):
        raise ConfigError("give either --checkpoint or --model")
    if precision is not None and precision not in DTYPES:
        raise ConfigError(f"precision: {precision}; legal: {', '.join(DTYPES)}")
    if checkpoint is not None:
        files.read_trainer(checkpoint)
        whole = run_config(checkpoint, config)
        beside = checkpoint / from_hf.TOKENIZER
        found = tokenizer or (beside if beside.is_file() else Path(whole.data.tokenizer or "/"))
    else:
        assert folder is not None
        if not folder.is_dir():
            raise ConfigError(f"--model: {folder} is no folder; give an exported or released one")
        released = from_hf.whole(folder)
        dtype = released.dtype("project_up.weight")
        own = next((name for name, known in DTYPES.items() if known is dtype), "fp32")
        whole = Config(model=released.model, data=DataConfig(), training=TrainingConfig(precision=own))
        found = tokenizer or from_hf.find_tokenizer(folder) or Path("/")
    training = replace(whole.training, precision=precision or whole.training.precision)
    data = replace(whole.data, tokenizer=str(found) if found.is_file() or tokenizer else "")
    whole = for_inference(replace(whole, training=training, data=data), tensor_parallel_size, pipeline_parallel_size)

    def load() -> InferenceModel:
        topology.start()
        here = topology.initialize(whole)
        if checkpoint is None:
            return InferenceModel(whole, here, source_of_folder(released))
        with files.reading(checkpoint):
            check_files(checkpoint, files.read_trainer(checkpoint)["files"])
            return InferenceModel(whole, here, source_of_checkpoint(checkpoint, whole.model))

    return Found(whole, load)


@dataclass(frozen=True)
class FoundDecoder:
    """A visual decoder that lies somewhere, not loaded yet."""

    config: VisualDecoderConfig
    load: "Callable[[], tuple[UNet2DConditionModel, AutoencoderKL]]"
    """Both networks, on this rank's device."""


def find_decoder(folder: Path, width: int, precision: str | None = None) -> FoundDecoder:
    """Look for a visual decoder, without reading its weights.

    Args:
        folder: a checkpoint of a run that trained one; or Emu2-Gen's, an export, or any other with `unet` and `vae` in
            diffusers' layout.
        width: E of the embeddings to be painted.
        precision: bf16, fp16 or fp32; None takes each network's own. A VAE that must not be rounded is fp32 all the
            same when it is used.

    Raises:
        ConfigError, CheckpointError, ConversionError: there is none, or it reads embeddings of another width.
    """
    decoder = decoder_at(folder, width)

    def load() -> "tuple[UNet2DConditionModel, AutoencoderKL]":
        with torch.device("meta"):
            networks = build_unet(decoder.config, width), build_vae(decoder.config)
        for network, tensors in zip(networks, decoder.load(), strict=True):
            network.load_state_dict(tensors, assign=True)
            network.to(device(), DTYPES[precision] if precision else None).requires_grad_(False).eval()
        return networks

    return FoundDecoder(decoder.config, load)


@dataclass(frozen=True)
class FoundFilmDecoder:
    """A video decoder that lies somewhere, not loaded yet."""

    config: VideoDecoderConfig
    load: "Callable[[], tuple[video_decoder.VideoDecoder, AutoencoderKL]]"
    """Both networks, on this rank's device."""


def find_film_decoder(folder: Path, width: int, precision: str | None = None) -> FoundFilmDecoder:
    """Look for a video decoder, in a checkpoint of its run; arguments and errors as of `find_decoder`."""
    decoder = film_decoder_at(folder, width)

    def load() -> "tuple[video_decoder.VideoDecoder, AutoencoderKL]":
        with torch.device("meta"):
            network, vae = video_decoder.build(decoder.config, width), build_vae(decoder.config)
        for part, tensors in zip((network.unet, vae), decoder.load(), strict=True):
            part.load_state_dict(tensors, assign=True)
        for whole in (network, vae):
            nn.Module.to(whole, device(), DTYPES[precision] if precision else None).requires_grad_(False).eval()
        return network, vae

    return FoundFilmDecoder(decoder.config, load)
