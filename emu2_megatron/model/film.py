"""Films from visual embeddings of their frames: sampling, writing, and how steady the result is.

Guidance and step count are Emu2-Gen's for pictures (`model/paint`); for films nothing is published.

Shapes: B clips, T frames, C latent channels, H, W; Q embeddings of a frame, E their width.
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

from emu2_megatron.model.paint import sample
from emu2_megatron.model.video_decoder import VideoDecoder
from emu2_megatron.model.visual_decoder import decode_latents

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDPMScheduler


@torch.no_grad()
def render(
    decoder: VideoDecoder,
    vae: "AutoencoderKL",
    scheduler: "DDPMScheduler",
    embeddings_BTQE: Tensor,
    null_QE: Tensor,
    seeds: Sequence[int],
    size: tuple[int, int],
    steps: int = 50,
    guidance: float = 3.0,
) -> Tensor:
    """Films of visual embeddings, uint8 [B, T, H, W, 3], RGB, on the device.

    Args:
        decoder: on the device to be used; it computes in its own dtype, the latents are fp32.
        vae: on the same device; it decodes one frame at a time, to save memory.
        scheduler: the one the decoder was trained with (`video_loss.training_scheduler`).
        embeddings_BTQE: of the frames, from the encoder or regressed by the language model.
        null_QE: what guidance leads away from: what stood for dropped embeddings in training.
        seeds: one for each film; its noise is drawn from it on the CPU, and does not depend on the others.
        size: height and width wanted, pixels.
        steps: of the sampler, each a pass of the decoder over B clips, with guidance over 2 B.
        guidance: how far to lead; up to 1 there is none, and null_QE is not looked at.

    Raises:
        ValueError: not a seed for each film, or a size that does not fit the networks.
    """
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    whole = scale * 2 ** (len(decoder.unet.config.block_out_channels) - 1)
    if size[0] % whole or size[1] % whole:
        raise ValueError(f"size {size[0]} x {size[1]}: both must be multiples of {whole}")
    latent_size = size[0] // scale, size[1] // scale
    latents_BTCHW = denoise(decoder, scheduler, embeddings_BTQE, null_QE, seeds, latent_size, steps, guidance)
    frames = [decode_latents(vae, latent_1CHW) for latent_1CHW in latents_BTCHW.flatten(0, 1).split(1)]
    return torch.cat(frames).view(*latents_BTCHW.shape[:2], *size, 3)


@torch.no_grad()
def denoise(
    decoder: VideoDecoder,
    scheduler: "DDPMScheduler",
    embeddings_BTQE: Tensor,
    null_QE: Tensor,
    seeds: Sequence[int],
    latent_size: tuple[int, int],
    steps: int,
    guidance: float,
) -> Tensor:
    """Latents of clips, fp32 [B, T, C, H, W], by Euler's method (arXiv 2206.00364); arguments as in `render`.

    Raises:
        ValueError: not a seed for each film.
    """
    from diffusers import EulerDiscreteScheduler

    B, T = embeddings_BTQE.shape[:2]
    if len(seeds) != B:
        raise ValueError(f"{len(seeds)} seeds for {B} films: give one for each")
    euler = EulerDiscreteScheduler.from_config(scheduler.config, timestep_spacing="leading", steps_offset=1)
    weights = next(decoder.parameters())
    shape = (T, decoder.unet.config.in_channels, *latent_size)
    noise_BTCHW = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    if guidance > 1:
        embeddings_BTQE = torch.cat([embeddings_BTQE, null_QE.expand_as(embeddings_BTQE)])
    given_BTQE = embeddings_BTQE.to(weights)

    def predict(noisy_BTCHW: Tensor, t: Tensor) -> Tensor:
        predicted_BTCHW: Tensor = decoder(noisy_BTCHW, t.expand(len(given_BTQE)), given_BTQE)
        return predicted_BTCHW

    return sample(euler, noise_BTCHW.to(weights.device), weights.dtype, steps, guidance, predict)


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
