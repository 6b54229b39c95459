"""Runs that are told to end, or hang, on real processes: what they leave, what they return, and how they go on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from emu2_megatron.config.loading import load
from emu2_megatron.data.loader import Loader
from emu2_megatron.data.tokenizer import Tokenizer
from emu2_megatron.training.watchdog import Heartbeat, late, report

ROOT = Path(__file__).parents[2]


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "PYTHONPATH": str(ROOT), **more}


def start(*command: str, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment(**more), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def arguments(shards: Path, directory: Path, *more: str, processes: int = 2) -> list[str]:
    """Of `emu2 train`: a small run on a pipeline of one or two stages."""
    return [
        "train", "--config", "tiny_interleaved", f"data.shards=[{shards}/i*.tar]", f"logging.directory={directory}",
        "parallel.tensor_parallel_size=1", "parallel.data_parallel_size=1",
        f"parallel.pipeline_parallel_size={processes}", "training.global_batch_size=4", "training.micro_batch_size=2",
        "training.steps=30", "logging.every=1", "logging.tensorboard=false", *more,
    ]  # fmt: skip


def train(shards: Path, directory: Path, *more: str, processes: int = 2, **env: str) -> subprocess.Popen[str]:
    return start("-m", "emu2_megatron.cli", *arguments(shards, directory, *more, processes=processes), **env)


def records(directory: Path) -> list[dict[str, Any]]:
    file = directory / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line] if file.exists() else []


def until_step(process: subprocess.Popen[str], directory: Path, step: int) -> None:
    """Wait for a step of the log."""
    deadline = time.monotonic() + 150
    while not any(record["step"] >= step for record in records(directory)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def saved(directory: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (directory / "checkpoints").glob("step_*") if path.suffix == "")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "tar"
    made = start("tools/make_shards.py", "--input", "examples/data", "--output", str(folder))
    assert finished(made)[0] == 0
    return folder


@pytest.fixture(scope="module")
def straight(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The log of a run that nobody stopped."""
    directory = tmp_path_factory.mktemp("straight")
    code, out, err = finished(train(shards, directory))
    assert code == 0 and err == "", out + err
    return records(directory)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "whom", "code"), [(signal.SIGTERM, "launcher", 143), (signal.SIGUSR1, "rank 1", 75)]
)
def test_signals(
    number: signal.Signals, whom: str, code: int, shards: Path, straight: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The step that a signal falls into is finished and saved, by all ranks; --resume auto makes of the two runs the
    one that nobody stopped. A SIGTERM goes to the launcher, which hands it on, SIGUSR1 to a single rank."""
    process = train(shards, tmp_path)
    until_step(process, tmp_path, 3)
    rank_1 = json.loads((tmp_path / "heartbeat" / "rank_00001.json").read_text())
    os.kill(process.pid if whom == "launcher" else rank_1["pid"], number)
    returned, out, err = finished(process)
    assert returned == code, out + err
    assert f"emu2: {number.name}: saved and ended early; `emu2 train ... --resume auto` goes on" in err
    (step,) = saved(tmp_path)
    assert 3 <= step < 30 and records(tmp_path)[-1]["step"] == step
    ended = json.loads((tmp_path / "heartbeat" / "rank_00001.json").read_text())
    assert (ended["phase"], ended["step"]) == ("ended", step)

    returned, out, err = finished(train(shards, tmp_path, "--resume", "auto"))
    assert returned == 0 and f"step {step} is done" in out, out + err
    both = records(tmp_path)
    assert [record["step"] for record in both] == list(range(1, 31))
    for name in ("text_loss", "image_loss", "grad_norm"):
        assert [record[name] for record in both] == [record[name] for record in straight]


@pytest.mark.slow
def test_time_limit_and_restart_by_torchrun(shards: Path, tmp_path: Path) -> None:
    """A limit that is over before the first step ends lets that one through. torchrun starts the run again, which goes
    on by itself: three starts, three steps."""
    limited = arguments(shards, tmp_path, "guards.time_limit_minutes=0.001")
    code, out, err = finished(
        start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2",
              "-m", "emu2_megatron.cli", *limited)
    )  # fmt: skip
    assert code != 0 and saved(tmp_path) == [1, 2, 3], out + err
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]
    assert err.count("emu2: guards.time_limit_minutes: saved and ended early") == 3


@pytest.mark.slow
def test_time_limit_of_one_process(shards: Path, tmp_path: Path) -> None:
    code, out, err = finished(train(shards, tmp_path, "guards.time_limit_minutes=0.001", processes=1))
    assert code == 75 and saved(tmp_path) == [1], out + err
    # At the end of the last step there is nothing left to be started again for.
    code, out, err = finished(
        train(shards, tmp_path / "2", "guards.time_limit_minutes=0.001", "training.steps=1", processes=1)
    )
    assert code == 0 and err == "" and "Summary" in out, out + err


@pytest.mark.slow
def test_steps_to_skip(shards: Path, tmp_path: Path) -> None:
    """Their batches are read, and that is all: one update fewer each, the place in the data is that of all steps."""
    options = ["training.steps=6", "guards.steps_to_skip=[1,3,6]", "logging.every=2"]
    code, out, err = finished(train(shards, tmp_path, *options, processes=1))
    assert code == 0 and err == "", out + err
    assert [record["step"] for record in records(tmp_path)] == [2, 4, 6]
    assert [f"step {step}: left out (guards.steps_to_skip)" in out for step in range(1, 7)] == [
        True, False, True, False, False, True,
    ]  # fmt: skip
    trainer = json.loads((tmp_path / "checkpoints" / "step_00000006" / "trainer.json").read_text())
    assert trainer["optimizer"]["updates"] == 3
    config = load(str(tmp_path / "config.yaml"))
    with Loader(config, Tokenizer(config.data.tokenizer), range(4)) as loader:
        for _ in range(6):
            next(loader)
        assert trainer["data"] == loader.state() and trainer["step"] == 6


BROKEN = """
import os, sys
from emu2_megatron import cli
from emu2_megatron.model.decoder import DecoderStage

losses, calls = DecoderStage.losses, [0]

def broken(stage, *args):
    calls[0] += 1
    return losses(stage, *args) * (float("nan") if calls[0] > 4 and calls[0] % 2 else 1.0)

DecoderStage.losses = broken
sys.exit(cli.main())
"""


@pytest.mark.slow
def test_bad_updates_end_a_run(shards: Path, tmp_path: Path) -> None:
    """From step 3 on the first of two micro-batches has no loss: two steps are skipped, the third ends the run, in one
    line. What the run had saved stays, and without those steps it could go on."""
    script, run = tmp_path / "broken.py", tmp_path / "run"
    script.write_text(BROKEN)
    code, out, err = finished(
        start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script),
              *arguments(shards, run, "checkpoint.every=1"))
    )  # fmt: skip
    assert code != 0 and err.count("emu2: ") == 1 and "emu2, rank 1" not in err, err
    assert out.count("update skipped, ") == 2 and "step 4: losses nan (text), nan (image); not finite: the loss" in out
    assert (
        "emu2: step 5: losses nan (text), nan (image); not finite: the loss of micro-batch 0 of rank 1; samples" in err
    )
    assert "guards.steps_to_skip=[3,4,5] goes on without them" in err
    assert saved(run) == [1, 2, 3, 4]
    log = records(run)
    assert [(record["text_loss"] is None, record["skipped_steps"]) for record in log] == [
        (False, 0), (False, 0), (True, 1), (True, 2),
    ]  # fmt: skip
    found = json.loads((run / "skipped" / "step_00000005" / "report.json").read_text())
    keys = [key for row in found["cause"]["rows"] for key in row["keys"]]
    assert (
        keys and all(key in err for key in keys[:5]) and all(row["micro_batch"] == 0 for row in found["cause"]["rows"])
    )
    assert json.loads((run / "heartbeat" / "rank_00001.json").read_text())["phase"] == "update"
    trainer = json.loads((run / "checkpoints" / "step_00000004" / "trainer.json").read_text())
    assert trainer["guards"] == {"skipped": 2, "in_a_row": [3, 4], "losses": []}
    assert trainer["optimizer"]["updates"] == 2 and trainer["finite"] is True


SLEEPER = """
import os, sys, time
from emu2_megatron import cli
from emu2_megatron.data.loader import Loader

if os.environ["RANK"] == "1":
    steps, take = [0], Loader.__next__

    def dozes(loader):
        steps[0] += 1
        if steps[0] == 3:
            time.sleep(1000)
        return take(loader)

    Loader.__next__ = dozes
sys.exit(cli.main())
"""


@pytest.mark.slow
def test_a_rank_that_sleeps(shards: Path, tmp_path: Path) -> None:
    """All stacks are on disk, the late rank and what it is at are named, and the launcher gets an error."""
    script = tmp_path / "sleeper.py"
    script.write_text(SLEEPER)
    run = tmp_path / "run"
    code, out, err = finished(
        start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script),
              *arguments(shards, run, "guards.hang_minutes=0.1"))
    )  # fmt: skip
    assert code != 0, out + err
    said = (run / "hang" / "report.txt").read_text()
    assert said.startswith("no step has ended for 6 s (guards.hang_minutes); the stacks of all ranks are in ")
    first, second = said.strip().split("\n")
    assert first.endswith("; late: rank 1") and f"emu2, rank 0: {first}" in err
    assert second.startswith("rank 1 (") and "in load of step 3 for " in second and "at dozes (" in second
    sleeping, waiting = ((run / "hang" / f"rank_0000{rank}.txt").read_text() for rank in (1, 0))
    assert "in dozes" in sleeping and "gather_sequences" in waiting and "dozes" not in waiting
    assert [record["step"] for record in records(run)] == [1, 2]


def beat(rank: int, step: int, phase: str, waits: bool = True, written: float = 1000.0) -> Heartbeat:
    return Heartbeat(rank, f"host{rank}", 100 + rank, step, phase, 900.0, written, waits, "f (file.py:1)")


@pytest.mark.parametrize(
    ("beats", "who"),
    [
        ([beat(0, 5, "decode"), beat(1, 4, "update"), beat(2, 5, "load")], [1]),
        ([beat(0, 5, "decode"), beat(1, 5, "encode"), beat(2, 5, "encode")], [1, 2]),
        ([beat(0, 5, "decode"), beat(1, 5, "decode", waits=False)], [1]),
        ([beat(0, 5, "decode"), beat(1, 5, "decode")], []),
        ([beat(0, 5, "load", waits=False), beat(1, 5, "decode", written=950.0)], [1]),
        ([beat(0, 5, "decode"), beat(1, 5, "ended")], [0]),
        ([], []),
    ],
)
def test_who_is_late(beats: list[Heartbeat], who: list[int]) -> None:
    assert [b.rank for b in late(beats)] == who


def test_report() -> None:
    beats = [beat(0, 5, "decode"), beat(1, 5, "load", waits=False), beat(3, 5, "decode", written=960.0)]
    assert report(beats, 5, 600, Path("run/hang")).split("\n") == [
        "no step has ended for 600 s (guards.hang_minutes); the stacks of all ranks are in run/hang; late: rank 3",
        "rank 3 (host3, process 103): in decode of step 5 for 100 s, no heartbeat for 40 s",
        "no heartbeat at all of rank 2, 4",
    ]
    alike = report([beat(0, 5, "decode"), beat(1, 5, "decode")], 2, 600, Path("h"))
    assert alike.endswith("; no rank is behind the others: 0 decode of step 5, 1 decode of step 5")
