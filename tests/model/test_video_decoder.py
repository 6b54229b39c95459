"""The inflated UNet is diffusers' 2D UNet frame by frame until it is trained, and mixes frames as written by hand then;
it begins from a 2D checkpoint, name by name, and learns a clip.

B clips, T frames; `TINY` has every kind of block that Stable Diffusion 2.1 has, on two levels.
"""

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from emu2_megatron.config.presets import VIDEO_DECODERS
from emu2_megatron.config.schema import VideoDecoderConfig
from emu2_megatron.data import video
from emu2_megatron.errors import ConfigError, ConversionError
from emu2_megatron.model import film, video_decoder
from emu2_megatron.model.video_decoder import VideoDecoder
from emu2_megatron.model.video_loss import denoising_loss, training_scheduler
from emu2_megatron.model.visual_decoder import draw

CLIPS = Path(__file__).parents[2] / "examples" / "data" / "videos"

TINY = VideoDecoderConfig(
    unet_channels=(16, 32),
    unet_attention_heads=(2, 4),
    unet_layers_per_block=1,
    latent_channels=3,
    norm_num_groups=8,
)
WIDTH = 24


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def stable_diffusion(**changes: object) -> UNet2DConditionModel:
    """The UNet of Stable Diffusion 2.1: its `unet/config.json`, what it leaves to diffusers' defaults left out."""
    settings = dict(
        act_fn="silu",
        attention_head_dim=[5, 10, 20, 20],
        block_out_channels=[320, 640, 1280, 1280],
        center_input_sample=False,
        cross_attention_dim=1024,
        down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        downsample_padding=1,
        dual_cross_attention=False,
        flip_sin_to_cos=True,
        freq_shift=0,
        in_channels=4,
        layers_per_block=2,
        mid_block_scale_factor=1,
        norm_eps=1e-05,
        norm_num_groups=32,
        out_channels=4,
        sample_size=96,
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        use_linear_projection=True,
    )
    return UNet2DConditionModel(**{**settings, **changes})


def tiny_2d(cross_attention_dim: int = WIDTH) -> UNet2DConditionModel:
    """A 2D UNet of TINY's sizes, every parameter random, norms and biases too."""
    torch.manual_seed(0)
    unet = stable_diffusion(
        attention_head_dim=[2, 4],
        block_out_channels=[16, 32],
        cross_attention_dim=cross_attention_dim,
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        in_channels=3,
        layers_per_block=1,
        norm_num_groups=8,
        out_channels=3,
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    )
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return unet


def disturb(decoder: VideoDecoder) -> VideoDecoder:
    """Gives the temporal modules something to do."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if ".temporal." in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return decoder


def inputs(B: int, T: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(B, T, 3, 8, 8, generator=generator)
    timesteps = torch.randint(1000, (B,), generator=generator)
    return latents, timesteps, torch.randn(B, T, 4, WIDTH, generator=generator)


@pytest.mark.parametrize("recomputed", [False, True], ids=["", "recomputed"])
@pytest.mark.parametrize("T", [1, 2, 5])
def test_at_the_start_it_is_the_2d_unet_frame_by_frame(T: int, recomputed: bool) -> None:
    unet = tiny_2d()
    decoder = video_decoder.inflate(copy.deepcopy(unet))
    if recomputed:
        decoder.enable_gradient_checkpointing()
    latents_BTCHW, timesteps_B, embeddings_BTQE = inputs(2, T)
    predicted_BTCHW = decoder(latents_BTCHW, timesteps_B, embeddings_BTQE)
    assert predicted_BTCHW.shape == latents_BTCHW.shape
    for clip in range(2):
        for frame in range(T):
            alone = unet(
                latents_BTCHW[clip, frame][None], timesteps_B[clip], embeddings_BTQE[clip, frame][None]
            ).sample[0]
            # Outputs are of order 1. What is added is exactly 0; products over another batch round differently.
            torch.testing.assert_close(predicted_BTCHW[clip, frame], alone, rtol=0, atol=1e-5)


def test_every_convolution_and_self_attention_has_its_temporal_partner() -> None:
    unet = tiny_2d()
    names_2d, modules_2d = set(unet.state_dict()), dict(unet.named_modules())
    decoder = video_decoder.inflate(unet)
    convolutions = [name for name, module in modules_2d.items() if type(module) is nn.Conv2d]
    attentions = [name for name in modules_2d if name.endswith("attn1")]
    # At the ends 2; down 3 and 3, middle 4, up 7 and 6: residual blocks have two, and one across where channels change.
    assert len(convolutions) == 2 + 3 + 3 + 4 + 7 + 6 and len(attentions) == 1 + 1 + 2
    new = {f"{name}.temporal.{part}" for name in convolutions for part in ("weight", "bias")} | {
        f"{name}.temporal.{part}"
        for name in attentions
        for part in ("norm.weight", "norm.bias", "to_q.weight", "to_k.weight", "to_v.weight", "to_out.weight",
                     "to_out.bias")
    }  # fmt: skip
    assert set(decoder.unet.state_dict()) == names_2d | new


def test_a_temporal_convolution_is_the_one_written_by_hand() -> None:
    T, C = 5, 3
    frames = video_decoder.Frames(T)
    conv = video_decoder.TemporalConv(C, 3, frames).double()
    nn.init.normal_(conv.weight)
    nn.init.normal_(conv.bias)
    x_BTCHW = torch.randn(2, T, C, 2, 4, dtype=torch.float64)
    y_BTCHW = conv(x_BTCHW.flatten(0, 1)).view(x_BTCHW.shape)
    kernel = conv.weight.detach().clone()
    kernel[range(C), range(C), 1] += 1  # the identity
    for t in range(T):
        expected = conv.bias.detach()[:, None, None].expand(2, C, 2, 4).clone()
        for k in range(3):
            if 0 <= t + k - 1 < T:
                expected += torch.einsum("oc,bchw->bohw", kernel[:, :, k], x_BTCHW[:, t + k - 1])
        torch.testing.assert_close(y_BTCHW[:, t], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("most", [4, 2**15], ids=["in parts", "at once"])
def test_temporal_attention_is_the_one_written_by_hand(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_decoder, "_MOST_SEQUENCES", most)
    B, T, P, C, heads = 2, 4, 3, 8, 2
    attention = video_decoder.TemporalAttention(C, heads, video_decoder.Frames(T)).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_()
    x_BTPC = torch.randn(B, T, P, C, dtype=torch.float64)
    y_BTPC = attention(x_BTPC.flatten(0, 1)).view(B, T, P, C)
    q, k, v, out = (getattr(attention, f"to_{name}").weight.detach() for name in ("q", "k", "v", "out"))
    positions_TC = torch.tensor(
        [[f(t * 10000 ** (-i / 4)) for f in (math.sin, math.cos) for i in range(4)] for t in range(T)],
        dtype=torch.float64,
    )
    for b in range(B):
        for p in range(P):
            x_TC = x_BTPC[b, :, p]
            normal = (x_TC - x_TC.mean(1, keepdim=True)) / (x_TC.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
            y_TC = normal * attention.norm.weight.detach() + attention.norm.bias.detach() + positions_TC
            attended = []
            for head in range(heads):
                rows = slice(4 * head, 4 * head + 4)
                scores_TT = (y_TC @ q[rows].T) @ (y_TC @ k[rows].T).T / math.sqrt(4)
                attended.append(scores_TT.softmax(1) @ (y_TC @ v[rows].T))
            expected = x_TC + torch.cat(attended, 1) @ out.T + attention.to_out.bias.detach()
            # Positions are fp32 by design: angles up to 3, rounded to 1e-7.
            torch.testing.assert_close(y_BTPC[b, :, p].detach(), expected, rtol=1e-5, atol=1e-5)


def test_frames_are_mixed_within_a_clip_and_never_between_clips() -> None:
    decoder = disturb(video_decoder.inflate(tiny_2d()))
    latents, timesteps, embeddings = inputs(2, 4)
    other = latents.clone()
    other[0, 3] += 1
    with torch.no_grad():
        change_BT = (
            (decoder(other, timesteps, embeddings) - decoder(latents, timesteps, embeddings)).abs().amax((2, 3, 4))
        )
    assert (change_BT[0] > 1e-3).all() and (change_BT[1] < 1e-5).all()


def test_gradients_reach_every_parameter_after_the_first_step() -> None:
    decoder = video_decoder.inflate(tiny_2d())
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.1)
    batch = inputs(1, 3)
    for step in range(2):
        optimizer.zero_grad()
        decoder(*batch).square().sum().backward()
        idle = {name for name, parameter in decoder.named_parameters() if not parameter.grad.abs().sum() > 0}
        if step == 0:  # behind a projection that is still zero
            assert idle == {
                name
                for name, _ in decoder.named_parameters()
                if ".temporal." in name and ("norm" in name or ".to_" in name) and ".to_out." not in name
            }
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            optimizer.step()
    assert idle == set()


def test_recomputation_gives_the_same_gradients_for_clips_of_any_length() -> None:
    decoder = disturb(video_decoder.inflate(tiny_2d()))

    def gradients() -> list[Tensor]:
        decoder.zero_grad()
        # Clips of other lengths in one backward pass: what is computed again must not take the last one's.
        (decoder(*inputs(1, 4)).square().sum() + decoder(*inputs(2, 2, seed=1)).square().sum()).backward()
        return [parameter.grad.clone() for parameter in decoder.parameters()]

    kept = gradients()
    decoder.enable_gradient_checkpointing()
    torch.testing.assert_close(gradients(), kept, rtol=0, atol=0)  # the same operations on the same numbers


def test_inputs_that_do_not_go_together_are_refused() -> None:
    decoder = video_decoder.build(TINY, WIDTH)
    latents, timesteps, embeddings = inputs(2, 3)
    for wrong in (
        (latents, timesteps, embeddings[:, :2]),
        (latents, timesteps, embeddings[..., :20]),
        (latents, timesteps[:1], embeddings),
        (latents, timesteps, embeddings[:, 0]),
    ):
        with pytest.raises(ValueError, match=r"2 clips of 3 frames go with 2 timesteps and embeddings \[2, 3, Q, 24\]"):
            decoder(*wrong)


def test_a_2d_checkpoint_is_taken_name_by_name() -> None:
    weights = tiny_2d(cross_attention_dim=10).state_dict()
    decoder, origins = video_decoder.from_2d(TINY, WIDTH, weights)
    width = {f"attn2.to_{part}.weight" for part in "kv"}
    assert set(origins.reinitialised) == {name for name in weights if name.endswith(tuple(width))}
    assert len(origins.reinitialised) == 2 * 4  # of four transformers
    assert set(origins.taken) == set(weights) - set(origins.reinitialised)
    assert {*origins.taken, *origins.reinitialised, *origins.new} == set(decoder.unet.state_dict())
    assert all(".temporal." in name for name in origins.new)
    ours = decoder.unet.state_dict()
    assert all(torch.equal(ours[name], weights[name]) for name in origins.taken)
    fresh = video_decoder.build(TINY, WIDTH).unet.state_dict()
    assert all(torch.equal(ours[name], fresh[name]) for name in (*origins.reinitialised, *origins.new))


def test_a_2d_checkpoint_of_the_same_width_gives_the_2d_unet() -> None:
    unet = tiny_2d()
    decoder, origins = video_decoder.from_2d(TINY, WIDTH, unet.state_dict())
    assert origins.reinitialised == ()
    latents, timesteps, embeddings = inputs(1, 2)
    expected = unet(latents[0], timesteps, embeddings[0]).sample
    torch.testing.assert_close(decoder(latents, timesteps, embeddings)[0], expected, rtol=0, atol=1e-5)


def test_a_checkpoint_that_does_not_fit_is_refused_by_name() -> None:
    weights = tiny_2d().state_dict()
    name = "mid_block.resnets.0.conv1.weight"
    lacking = {key: tensor for key, tensor in weights.items() if key != name}
    with pytest.raises(ConversionError, match=f"lacks {name};"):
        video_decoder.from_2d(TINY, WIDTH, lacking)
    with pytest.raises(ConversionError, match="has what the decoder does not: add_embedding.bias;"):
        video_decoder.from_2d(TINY, WIDTH, {**weights, "add_embedding.bias": torch.zeros(1)})
    with pytest.raises(ConversionError, match=rf"does not fit: {name} \[32, 32, 1, 1\], not \[32, 32, 3, 3\];"):
        video_decoder.from_2d(TINY, WIDTH, {**weights, name: weights[name][:, :, :1, :1]})
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    with pytest.raises(ConversionError, match=rf"does not fit: {name} \[16, 24\], not \[32, 24\];"):
        video_decoder.from_2d(TINY, WIDTH, {**weights, name: weights[name][:16]})


def test_a_configuration_that_does_not_go_together_is_refused() -> None:
    with pytest.raises(ConfigError, match="video_decoder.unet_attention_heads: 1 levels, but unet_channels has 2"):
        video_decoder.build(replace(TINY, unet_attention_heads=(2,)), WIDTH)
    with pytest.raises(
        ConfigError, match="video_decoder.unet_channels: 32 must be even, and divisible by .* 3 attention"
    ):
        video_decoder.build(replace(TINY, unet_attention_heads=(2, 3)), WIDTH)
    with pytest.raises(ConfigError, match="video_decoder.temporal_kernel_size: 4 is not odd"):
        video_decoder.build(replace(TINY, temporal_kernel_size=4), WIDTH)
    with pytest.raises(ConfigError, match="video_decoder.prediction_type: 'sample' is none of"):
        training_scheduler(replace(TINY, prediction_type="sample"))


def test_the_full_size_is_stable_diffusion_2_1_of_another_width() -> None:
    with torch.device("meta"):
        unet = stable_diffusion()
        decoder = video_decoder.build(VIDEO_DECODERS["emu2_video"], 1792)
    shapes_2d = {name: tensor.shape for name, tensor in unet.state_dict().items()}
    for name in shapes_2d:
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            shapes_2d[name] = torch.Size([shapes_2d[name][0], 1792])
    shapes = {name: tensor.shape for name, tensor in decoder.unet.state_dict().items()}
    assert {name: shape for name, shape in shapes.items() if ".temporal." not in name} == shapes_2d

    # Stable Diffusion 2.1's 865,910,724, and 768 more inputs of keys and values in 5 + 5 + 6 transformers.
    transformers = {320: 5, 640: 5, 1280: 6}
    flat = 865_910_724 + sum(n * 2 * C * (1792 - 1024) for C, n in transformers.items())
    # Convolutions by their output channels: conv_in and conv_out; residual blocks (two each, and one across where
    # channels change: first on levels 2 and 3 down, all on the way up); three down, three up.
    convolutions = {
        4: 1,
        320: 1 + 2 * 2 + 1 + 3 * 3,
        640: (2 * 2 + 1) + 1 + 3 * 3 + 1,
        1280: (2 * 2 + 1) + 1 + 2 * 2 + 2 * 2 + 2 * (3 * 3 + 1),
    }
    temporal = sum(n * (3 * C * C + C) for C, n in convolutions.items())
    temporal += sum(n * (4 * C * C + C + 2 * C) for C, n in transformers.items())  # q, k, v, out; its bias; the norm
    counted = {name: shape.numel() for name, shape in shapes.items()}
    assert sum(n for name, n in counted.items() if ".temporal." not in name) == flat == 885_080_004
    assert sum(counted.values()) == flat + temporal == 1_126_123_256


def clip(name: str, T: int, size: int) -> Tensor:
    """T frames from the middle of an example clip, four apart, uint8 [T, size, size, 3]."""
    data = (CLIPS / name).read_bytes()
    first = len(video.index(data).times) // 2

    def small(pixels_HW3: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(Image.fromarray(pixels_HW3).resize((size, size))))

    return torch.stack(video.frames(data, [first + 4 * i for i in range(T)], small))


def test_it_learns_a_clip_and_its_films_flicker_less() -> None:
    """In pixels, without an autoencoder; embeddings are pixels of a 2 x 2 thumbnail through a fixed random matrix."""
    T = 4
    frames_THW3 = clip("bigbuckbunny.mp4", T, 16)
    latents = (frames_THW3.float() / 127.5 - 1).movedim(-1, 1)[None]
    thumbnails = nn.functional.avg_pool2d(latents[0], 8).flatten(2).transpose(1, 2)
    generator = torch.Generator().manual_seed(0)
    embeddings = (thumbnails @ torch.randn(3, WIDTH, generator=generator))[None]
    null_QE = torch.zeros(4, WIDTH)
    decoder, scheduler = video_decoder.build(TINY, WIDTH), training_scheduler(TINY)

    def loss(seeds: list[int]) -> Tensor:
        n = len(seeds)
        draws = draw(TINY, seeds, *latents.shape[1:2], *latents.shape[3:])
        clips, given = latents.expand(n, *latents.shape[1:]), embeddings.expand(n, -1, -1, -1)
        total, count = denoising_loss(decoder, scheduler, clips, given, null_QE, draws)
        return total / count

    def flicker() -> float:
        made = film.denoise(decoder, scheduler, embeddings, null_QE, [1], (16, 16), steps=10, guidance=1.0)
        return film.neighbour_psnr(((made[0].clamp(-1, 1) + 1) * 127.5).round().byte())

    held_out = [-seed for seed in range(1, 17)]  # timesteps and noise not trained on
    with torch.no_grad():
        before, psnr_before = loss(held_out).item(), flicker()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    for step in range(40):
        loss([2 * step, 2 * step + 1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after, psnr_after = loss(held_out).item(), flicker()
    assert after < before / 2
    assert psnr_before + 3 < psnr_after < film.neighbour_psnr(frames_THW3)
