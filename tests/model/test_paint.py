"""The sampler against diffusers' own pipeline for SDXL, given the same embeddings."""

import copy
import functools
from dataclasses import replace
from typing import Any

import pytest
import sdxl
import torch

from emu2_megatron.config.presets import VISUAL_DECODERS
from emu2_megatron.model import paint as painting
from emu2_megatron.model.paint import paint

diffusers = pytest.importorskip("diffusers")

TINY = replace(VISUAL_DECODERS["emu2_gen_tiny"], image_size=32)
WIDTH, QUERIES = 56, 4
SEEDS = (11, 12)


@pytest.fixture(scope="module")
def networks() -> tuple[Any, Any]:
    return sdxl.networks(TINY, WIDTH)


@pytest.fixture(scope="module")
def embeddings() -> tuple[torch.Tensor, torch.Tensor]:
    """Of two pictures, and of none."""
    draw = torch.Generator().manual_seed(1)
    return torch.randn(2, QUERIES, WIDTH, generator=draw), torch.randn(QUERIES, WIDTH, generator=draw)


def latents(*args: Any, **kwargs: Any) -> torch.Tensor:
    """What `paint` decodes."""
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(painting, "decode_latents", lambda vae, latents: kept.append(latents))
        paint(*args, **kwargs)
    return kept[0]


@pytest.mark.parametrize(
    "arguments",
    [
        {},  # as Emu2-Gen does by default: 50 steps, guidance 3
        {"steps": 8, "guidance": 7.5, "size": (32, 48), "original_size": (700, 1024), "crop": (5, 30)},
        {"steps": 8, "guidance": 1.0},
    ],
)
def test_diffusers_pipeline_draws_the_same(networks: Any, embeddings: Any, arguments: dict[str, Any]) -> None:
    unet, vae = networks
    told, null = embeddings
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=vae, unet=unet, scheduler=diffusers.EulerDiscreteScheduler.from_config(sdxl.SCHEDULER), text_encoder=None,
        text_encoder_2=None, tokenizer=None, tokenizer_2=None, add_watermarker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    height, width = arguments.get("size", (32, 32))
    draw = functools.partial(
        pipeline,
        prompt_embeds=told,
        pooled_prompt_embeds=told.mean(dim=1),
        negative_prompt_embeds=null.expand_as(told),
        negative_pooled_prompt_embeds=null.mean(dim=0).expand(2, -1),
        height=height,
        width=width,
        original_size=arguments.get("original_size", (height, width)),
        crops_coords_top_left=arguments.get("crop", (0, 0)),
        target_size=(height, width),
        guidance_scale=arguments.get("guidance", 3.0),
        num_inference_steps=arguments.get("steps", 50),
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
    )
    wanted = draw(output_type="latent").images
    found = latents(unet, vae, told, null, SEEDS, **arguments)
    # fp32, up to 50 steps; conditions are in another order in the batch, so sums may be too.
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def test_diffusers_pipeline_decodes_the_same(networks: Any, embeddings: Any) -> None:
    unet, vae = networks
    found = paint(unet, vae, *embeddings, SEEDS, steps=2)
    drawn = latents(unet, vae, *embeddings, SEEDS, steps=2)
    processor = diffusers.image_processor.VaeImageProcessor()
    pixels = vae.decode(drawn / sdxl.VAE["scaling_factor"]).sample.detach()
    pictures = processor.postprocess(pixels, output_type="pil")
    assert found.shape == (2, 32, 32, 3) and found.dtype is torch.uint8
    assert [picture.numpy().tobytes() for picture in found] == [picture.tobytes() for picture in pictures]
    assert 15 < found.float().std() < 40  # there is something in it, and hardly a number is clamped


def test_what_was_compared_could_tell(networks: Any, embeddings: Any) -> None:
    """Every argument moves the latents by at least ten times what is tolerated above."""
    told, null = embeddings
    base: dict[str, Any] = {"seeds": SEEDS, "steps": 8, "guidance": 3.0, "crop": (0, 0), "original_size": (32, 32)}
    wanted = latents(*networks, told, null, **base)
    for change in ({"crop": (9, 0)}, {"original_size": (32, 99)}, {"steps": 7}, {"guidance": 3.1}, {"seeds": (11, 13)}):
        other = latents(*networks, told, null, **(base | change))
        assert float((other - wanted).abs().max()) > 1e-3 * float(wanted.abs().max()), change
    swapped = latents(*networks, null.expand_as(told), told[0], **base)
    assert float((swapped - wanted).abs().max()) > 1e-2 * float(wanted.abs().max())


def test_guidance_of_one_costs_one_pass(networks: Any, embeddings: Any) -> None:
    unet, vae = networks
    told, null = embeddings
    sizes: list[int] = []
    hook = unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    paint(unet, vae, told, null, SEEDS, steps=3, guidance=1.0)
    paint(unet, vae, told, null, SEEDS, steps=2, guidance=1.01)
    hook.remove()
    assert sizes == [2, 2, 2, 4, 4]
    # Then what stands for no picture is not looked at.
    nothing = torch.full_like(null, float("nan"))
    plain = [paint(unet, vae, told, x, SEEDS, steps=3, guidance=1.0) for x in (null, nothing)]
    assert torch.equal(*plain)


def test_a_picture_does_not_depend_on_the_others(networks: Any, embeddings: Any) -> None:
    unet, vae = networks
    told, null = embeddings
    both = latents(unet, vae, told, null, SEEDS, steps=4)
    alone = latents(unet, vae, told[1:], null, SEEDS[1:], steps=4)
    # Products of other sizes may sum in another order.
    assert float((both[1] - alone[0]).abs().max()) < 1e-4 * float(both.abs().max())
    assert not torch.allclose(both[1], latents(unet, vae, told[1:], null, [13], steps=4)[0], atol=0.1)


def test_bf16_keeps_its_latents_in_fp32(networks: Any, embeddings: Any) -> None:
    """The UNet's outputs are rounded, what they are added up to is not."""
    unet, vae = networks
    told, null = embeddings
    wanted = latents(unet, vae, told, null, SEEDS, steps=8)
    found = latents(copy.deepcopy(unet).bfloat16(), vae, told, null, SEEDS, steps=8)
    assert found.dtype is torch.float32
    assert not torch.equal(found, found.bfloat16().float())
    # 2**-9 a rounding, times guidance (2 x 3 - 1), through some ten layers that add up like a random walk.
    error = float((found - wanted).norm() / wanted.norm())
    assert error < 0.03


def test_what_does_not_fit_is_refused(networks: Any, embeddings: Any) -> None:
    with pytest.raises(ValueError, match="1 seeds for 2 pictures"):
        paint(*networks, *embeddings, [1])
    with pytest.raises(ValueError, match="size 64 x 40: both must be multiples of 16"):
        paint(*networks, *embeddings, SEEDS, size=(64, 40))
