"""Films: sampling arrives where a perfect predictor points, files can be read back, consistency is measured by hand."""

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from emu2_megatron.config.presets import VIDEO_DECODERS
from emu2_megatron.data import video
from emu2_megatron.model import film, video_decoder
from emu2_megatron.model.video_loss import training_scheduler

TINY = replace(VIDEO_DECODERS["emu2_video_tiny"], unet_channels=(16, 32))
WIDTH = 24
KEPT = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Oracle(nn.Module):
    """Knows that all latents of a frame are the first number of its embeddings, and predicts accordingly."""

    def __init__(self, prediction: str) -> None:
        super().__init__()
        self.prediction, self.given = prediction, []
        self.weight = nn.Parameter(torch.zeros(1))
        self.unet = SimpleNamespace(config=SimpleNamespace(in_channels=4))

    def forward(self, noisy: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        self.given.append(noisy)
        clean = embeddings[..., 0, 0, None, None, None].double()
        kept = KEPT[timesteps.long()].view(-1, 1, 1, 1, 1)
        noise = (noisy - kept**0.5 * clean) / (1 - kept) ** 0.5
        return (noise if self.prediction == "epsilon" else kept**0.5 * noise - (1 - kept) ** 0.5 * clean).float()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_sampling_arrives_where_the_prediction_points(prediction: str, guidance: float) -> None:
    embeddings_BTQE = torch.randn(2, 3, 4, WIDTH)
    null_QE = torch.randn(4, WIDTH)
    oracle, scheduler = Oracle(prediction), training_scheduler(replace(TINY, prediction_type=prediction))
    latents = film.denoise(oracle, scheduler, embeddings_BTQE, null_QE, [1, 2], (16, 16), steps=10, guidance=guidance)
    wanted, unguided = embeddings_BTQE[..., 0, 0], null_QE[0, 0]
    expected = (unguided + guidance * (wanted - unguided))[..., None, None, None].expand(2, 3, 4, 16, 16)
    # The first step has a noise of 14, fp32 keeps it to 1e-6; the last divides by its own, 0.04.
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)
    assert len(oracle.given) == 10
    assert len(oracle.given[0]) == (2 if guidance == 1 else 4)
    assert 0.9 < oracle.given[0].std() < 1.1  # the network sees noise of variance 1


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    """Halves height and width."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.5,
    )


def test_films_are_the_decoded_latents_the_same_in_any_batch(vae: AutoencoderKL) -> None:
    decoder, scheduler = video_decoder.build(TINY, WIDTH), training_scheduler(TINY)
    embeddings_BTQE = torch.randn(2, 3, 4, WIDTH)
    null_QE = torch.zeros(4, WIDTH)

    def films(which: list[int], seeds: list[int]) -> Tensor:
        return film.render(decoder, vae, scheduler, embeddings_BTQE[which], null_QE, seeds, (8, 12), steps=3)

    both = films([0, 1], [1, 2])
    assert both.shape == (2, 3, 8, 12, 3) and both.dtype == torch.uint8
    latents = film.denoise(decoder, scheduler, embeddings_BTQE, null_QE, [1, 2], (4, 6), steps=3, guidance=3.0)
    with torch.no_grad():
        pixels = vae.decode(latents[1, 2][None] / 0.5).sample[0]
    expected = ((pixels.permute(1, 2, 0).double() + 1) * 127.5).clamp(0, 255)
    assert (both[1, 2].double() - expected).abs().max() < 0.501  # rounding to a level
    # Products of other batch sizes may move a number over the edge between two levels.
    assert (films([1], [2])[0].double() - both[1]).abs().max() <= 1
    assert (films([1], [3])[0].double() - both[1]).abs().mean() > 5


def test_what_cannot_be_rendered_is_refused(vae: AutoencoderKL) -> None:
    decoder, scheduler = video_decoder.build(TINY, WIDTH), training_scheduler(TINY)
    embeddings_BTQE, null_QE = torch.randn(2, 3, 4, WIDTH), torch.zeros(4, WIDTH)
    with pytest.raises(ValueError, match="1 seeds for 2 films"):
        film.render(decoder, vae, scheduler, embeddings_BTQE, null_QE, [1], (8, 12))
    with pytest.raises(ValueError, match="size 8 x 10: both must be multiples of 4"):
        film.render(decoder, vae, scheduler, embeddings_BTQE, null_QE, [1, 2], (8, 10))


def moving(T: int, height: int, width: int) -> Tensor:
    """A smooth picture in strong colours that moves two pixels a frame."""
    y, x = np.mgrid[:height, :width]
    frames = [np.stack([(x + 2 * t) * 255 // (width + 2 * T), y * 255 // height, 255 - x], -1) for t in range(T)]
    return torch.from_numpy(np.stack(frames).astype(np.uint8))


@pytest.mark.parametrize("encoder", ["libx264", "mpeg4"])
def test_an_mp4_is_read_back(encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "codecs_available", {encoder})
    frames = moving(5, 48, 64)
    film.write(tmp_path / "film.mp4", frames, rate=8)
    data = (tmp_path / "film.mp4").read_bytes()
    clip = video.index(data)
    assert clip.codec == {"libx264": "h264"}.get(encoder, encoder)
    assert (clip.colorspace, clip.pixel_format) == (1, "yuv420p")
    read = torch.stack(video.frames(data, range(5), torch.from_numpy))
    # A wrong matrix, or colours exchanged, would leave less than 25 dB.
    assert 10 * torch.log10(255**2 / (read.double() - frames).square().mean()) > 30
    with av.open(str(tmp_path / "film.mp4")) as opened:
        assert opened.streams.video[0].average_rate == 8


def test_a_gif_is_read_back(tmp_path: Path) -> None:
    frames = moving(4, 24, 32)
    film.write(tmp_path / "film.gif", frames, rate=8)
    with Image.open(io.BytesIO((tmp_path / "film.gif").read_bytes())) as opened:
        assert (opened.n_frames, opened.info["duration"], opened.info["loop"]) == (4, 120, 0)  # GIF counts in 10 ms
        for number in range(4):
            opened.seek(number)
            difference = np.asarray(opened.convert("RGB"), dtype=float) - frames[number].numpy()
            assert np.abs(difference).mean() < 8  # 256 colours


@pytest.mark.parametrize(
    "name, frames, problem",
    [
        ("film.avi", moving(2, 8, 8), "its suffix is none of .mp4, .gif"),
        ("film.mp4", moving(2, 8, 7), "7 x 8 pixels .* even"),
        ("film.mp4", moving(2, 8, 8).float(), r"uint8 \[T, H, W, 3\], got torch.float32"),
        ("film.mp4", moving(2, 8, 8)[:0], r"got torch.uint8 \[0, 8, 8, 3\]"),
        ("film.gif", moving(2, 8, 8)[0], r"got torch.uint8 \[8, 8, 3\]"),
    ],
)
def test_what_cannot_be_written_is_refused(name: str, frames: Tensor, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=problem):
        film.write(tmp_path / name, frames, rate=8)
    assert not list(tmp_path.iterdir())


def test_consistency_is_measured_between_neighbours() -> None:
    frames = torch.tensor([10, 13, 9], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 2, 2, 3)
    assert film.neighbour_psnr(frames) == pytest.approx(10 * np.log10(255**2 / ((3**2 + 4**2) / 2)))
    assert film.neighbour_psnr(frames[:1].expand(2, 2, 2, 3)) == np.inf
    features = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, -1.0]])
    assert film.neighbour_cosine(features) == pytest.approx((0.5**0.5 - 1) / 2)
    for measure in (film.neighbour_psnr, film.neighbour_cosine):
        with pytest.raises(ValueError, match="successive frames, got 1"):
            measure(frames[:1])
