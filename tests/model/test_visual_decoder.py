"""The visual decoder against SDXL's public configuration, and its loss against its formula in float64."""

import copy
import json
from dataclasses import replace
from typing import Any

import harness
import numpy as np
import pytest
import sdxl
import torch

from emu2_megatron.config.presets import PRESETS, VISUAL_DECODERS
from emu2_megatron.errors import ConfigError, ConversionError
from emu2_megatron.model import visual_decoder as vd
from emu2_megatron.model.eva_vit import EvaVisionTransformer
from emu2_megatron.model.sdxl import load_sdxl, to_reinitialize

diffusers = pytest.importorskip("diffusers")

FULL, TINY = VISUAL_DECODERS["emu2_gen"], VISUAL_DECODERS["emu2_gen_tiny"]
WIDTH, QUERIES = 56, 4  # emu2_tiny's
SIDE = 16  # of TINY's latents


@pytest.fixture(scope="module")
def unet() -> Any:
    return vd.build_unet(TINY, WIDTH)


@pytest.fixture(scope="module")
def vae() -> Any:
    return vd.build_vae(TINY)


def test_the_full_one_is_sdxl_but_for_two_widths() -> None:
    """Configurations and parameters; the counts are the released files' (5.05 GB and 167 MB in bf16)."""
    with torch.device("meta"):
        unet, vae = vd.build_unet(FULL, 1792), vd.build_vae(FULL)
        theirs = diffusers.UNet2DConditionModel.from_config(sdxl.UNET)
    assert sum(p.numel() for p in unet.parameters()) == 2_525_520_644
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert sum(p.numel() for p in theirs.parameters()) == 2_567_463_684

    ours = json.loads(unet.to_json_string())
    differing = {k for k, v in sdxl.UNET.items() if not k.startswith("_") and (ours[k] or None) != (v or None)}
    assert differing == {"cross_attention_dim", "projection_class_embeddings_input_dim"}
    ours = json.loads(vae.to_json_string())
    assert {k for k, v in sdxl.VAE.items() if not k.startswith("_") and ours[k] != v} == set()
    ours = json.loads(vd.sampling_scheduler().to_json_string())
    foreign = {"clip_sample", "sample_max_value", "set_alpha_to_one", "skip_prk_steps"}  # of other schedulers
    assert {k for k, v in sdxl.SCHEDULER.items() if not k.startswith("_") and ours.get(k) != v} == foreign

    wanted, found = unet.state_dict(), theirs.state_dict()
    assert wanted.keys() == found.keys()
    expected = [name for name in wanted if wanted[name].shape != found[name].shape]
    assert to_reinitialize(wanted, found) == expected
    assert len(expected) == 2 * 70 + 1  # k and v of 70 transformer blocks, and the added embedding


def test_sdxl_is_taken_where_it_fits(unet: Any) -> None:
    theirs = diffusers.UNet2DConditionModel.from_config(sdxl.TINY_UNET).state_dict()
    ours = [copy.deepcopy(unet) for _ in range(3)]
    new = load_sdxl(ours[0], theirs, seed=1)
    load_sdxl(ours[1].to(torch.bfloat16), {name: t.double() for name, t in theirs.items()}, seed=1)
    load_sdxl(ours[2], theirs, seed=2)
    states = [u.state_dict() for u in ours]
    # One block each: down 64, down 96, middle, up 2 x 96, up 2 x 64.
    assert len(new) == 2 * 7 + 1
    for name, tensor in states[0].items():
        if name not in new:
            assert torch.equal(tensor, theirs[name]), name
            continue
        inputs = tensor.shape[1]
        assert tensor.shape[1] in (WIDTH, WIDTH + 6 * 16)
        # Of n normal numbers the root mean square is off by 1/sqrt(2 n), 1.2% for the smallest.
        assert float(tensor.square().mean().sqrt()) == pytest.approx((3 * inputs) ** -0.5, rel=0.06)
        assert torch.equal(tensor.bfloat16(), states[1][name])
        assert not torch.allclose(tensor, states[2][name])


def test_another_unet_is_refused(unet: Any) -> None:
    theirs = diffusers.UNet2DConditionModel.from_config(sdxl.TINY_UNET).state_dict()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    less = {name: tensor for name, tensor in theirs.items() if name != "conv_in.bias"}
    longer = theirs | {"conv_in.bias": torch.zeros(33)}
    for state, message in (
        (less, r"conv_in\.bias is missing \(1 of"),
        (theirs | {"conv_middle.bias": torch.zeros(3)}, r"conv_middle\.bias is too many"),
        (longer, r"conv_in\.bias is \[33\], the visual decoder has \[32\]"),
    ):
        with pytest.raises(ConversionError, match=message):
            load_sdxl(unet, state)
    assert all(torch.equal(before[name], tensor) for name, tensor in unet.state_dict().items())


def test_weights_depend_on_the_seed_alone(unet: Any) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again, other = vd.build_unet(TINY, WIDTH), vd.build_unet(TINY, WIDTH, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again.conv_in.weight, unet.conv_in.weight)
    assert not torch.equal(other.conv_in.weight, unet.conv_in.weight)


def test_condition() -> None:
    embeddings = torch.randn(2, 3, 5, dtype=torch.float64)
    sizes = torch.tensor([[1333, 2001], [480, 640]]), torch.tensor([[7, 0], [0, 9]]), torch.tensor([[64, 64]] * 2)
    hidden, added = vd.condition(embeddings, *sizes)
    assert hidden is embeddings
    by_hand = [[sum(float(embeddings[b, q, e]) for q in range(3)) / 3 for e in range(5)] for b in range(2)]
    torch.testing.assert_close(added["text_embeds"], torch.tensor(by_hand, dtype=torch.float64))
    # Exact: in bf16, 1333 would be 1336.
    assert added["time_ids"].tolist() == [[1333, 2001, 7, 0, 64, 64], [480, 640, 0, 9, 64, 64]]


def batch(count: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(3)
    embeddings = torch.randn(count, QUERIES, WIDTH, generator=draw)
    sizes = torch.randint(64, 2000, (3, count, 2), generator=draw)
    return {
        "latents_BCHW": torch.randn(count, 4, SIDE, SIDE, generator=draw),
        "embeddings_BQE": embeddings,
        "null_QE": torch.randn(QUERIES, WIDTH, generator=draw),
        "sizes": vd.Sizes(*sizes),
    }


def test_the_loss_is_its_formula(unet: Any) -> None:
    """Noise levels, offset, drop, conditions and sum, written out in float64."""
    given = batch(4)
    draws = vd.draw(TINY, [harness.sample_seed(0, i) for i in range(4)], SIDE, SIDE)
    draws = replace(draws, dropped_B=torch.tensor([False, True, False, True]))
    loss, count = vd.denoising_loss(unet, vd.training_scheduler(), **given, draws=draws)

    kept = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    wide = copy.deepcopy(unet).double()
    total = 0.0
    for i in range(4):
        t = int(draws.timesteps_B[i])
        noise, latents = draws.noise[i].double(), given["latents_BCHW"][i].double()
        noisy = kept[t] ** 0.5 * latents + (1 - kept[t]) ** 0.5 * noise
        told = (given["null_QE"] if i % 2 else given["embeddings_BQE"][i]).double()
        numbers = torch.cat([size[i] for size in given["sizes"]]).double()
        added = {"text_embeds": told.mean(0)[None], "time_ids": numbers[None]}
        with torch.no_grad():
            predicted = wide(noisy[None], t, encoder_hidden_states=told[None], added_cond_kwargs=added).sample[0]
        total += float(((predicted - noise) ** 2).sum())
    assert count == 4 * 4 * SIDE * SIDE
    # fp32 through some hundred layers, and sinusoids of numbers up to 2000 in fp32: 2000 x 6e-8 = 1e-4 in some of them.
    assert float(loss.detach()) == pytest.approx(total, rel=1e-5)


def test_losses_and_gradients_over_ranks_are_sums(unet: Any) -> None:
    """A batch at once, or one half on each of two ranks."""
    given, seeds = batch(4), [harness.sample_seed(1, i) for i in range(4)]
    scheduler = vd.training_scheduler()

    def run(part: slice) -> float:
        cut = {name: value if name == "null_QE" else value[part] for name, value in given.items() if name != "sizes"}
        draws = vd.draw(TINY, seeds[part], SIDE, SIDE)
        sizes = vd.Sizes(*(size[part] for size in given["sizes"]))
        loss, _ = vd.denoising_loss(unet, scheduler, **cut, sizes=sizes, draws=draws)
        loss.backward()
        return float(loss.detach())

    unet.zero_grad()
    whole = run(slice(0, 4))
    gradients = [p.grad.clone() for p in unet.parameters()]
    unet.zero_grad()
    assert run(slice(0, 2)) + run(slice(2, 4)) == pytest.approx(whole, rel=1e-5)
    for parameter, gradient in zip(unet.parameters(), gradients, strict=True):
        # Sums of fp32 numbers in another order.
        assert (parameter.grad - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-6
    unet.zero_grad()


def test_what_is_drawn_depends_on_the_sample_alone() -> None:
    seeds = [harness.sample_seed(7, step, place) for step in (1, 2) for place in (0, 1)]
    assert len({*seeds, harness.sample_seed(8, 1, 0)}) == 5
    together = vd.draw(TINY, seeds, 2, 3)
    assert together.noise.shape == together.posterior.shape == (4, 4, 2, 3)
    for i, seed in enumerate(seeds):
        alone = vd.draw(TINY, [seed], 2, 3)
        for name, value in vars(alone).items():
            assert torch.equal(value[0], getattr(together, name)[i]), name


def test_statistics_of_what_is_drawn() -> None:
    """Over N samples a share p is off by sqrt(p (1 - p) / N), a variance v by v sqrt(2 / N); four of these are
    allowed. Seeds are fixed, so this passes or fails for good."""
    count = 5000
    draws = vd.draw(TINY, [harness.sample_seed(0, i) for i in range(count)], 4, 4)
    assert float(draws.dropped_B.float().mean()) == pytest.approx(0.1, abs=4 * (0.09 / count) ** 0.5)
    times = draws.timesteps_B.float()
    assert (int(times.min()), int(times.max())) == (0, 999)
    assert float(times.mean()) == pytest.approx(499.5, abs=4 * 1000 / (12 * count) ** 0.5)
    # A channel's mean over n numbers has variance 1/n, and the offset's.
    channels = count * TINY.latent_channels
    variance = float(draws.noise.mean(dim=(2, 3)).var())
    assert variance == pytest.approx(1 / 16 + 0.1**2, rel=4 * (2 / channels) ** 0.5)
    plain = float(draws.posterior.mean(dim=(2, 3)).var())
    assert plain == pytest.approx(1 / 16, rel=4 * (2 / channels) ** 0.5)
    assert float(draws.noise.var()) == pytest.approx(1.01, rel=0.02)
    both = torch.stack([draws.noise.flatten(), draws.posterior.flatten()])
    assert abs(float(torch.corrcoef(both)[0, 1])) < 4 / both.shape[1] ** 0.5
    # No sample without its embeddings, and no offset, if none is wanted.
    off = vd.draw(replace(TINY, condition_drop=0.0, noise_offset=0.0), range(200), 4, 4)
    assert not off.dropped_B.any()
    on = vd.draw(replace(TINY, condition_drop=1.0), range(200), 4, 4)
    assert on.dropped_B.all() and torch.equal(off.posterior, on.posterior)


def test_null_embeddings() -> None:
    encoder = EvaVisionTransformer(PRESETS["emu2_tiny"].encoder)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    found = vd.null_embeddings(TINY, encoder, QUERIES)
    hidden = encoder.hidden(torch.zeros(1, 3, 56, 56))[0, 1:].detach()  # 4 x 4 patches
    squares = hidden.view(2, 2, 2, 2, WIDTH).mean(dim=(1, 3)).view(QUERIES, WIDTH)
    torch.testing.assert_close(found, squares)
    assert found.abs().max() > 0.1
    zeros = vd.null_embeddings(replace(TINY, null_condition="zeros"), encoder, QUERIES)
    assert torch.equal(zeros, torch.zeros(QUERIES, WIDTH))


def test_latents(vae: Any) -> None:
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    posterior = torch.randn(2, 4, SIDE, SIDE)
    moments = vae.quant_conv(vae.encoder(pixels)).detach()  # mean and log of the variance
    mean, std = moments[:, :4], (0.5 * moments[:, 4:]).exp()
    torch.testing.assert_close(vd.encode_latents(vae, pixels, posterior), (mean + std * posterior) * 0.13025)

    latents = torch.randn(2, 4, SIDE, SIDE)
    decoded = vae.decoder(vae.post_quant_conv(latents / 0.13025)).detach()
    levels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    found = vd.decode_latents(vae, latents)
    assert found.shape == (2, 64, 64, 3) and torch.equal(found.float(), levels)
    assert levels.std() > 10  # of a picture with something in it


def test_the_vae_computes_in_fp32(vae: Any) -> None:
    narrow = copy.deepcopy(vae).to(torch.bfloat16)
    latents = torch.randn(1, 4, SIDE, SIDE)
    rounded = copy.deepcopy(narrow).float()
    assert torch.equal(vd.decode_latents(narrow, latents), vd.decode_latents(rounded, latents))
    assert narrow.dtype is torch.float32


@pytest.mark.parametrize(
    "change, message",
    [
        ({"unet_attention_heads": (2, 4)}, "unet_attention_heads needs a number for each of the 3"),
        ({"unet_transformer_layers": (0, 1, 0)}, "the last level needs attention"),
        ({"unet_attention_heads": (2, 4, 7)}, "7 unet_attention_heads do not divide 96"),
        ({"vae_channels": (16, 36)}, "norm_num_groups 8 does not divide 36"),
        ({"image_size": 72}, "72 is no multiple of 16"),
        ({"null_condition": "mean"}, "null_condition mean; legal: image, zeros"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        vd.unet_config(replace(TINY, **change), WIDTH)
