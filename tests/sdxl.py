"""SDXL-base 1.0's public configuration files, the same in the sizes of the tiny visual decoder, and such a decoder."""

from typing import Any

import torch

from emu2_megatron.config.schema import VisualDecoderConfig
from emu2_megatron.model.visual_decoder import build_unet, build_vae

UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.19.0.dev0", "act_fn": "silu",
    "addition_embed_type": "text_time", "addition_embed_type_num_heads": 64, "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "center_input_sample": False,
    "class_embed_type": None, "class_embeddings_concat": False, "conv_in_kernel": 3, "conv_out_kernel": 3,
    "cross_attention_dim": 2048, "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "downsample_padding": 1,
    "dual_cross_attention": False, "encoder_hid_dim": None, "encoder_hid_dim_type": None, "flip_sin_to_cos": True,
    "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-05,
    "norm_num_groups": 32, "num_attention_heads": None, "num_class_embeds": None, "only_cross_attention": False,
    "out_channels": 4, "projection_class_embeddings_input_dim": 2816, "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False, "resnet_time_scale_shift": "default", "sample_size": 128,
    "time_cond_proj_dim": None, "time_embedding_act_fn": None, "time_embedding_dim": None,
    "time_embedding_type": "positional", "timestep_post_act": None, "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "upcast_attention": None,
    "use_linear_projection": True,
}  # fmt: skip
"""unet/config.json"""

VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.20.0.dev0", "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "force_upcast": True,
    "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3,
    "sample_size": 1024, "scaling_factor": 0.13025, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
"""vae/config.json"""

SCHEDULER: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False, "interpolation_type": "linear",
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None,
    "use_karras_sigmas": False,
}  # fmt: skip
"""scheduler/scheduler_config.json"""

TINY_UNET = UNET | {
    "sample_size": 16, "block_out_channels": [32, 64, 96], "transformer_layers_per_block": [1, 1, 1],
    "attention_head_dim": [2, 4, 6], "layers_per_block": 1, "norm_num_groups": 8, "addition_time_embed_dim": 16,
    "cross_attention_dim": 40, "projection_class_embeddings_input_dim": 30 + 6 * 16,
}  # fmt: skip
"""SDXL with the sizes of emu2_gen_tiny; its captions have other widths than emu2_tiny's embeddings."""


def networks(config: VisualDecoderConfig, width: int) -> tuple[Any, Any]:
    """Untrained, but with a UNet that listens to its conditions and a VAE whose pictures are within range."""
    unet, vae = build_unet(config, width), build_vae(config)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith(("attn2.to_out.0.weight", "add_embedding.linear_2.weight")):
                parameter *= 10
        vae.decoder.conv_out.weight *= 0.5
    return unet, vae
