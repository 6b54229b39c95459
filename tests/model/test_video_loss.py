"""The video decoder's loss is the formula, its draws depend on nothing but the clip's seed.

The stand-in decoder predicts zeros and keeps what it was given, so that the loss is the sum of squared targets.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from emu2_megatron.config.presets import VIDEO_DECODERS
from emu2_megatron.model import video_decoder
from emu2_megatron.model.video_loss import denoising_loss, training_scheduler
from emu2_megatron.model.visual_decoder import draw

TINY = replace(VIDEO_DECODERS["emu2_video_tiny"], unet_channels=(16, 32), condition_drop=0.5)
WIDTH = 24
SHAPE_TCHW = (3, 4, 8, 8)
THW = (3, 8, 8)


class Zeros(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, *given: Tensor) -> Tensor:
        self.given = given
        return torch.zeros_like(given[0])


def clips(B: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(B, *SHAPE_TCHW, generator=generator)
    embeddings = torch.randn(B, SHAPE_TCHW[0], 4, WIDTH, generator=generator)
    return latents, embeddings, torch.randn(4, WIDTH, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_noisy_clips_and_targets_are_those_of_the_formula(prediction: str, dtype: torch.dtype) -> None:
    latents, embeddings, null_QE = clips(2)
    config = replace(TINY, prediction_type=prediction, condition_drop=0.0)
    draws = draw(config, [5, 6], *THW)
    decoder = Zeros(dtype)
    total, count = denoising_loss(decoder, training_scheduler(config), latents, embeddings, null_QE, draws)

    kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    noisy, timesteps, given = decoder.given
    expected = 0.0
    assert torch.equal(timesteps, draws.timesteps_B)
    for clip in range(2):
        signal, noise = kept[timesteps[clip]] ** 0.5, (1 - kept[timesteps[clip]]) ** 0.5
        x, n = latents[clip].double(), draws.noise[clip].double()
        # fp32's rounding of numbers up to 4, or bfloat16's.
        torch.testing.assert_close(
            noisy[clip], (signal * x + noise * n).to(dtype), rtol=1e-2 if dtype is torch.bfloat16 else 0, atol=2e-6
        )
        target = n if prediction == "epsilon" else signal * n - noise * x
        expected += target.square().sum().item()
    assert total.dtype is torch.float32 and count == latents.numel()
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(given, embeddings.to(dtype))


def test_dropped_embeddings_are_replaced_in_all_frames() -> None:
    latents, embeddings, null_QE = clips(8)
    decoder, draws = Zeros(torch.float32), draw(TINY, range(8), *THW)
    denoising_loss(decoder, training_scheduler(TINY), latents, embeddings, null_QE, draws)
    assert 0 < draws.dropped_B.sum() < 8
    for clip, dropped in enumerate(draws.dropped_B):
        expected = null_QE.expand(THW[0], 4, WIDTH) if dropped else embeddings[clip]
        assert torch.equal(decoder.given[2][clip], expected)


def test_a_clip_counts_the_same_in_any_batch() -> None:
    latents, embeddings, null_QE = clips(3)
    decoder, scheduler = video_decoder.build(TINY, WIDTH), training_scheduler(TINY)

    def loss(*which: int) -> float:
        chosen = list(which)
        draws = draw(TINY, chosen, *THW)
        with torch.no_grad():
            total, _ = denoising_loss(decoder, scheduler, latents[chosen], embeddings[chosen], null_QE, draws)
        return total.item()

    # Sums of 768 squares a clip in fp32, by products of other batch sizes.
    assert loss(0, 1, 2) == pytest.approx(loss(2) + loss(1, 0), rel=1e-5)


def test_the_offset_is_one_number_a_channel_for_the_whole_clip() -> None:
    plain, offset = (draw(replace(TINY, noise_offset=weight), [3], *THW) for weight in (0.0, 0.5))
    assert torch.equal(plain.posterior, offset.posterior)
    difference_TCHW = (offset.noise - plain.noise)[0]
    C = SHAPE_TCHW[1]
    assert difference_TCHW.transpose(0, 1).reshape(C, -1).std(1).max() < 1e-6  # fp32's rounding
    assert difference_TCHW[0, :, 0, 0].unique().numel() == C
    frames = plain.noise[0].flatten(1)
    assert torch.corrcoef(frames).fill_diagonal_(0).abs().max() < 0.25  # four deviations, each 1 / sqrt(256)


def test_draws_are_spread_as_they_should_be() -> None:
    draws = draw(replace(TINY, condition_drop=0.1), range(2000), 1, 1, 1)
    timesteps = draws.timesteps_B.double()
    assert timesteps.min() < 10 and timesteps.max() > 989
    assert abs(timesteps.mean() - 499.5) < 4 * 1000 / 12**0.5 / 2000**0.5  # four deviations of the mean
    assert abs(draws.dropped_B.sum() - 200) < 4 * (2000 * 0.1 * 0.9) ** 0.5
