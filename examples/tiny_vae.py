"""Trains the VAE that examples/visual_decoder_tiny.sh and video_decoder_tiny.sh stand on: no Stable Diffusion has
pictures of 64 x 64.

Writes a folder in diffusers' layout, with the VAE and a fresh UNet, for `visual_decoder.sdxl` or `video_decoder.sd21`.
"""

import argparse
import math
from pathlib import Path

import torch
from rich.progress import track
from torch.nn import functional as F

from emu2_megatron.config.loading import load
from emu2_megatron.config.schema import VideoDecoderConfig, trained_decoder
from emu2_megatron.data.loader import Loader
from emu2_megatron.model.video_decoder import build_2d
from emu2_megatron.model.visual_decoder import build_unet, build_vae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to be made")
    parser.add_argument("--config", default="visual_decoder_tiny", metavar="RECIPE", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=600, help="of a batch of the recipe each (default %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="over the recipe")
    options = parser.parse_args()
    config = load(options.config, options.overrides)
    decoder = trained_decoder(config)
    vae = build_vae(decoder, config.training.seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=options.steps, pct_start=0.1)
    torch.manual_seed(config.training.seed)
    generator = torch.Generator().manual_seed(config.training.seed)
    with Loader(config, None, range(config.training.global_batch_size)) as loader:
        for step in track(range(options.steps), "training the VAE"):
            pixels = torch.cat([crop.painted_T3HW for row in next(loader) for crop in row.crops]).float() / 127.5 - 1
            found = vae.encode(pixels).latent_dist
            decoded = vae.decode(found.sample(generator)).sample
            loss = F.mse_loss(decoded, pixels) + 1e-6 * found.kl().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if (step + 1) % (options.steps // 5) == 0:
                error = F.mse_loss(decoded.detach(), pixels)
                print(f"step {step + 1}: {10 * math.log10(4 / float(error)):.1f} dB", flush=True)
        with torch.no_grad():
            # Scaled, so that the factor gives latents of unit variance.
            factor = 1 / (decoder.vae_scaling_factor * float(vae.encode(pixels).latent_dist.mean.std()))
            channels = decoder.latent_channels
            for tensor in (vae.quant_conv.weight, vae.quant_conv.bias):
                tensor[:channels] *= factor
            vae.quant_conv.bias[channels:] += 2 * math.log(factor)
            vae.post_quant_conv.weight /= factor
    vae.save_pretrained(options.output / "vae")
    width = config.model.encoder.hidden_size
    unet = build_2d(decoder, width) if isinstance(decoder, VideoDecoderConfig) else build_unet(decoder, width)
    unet.save_pretrained(options.output / "unet")
    print(f"VAE and a fresh UNet: {options.output}")


if __name__ == "__main__":
    main()
