"""The visual decoder that a folder in diffusers' layout has: Emu2-Gen's, an export, or SDXL's."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from emu2_megatron.config.schema import VisualDecoderConfig
from emu2_megatron.errors import ConfigError, ConversionError

# Key of config.json to field, for what is only spelled differently.
_UNET = {
    "block_out_channels": "unet_channels",
    "attention_head_dim": "unet_attention_heads",
    "layers_per_block": "unet_layers_per_block",
    "addition_time_embed_dim": "time_embed_dim",
    "in_channels": "latent_channels",
    "norm_num_groups": "norm_num_groups",
}
_VAE = {
    "block_out_channels": "vae_channels",
    "layers_per_block": "vae_layers_per_block",
    "scaling_factor": "vae_scaling_factor",
}


def decoder_of(folder: Path, width: int) -> VisualDecoderConfig:
    """The sizes that `unet/config.json` and `vae/config.json` say, and the null condition of `model_index.json`.

    What else they say is compared by `to_diffusers.open_diffusers`.

    Args:
        folder: with `unet/` and `vae/`.
        width: E of the embeddings that it is to read.

    Raises:
        ConfigError: diffusers is not installed.
        ConversionError: a file is missing, or of another kind of network, or the UNet reads another width.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise ConfigError("the visual decoder needs diffusers: pip install 'emu2-megatron[diffusion]'")
    unet, vae = (read_json(folder / name / "config.json") for name in ("unet", "vae"))
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    try:
        blocks = zip(unet["down_block_types"], unet["transformer_layers_per_block"], strict=True)
        fields: dict[str, Any] = {
            **{name: unet[key] for key, name in _UNET.items()},
            **{name: vae[key] for key, name in _VAE.items()},
            # SDXL's configuration has a 1 where nothing reads it.
            "unet_transformer_layers": [0 if kind == "DownBlock2D" else layers for kind, layers in blocks],
            "image_size": unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1),
            "null_condition": index.get("null_condition", "image"),
        }
        reads = unet["cross_attention_dim"]
    except KeyError as error:
        raise ConversionError(f"{folder} is no visual decoder of SDXL's kind: it has no {error.args[0]}") from error
    except (TypeError, ValueError) as error:
        raise ConversionError(f"{folder} is no visual decoder of SDXL's kind ({error})") from error
    if wrong := [name for name, value in fields.items() if not _fits(value, getattr(VisualDecoderConfig, name))]:
        name = wrong[0]
        raise ConversionError(f"{folder} is no visual decoder of SDXL's kind: its {name} would be {fields[name]!r}")
    if reads != width:
        raise ConversionError(
            f"{folder / 'unet'} reads embeddings of width {reads}, the model's have {width}: give the decoder that was "
            "trained on them"
        )
    sizes: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    return VisualDecoderConfig(**sizes)


def _fits(value: Any, default: Any) -> bool:
    """Whether a value from JSON has the type of a field."""
    if isinstance(default, tuple):
        return isinstance(value, list) and all(type(number) is int for number in value)
    return type(value) is type(default)


def read_json(path: Path) -> dict[str, Any]:
    """A `config.json`.

    Raises:
        ConversionError: it is missing or no JSON.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ConversionError(f"{path}: {error.strerror}; give a folder in diffusers' layout") from error
    except ValueError as error:
        raise ConversionError(f"{path} is no JSON: copy it again") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} is no configuration of diffusers: copy it again")
    return content
