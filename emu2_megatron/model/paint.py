"""Visual embeddings to pictures, by Emu2-Gen's sampler (arXiv 2312.13286, §2.3): Euler's method with classifier-free
guidance (arXiv 2207.12598).

Shapes as in `model/visual_decoder`.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from emu2_megatron.model.visual_decoder import condition, decode_latents, sampling_scheduler

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel


@torch.no_grad()
def paint(
    unet: "UNet2DConditionModel",
    vae: "AutoencoderKL",
    embeddings_BQE: Tensor,
    null_QE: Tensor,
    seeds: Sequence[int],
    size: tuple[int, int] | None = None,
    steps: int = 50,
    guidance: float = 3.0,
    original_size: tuple[int, int] | None = None,
    crop: tuple[int, int] = (0, 0),
) -> Tensor:
    """Pictures of visual embeddings.

    Args:
        unet: on the device to be used; it computes in its own dtype, the latents are fp32.
        vae: on the same device; in fp32 afterwards where its configuration says so.
        embeddings_BQE: from the encoder (autoencoding) or regressed by the language model (generation).
        null_QE: what guidance leads away from: for autoencoding `null_embeddings`, for generation what the language
            model regresses after `<s>[IMG]`.
        seeds: one for each picture; its noise is drawn from it on the CPU, and does not depend on the others.
        size: height and width wanted, pixels; None takes what the UNet was built for.
        steps: of the sampler, each a pass of the UNet over B pictures, with guidance over 2 B.
        guidance: how far to lead; up to 1 there is none, and null_QE is not looked at.
        original_size: height and width that the UNet is told the picture had before; None takes `size`.
        crop: top and left that the UNet is told the picture was cut out at.

    Returns:
        uint8 [B, H, W, 3] on the device.

    Raises:
        ValueError: not a seed for each picture, or a size that does not fit the networks.
    """
    pictures, device = len(embeddings_BQE), unet.device
    if len(seeds) != pictures:
        raise ValueError(f"{len(seeds)} seeds for {pictures} pictures: give one for each")
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = size or (unet.config.sample_size * scale,) * 2
    whole = scale * 2 ** (len(unet.config.block_out_channels) - 1)
    if height % whole or width % whole:
        raise ValueError(f"size {height} x {width}: both must be multiples of {whole}")

    embeddings_BQE = embeddings_BQE.to(device, unet.dtype)
    if guidance > 1:
        embeddings_BQE = torch.cat([embeddings_BQE, null_QE.to(embeddings_BQE).expand_as(embeddings_BQE)])
    told = torch.tensor([[*(original_size or (height, width)), *crop, height, width]], device=device)
    sizes = told.expand(len(embeddings_BQE), -1).split(2, dim=1)
    hidden_BQE, added = condition(embeddings_BQE, *sizes)
    shape = (unet.config.in_channels, height // scale, width // scale)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return decode_latents(vae, denoise(unet, torch.stack(noise).to(device), hidden_BQE, added, steps, guidance))


@torch.no_grad()
def denoise(
    unet: "UNet2DConditionModel",
    noise_BCHW: Tensor,
    hidden_BQE: Tensor,
    added: dict[str, Tensor],
    steps: int,
    guidance: float,
) -> Tensor:
    """Noise to latents, fp32.

    Args:
        unet: the denoiser.
        noise_BCHW: standard normal, fp32.
        hidden_BQE, added: of `condition`. With guidance, of B pictures and then of B null conditions.
        steps, guidance: as in `paint`.
    """

    def predict(noisy_BCHW: Tensor, t: Tensor) -> Tensor:
        epsilon: Tensor = unet(
            noisy_BCHW, t, encoder_hidden_states=hidden_BQE, added_cond_kwargs=added, return_dict=False
        )[0]
        return epsilon

    return sample(sampling_scheduler(), noise_BCHW, unet.dtype, steps, guidance, predict)


@torch.no_grad()
def sample(
    scheduler: "EulerDiscreteScheduler",
    noise: Tensor,
    dtype: torch.dtype,
    steps: int,
    guidance: float,
    predict: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Euler's method with classifier-free guidance, for pictures and clips: latents, fp32, in the shape of the noise.

    Args:
        scheduler: not started yet.
        noise: standard normal, fp32 [B, ...].
        dtype: what `predict` is given.
        steps, guidance: as in `paint`.
        predict: (noisy latents, timestep) to what the network predicts; with guidance, of B samples and then of B
            null conditions.
    """
    guided = guidance > 1
    scheduler.set_timesteps(steps, device=noise.device)
    latents: Tensor = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, t).to(dtype)
        predicted = predict(torch.cat([scaled] * 2) if guided else scaled, t).float()
        if guided:
            conditional, unconditional = predicted.chunk(2)
            predicted = unconditional + guidance * (conditional - unconditional)
        latents = scheduler.step(predicted, t, latents, return_dict=False)[0]
    return latents
