"""`emu2 train` as a user runs it: real processes, real pictures, real mistakes. (i*.tar: images and interleaved.)"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from emu2_megatron.config.loading import load
from emu2_megatron.data.loader import Loader
from emu2_megatron.data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, *command], cwd=cwd or ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def emu2(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "emu2_megatron.cli", *arguments)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    made = run("tools/make_shards.py", "--input", "examples/data", "--output", str(folder / "tar"))
    assert made.returncode == 0, made.stderr
    return folder / "tar"


def test_two_processes(shards: Path, tmp_path: Path) -> None:
    """A pipeline of two, trained encoder: every step logged everywhere, and a checkpoint that knows its place."""
    overrides = [
        f"data.shards=[{shards}/i*.tar]", f"logging.directory={tmp_path}", "logging.every=2",
        "parallel.tensor_parallel_size=1", "parallel.data_parallel_size=1", "training.train_encoder=true",
        "training.steps=5", "training.global_batch_size=4", "training.micro_batch_size=2", "checkpoint.every=3",
    ]  # fmt: skip
    done = emu2("train", "--config", "tiny_interleaved", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "", "libraries talk to users of libraries"

    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 4, 5]
    assert records[-1]["text_loss"] < records[0]["text_loss"] and records[-1]["image_loss"] < records[0]["image_loss"]
    assert all(r["tokens_per_second"] > 0 and r["images_per_second"] > 0 and r["skipped_samples"] == 0 for r in records)
    assert all(0 < r["mfu"] < 1.5 and r["tflops_per_second"] > 0 for r in records)
    # One replica has nobody to wait for.
    assert all(0 <= r["padding_share"] < 1 and r["encoder_balance"] == 1 for r in records)
    assert done.stdout.count("FLOPs of a step = ") == 1 and "measured by" in done.stdout
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in events.Scalars("loss/text")] == [1, 2, 4, 5]
    assert events.Scalars("loss/image")[-1].value == pytest.approx(records[-1]["image_loss"], rel=1e-6)
    assert "Summary" in done.stdout and "encoder backward" in done.stdout

    # A second run does not write over the first.
    again_here = emu2("train", "--config", "tiny_interleaved", *overrides)
    assert again_here.returncode == 2 and "log.jsonl of an earlier run" in again_here.stderr

    # The configuration beside the log is the whole run, and can be run again.
    again = load(str(tmp_path / "config.yaml"))
    assert again == load("tiny_interleaved", overrides)

    saved = sorted(p.name for p in (tmp_path / "checkpoints").glob("step_*"))
    assert saved == ["step_00000003", "step_00000005"]
    for name, steps in (("step_00000003", 3), ("step_00000005", 5)):
        state = json.loads((tmp_path / "checkpoints" / name / "trainer.json").read_text())
        with Loader(again, Tokenizer(again.data.tokenizer), range(4)) as loader:
            for _ in range(steps):
                next(loader)
            assert state["step"] == steps and state["data"] == loader.state() and state["finite"] is True

    # What the first run of a cluster's machines does after a kill: the same command, and --resume auto.
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000005")
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "text_l')
    resumed = emu2("train", "--config", "tiny_interleaved", *overrides, "--resume", "auto")
    assert resumed.returncode == 0 and resumed.stderr == "", resumed.stdout + resumed.stderr
    assert f"resumed from {tmp_path}/checkpoints/step_00000003: step 3 is done" in resumed.stdout
    repeated = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in repeated] == [1, 2, 4, 5] and repeated[:2] == records[:2]
    for name in ("text_loss", "image_loss", "grad_norm"):
        # Step 4's record was of steps 3 and 4 together, now it is of 4 alone.
        assert repeated[3][name] == records[3][name]
    assert [e.step for e in EventAccumulator(str(tmp_path)).Reload().Scalars("loss/text")] == [1, 2, 4, 5]


WRONG = {
    "unknown key": (["training.stepz=5"], "training.steps"),
    "unknown section": (["optimiser.clip_grad=1"], "optimizer"),
    "wrong type": (["training.steps=many"], "training.steps"),
    "tensor parallel 8": (["model.preset=emu2_37b", "parallel.tensor_parallel_size=8"], "1, 2, 4"),
    "more stages than layers": (["parallel.pipeline_parallel_size=5"], "up to model.decoder.num_layers 4"),
    "layout that does not add up": (["parallel.pipeline_layout=[1,2]"], "parallel.pipeline_layout"),
    "batch that cannot be shared out": (["training.global_batch_size=10"], "training.global_batch_size"),
    "sequence too long": (["data.sequence_length=4096"], "max_position_embeddings"),
    "unknown preset": (["model.preset=emu3"], "emu2_tiny"),
    "unknown precision": (["training.precision=fp8"], "bf16"),
    "two warm-ups": (["optimizer.warmup_steps=5"], "warmup_ratio 0.05"),
    "picture of half patches": (["model.encoder.image_size=60"], "patch_size"),
    "no shards": (["data.shards=[nowhere/*.tar]"], "emu2 shards"),
    "tokenizer of another size": (["model.preset=emu2_small"], "1272 or 1274"),
    "directory that cannot be made": (["logging.directory=/proc/nowhere"], "logging.directory"),
    "no override": (["training.steps"], "="),
    "wrong number of processes": (["--nproc-per-node", "6"], "6"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_configurations(name: str, shards: Path, tmp_path: Path) -> None:
    """Exit code 2 and one line that names the key and what would be legal; no process was started for it."""
    wrong, helpful = WRONG[name]
    right = [f"data.shards=[{shards}/i*.tar]", f"logging.directory={tmp_path}"]
    done = emu2("train", "--config", "tiny_interleaved", *right, *wrong)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("emu2: ") and helpful in done.stderr


def test_unknown_recipe() -> None:
    done = emu2("train", "--config", "stage3")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "stage2" in done.stderr and "tiny_interleaved" in done.stderr


def test_a_model_too_large_for_the_machine(shards: Path, tmp_path: Path) -> None:
    """The 37B model on this machine's CPU is refused before the first process starts, not by the kernel later."""
    done = emu2(
        "train", "--config", "stage2", f"data.shards=[{shards}/i*.tar]", "data.tokenizer=examples/data/tokenizer.model",
        f"logging.directory={tmp_path}", "model.decoder.vocab_size=1272",
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "GiB" in done.stderr or "GPUs" in done.stderr


def test_fp8_that_is_not_there(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core would train in bf16 without a word."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = emu2(
        "train", "--config", "tiny_interleaved", f"data.shards=[{shards}/i*.tar]", f"logging.directory={tmp_path}/run",
        "training.precision=bf16", "fp8.recipe=current", "model.decoder.ffn_hidden_size=352",
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("emu2: fp8.recipe: current; needs a GPU and Transformer Engine")
    assert "fp8.emulate=true" in done.stderr and not (tmp_path / "run").exists()


def test_fp8_emulated(shards: Path, tmp_path: Path) -> None:
    """It runs on two ranks, and says once what it is."""
    done = emu2(
        "train", "--config", "tiny_interleaved", f"data.shards=[{shards}/i*.tar]", f"logging.directory={tmp_path}",
        "parallel.tensor_parallel_size=1", "parallel.data_parallel_size=1", "training.steps=2",
        "training.precision=bf16", "fp8.recipe=delayed", "fp8.emulate=true",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("FP8 IS EMULATED (recipe delayed)") == 1
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 2
