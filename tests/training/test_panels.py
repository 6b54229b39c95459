"""What is painted while a decoder is trained, and the run as a user starts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import clips
import numpy as np
import pytest
import torch
from PIL import Image

from emu2_megatron.data.shards import RawSample, ShardIndex, write_shard
from emu2_megatron.training.panels import ROWS, contact_sheet, psnr

ROOT = Path(__file__).parents[2]


def test_psnr_by_hand() -> None:
    """One level off everywhere is 20 log10(255) = 48.13 dB; of two halves, one 255 off and one right, 3.01 dB."""
    black = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    other = black.clone()
    other[0] = 1
    other[1, :2] = 255
    assert psnr(other, black).tolist() == pytest.approx([48.1308, 3.0103], abs=1e-4)
    assert psnr(black, other).tolist() == pytest.approx([48.1308, 3.0103], abs=1e-4)


def test_a_contact_sheet_has_every_picture(tmp_path: Path) -> None:
    panel = np.zeros((3, 18, 8, 8, 3), np.uint8)
    for row in range(3):
        for column in range(18):
            panel[row, column] = (row * 80, column * 10, 200)
    contact_sheet(panel, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (6 * 26 + 4, 16 * 12 + 4, 3) and len(ROWS) == 3
    for row in range(3):
        for column in range(18):
            top = 4 + (row + 3 * (column // 16)) * 26 + 14
            left = 4 + column % 16 * 12
            assert (sheet[top : top + 8, left : left + 8] == panel[row, column]).all()


def train(recipe: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-m", "emu2_megatron.cli", "train", "--config", recipe]
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_a_run_paints_and_goes_on(tmp_path: Path) -> None:
    """Two ranks; pictures in the log, in TensorBoard and in a file; resumed by hand, it writes what follows."""
    make_shards = [sys.executable, "tools/make_shards.py", "--input", "examples/data", "--output", tmp_path / "all"]
    made = subprocess.run(make_shards, cwd=ROOT, capture_output=True)
    assert made.returncode == 0
    index = ShardIndex([str(tmp_path / "all/images-*.tar")])
    write_shard(tmp_path / "few.tar", [index.read(i) for i in range(3)])
    tiny = ["visual_decoder.unet_channels=[16,32]", "visual_decoder.unet_transformer_layers=[0,1]",
            "visual_decoder.unet_attention_heads=[2,2]", "visual_decoder.vae_channels=[8,8,8]"]  # fmt: skip
    common = [f"data.shards=[{tmp_path}/few.tar]", f"logging.directory={tmp_path}/run", "logging.every=1", *tiny,
              "training.steps=4", "training.global_batch_size=4", "training.micro_batch_size=2",
              "optimizer.warmup_steps=1", "visual_decoder.paint_every=2", "checkpoint.every=2",
              "parallel.data_parallel_size=2"]  # fmt: skip

    done = train("visual_decoder_tiny", *common)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    assert done.stdout.count("painted pictures are") == 2 and "denoising" in done.stdout and "text" not in done.stdout
    sheet = Image.open(tmp_path / "run/pictures.png")
    assert sheet.width == 3 * 68 + 4 and sheet.height == 3 * 82 + 4
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [1, 2, 2, 3, 4, 4] and "text_loss" not in log[0]
    assert ["painted_psnr" in record for record in log] == [False, False, True, False, False, True]
    assert all(0.5 < log[i]["image_loss"] < 2 and log[i]["mfu"] > 0 for i in (0, 1, 3, 4))
    assert (tmp_path / "run/quarantine").is_dir() or log[-2]["skipped_samples"] == 0

    resumed = train("visual_decoder_tiny", *common, "--resume", str(tmp_path / "run/checkpoints/step_00000002"))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    again = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    for name in ("image_loss", "grad_norm", "painted_psnr", "shuffled_psnr"):
        assert [record.get(name) for record in again] == [record.get(name) for record in log], name

    other = train("visual_decoder_tiny", *common, "--resume", "auto", "training.steps=5", "model.encoder.num_layers=1")
    assert other.returncode != 0 and "was trained on the embeddings of encoder" in other.stderr


@pytest.mark.slow
def test_a_run_on_clips_writes_a_film(tmp_path: Path) -> None:
    films = {"a": "vp8.webm", "b": "cityCC0.mp4"}
    write_shard(tmp_path / "films.tar", [
        RawSample(key, {"kind": "caption", "video": f"0{Path(name).suffix}", "text": "a film"},
                  {f"0{Path(name).suffix}": clips.clip(name)})
        for key, name in films.items()
    ])  # fmt: skip
    small = ["frames=3", "image_size=32", "unet_channels=[16,32]", "unet_attention_heads=[2,2]", "vae_channels=[8,8]"]
    done = train(
        "video_decoder_tiny", f"data.shards=[{tmp_path}/films.tar]", f"logging.directory={tmp_path}/run",
        "logging.every=1", "data.sequence_length=48", "training.steps=3", "training.global_batch_size=2",
        "training.micro_batch_size=2", "optimizer.warmup_steps=1", *(f"video_decoder.{field}" for field in small)
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    assert done.stdout.count("painted pictures are") == 1 and "original and painted clip" in done.stdout
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [1, 2, 3, 3] and "lr_video_decoder" in log[0]
    measured = [f"{name}_neighbour_{how}" for name in ("original", "painted") for how in ("psnr", "cosine")]
    assert {"painted_psnr", "shuffled_psnr", *measured} <= log[3].keys() and not set(measured) & log[2].keys()
    sheet = Image.open(tmp_path / "run/pictures.png")
    assert sheet.width == 2 * 3 * 36 + 4 and sheet.height == 3 * 50 + 4
    with av.open(str(tmp_path / "run/clip.mp4")) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert [frame.shape for frame in frames] == [(32, 64, 3)] * 3
    # The left half is what the sheet begins with, but for what H.264 and half the colour's resolution lose.
    first = np.asarray(sheet)[18:50, 4:36]
    assert clips.psnr(frames[0][:, :32], first) > 20
