"""Conversions that are interrupted, damaged, or larger than memory."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import weights
from safetensors import safe_open
from safetensors.torch import save_file

from emu2_megatron.convert import from_hf, shards
from emu2_megatron.convert.shards import MANIFEST, check_files, sha256
from emu2_megatron.convert.stored import open_checkpoint
from emu2_megatron.convert.to_hf import to_hf
from emu2_megatron.errors import CheckpointError, ConversionError

MODEL = weights.shallow()


def export(exported: Path, output: Path, **options: Any) -> None:
    to_hf(exported / "checkpoint", output, MODEL, weights.TOKENIZER, **{"shard_size": 500_000, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}


def test_shards_and_index(exported: Path) -> None:
    """No shard is larger than asked for, the index is right, transformers' library reads every tensor."""
    folder = exported / "hf"
    files = sorted(folder.glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-{i:05d}-of-{len(files):05d}.safetensors"
                                             for i in range(1, len(files) + 1)]  # fmt: skip
    assert len(files) > 5
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    total = 0
    for file in files:
        with safe_open(str(file), "pt") as opened:
            sizes = [opened.get_tensor(name).nbytes for name in opened.keys()]
            assert all(index["weight_map"][name] == file.name for name in opened.keys())
        total += sum(sizes)
        # The embedding, 1272 x 128 in fp32, is larger alone.
        assert sum(sizes) <= 500_000 or len(sizes) == 1
    assert index["metadata"]["total_size"] == total


@pytest.mark.parametrize("after", [1, 4])
def test_an_interrupted_export_goes_on(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Nothing has the final name before it is whole, and what is finished is not written again."""
    written: list[str] = []
    fill_shard, finish = shards.Folder.fill_shard, shards.Folder._finish
    begun: list[str] = []

    def interrupted(self: shards.Folder, shard: shards.Shard, *args: Any) -> Any:
        if len(begun) == after:  # the shard before is not finished yet, and will be
            raise KeyboardInterrupt
        begun.append(shard.name)
        return fill_shard(self, shard, *args)

    def counted(self: shards.Folder, name: str, *args: Any) -> None:
        written.append(name)
        finish(self, name, *args)

    monkeypatch.setattr(shards.Folder, "fill_shard", interrupted)
    monkeypatch.setattr(shards.Folder, "_finish", counted)
    output = tmp_path / "hf"
    with pytest.raises(KeyboardInterrupt):
        export(exported, output)
    assert not output.exists() and len(written) == after
    unfinished = tmp_path / "hf.unfinished"
    first = [path for path in unfinished.glob("*.safetensors")]
    assert len(first) == after
    times = {path.name: path.stat().st_mtime_ns for path in first}
    (unfinished / "model-00009-of-00009.safetensors.part").write_bytes(b"half")

    with pytest.raises(ConversionError, match="left by another conversion: remove it"):
        export(exported, output, dtype=torch.bfloat16)
    written.clear()
    monkeypatch.setattr(shards.Folder, "fill_shard", fill_shard)
    export(exported, output)
    assert not set(written) & set(times) and not unfinished.exists()
    assert {name: (output / name).stat().st_mtime_ns for name in times} == times
    assert {n: c for n, c in contents(output).items() if not n.endswith(".part")} == contents(exported / "hf")


def test_a_damaged_finished_shard_is_written_again(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards.Folder, "finish", lambda *_: None)
    export(exported, tmp_path / "hf")
    shard = min((tmp_path / "hf.unfinished").glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    monkeypatch.undo()
    export(exported, tmp_path / "hf")
    assert (tmp_path / "hf" / shard.name).read_bytes() == whole


@pytest.mark.slow
def test_killed_and_continued(exported: Path, tmp_path: Path) -> None:
    """As the kernel does it, in the middle of writing: what is left continues to the same bytes."""
    script = f"""
import os, signal, sys
from pathlib import Path
from emu2_megatron.convert import shards
from emu2_megatron.convert.to_hf import to_hf
import weights
write = shards.HashingFile.write
count = 0
def dying(self, data):
    global count
    count += 1
    if count == 30:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, data)
shards.HashingFile.write = dying
to_hf(Path({str(exported / "checkpoint")!r}), Path({str(tmp_path / "hf")!r}), weights.shallow(), weights.TOKENIZER,
      None, 500_000)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": f"{root}:{root / 'tests'}"})
    assert done.returncode == -9 and not (tmp_path / "hf").exists()
    export(exported, tmp_path / "hf")
    assert {n: c for n, c in contents(tmp_path / "hf").items() if not n.endswith(".part")} == contents(exported / "hf")


def test_manifest_has_every_file(exported: Path) -> None:
    for folder in (exported / "hf", exported / "checkpoint"):
        listed = json.loads((folder / MANIFEST).read_text())["files"]
        on_disk = {path.name for path in folder.iterdir()} - {MANIFEST}
        assert on_disk - set(listed) <= {".metadata", "metadata.json"}
        assert all(sha256(folder / name) == entry["sha256"] for name, entry in listed.items())


def test_a_wrong_hash(exported: Path, tmp_path: Path) -> None:
    export(exported, tmp_path / "hf")
    shard = max((tmp_path / "hf").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    says = r"model-.*safetensors has SHA-256 .*, conversion\.json beside it says .*: it was damaged or changed"
    with pytest.raises(ConversionError, match=says):
        check_files([shard])
    with pytest.raises(ConversionError, match=says):
        from_hf.write(from_hf.whole(tmp_path / "hf"), tmp_path / "checkpoint", None)
    assert not (tmp_path / "checkpoint").exists()


def test_output_and_room(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hf").mkdir()
    with pytest.raises(ConversionError, match="is already there: choose another --output"):
        export(exported, tmp_path / "hf")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ConversionError, match=r"needs 0\.0 GB, its disk has 0\.0 GB free"):
        export(exported, tmp_path / "other")


def test_checkpoints_that_are_not_right(exported: Path, tmp_path: Path) -> None:
    import shutil

    from emu2_megatron.convert.stored import check_model

    def copy(name: str) -> Path:
        return Path(shutil.copytree(exported / "checkpoint", tmp_path / name))

    missing = copy("missing")
    (missing / "__0_2.distcp").unlink()
    with pytest.raises(ConversionError, match=r"missing: __0_2\.distcp is missing, a piece of .* is there"):
        open_checkpoint(missing)
    (copy("incomplete") / "trainer.json").unlink()
    with pytest.raises(ConversionError, match=r"is not a complete checkpoint: it has no trainer\.json"):
        open_checkpoint(tmp_path / "incomplete")
    (copy("no_table") / ".metadata").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        open_checkpoint(tmp_path / "no_table")
    short = copy("short")
    (short / MANIFEST).unlink()
    with (short / "__0_1.distcp").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ConversionError, match=r"__0_1\.distcp"):
        to_hf(short, tmp_path / "hf", MODEL, None)
    sound = open_checkpoint(exported / "checkpoint")
    for model, says in (
        (weights.shallow(3), r"decoder\.layers\.2\..* is missing, 6 in all"),
        (weights.shallow(1), r"decoder\.layers\.1\..* is too many, 6 in all"),
        (weights.shallow(2, vocab_size=1274), "its vocabulary has 1272 rows, the model's 1274"),
        (weights.shallow(2, ffn_hidden_size=320), r"mlp\.linear_fc1\.weight has shape \[688, 128\]"),
    ):
        with pytest.raises(ConversionError, match=says):
            check_model(sound, model)


@pytest.mark.slow
def test_memory_is_bounded(tmp_path: Path) -> None:
    """A model of 400 MB in shards of 40 MB: either direction takes less than two shards more than it begins with, and
    some for the interpreter."""
    script = f"""
import resource, sys
from dataclasses import replace
from pathlib import Path
import torch, weights
from emu2_megatron.convert import from_hf
from emu2_megatron.convert.to_hf import to_hf
root = Path({str(tmp_path)!r})
decoder = replace(weights.TINY.decoder, num_layers=24, hidden_size=512, ffn_hidden_size=2048, num_attention_heads=4)
model = replace(weights.TINY, decoder=decoder)
def peak():  # of this program: what exec inherits from the parent's resource usage is not in it
    return int(next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x).split()[1]) / 1e3
size = 40_000_000
from emu2_megatron.convert.stored import open_checkpoint
from emu2_megatron.convert.places import torch_places
torch.save(torch.ones(2), root / "warm")
torch_places(root / "warm")  # loads what reads tables of contents
before = peak()
if sys.argv[1] == "import":
    from_hf.write(from_hf.whole(root / "native.safetensors", model), root / "checkpoint", None, None, size)
else:
    to_hf(root / "checkpoint", root / "hf", model, None, None, size)
print(peak() - before)
"""
    root = Path(__file__).parents[2]
    decoder = replace(weights.TINY.decoder, num_layers=24, hidden_size=512, ffn_hidden_size=2048, num_attention_heads=4)
    save_file(weights.native(replace(weights.TINY, decoder=decoder)), tmp_path / "native.safetensors")
    assert (tmp_path / "native.safetensors").stat().st_size > 380e6
    for step in ("import", "export"):
        done = subprocess.run(
            [sys.executable, "-c", script, step], check=True, capture_output=True, text=True,
            env={"PYTHONPATH": f"{root}:{root / 'tests'}"},
        )  # fmt: skip
        assert float(done.stdout.split()[-1]) < 2 * 40 + 30, step
