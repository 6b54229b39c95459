"""The command: arguments, exit codes, who speaks, and what reaches `launch.train`."""

import sys
import types

import pytest

import emu2_megatron
from emu2_megatron import cli
from emu2_megatron.errors import DataError


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def launched(monkeypatch):
    """Stands in for emu2_megatron.training.launch; the calls of its `train`."""
    calls = []
    launch = types.ModuleType("emu2_megatron.training.launch")
    launch.train = lambda config, nproc_per_node: calls.append((config, nproc_per_node))
    training = types.ModuleType("emu2_megatron.training")
    training.launch = launch
    monkeypatch.setitem(sys.modules, "emu2_megatron.training", training)
    monkeypatch.setitem(sys.modules, "emu2_megatron.training.launch", launch)
    return calls


@pytest.fixture
def data(tmp_path):
    """Overrides that point to files that exist."""
    for name in ("a.tar", "tokenizer.model"):
        (tmp_path / name).touch()
    return [f"data.shards=[{tmp_path}/*.tar]", f"data.tokenizer={tmp_path}/tokenizer.model"]


def train(*arguments: str) -> int:
    return cli.main(["train", *arguments])


def test_train_starts_as_many_processes_as_the_layout_needs(launched, data):
    assert train("--config", "tiny_interleaved", *data) == 0
    [(config, processes)] = launched
    assert processes == 8 and config.model.preset == "emu2_tiny" and config.data.tokenizer.endswith("tokenizer.model")


def test_overrides_stand_anywhere_and_the_last_one_wins(launched, data):
    first = ["parallel.data_parallel_size=null", "training.steps=1", "training.seed=5"]
    assert train(*first, "--config", "tiny_interleaved", *data, "--nproc-per-node", "4", "training.steps=2") == 0
    [(config, processes)] = launched
    assert processes == 4 and config.training.steps == 2 and config.training.seed == 5


def test_under_torchrun_the_world_is_there_already(launched, data, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "16")):
        monkeypatch.setenv(name, value)
    assert (
        train(
            "--config", "tiny_interleaved", *data, "parallel.data_parallel_size=null", "training.global_batch_size=64"
        )
        == 0
    )
    assert launched[0][1] is None
    assert train("--config", "tiny_interleaved", *data) == 2  # data_parallel_size 2 makes 8 processes, not 16


def test_a_configuration_that_cannot_run_is_one_line_and_exit_code_2(launched, data, capsys):
    assert train("--config", "tiny_interleaved", *data, "parallel.tensor_parallel_size=3") == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("emu2: parallel.tensor_parallel_size: 3; must divide")
    assert printed.err.count("\n") == 1 and printed.out == ""
    assert train("--config", "tiny_interleaved", *data, "--nproc-per-node", "4") == 2
    assert train("--config", "nowhere") == 2
    assert train("--config", "tiny_interleaved", "data.shards=[nowhere/*.tar]") == 2
    assert "data.shards: nowhere/*.tar matches no file" in capsys.readouterr().err
    assert launched == []


def test_another_error_is_exit_code_1(launched, data, capsys, monkeypatch):
    def fail(config, nproc_per_node):
        raise DataError("shard a.tar: cut off")

    monkeypatch.setattr(sys.modules["emu2_megatron.training.launch"], "train", fail)
    assert train("--config", "tiny_interleaved", *data) == 1
    assert capsys.readouterr().err == "emu2: shard a.tar: cut off\n"


@pytest.mark.parametrize(
    ("rank", "local_rank", "config_error", "data_error"),
    [
        ("0", "0", "emu2: ", "emu2: "),
        ("1", "1", "", "emu2, rank 1: "),
        ("8", "0", "emu2, rank 8: ", "emu2, rank 8: "),  # first of the second node: its files may be missing there
        ("3", None, "", "emu2, rank 3: "),
    ],
)
def test_who_speaks(launched, data, capsys, monkeypatch, rank, local_rank, config_error, data_error):
    def fail(config, nproc_per_node):
        raise DataError("cut off")

    monkeypatch.setattr(sys.modules["emu2_megatron.training.launch"], "train", fail)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", rank)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert train("--config", "tiny_interleaved", "training.steps=x") == 2
    error = capsys.readouterr().err
    assert error == (f"{config_error}training.steps: 'x' given, int wanted\n" if config_error else "")
    assert train("--config", "tiny_interleaved", *data) == 1
    assert capsys.readouterr().err == f"{data_error}cut off\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nothing"],
        ["train"],
        ["train", "--config", "stage2", "--nope"],
        ["doctor", "x"],
        ["train", "--conf", "stage2"],
    ],
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2 and "emu2" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"emu2 {emu2_megatron.__version__}\n"


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    assert "megatron-core" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["plan", "--gpus", "8"], ["data", "inspect"], ["embed", "--output", "x"]])
def test_commands_about_language_say_so(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command, "--config", "visual_decoder_tiny"]) == 2
    said = capsys.readouterr().err
    assert f"training.objective: visual_decoder; emu2 {' '.join(command[: 1 + (command[0] == 'data')])} is" in said
