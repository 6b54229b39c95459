"""Named model sizes. `model.preset` picks one; single fields given beside it win."""

from dataclasses import replace

from emu2_megatron.config.schema import (
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    VideoDecoderConfig,
    VisualDecoderConfig,
)

_EMU2_37B = ModelConfig()

PRESETS: dict[str, ModelConfig] = {
    "emu2_37b": _EMU2_37B,
    "emu2_chat_37b": replace(
        _EMU2_37B,
        preset="emu2_chat_37b",
        decoder=replace(_EMU2_37B.decoder, vocab_size=32274),
        image_queries=256,
    ),
    # About 100 M parameters, 45 % of them in the encoder; LLaMA's vocabulary would be most of it, so it brings its own.
    "emu2_small": ModelConfig(
        preset="emu2_small",
        encoder=EncoderConfig(
            image_size=112, num_layers=8, hidden_size=640, num_attention_heads=8, ffn_hidden_size=2720
        ),
        decoder=DecoderConfig(
            num_layers=12,
            hidden_size=576,
            num_attention_heads=12,
            ffn_hidden_size=1552,
            vocab_size=4272,
            max_position_embeddings=2048,
        ),
        image_queries=16,
        frame_queries=16,
    ),
    # Seconds a step on a laptop; every ratio of the 37B kept except depth.
    "emu2_tiny": ModelConfig(
        preset="emu2_tiny",
        encoder=EncoderConfig(image_size=56, num_layers=2, hidden_size=56, num_attention_heads=4, ffn_hidden_size=480),
        decoder=DecoderConfig(
            num_layers=4,
            hidden_size=128,
            num_attention_heads=4,
            ffn_hidden_size=344,
            vocab_size=1272,
            max_position_embeddings=2048,
        ),
        image_queries=4,
        frame_queries=4,
    ),
}

VISUAL_DECODERS: dict[str, VisualDecoderConfig] = {
    "emu2_gen": VisualDecoderConfig(),
    # Pictures of 64 x 64, latents of 16 x 16; 2.8 M parameters on emu2_tiny's embeddings, and 0.2 M in the VAE.
    "emu2_gen_tiny": VisualDecoderConfig(
        preset="emu2_gen_tiny",
        image_size=64,
        unet_channels=(32, 64, 96),
        unet_transformer_layers=(0, 1, 1),
        unet_attention_heads=(2, 4, 6),
        unet_layers_per_block=1,
        time_embed_dim=16,
        vae_channels=(16, 32, 32),
        vae_layers_per_block=1,
        norm_num_groups=8,
        min_picture_size=64,
    ),
}
"""Named sizes of the visual decoder."""

VIDEO_DECODERS: dict[str, VideoDecoderConfig] = {
    "emu2_video": VideoDecoderConfig(),
    # Two levels: with those there are a way down, a middle and a way up. Frames and latents as of emu2_gen_tiny.
    "emu2_video_tiny": VideoDecoderConfig(
        preset="emu2_video_tiny",
        image_size=64,
        unet_channels=(32, 64),
        unet_attention_heads=(2, 4),
        unet_layers_per_block=1,
        vae_channels=(16, 32, 32),
        vae_layers_per_block=1,
        norm_num_groups=8,
        min_picture_size=64,
        frames=4,
    ),
}
"""Named sizes of the video decoder."""
