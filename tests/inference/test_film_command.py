"""`emu2 generate --video-out`: a video painted again by a checkpoint of a video decoder."""

from pathlib import Path
from typing import Any

import pytest
import torch
import weights
from torch import Tensor

from emu2_megatron import cli
from emu2_megatron.checkpoint.save import Saver
from emu2_megatron.config.loading import load, to_yaml
from emu2_megatron.config.schema import Config
from emu2_megatron.data import decode
from emu2_megatron.data.samples import frame_indices
from emu2_megatron.data.visuals import EncodedVideo
from emu2_megatron.inference.load import find
from emu2_megatron.model import film, video_decoder, video_loss
from emu2_megatron.model.visual_decoder import null_embeddings
from emu2_megatron.parallel import diffusion, topology

pytest.importorskip("diffusers")
FILM = weights.TOKENIZER.parent / "videos" / "cityCC0.mp4"
FRAMES = 190
"""Of the film, as its source says."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config, dict[str, Tensor]]:
    """A checkpoint whose UNet mixes frames and whose average is other than its weights; and that average."""
    root = tmp_path_factory.mktemp("run")
    config = load("video_decoder_tiny", ["video_decoder.image_size=32", "video_decoder.vae_channels=[8,8,8]"])
    topology.start("gloo")
    engine = diffusion.build(config, topology.initialize(config), None, None)
    draw = torch.Generator().manual_seed(0)
    named: Any = dict(engine.whole["unet"].named_parameters())
    for parameter, average in engine.average.items():
        average.copy_(parameter.detach().flatten() + 0.05 * torch.randn(average.shape, generator=draw))
    averages = {name: engine.average[p].view_as(p).clone() for name, p in named.items()}
    saver = Saver(config.checkpoint, root / "checkpoints", engine, print)
    saver.save(7, {"data": {}})
    saver.finish()
    topology.stop()
    (root / "config.yaml").write_text(to_yaml(config))
    return root / "checkpoints/step_00000007", config, averages


def run(*arguments: object) -> int:
    return cli.main(["generate", "--steps", "3", *map(str, arguments)])


def test_frames_are_painted_from_their_embeddings(
    trained: tuple[Path, Config, dict[str, Tensor]], exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same film, put together by hand: which frames, whose embeddings, what guidance leads away from, and the
    average of the weights. What is written is looked at before it is compressed."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    checkpoint, config, averages = trained
    written: list[tuple[Path, Tensor, int]] = []
    write = film.write
    monkeypatch.setattr(film, "write", lambda *film_: (written.append(film_), write(*film_)))
    out = tmp_path / "films" / "again.mp4"
    assert (
        run("--checkpoint", exported / "checkpoint", "--decoder", checkpoint, "--seed", 5, "--video-out", out, FILM)
        == 0
    )
    ((path, found, rate),) = written
    assert path == out and out.stat().st_size > 500 and rate == 4

    model = find(checkpoint=exported / "checkpoint").load()
    video = EncodedVideo(FILM.read_bytes(), frame_indices(FRAMES, 4))
    (pictures,) = decode.decode([video], model.config.model.encoder.image_size)
    queries = model.config.model.frame_queries
    rows = model.encode(list(pictures), [queries] * 4).view(1, 4, queries, -1)
    null = null_embeddings(config.video_decoder, model.encoder, queries)
    topology.stop()
    network = video_decoder.build(config.video_decoder, 56)
    network.unet.load_state_dict(averages, strict=False)
    torch.manual_seed(0)
    from emu2_megatron.convert.decoder_checkpoint import from_checkpoint
    from emu2_megatron.model.visual_decoder import build_vae

    vae = build_vae(config.video_decoder)
    vae.load_state_dict(from_checkpoint(checkpoint, config.video_decoder, 56)[1])
    scheduler = video_loss.training_scheduler(config.video_decoder)
    (wanted,) = film.render(network.eval(), vae.eval(), scheduler, rows, null, [5], (32, 32), 3, 3.0)
    assert found.equal(wanted)


def test_errors_are_one_line(
    trained: tuple[Path, Config, dict[str, Tensor]], exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--checkpoint", exported / "checkpoint"]
    decoder = ["--decoder", trained[0]]
    for arguments, said in (
        ([*model, "--video-out", "a.mp4", FILM], "--decoder: give a checkpoint of a run that trained a video decoder"),
        ([*model, *decoder, "--video-out", "a.mp4", FILM, "again"], "the prompt is one video and nothing else"),
        ([*model, *decoder, "--video-out", "a.avi", FILM], "legal: a file that ends with .mp4 or .gif"),
        ([*model, "--decoder", exported / "hf", "--video-out", "a.mp4", FILM], "hf is no checkpoint"),
        (
            [*model, *decoder, "--image-out", tmp_path / "a.png", "a city"],
            "training.objective video_decoder, not visual",
        ),
    ):
        assert run(*arguments) != 0
        message = capsys.readouterr().err
        assert said in message and message.count("\n") == 1
