"""Checkpoints and shards that are not as they were written: named in a line, and never trained on."""

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_runs import Run, as_if_nothing_was, checkpoints, finish, flip, log, same

from emu2_megatron.checkpoint import files, metadata

from .conftest import Fault, Stopped, Straight

OLDER = "checkpoint.older_if_damaged=true"


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _all_but_the_name(path: Path) -> None:
    """One digit of trainer.json: JSON all the same, and another place in the data."""
    text = path.read_text()
    at = text.index('"drawn": [') + len('"drawn": [\n')
    while not text[at].isdigit():
        at += 1
    path.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])


def _not_finite(path: Path, name: str, marked: bool) -> None:
    """Plant a NaN in a stored tensor, with checksums that are right: as if training had put it there."""
    table = metadata.table(path)
    index, info = next((i, info) for i, info in table.storage_data.items() if i.fqn == name)
    file = path / info.relative_path
    content = file.read_bytes()
    tensor = torch.load(io.BytesIO(content[info.offset : info.offset + info.length]), weights_only=True)
    tensor.view(-1)[0] = float("nan")
    stream = io.BytesIO()
    torch.save(tensor, stream)
    assert len(stream.getvalue()) == info.length, index
    file.write_bytes(content[: info.offset] + stream.getvalue() + content[info.offset + info.length :])
    _rewrite(path, finite=not marked)


def _rewrite(path: Path, **fields: Any) -> None:
    """Make a checkpoint's trainer.json fit its files."""
    trainer = {**files.read_trainer(path), **fields}
    trainer["files"] = {name: files.checksum(path / name) for name in trainer["files"]}
    (path / files.TRAINER).write_text(files.trainer_text(trainer))


class _Code:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def _code(path: Path) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(_Code(path.parent.parent / "made by it")))
    _rewrite(path)


def _elsewhere(path: Path) -> None:
    """The table of contents sends the reader to a file of another folder."""
    table = metadata.table(path)
    for index, info in table.storage_data.items():
        info.relative_path = f"../step_00000004/{info.relative_path}"
        table.storage_data[index] = info
    (path / ".metadata").write_bytes(pickle.dumps(table))
    _rewrite(path)


def _names_elsewhere(path: Path) -> None:
    trainer = files.read_trainer(path)
    trainer["files"]["../../../../../../dev/zero"] = {"bytes": 1, "crc32": 0}
    (path / files.TRAINER).write_text(files.trainer_text(trainer))


Do = Callable[[Path], None]
QUICK: dict[str, tuple[str, Do, str]] = {
    "bit of a shard": ("damaged checkpoint", lambda path: flip(path / "__1_0.distcp"), "__1_0.distcp is damaged"),
    "NaN in a weight": (
        "NaN in a checkpoint",
        partial(_not_finite, name="decoder.layers.1.mlp.linear_fc2.weight", marked=True),
        "not finite: in decoder.layers.1.mlp.linear_fc2.weight",
    ),
    "code": ("dangerous checkpoint", _code, "it refers to posix.mkdir"),
}
MORE: dict[str, tuple[str, Do, str]] = {
    "shard cut off": ("damaged checkpoint", lambda path: _cut(path / "__0_1.distcp"), "bytes"),
    "shard missing": ("damaged checkpoint", lambda path: (path / "__0_0.distcp").unlink(), "No such file"),
    "bit of the table": ("damaged checkpoint", lambda path: flip(path / ".metadata"), ".metadata is damaged"),
    "table cut off": ("damaged checkpoint", lambda path: _cut(path / ".metadata"), ".metadata has"),
    "table missing": ("damaged checkpoint", lambda path: (path / ".metadata").unlink(), ".metadata: No such file"),
    "trainer.json cut off": ("damaged checkpoint", lambda path: _cut(path / files.TRAINER), "trainer.json is damaged"),
    "trainer.json empty": (
        "damaged checkpoint", lambda path: os.truncate(path / files.TRAINER, 0), "trainer.json is damaged",
    ),
    "digit of trainer.json": (
        "damaged checkpoint", lambda path: _all_but_the_name(path / files.TRAINER), "trainer.json is damaged",
    ),
    "NaN in a moment, unnoticed": (
        "NaN in a checkpoint",
        partial(_not_finite, name="optimizer.exp_avg_sq.embedding.word_embeddings.weight", marked=False),
        "not finite: in optimizer.exp_avg_sq.embedding.word_embeddings.weight",
    ),
    "files of another folder": ("dangerous checkpoint", _elsewhere, "refers to ../step_00000004/"),
    "files of the machine": ("dangerous checkpoint", _names_elsewhere, "names a file outside of its folder"),
}  # fmt: skip


def _refused_and_passed_over(
    scenario: str, damage: Do, message: str, stopped: Stopped, straight: Path, shards: str, fault: Fault
) -> None:
    folder = stopped()
    newest = checkpoints(folder)[-1]
    with fault(scenario):
        damage(newest)
        run = Run(folder, shards, "--resume", "auto")
        assert run.wait() == [1, 1] and "Traceback" not in run.output, run.output
        for line in run.messages:
            assert str(newest) in line and message in line, line
            assert "checkpoint.older_if_damaged=true goes on from step_00000004" in line, line
        assert len(run.messages) == 2, "each rank says it in one line"
        assert log(folder) == log(straight), "a run that did not begin has changed the log"
        assert not (folder / "made by it").exists()

        run = finish(folder, shards, "--resume", "auto", OLDER)
        assert f"{newest}" in run.output and "trying an older checkpoint" in run.output
        assert "step_00000004: step 4 is done" in run.output and f"it is kept as {newest}.aside" in run.output
        assert not (folder / "made by it").exists()
        same(folder, straight)
        assert newest.with_name(newest.name + ".aside").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_a_newest_checkpoint(name: str, stopped: Stopped, straight: Straight, shards: str, fault: Fault) -> None:
    _refused_and_passed_over(*QUICK[name], stopped, straight(), shards, fault)


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_more_of_it(name: str, stopped: Stopped, straight: Straight, shards: str, fault: Fault) -> None:
    _refused_and_passed_over(*MORE[name], stopped, straight(), shards, fault)


def test_one_that_is_not_finite_does_not_push_out_one_that_is(stopped: Stopped, fault: Fault) -> None:
    folder = stopped()
    with fault("NaN in a checkpoint"):
        _not_finite(checkpoints(folder)[-1], "decoder.layers.0.mlp.linear_fc1.weight", marked=True)
        gone = files.surplus(checkpoints(folder), 1, 0)
        assert [files.step_of(path) for path in gone] == [2], "step 4 is the latest that one can go on from"


@pytest.mark.faults
@pytest.mark.slow
def test_a_marker_that_is_missing(stopped: Stopped, straight: Straight, shards: str, fault: Fault) -> None:
    """Then it was never complete: the one before is the latest, and the folder is no obstacle to saving step 6."""
    folder = stopped()
    newest = checkpoints(folder)[-1]
    with fault("damaged checkpoint"):
        (newest / files.TRAINER).unlink()
        run = finish(folder, shards, "--resume", "auto")
        assert "step 4 is done" in run.output and f"it is kept as {newest}.aside" in run.output
        same(folder, straight())


@pytest.mark.faults
@pytest.mark.slow
def test_all_are_damaged(stopped: Stopped, shards: str, fault: Fault) -> None:
    folder = stopped()
    with fault("damaged checkpoint"):
        for path in checkpoints(folder):
            flip(path / "__0_0.distcp")
        run = Run(folder, shards, "--resume", "auto", OLDER)
        assert run.wait() == [1, 1] and "Traceback" not in run.output
        assert all("step_00000002/__0_0.distcp is damaged" in line for line in run.messages), run.messages
        assert [path.name for path in checkpoints(folder)] == [f"step_0000000{step}" for step in (2, 4, 6)]


@pytest.mark.faults
@pytest.mark.slow
def test_an_old_marker_that_is_damaged(stopped: Stopped, straight: Straight, shards: str, fault: Fault) -> None:
    """Retention reads the markers of old checkpoints: a damaged one must not fail the saving of new ones."""
    folder = stopped()
    with fault("damaged checkpoint"):
        _cut(folder / "checkpoints/step_00000002/trainer.json")
        run = finish(folder, shards, "--resume", "auto", "checkpoint.keep_last=2")
        assert [files.step_of(path) for path in checkpoints(folder)] == [10, 12], run.output
        same(folder, straight())


def _bits(shard: Path) -> None:
    for share in range(2, 100, 2):
        flip(shard, share / 100)


def _zeros(shard: Path) -> None:
    shard.write_bytes(bytes(shard.stat().st_size))


DATA: dict[str, tuple[Do, str]] = {
    "cut off": (_cut, "images-000000.tar"),
    "empty": (lambda shard: os.truncate(shard, 0), "images-000000.tar"),
    "missing": (lambda shard: shard.unlink(), "order"),
}


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("name", DATA)
def test_a_shard_that_cannot_be_read(
    name: str, stopped: Stopped, straight: Straight, shards: str, tmp_path: Path, fault: Fault
) -> None:
    """Of a run that goes on: it ends with a line that names the shard; with the shard as it was, it goes on."""
    damage, message = DATA[name]
    folder, mine = stopped(), tmp_path / "tar"
    shutil.copytree(Path(shards).parent, mine)
    with fault("damaged data"):
        damage(mine / "images-000000.tar")
        run = Run(folder, f"{mine}/i*.tar", "--resume", "auto", "data.max_bad_share=0.1")
        codes = run.wait()
        assert 0 not in codes and "Traceback" not in run.output, run.output
        assert any(message in line for line in run.messages), run.messages
        assert as_if_nothing_was(folder, straight())[-1] == 6
        finish(folder, shards, "--resume", "auto")
        same(folder, straight())


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("damage", [_bits, _zeros])
def test_samples_that_cannot_be_read(damage: Do, shards: str, tmp_path: Path, fault: Fault) -> None:
    """Samples that cannot be used are skipped, counted and listed with their shard; weights stay finite."""
    mine, folder = tmp_path / "tar", tmp_path / "run"
    shutil.copytree(Path(shards).parent, mine)
    with fault("damaged data"):
        damage(mine / "images-000000.tar")
        finish(folder, f"{mine}/i*.tar", "data.max_bad_share=0.9")
        listed = [json.loads(line) for file in folder.glob("quarantine/*") for line in file.read_text().splitlines()]
        assert len(listed) >= 2 and all("images-000000.tar" in entry["shard"] for entry in listed)
        assert as_if_nothing_was(folder, folder)[-1] == 12
