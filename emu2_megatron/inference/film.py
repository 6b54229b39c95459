"""Films from visual embeddings of their frames: sampling, writing, and how steady the result is.

Guidance and step count are Emu2-Gen's for pictures; for films nothing is published. Shapes: B clips, T frames, C latent
channels, H, W; Q embeddings of a frame, E their width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from emu2_megatron.model.video_decoder import VideoDecoder

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDPMScheduler


@torch.inference_mode()
def sample_latents(
    decoder: VideoDecoder,
    schedule: "DDPMScheduler",
    embeddings_BTQE: Tensor,
    null_QE: Tensor,
    seeds: Sequence[int],
    size: tuple[int, int],
    steps: int = 50,
    guidance: float = 3.0,
) -> Tensor:
    """Clean latents of clips, fp32 [B, T, C, H, W] on the embeddings' device, by Euler steps (arXiv 2206.00364).

    Args:
        decoder: on the same device.
        schedule: the one the decoder was trained with (`model/video_loss.noise_schedule`).
        embeddings_BTQE: of the frames wanted.
        null_QE: the embeddings that stood for none in training.
        seeds: of each clip's noise, drawn on the CPU: a clip is the same in any batch.
        size: height and width of the latents.
        steps: calls of the decoder; each computes every clip twice, unless guidance is 1.
        guidance: how far to go from the prediction without embeddings to the one with them; 1 stops there.
    """
    from diffusers import EulerDiscreteScheduler

    euler = EulerDiscreteScheduler.from_config(schedule.config, timestep_spacing="leading", steps_offset=1)
    euler.set_timesteps(steps)
    device, dtype = embeddings_BTQE.device, next(decoder.parameters()).dtype
    B, T = embeddings_BTQE.shape[:2]
    shape = (T, decoder.unet.config.in_channels, *size)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    latents_BTCHW = torch.stack(noise).to(device) * euler.init_noise_sigma
    copies = 1 if guidance == 1 else 2
    given = torch.cat([embeddings_BTQE, null_QE.expand_as(embeddings_BTQE)])[: copies * B].to(dtype)
    for timestep in euler.timesteps:
        noisy = euler.scale_model_input(latents_BTCHW, timestep).to(dtype).repeat(copies, 1, 1, 1, 1)
        predicted = decoder(noisy, timestep.to(device).expand(copies * B), given).float()
        conditional, unconditional = predicted[:B], predicted[-B:]
        guided = unconditional + guidance * (conditional - unconditional) if copies == 2 else conditional
        latents_BTCHW = euler.step(guided, timestep, latents_BTCHW).prev_sample
    clean_BTCHW: Tensor = latents_BTCHW
    return clean_BTCHW


@torch.inference_mode()
def decode_latents(vae: "AutoencoderKL", latents_BTCHW: Tensor) -> Tensor:
    """What latents stand for, uint8 [B, T, H, W, 3], RGB, on the CPU; one frame at a time, to save memory."""
    frames = [
        to_uint8(vae.decode(latent[None].to(vae.dtype) / vae.config.scaling_factor).sample[0])
        for latent in latents_BTCHW.flatten(0, 1)
    ]
    return torch.stack(frames).view(*latents_BTCHW.shape[:2], *frames[0].shape)


def to_uint8(pixels_3HW: Tensor) -> Tensor:
    """Pixels from -1 to 1, clamped, as uint8 [H, W, 3] on the CPU."""
    levels = (pixels_3HW.float() / 2 + 0.5).clamp(0, 1).mul(255).round()
    return levels.to(torch.uint8).movedim(-3, -1).cpu()


def write(path: Path, frames_THW3: Tensor, rate: int) -> None:
    """Writes a film; the suffix says how: .mp4 (H.264, or MPEG-4 where PyAV was built without it) or .gif.

    Args:
        path: of the file, which is overwritten.
        frames_THW3: uint8, RGB; of even height and width for .mp4, whose colour has half the resolution.
        rate: frames a second.

    Raises:
        ValueError: another suffix, no frames, or frames of another kind.
        OSError: the file cannot be written.
    """
    if frames_THW3.dtype != torch.uint8 or frames_THW3.ndim != 4 or frames_THW3.shape[-1] != 3 or not len(frames_THW3):
        raise ValueError(f"film must be uint8 [T, H, W, 3], got {frames_THW3.dtype} {list(frames_THW3.shape)}")
    if path.suffix not in _WRITERS:
        raise ValueError(f"film cannot be written to {path}: its suffix is none of {', '.join(_WRITERS)}")
    _WRITERS[path.suffix](path, frames_THW3.cpu().numpy(), rate)


def _write_mp4(path: Path, frames_THW3: np.ndarray, rate: int) -> None:
    _, height, width, _ = frames_THW3.shape
    if height % 2 or width % 2:
        raise ValueError(f"film of {width} x {height} pixels cannot be written to {path}: .mp4 needs even sizes")
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w", format="mp4") as output:
        stream = output.add_stream(codec, rate=rate)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # What is not said, players guess by the size: BT.709 (1), levels 16 to 235 (1).
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
        for pixels_HW3 in frames_THW3:
            frame = av.VideoFrame.from_ndarray(pixels_HW3, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def _write_gif(path: Path, frames_THW3: np.ndarray, rate: int) -> None:
    # Pillow: it finds a palette for each frame, FFmpeg's encoder has one for all films.
    first, *rest = (Image.fromarray(pixels_HW3) for pixels_HW3 in frames_THW3)
    first.save(path, "GIF", save_all=True, append_images=rest, duration=round(1000 / rate), loop=0)


_WRITERS = {".mp4": _write_mp4, ".gif": _write_gif}


def neighbour_psnr(frames_THW3: Tensor) -> float:
    """How alike successive frames of a film are, pixel by pixel: their peak signal-to-noise ratio in dB.

    Of the squared difference averaged over all pairs of neighbours, so that one jump in a still film counts; infinite
    if nothing moves. Alone it does not say what is good, as films move: compare it with that of the film the embeddings
    come from. Less is flicker, more is too little motion.

    Args:
        frames_THW3: uint8, at least two frames.

    Raises:
        ValueError: there is one frame only.
    """
    _pairs(frames_THW3)
    steps = frames_THW3.double().diff(dim=0)
    return float(10 * torch.log10(255**2 / steps.square().mean()))


def neighbour_cosine(features_TX: Tensor) -> float:
    """How alike successive frames are in content: the mean cosine between their features, -1 to 1.

    The field's "frame consistency", with CLIP's features; here those of any encoder, for example the visual embeddings
    of the frames that were generated, flattened. To be compared with the original film's, too.

    Args:
        features_TX: one row a frame, at least two.

    Raises:
        ValueError: there is one frame only.
    """
    _pairs(features_TX)
    return float(F.cosine_similarity(features_TX[:-1].double(), features_TX[1:].double(), dim=1).mean())


def _pairs(frames: Tensor) -> None:
    if len(frames) < 2:
        raise ValueError(f"temporal consistency is about successive frames, got {len(frames)}")
