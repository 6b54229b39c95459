# Copyright the emu2_megatron contributors. SPDX-License-Identifier: Apache-2.0
"""Emu2-Gen (arXiv 2312.13286) for diffusers: text and pictures in any order to a picture.

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16).to("cuda")
    pipe("impressionist painting of an astronaut in a jungle").image.save("astronaut.png")

Shapes: B pictures, C latent channels, H and W, Q visual embeddings of a picture, E their width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

PLACEHOLDER = "[<IMG_PLH>]"
"""Stands for a picture in a prompt."""


@dataclass
class EmuVisualGenerationPipelineOutput(BaseOutput):
    """What the pipeline returns."""

    image: Image.Image
    """The picture."""


class EmuVisualGenerationPipeline(DiffusionPipeline):
    """The language model regresses the embeddings of a picture, or the encoder gives those of one; an SDXL decoder
    paints what they describe.

    Args:
        tokenizer: of the language model.
        multimodal_encoder: `EmuForCausalLM`.
        scheduler: Euler's.
        unet: reads visual embeddings in place of text.
        vae: SDXL's.
        null_condition: what guidance leads away from where a picture is painted again: "image" (the embeddings of one
            whose normalised pixels are all 0) or "zeros", as the decoder was trained.
    """

    def __init__(
        self,
        tokenizer: Any,
        multimodal_encoder: Any,
        scheduler: Any,
        unet: Any,
        vae: Any,
        null_condition: str = "image",
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, multimodal_encoder=multimodal_encoder, scheduler=scheduler, unet=unet, vae=vae
        )
        self.register_to_config(null_condition=null_condition)
        self._negative: dict[bool, Tensor] = {}

    @torch.no_grad()
    def __call__(
        self,
        inputs: str | Image.Image | Sequence[str | Image.Image],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.0,
        crop_info: Sequence[int] = (0, 0),
        original_size: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> EmuVisualGenerationPipelineOutput:
        """Paint one picture.

        Args:
            inputs: text and pictures, in order. A single picture is painted again from its embeddings; to have one
                generated from it, put an empty string beside it.
            height, width: of the picture wanted, pixels; None takes what the decoder was trained on (1024).
            num_inference_steps: of the sampler.
            guidance_scale: of classifier-free guidance; up to 1 there is none.
            crop_info, original_size: the micro-conditions of SDXL: top and left of a crop, height and width before it;
                by default not cropped, and as large as the picture wanted.
            generator: of the noise, on the CPU for the same picture on every device; None draws from torch's own.
        """
        parts = [inputs] if isinstance(inputs, str | Image.Image) else list(inputs)
        again = len(parts) == 1 and isinstance(parts[0], Image.Image)
        if guidance_scale > 1 and again not in self._negative:
            self._negative[again] = self._null() if again else self._embed([""])
        pictures = self.decode(
            self.encode(parts[0]) if again else self._embed(parts),
            self._negative.get(again),
            height,
            width,
            num_inference_steps,
            guidance_scale,
            crop_info,
            original_size,
            generator,
        )
        return EmuVisualGenerationPipelineOutput(image=Image.fromarray(pictures[0].cpu().numpy()))

    def _embed(self, parts: Sequence[str | Image.Image]) -> Tensor:
        """Embeddings [1, Q, E] that the language model continues a prompt with."""
        text = "".join(part if isinstance(part, str) else PLACEHOLDER for part in parts)
        pictures = [part for part in parts if not isinstance(part, str)]
        embeddings: Tensor = self.multimodal_encoder.generate_image([text], self.tokenizer, image=pictures or None)
        return embeddings

    def encode(self, picture: Any) -> Tensor:
        """Embeddings [1, Q, E] of a picture, as it is painted again from."""
        encoder = self.multimodal_encoder
        embeddings: Tensor = encoder.encode_image(encoder.prepare_image_input([picture]))
        return embeddings

    def _null(self) -> Tensor:
        """Embeddings [1, Q, E] of no picture."""
        encoder = self.multimodal_encoder
        vision = encoder.config.vision_config
        if self.config.null_condition == "zeros":
            return torch.zeros(1, encoder.n_query, vision["width"], dtype=encoder.dtype, device=encoder.device)
        size = vision["image_size"]
        pixels = torch.zeros(1, 3, size, size, dtype=encoder.dtype, device=encoder.device)
        embeddings: Tensor = encoder.encode_image(pixels)
        return embeddings

    @torch.no_grad()
    def decode(
        self,
        embeddings_BQE: Tensor,
        negative_BQE: Tensor | None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.0,
        crop_info: Sequence[int] = (0, 0),
        original_size: Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """Visual embeddings to pictures, uint8 [B, H, W, 3]; one generator for all of them, or one for each."""
        unet, vae, scheduler = self.unet, self.vae, self.scheduler
        device, count = unet.device, len(embeddings_BQE)
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        height = height or unet.config.sample_size * scale
        width = width or unet.config.sample_size * scale
        whole = scale * 2 ** (len(unet.config.block_out_channels) - 1)
        if height % whole or width % whole:
            raise ValueError(f"height {height} and width {width} must be multiples of {whole}")

        guided = guidance_scale > 1
        hidden_BQE = embeddings_BQE.to(device, unet.dtype)
        if guided:
            if negative_BQE is None:
                raise ValueError("guidance needs negative embeddings")
            hidden_BQE = torch.cat([hidden_BQE, negative_BQE.to(hidden_BQE).expand_as(hidden_BQE)])
        told = [*(original_size or (height, width)), *crop_info, height, width]
        added = {
            "text_embeds": hidden_BQE.mean(dim=1),
            "time_ids": torch.tensor([told] * len(hidden_BQE), dtype=torch.float32, device=device),
        }

        scheduler.set_timesteps(num_inference_steps, device=device)
        shape = (count, unet.config.in_channels, height // scale, width // scale)
        latents_BCHW = randn_tensor(shape, generator, device, torch.float32) * scheduler.init_noise_sigma
        for t in self.progress_bar(scheduler.timesteps):
            scaled_BCHW = scheduler.scale_model_input(latents_BCHW, t).to(unet.dtype)
            epsilon = unet(
                torch.cat([scaled_BCHW] * 2) if guided else scaled_BCHW,
                t,
                encoder_hidden_states=hidden_BQE,
                added_cond_kwargs=added,
                return_dict=False,
            )[0].float()
            if guided:
                conditional, unconditional = epsilon.chunk(2)
                epsilon = unconditional + guidance_scale * (conditional - unconditional)
            latents_BCHW = scheduler.step(epsilon, t, latents_BCHW, return_dict=False)[0]

        if vae.config.force_upcast and vae.dtype is not torch.float32:  # it overflows in fp16, and bf16 shows
            vae.to(torch.float32)
        pixels_B3HW = vae.decode((latents_BCHW / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]
        levels_B3HW = (pixels_B3HW.float() / 2 + 0.5).clamp(0, 1) * 255
        pictures_BHW3: Tensor = levels_B3HW.round().to(torch.uint8).permute(0, 2, 3, 1)
        return pictures_BHW3
