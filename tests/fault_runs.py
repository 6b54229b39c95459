"""Real training runs, started in milliseconds, for tests that break them.

A `Run` is `emu2 train` on two ranks: the command's own `main`, each rank a process of its own that can be killed,
joined over gloo and TCP as under torchrun. The processes are forked from a server that has the imports done. No
launcher stops the survivors, so that they have to end by themselves; `launch` starts the whole command, torchrun
included.
"""

import ctypes
import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from emu2_megatron.checkpoint import files
from emu2_megatron.checkpoint.metadata import shapes, table

ROOT = Path(__file__).parents[1]
STEPS = 12
LIMIT = 120
"""Seconds within which any run must have ended, whatever was done to it."""
CONFIG = f"""
model:
  preset: emu2_tiny
  image_queries: 4
  frame_queries: 4
  encoder: {{image_size: 56, num_layers: 1, hidden_size: 28, num_attention_heads: 2, ffn_hidden_size: 56}}
  decoder: {{num_layers: 2, hidden_size: 32, num_attention_heads: 4, ffn_hidden_size: 48}}
data:
  tokenizer: {ROOT}/examples/data/tokenizer.model
  sequence_length: 48
training: {{steps: {STEPS}, global_batch_size: 2, micro_batch_size: 1, precision: fp32, train_encoder: true}}
optimizer: {{decoder_lr: 1.0e-3, projection_lr: 1.0e-3, encoder_lr: 1.0e-4, warmup_steps: 2}}
checkpoint: {{every: 2}}
logging: {{every: 1, tensorboard: false}}
"""
"""Two ranks of anything; 100,000 parameters, a checkpoint of 2 MB after every other step."""

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["emu2_megatron.training.loop", "emu2_megatron.cli", "torch.distributed.checkpoint"])


def overrides(folder: Path, shards: str, *more: str) -> list[str]:
    """Of a run in `folder`: two data-parallel ranks unless `more` says otherwise."""
    config = folder.parent / "run.yaml"
    if not config.is_file():
        config.write_text(CONFIG)
    return ["--config", str(config), f"logging.directory={folder}", f"data.shards=[{shards}]", *more]


class Run:
    """Two ranks of `emu2 train`; what they print is in `folder`.out and `output`.

    Args:
        folder: logging.directory.
        shards: data.shards.
        more: further overrides and options.
        enter: called in each rank before it begins.
    """

    def __init__(self, folder: Path, shards: str, *more: str, enter: Callable[[], None] | None = None) -> None:
        self.folder, self.out = folder, folder.with_name(folder.name + ".out")
        self.out.write_text("")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = ["train", *overrides(folder, shards, *more)]
        self.ranks = [
            _processes.Process(target=_rank, args=(rank, port, str(self.out), arguments, enter)) for rank in range(2)
        ]
        for process in self.ranks:
            process.start()

    def wait(self, limit: float = LIMIT) -> list[int]:
        """Exit codes; AssertionError if a rank has not ended in time."""
        deadline = time.monotonic() + limit
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = [rank for rank, process in enumerate(self.ranks) if process.is_alive()]
        self.kill(*hung)
        assert not hung, f"ranks {hung} did not end within {limit} s:\n{self.output}"
        return [int(process.exitcode) for process in self.ranks]

    def kill(self, *ranks: int, how: int = signal.SIGKILL) -> None:
        """Signal these ranks."""
        for rank in ranks:
            pid = self.ranks[rank].pid
            if pid is not None and self.ranks[rank].is_alive():
                os.kill(pid, how)

    def until(self, seen: Callable[[], bool], limit: float = LIMIT) -> bool:
        """Wait for something to be seen; False if all ranks ended before."""
        deadline = time.monotonic() + limit
        while not seen():
            if not any(process.is_alive() for process in self.ranks):
                return False
            assert time.monotonic() < deadline, f"not seen within {limit} s:\n{self.output}"
            time.sleep(0.0005)
        return True

    @property
    def output(self) -> str:
        return self.out.read_text(errors="replace")

    @property
    def messages(self) -> list[str]:
        """The lines that tell a user why it ended."""
        return [line for line in self.output.splitlines() if line.startswith("emu2")]


def _rank(rank: int, port: int, out: str, arguments: list[str], enter: Callable[[], None] | None) -> None:
    descriptor = os.open(out, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
    torch.set_num_threads(1)
    if enter:
        enter()
    from emu2_megatron import cli

    sys.exit(cli.main(arguments))


def finish(folder: Path, shards: str, *more: str, enter: Callable[[], None] | None = None) -> Run:
    """Run, or go on, to the end; AssertionError if it does not get there."""
    run = Run(folder, shards, *more, enter=enter)
    assert run.wait() == [0, 0], run.output
    return run


def launch(folder: Path, shards: str, *more: str) -> "subprocess.Popen[str]":
    """`emu2 train` as a user starts it, which starts two ranks; stderr is in its stdout."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    more = ("parallel.data_parallel_size=2", *more)
    command = [sys.executable, "-m", "emu2_megatron.cli", "train", *overrides(folder, shards, *more)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return files.complete(folder / "checkpoints")


def unfinished(folder: Path) -> list[Path]:
    """What an interrupted save or deletion left."""
    return sorted((folder / "checkpoints").glob("*" + files.UNFINISHED))


def log(folder: Path) -> list[dict[str, Any]]:
    """What the run logged and what must not depend on the clock."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    names = ("step", "text_loss", "image_loss", "grad_norm", "lr_decoder", "padding_share", "encoder_balance")
    return [{name: record[name] for name in names} for record in records]


def sound(folder: Path) -> list[int]:
    """The steps of complete checkpoints, each of which has every byte that was written, and says it is finite."""
    for path in checkpoints(folder):
        trainer = files.read_trainer(path)
        assert files.verify(path, trainer["files"]) == []
        assert trainer["finite"] is True and shapes(table(path))
    return [files.step_of(path) for path in checkpoints(folder)]


def as_if_nothing_was(folder: Path, straight: Path) -> list[int]:
    """Every checkpoint is sound, and equal to the byte to that of the run without faults (which may not have one of
    that step, where a run saves when it is told to end). Returns their steps."""
    for path in checkpoints(folder):
        other = straight / "checkpoints" / path.name
        assert not other.is_dir() or files.read_trainer(path) == files.read_trainer(other), path.name
    return sound(folder)


def same(folder: Path, straight: Path) -> None:
    """A finished run has come to what the one without faults did: its checkpoints, and every value it logged."""
    steps = log(straight)[-1]["step"]
    assert as_if_nothing_was(folder, straight)[-1] == steps and unfinished(folder) == []
    assert log(folder) == log(straight) and [record["step"] for record in log(folder)] == list(range(1, steps + 1))
    assert all(math.isfinite(value) for record in log(folder) for value in record.values())


def flip(file: Path, where: float = 0.5) -> None:
    """Flip a bit, at a share of a file's length."""
    with file.open("r+b") as stream:
        stream.seek(int(where * file.stat().st_size))
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 16]))


class Mounts:
    """A mount namespace: what is mounted in it no other process sees, and it goes with the last process in it.

    With root's rights, or those that a user has in a user namespace. `available` says if this machine allows it.
    """

    def __init__(self) -> None:
        own = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        self.shell = subprocess.Popen(
            ["unshare", "--mount", *own, "sh"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        self.user = bool(own)

    @staticmethod
    def available() -> bool:
        mounts = Mounts()
        try:
            mounts.run("mount -t tmpfs none /mnt")
        except (AssertionError, OSError):
            return False
        finally:
            mounts.close()
        return True

    def run(self, command: str) -> str:
        """A shell command in it; AssertionError if it fails."""
        assert self.shell.stdin and self.shell.stdout
        self.shell.stdin.write(f"{command}; echo; echo = $?\n")
        self.shell.stdin.flush()
        lines = []
        for line in self.shell.stdout:
            if line.startswith("= "):
                assert line == "= 0\n", f"{command}: {''.join(lines)}"
                return "".join(lines)
            lines.append(line)
        raise AssertionError(f"{command}: the shell ended: {''.join(lines)}")

    def inside(self, path: Path) -> Path:
        """Where this process sees a path of the namespace."""
        return Path(f"/proc/{self.shell.pid}/root{path}")

    @property
    def enter(self) -> Callable[[], None]:
        """Moves a process, which must have one thread, into it."""
        return partial(_enter, self.shell.pid, self.user)

    def close(self) -> None:
        assert self.shell.stdin
        self.shell.stdin.close()
        self.shell.wait()


def _enter(pid: int, user: bool) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    for kind in ["user"] * user + ["mnt"]:
        with open(f"/proc/{pid}/ns/{kind}") as namespace:
            if library.setns(namespace.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"setns {kind}")
