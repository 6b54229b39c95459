"""What the video decoder is trained on: denoising clips (DDPM, arXiv 2006.11239), given the embeddings of their frames.

Sums, not means: ranks divide by the global count before they add gradients. Every draw comes from a generator of its
clip's own, on the CPU: a clip gets the same noise on whatever rank, device and batch it stands.

Shapes: B clips, T frames, C latent channels, H, W; Q embeddings of a frame, E their width.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from emu2_megatron.config.schema import VideoDecoderConfig
from emu2_megatron.errors import ConfigError
from emu2_megatron.model.video_decoder import VideoDecoder

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

PREDICTION_TYPES = ("v_prediction", "epsilon")


def noise_schedule(config: VideoDecoderConfig) -> "DDPMScheduler":
    """How noisy each of the 1000 timesteps is: Stable Diffusion's, of every version. Holds the prediction type too.

    Raises:
        ConfigError: the prediction type is unknown.
    """
    from diffusers import DDPMScheduler

    if config.prediction_type not in PREDICTION_TYPES:
        raise ConfigError(
            f"video_decoder.prediction_type: '{config.prediction_type}' is none of {', '.join(PREDICTION_TYPES)}"
        )
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=config.prediction_type
    )


class Draws(NamedTuple):
    """What chance decides for one clip."""

    timestep: int
    """One for all frames, uniform over the schedule."""
    unconditional: bool
    """Whether the embeddings of all frames are withheld, so that guidance has something to compare with."""
    noise_TCHW: Tensor
    """fp32 on the CPU, independent for each frame but for the offset."""


def draw(
    seed: int, shape_TCHW: Sequence[int], timesteps: int, unconditional_share: float, noise_offset: float
) -> Draws:
    """The draws of the clip with this seed.

    The offset is a number for each channel, the same in all frames and pixels: without it the brightness that frames
    share could be read from their average through almost any noise, and would never be learnt. One for each frame would
    average out in turn.
    """
    generator = torch.Generator().manual_seed(seed)
    timestep = int(torch.randint(timesteps, (), generator=generator))
    unconditional = bool(torch.rand((), generator=generator) < unconditional_share)
    offset_C11 = torch.randn(shape_TCHW[1], 1, 1, generator=generator)
    noise_TCHW = torch.randn(*shape_TCHW, generator=generator) + noise_offset * offset_C11
    return Draws(timestep, unconditional, noise_TCHW)


def denoising_loss(
    decoder: VideoDecoder,
    schedule: "DDPMScheduler",
    latents_BTCHW: Tensor,
    embeddings_BTQE: Tensor,
    null_QE: Tensor,
    seeds: Sequence[int],
    unconditional_share: float = 0.1,
    noise_offset: float = 0.1,
) -> tuple[Tensor, int]:
    """The sum of squared errors of what the decoder predicts of noisy clips (fp32 scalar), and the number of elements.

    Args:
        decoder: on the latents' device; its weights' dtype is the one it computes in.
        schedule: of `noise_schedule`.
        latents_BTCHW: clean latents, scaled as the autoencoder's configuration says, fp32.
        embeddings_BTQE: of the frames.
        null_QE: what stands for the embeddings of a frame that are withheld: the embeddings of a picture whose
            normalised pixels are all 0, with which Emu2-Gen guides.
        seeds: one a clip. Give a clip another one each time it is seen.
        unconditional_share: chance that a clip's embeddings are withheld (the paper's decoder of pictures: 10 %).
        noise_offset: weight of the offset (the same: 0.1).
    """
    device, dtype = latents_BTCHW.device, next(decoder.parameters()).dtype
    steps = schedule.config.num_train_timesteps
    draws = [draw(seed, latents_BTCHW.shape[1:], steps, unconditional_share, noise_offset) for seed in seeds]
    timesteps_B = torch.tensor([of_clip.timestep for of_clip in draws], device=device)
    withheld_B = torch.tensor([of_clip.unconditional for of_clip in draws], device=device)
    noise_BTCHW = torch.stack([of_clip.noise_TCHW for of_clip in draws]).to(device)

    embeddings_BTQE = torch.where(withheld_B[:, None, None, None], null_QE, embeddings_BTQE)
    noisy_BTCHW = schedule.add_noise(latents_BTCHW, noise_BTCHW, timesteps_B)
    target_BTCHW = (
        noise_BTCHW
        if schedule.config.prediction_type == "epsilon"
        else schedule.get_velocity(latents_BTCHW, noise_BTCHW, timesteps_B)
    )
    predicted_BTCHW = decoder(noisy_BTCHW.to(dtype), timesteps_B, embeddings_BTQE.to(dtype))
    return (predicted_BTCHW.float() - target_BTCHW).square().sum(), target_BTCHW.numel()
