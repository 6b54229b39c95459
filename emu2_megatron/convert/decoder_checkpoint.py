"""UNet and VAE out of a checkpoint of a run that trains a decoder of pictures or clips."""

from pathlib import Path

import torch
from torch import Tensor

from emu2_megatron.config.schema import VideoDecoderConfig, VisualDecoderConfig
from emu2_megatron.convert.places import Scratch
from emu2_megatron.convert.stored import open_checkpoint
from emu2_megatron.convert.to_diffusers import check_tensors
from emu2_megatron.model import video_decoder
from emu2_megatron.model.visual_decoder import build_unet, build_vae


def from_checkpoint(
    folder: Path, config: VisualDecoderConfig | VideoDecoderConfig, width: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of UNet and VAE by diffusers' names (of a video decoder's temporal parts, by ours), from a checkpoint of
    any ranks. Where the run kept a moving average of the UNet's weights, that is taken.

    Args:
        folder: such as step_00008000.
        config: of the run.
        width: E of the embeddings it was trained on.

    Raises:
        CheckpointError, ConversionError: it is no complete checkpoint, damaged, or of another network.
    """
    stored = open_checkpoint(folder)
    with torch.device("meta"):
        unet = (
            video_decoder.build(config, width).unet
            if isinstance(config, VideoDecoderConfig)
            else build_unet(config, width)
        )
        wanted = {"unet": unet.state_dict(), "vae": build_vae(config).state_dict()}
    prefixes = {"unet": "average.unet." if any(n.startswith("average.unet.") for n in stored.shapes) else "unet.",
                "vae": "vae."}  # fmt: skip
    found = {}
    for part, prefix in prefixes.items():
        names = {name.removeprefix(prefix): name for name in stored.shapes if name.startswith(prefix)}
        tensors = {name: stored.read(key, Scratch()) for name, key in names.items()}
        check_tensors(f"{folder}, {part}", wanted[part], tensors)
        # The average is fp32, whatever the run's precision.
        dtype = stored.dtypes.get(f"{part}.conv_out.weight", torch.float32)
        found[part] = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return found["unet"], found["vae"]
