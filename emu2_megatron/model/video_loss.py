"""What the video decoder is trained on: denoising clips (DDPM, arXiv 2006.11239), given the embeddings of their frames.

As `model/visual_decoder` does with pictures: every random number of a clip comes from the clip's own seed, so losses do
not depend on which rank has it, and losses are sums with their counts.

Shapes: B clips, T frames, C latent channels, H and W of latents; Q embeddings of a frame, E their width.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from emu2_megatron.config.schema import VideoDecoderConfig
from emu2_megatron.errors import ConfigError
from emu2_megatron.model.video_decoder import VideoDecoder
from emu2_megatron.model.visual_decoder import Draws, squared_error

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

PREDICTION_TYPES = ("v_prediction", "epsilon")
TIMESTEPS = 1000
"""Levels of noise, of every version of Stable Diffusion."""


def training_scheduler(config: VideoDecoderConfig) -> "DDPMScheduler":
    """Stable Diffusion's noise levels, by which training adds noise; it knows the prediction type.

    Raises:
        ConfigError: the prediction type is unknown.
    """
    from diffusers import DDPMScheduler

    if config.prediction_type not in PREDICTION_TYPES:
        raise ConfigError(
            f"video_decoder.prediction_type: '{config.prediction_type}' is none of {', '.join(PREDICTION_TYPES)}"
        )
    return DDPMScheduler(
        num_train_timesteps=TIMESTEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=config.prediction_type,
    )


def denoising_loss(
    decoder: VideoDecoder,
    scheduler: "DDPMScheduler",
    latents_BTCHW: Tensor,
    embeddings_BTQE: Tensor,
    null_QE: Tensor,
    draws: Draws,
) -> tuple[Tensor, int]:
    """`visual_decoder.squared_error` of clips.

    Args:
        decoder: of `video_decoder.build`, or a wrapper around it.
        scheduler: of `training_scheduler`.
        latents_BTCHW: clean, of `visual_decoder.encode_latents`, fp32.
        embeddings_BTQE: of the same frames, from the frozen encoder.
        null_QE: stands for the embeddings of a frame that are dropped (`visual_decoder.null_embeddings`).
        draws: of `visual_decoder.draw`, on the same device.

    Returns:
        The sum, fp32, a scalar with a gradient; the count, B x T x C x H x W.
    """

    def predict(noisy_BTCHW: Tensor, embeddings_BTQE: Tensor) -> Tensor:
        predicted_BTCHW: Tensor = decoder(noisy_BTCHW, draws.timesteps_B, embeddings_BTQE)
        return predicted_BTCHW

    return squared_error(decoder, scheduler, latents_BTCHW, embeddings_BTQE, null_QE, draws, predict)
