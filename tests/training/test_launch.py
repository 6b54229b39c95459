"""What `emu2 train` says before it starts and after it failed, and which directory is its own."""

from pathlib import Path

import harness
import pytest
import torch.distributed as dist

from emu2_megatron.config.schema import CheckpointConfig, Config, LoggingConfig
from emu2_megatron.errors import ConfigError
from emu2_megatron.training import launch, loop


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (harness.config(pp=2), ""),
        (harness.config(pp=3), "decoder layers of each stage: 1, 2, 1\n"),
        (harness.config(pp=2, vpp=2, layers=6), "decoder layers of each stage: 1 + 2, 2 + 1\n"),
    ],
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_uneven_layouts_are_printed_by_rank_0(
    config: Config, said: str, rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(loop, "run", lambda _: None)
    launch._run(config)
    assert capsys.readouterr().out == (said if rank == "0" else "")


@pytest.mark.parametrize(
    ("codes", "first", "message"),
    [
        ({0: 1, 1: -9}, 0, "rank 1 was killed by SIGKILL; the kernel does that when memory runs out"),
        ({0: -15, 1: -11}, 0, "rank 1 was killed by SIGSEGV; --resume auto"),
        ({0: -15, 3: 1}, 3, "rank 3 failed with exit code 1; its message is above"),
        ({2: -15}, 2, "rank 2 was killed by SIGTERM; --resume auto"),
        ({2: -99}, 2, "rank 2 was killed by signal 99; --resume auto"),
    ],
)
def test_the_rank_to_blame(codes: dict[int, int], first: int, message: str) -> None:
    assert launch._failed(codes, first).startswith(message)


def test_a_lost_peer_is_no_other_error() -> None:
    assert launch._is_lost_peer(dist.DistNetworkError("recvValue failed"))
    assert launch._is_lost_peer(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:1"))
    assert not launch._is_lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_relative_directory_is_the_runs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--resume of a checkpoint in it goes on there, however either path is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run/checkpoints/step_00000001").mkdir(parents=True)
    for directory, path in (("run", tmp_path / "run"), (tmp_path / "run", "run"), ("run", "run"), ("./run", "run/.")):
        logging = LoggingConfig(directory=str(directory))
        resume = CheckpointConfig(resume=f"{path}/checkpoints/step_00000001")
        launch._check_directory(Config(logging=logging, checkpoint=resume))
    with pytest.raises(ConfigError, match="step_00000001 of an earlier run"):
        launch._check_directory(Config(logging=logging, checkpoint=CheckpointConfig(resume="elsewhere/step_00000001")))
