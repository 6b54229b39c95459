"""The visual decoder of Emu2-Gen (arXiv 2312.13286, §2.2 and §2.3): visual embeddings back to a picture.

SDXL (arXiv 2307.01952) by diffusers, with the embeddings of a picture where SDXL has those of its caption: all of them
for cross-attention, their mean beside the micro-conditions. So two widths differ from SDXL's: what cross-attention
reads (E instead of 2048), and what the added embedding reads (E + 6 x 256 instead of 1280 + 6 x 256). It is trained as
an autoencoder on the frozen encoder's embeddings, and needs no language model.

Every random number of a sample comes from the sample's own seed, so losses do not depend on which rank has it, and
losses are sums with their counts.

Shapes: B pictures, C latent channels, H and W of latents (of pixels where said), Q embeddings of a picture, E width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from emu2_megatron.config.schema import Config, DiffusionConfig, VisualDecoderConfig
from emu2_megatron.errors import ConfigError
from emu2_megatron.model.eva_vit import EvaVisionTransformer

if TYPE_CHECKING:  # diffusers takes seconds to import, and few commands need it
    from diffusers import AutoencoderKL, DDPMScheduler, EulerDiscreteScheduler, UNet2DConditionModel

MICRO_CONDITIONS = 6
"""Numbers that tell the UNet of a picture's original size, crop and target size."""

_NOISE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}


def downsampling(config: DiffusionConfig) -> int:
    """Pixels of a picture's side for each of its latents'."""
    return int(2 ** (len(config.vae_channels) - 1))


def unet_config(config: VisualDecoderConfig, width: int) -> dict[str, Any]:
    """Arguments of diffusers' `UNet2DConditionModel`.

    Args:
        config: sizes.
        width: E of the visual embeddings.

    Raises:
        ConfigError: sizes that do not fit each other.
    """
    _check(config)
    plain = [layers == 0 for layers in config.unet_transformer_layers]
    return {
        "sample_size": config.image_size // downsampling(config),
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "block_out_channels": config.unet_channels,
        "down_block_types": tuple("DownBlock2D" if p else "CrossAttnDownBlock2D" for p in plain),
        "up_block_types": tuple("UpBlock2D" if p else "CrossAttnUpBlock2D" for p in reversed(plain)),
        # SDXL's configuration has a 1 where nothing reads it.
        "transformer_layers_per_block": tuple(max(1, layers) for layers in config.unet_transformer_layers),
        "attention_head_dim": config.unet_attention_heads,  # diffusers' name for the number of heads
        "layers_per_block": config.unet_layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "use_linear_projection": True,
        "cross_attention_dim": width,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": config.time_embed_dim,
        "projection_class_embeddings_input_dim": width + MICRO_CONDITIONS * config.time_embed_dim,
    }


def vae_config(config: DiffusionConfig) -> dict[str, Any]:
    """Arguments of diffusers' `AutoencoderKL`.

    Raises:
        ConfigError: sizes that do not fit each other.
    """
    check_pictures(config)
    levels = len(config.vae_channels)
    return {
        "sample_size": config.image_size,
        "latent_channels": config.latent_channels,
        "block_out_channels": config.vae_channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": config.vae_layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "scaling_factor": config.vae_scaling_factor,
        "force_upcast": True,
    }


def _check(config: VisualDecoderConfig) -> None:
    levels = len(config.unet_channels)
    for name in ("unet_transformer_layers", "unet_attention_heads"):
        if len(getattr(config, name)) != levels:
            raise ConfigError(f"visual decoder: {name} needs a number for each of the {levels} unet_channels")
    if config.unet_transformer_layers[-1] == 0:
        raise ConfigError("visual decoder: unet_transformer_layers ends with 0, the last level needs attention")
    for channels, heads in zip(config.unet_channels, config.unet_attention_heads, strict=True):
        if channels % heads:
            raise ConfigError(f"visual decoder: {heads} unet_attention_heads do not divide {channels} unet_channels")
    for channels in config.unet_channels:
        _check_groups(config, channels)
    check_pictures(config)


def check_pictures(config: DiffusionConfig) -> None:
    """Raise ConfigError unless VAE, size of pictures and null condition fit."""
    for channels in config.vae_channels:
        _check_groups(config, channels)
    whole = downsampling(config) * 2 ** (len(config.unet_channels) - 1)
    if config.image_size % whole:
        raise ConfigError(f"{_said(config)}: image_size {config.image_size} is no multiple of {whole}")
    if config.null_condition not in ("image", "zeros"):
        raise ConfigError(f"{_said(config)}: null_condition {config.null_condition}; legal: image, zeros")


def _check_groups(config: DiffusionConfig, channels: int) -> None:
    if channels % config.norm_num_groups:
        raise ConfigError(f"{_said(config)}: norm_num_groups {config.norm_num_groups} does not divide {channels}")


def _said(config: DiffusionConfig) -> str:
    return "visual decoder" if isinstance(config, VisualDecoderConfig) else "video decoder"


def build_unet(config: VisualDecoderConfig, width: int, seed: int = 0) -> "UNet2DConditionModel":
    """The denoiser, fp32, on the CPU, freshly initialised: the same for the same seed on every rank.

    Under `torch.device("meta")` it costs no memory; `to_empty` and `load_state_dict` follow.

    Args:
        config: sizes.
        width: E of the visual embeddings.
        seed: of the weights; the state of torch's own generator is left as it is.

    Raises:
        ConfigError: sizes that do not fit each other.
    """
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU's too
        return UNet2DConditionModel(**unet_config(config, width))


def build_vae(config: DiffusionConfig, seed: int = 0) -> "AutoencoderKL":
    """The autoencoder between pixels and latents, as `build_unet`."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU's too
        return AutoencoderKL(**vae_config(config))


def training_scheduler() -> "DDPMScheduler":
    """SDXL's 1000 noise levels, by which training adds noise."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(**_NOISE, clip_sample=False)


def sampling_scheduler() -> "EulerDiscreteScheduler":
    """Euler's method over the same noise levels, as Emu2-Gen samples."""
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(**_NOISE, timestep_spacing="leading", steps_offset=1, interpolation_type="linear")


def forward_flops(config: Config) -> int:
    """FLOPs of the UNet for one picture: matrix products and convolutions, counted by torch on tensors without
    memory."""
    decoder, width = config.visual_decoder, config.model.encoder.hidden_size
    latents = decoder.image_size // downsampling(decoder)
    with torch.device("meta"), torch.no_grad():
        unet, two = build_unet(decoder, width), torch.empty(1, 2)
        hidden, added = condition(torch.empty(1, config.model.image_queries, width), two, two, two)
        noisy = torch.empty(1, decoder.latent_channels, latents, latents)
        with FlopCounterMode(display=False) as counted:
            unet(noisy, torch.empty(1), encoder_hidden_states=hidden, added_cond_kwargs=added)
    return int(counted.get_total_flops())


def vae_flops(config: DiffusionConfig) -> int:
    """FLOPs of the VAE's encoder for one picture, counted as `forward_flops` does."""
    with torch.device("meta"), torch.no_grad():
        vae = build_vae(config)
        with FlopCounterMode(display=False) as counted:
            vae.encode(torch.empty(1, 3, config.image_size, config.image_size))
    return int(counted.get_total_flops())


def time_ids(original_B2: Tensor, crop_B2: Tensor, target_B2: Tensor) -> Tensor:
    """SDXL's micro-conditions [B, 6] in fp32, which bf16 could not tell apart beyond 256: original height and width,
    top and left of the crop, height and width wanted."""
    return torch.cat([original_B2, crop_B2, target_B2], dim=1).float()


def condition(
    embeddings_BQE: Tensor, original_B2: Tensor, crop_B2: Tensor, target_B2: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the UNet is conditioned on.

    Args:
        embeddings_BQE: visual embeddings as the encoder or `project_down` gives them, neither normalised nor scaled.
        original_B2: height and width of the pictures before anything was done to them, pixels.
        crop_B2: top and left of the part that was cut out of the scaled picture, pixels.
        target_B2: height and width of the pictures wanted, pixels.

    Returns:
        `encoder_hidden_states` and `added_cond_kwargs` of diffusers' UNet.
    """
    added = {"text_embeds": embeddings_BQE.mean(dim=1), "time_ids": time_ids(original_B2, crop_B2, target_B2)}
    return embeddings_BQE, added


@torch.no_grad()
def null_embeddings(config: DiffusionConfig, encoder: EvaVisionTransformer, queries: int) -> Tensor:
    """What stands for missing embeddings, [Q, E], in the encoder's dtype and on its device.

    Args:
        config: says which.
        encoder: whose embeddings the decoder is trained on.
        queries: Q.
    """
    size = encoder.config.image_size
    like = encoder.pos_embed
    if config.null_condition == "zeros":
        return like.new_zeros(queries, encoder.config.hidden_size)
    embeddings_QE: Tensor = encoder(like.new_zeros(1, 3, size, size), [queries])
    return embeddings_QE


class Sizes(NamedTuple):
    """Micro-conditions of B pictures, pixels; each [B, 2], height or top first."""

    original_B2: Tensor
    crop_B2: Tensor
    target_B2: Tensor


@dataclass(frozen=True)
class Draws:
    """All that is random about training on B pictures; or on B clips, whose latents are [B, T, C, H, W]."""

    posterior: Tensor
    """[B, C, H, W], standard normal, fp32; picks the latents out of the VAE's distribution."""
    noise: Tensor
    """[B, C, H, W], what is added to the latents, fp32, the offset of each channel included."""
    timesteps_B: Tensor
    """int64, 0 to 999: how much of it, in all frames of a clip."""
    dropped_B: Tensor
    """bool: whose embeddings, all of them, are replaced by the null condition."""

    def to(self, device: torch.device) -> "Draws":
        """On a device."""
        return Draws(*(value.to(device) for value in vars(self).values()))


def draw(config: DiffusionConfig, seeds: Sequence[int], *size: int) -> Draws:
    """Draw for each sample from its own seed, on the CPU: the same numbers on any device, rank and batch size.

    The noise of a clip's frames is independent but for the offset, which is one number a channel in the whole clip.
    Without it the brightness that frames share could be read from their average through almost any noise, and would not
    be learnt; one for each frame would average out in turn.

    Args:
        config: how often to drop, how much offset, and the latent channels.
        seeds: one for each sample (`Crop.seed`), of 32 bits: torch's generator on a CPU looks at no more.
        size: height and width of the latents; of clips, the number of frames before them.
    """
    steps, shape = _NOISE["num_train_timesteps"], (*size[:-2], config.latent_channels, *size[-2:])
    drawn = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        dropped = torch.rand((), generator=generator) < config.condition_drop
        timestep = torch.randint(steps, (), generator=generator)
        posterior = torch.randn(shape, generator=generator)
        noise = torch.randn(shape, generator=generator)
        offset = torch.randn(config.latent_channels, 1, 1, generator=generator)
        drawn.append((posterior, noise + config.noise_offset * offset, timestep, dropped))
    return Draws(*(torch.stack(values) for values in zip(*drawn, strict=True)))


@torch.no_grad()
def encode_latents(vae: "AutoencoderKL", pixels_B3HW: Tensor, posterior_BCHW: Tensor) -> Tensor:
    """Latents [B, C, h, w] of pictures, scaled as the UNet wants them, fp32.

    Args:
        vae: frozen. Where its configuration says so (SDXL's does) it computes in fp32, and is in fp32 afterwards.
        pixels_B3HW: from -1 to 1.
        posterior_BCHW: standard normal; zeros give the mean of the VAE's distribution.
    """
    _upcast(vae)
    found = vae.encode(pixels_B3HW.to(vae.dtype)).latent_dist
    latents_BCHW: Tensor = (found.mean.float() + found.std.float() * posterior_BCHW) * vae.config.scaling_factor
    return latents_BCHW


@torch.no_grad()
def decode_latents(vae: "AutoencoderKL", latents_BCHW: Tensor) -> Tensor:
    """Pictures uint8 [B, H, W, 3] of scaled latents; the VAE as in `encode_latents`."""
    _upcast(vae)
    pixels_B3HW = vae.decode((latents_BCHW / vae.config.scaling_factor).to(vae.dtype)).sample
    levels_B3HW = (pixels_B3HW.float() / 2 + 0.5).clamp(0, 1) * 255
    pixels_BHW3: Tensor = levels_B3HW.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return pixels_BHW3


def _upcast(vae: "AutoencoderKL") -> None:
    """SDXL's VAE overflows in fp16, and bf16 shows in its pictures."""
    if vae.config.force_upcast and vae.dtype is not torch.float32:
        vae.to(torch.float32)


def target(scheduler: "DDPMScheduler", latents: Tensor, draws: Draws) -> Tensor:
    """What is to be predicted: the noise, or v, of the latents' shape, fp32."""
    if scheduler.config.prediction_type == "epsilon":
        return draws.noise
    v: Tensor = scheduler.get_velocity(latents, draws.noise, draws.timesteps_B)
    return v


def squared_error(
    network: nn.Module,
    scheduler: "DDPMScheduler",
    latents: Tensor,
    embeddings: Tensor,
    null_QE: Tensor,
    draws: Draws,
    predict: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, int]:
    """Squared errors of what is predicted of noisy latents, of pictures or clips, summed, and how many they are.

    Divided by the count over all ranks, the sum is the mean squared error; so gradients over ranks are sums too.

    Args:
        network: inputs are cast to the dtype of its weights.
        scheduler: by which noise is added.
        latents: clean, fp32 [B, ..., C, H, W].
        embeddings: [B, ..., Q, E] of the same samples.
        null_QE: stands for embeddings that are dropped.
        draws: of `draw`, on the same device.
        predict: (noisy latents, embeddings) to what the network makes of them.
    """
    dtype = next(network.parameters()).dtype
    # The scheduler would compute in the dtype of the latents: fp32, as 1000 levels of noise need.
    noisy = scheduler.add_noise(latents, draws.noise, draws.timesteps_B)
    dropped = draws.dropped_B.view(-1, *[1] * (embeddings.ndim - 1))
    predicted = predict(noisy.to(dtype), torch.where(dropped, null_QE, embeddings).to(dtype))
    wanted = target(scheduler, latents, draws)
    return F.mse_loss(predicted.float(), wanted, reduction="sum"), wanted.numel()


def denoising_loss(
    unet: nn.Module,
    scheduler: "DDPMScheduler",
    latents_BCHW: Tensor,
    embeddings_BQE: Tensor,
    null_QE: Tensor,
    sizes: Sizes,
    draws: Draws,
) -> tuple[Tensor, int]:
    """`squared_error` of the predicted noise.

    Args:
        unet: of `build_unet`, or a wrapper around it.
        scheduler: of `training_scheduler`.
        latents_BCHW: of `encode_latents`, fp32.
        embeddings_BQE: of the same pictures, from the frozen encoder.
        null_QE: of `null_embeddings`.
        sizes: micro-conditions; dropping the embeddings leaves them, as sampling does.
        draws: of `draw`, on the same device.

    Returns:
        The sum, fp32, a scalar with a gradient; the count, B x C x H x W.
    """

    def predict(noisy_BCHW: Tensor, embeddings_BQE: Tensor) -> Tensor:
        hidden_BQE, added = condition(embeddings_BQE, *sizes)
        predicted_BCHW: Tensor = unet(
            noisy_BCHW,
            draws.timesteps_B,
            encoder_hidden_states=hidden_BQE,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return predicted_BCHW

    return squared_error(unet, scheduler, latents_BCHW, embeddings_BQE, null_QE, draws, predict)
