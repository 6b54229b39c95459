"""Making shards: what is written, by how many processes, what an interrupted run leaves, and what `--verify` finds."""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from emu2_megatron.data import make_shards as module
from emu2_megatron.data import manifest
from emu2_megatron.data.index_file import index_path
from emu2_megatron.data.make_shards import Options, add_arguments, make_shards, plan_units, run
from emu2_megatron.data.records import find_blocks, find_files, read_block
from emu2_megatron.data.shards import RawSample, ShardIndex
from emu2_megatron.data.tokenizer import Tokenizer
from emu2_megatron.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]


def command(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(argument) for argument in arguments]))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """25 captions with pictures, three documents, and two texts that are cut; 3 of the captions are bad."""
    folder = tmp_path / "in"
    (folder / "text").mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for i in range(25):
        (folder / f"{i}.jpg").write_bytes(bytes([i]) * (100 * i))
        lines.append({"kind": "caption", "text": f"number {i}", "image": f"{i}.jpg"})
    lines[7]["image"] = lines[20]["image"] = "none.jpg"
    del lines[11]["text"]
    for i in range(3):
        lines.append({"kind": "interleaved", "content": [{"text": f"{i} two three four"}, {"image": f"{i}.jpg"}]})
    (folder / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for i in range(2):
        (folder / "text" / f"{i}.txt").write_text(" ".join(f"{i}-{word}" for word in range(30)))
    return folder


OPTIONS = Options(samples_per_shard=4, max_words=3)


def test_shards_are_the_records_in_order(source: Path, tmp_path: Path) -> None:
    summary = make_shards(source, tmp_path / "out", OPTIONS)
    index = ShardIndex([f"{tmp_path}/out/*.tar"])
    samples = [index.read(i) for i in range(len(index))]
    captions = [sample for sample in samples if sample.meta["kind"] == "caption"]
    numbers = [i for i in range(25) if i not in (7, 11, 20)]
    assert [sample.meta["text"] for sample in captions] == [f"number {i}" for i in numbers]
    assert [sample.key for sample in captions] == [f"x-{i + 1:06d}" for i in numbers]
    assert [sample.files for sample in captions] == [{"0.jpg": bytes([i]) * (100 * i)} for i in numbers]
    documents = [(s.key, s.meta["content"], s.files) for s in samples if s.meta["kind"] == "interleaved"]
    assert documents[:2] == [
        ("x-000026-0000", [{"text": "0 two three"}], {}),
        ("x-000026-0001", [{"text": "four"}, {"image": "0.jpg"}], {"0.jpg": b""}),
    ]
    texts = [sample for sample in samples if sample.meta["kind"] == "text"]
    assert " ".join(s.meta["text"] for s in texts) == " ".join(f"{i}-{w}" for i in range(2) for w in range(30))
    assert [sample.key for sample in texts] == [f"text/{i}-000001-{c:04d}" for i in range(2) for c in range(10)]
    # 28 records, 4 a unit, and of the last unit's 4 records 3 give two samples each; texts: 20 samples in one unit.
    names = [os.path.basename(path) for path in index.paths]
    assert sorted(names) == sorted(
        [f"records-{i:06d}.tar" for i in range(7)] + ["records-000006_001.tar"]
        + ["text-000000.tar"] + [f"text-000000_{i:03d}.tar" for i in range(1, 5)]
    )  # fmt: skip
    assert summary == (
        f"{tmp_path}/out: 13 shards, 48 samples (22 caption, 6 interleaved, 20 text), 25 pictures, 0 videos, 3 rejected"
        f" (file is missing: 2, record does not follow the format: 1; {tmp_path}/out/rejected.jsonl lists them)"
    )


def test_manifest_says_what_other_programs_find(source: Path, tmp_path: Path) -> None:
    make_shards(source, tmp_path / "out", OPTIONS)
    made = json.loads((tmp_path / "out" / "manifest.json").read_text())
    kinds: Counter[str] = Counter()
    for shard in made["shards"]:
        path = tmp_path / "out" / shard["name"]
        assert shard["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert shard["bytes"] == path.stat().st_size
        with tarfile.open(path) as tar:
            files = [tar.extractfile(name) for name in tar.getnames() if name.endswith(".json")]
            of_shard = Counter(json.loads(file.read())["kind"] for file in files if file is not None)
            assert shard["pictures"] == sum(name.endswith(".jpg") for name in tar.getnames())
        assert shard["kinds"] == of_shard and shard["samples"] == sum(of_shard.values())
        kinds += of_shard
    assert [shard["name"] for shard in made["shards"]][:2] == ["records-000000.tar", "records-000001.tar"]
    assert made["kinds"] == kinds and made["samples"] == 48 and made["pictures"] == 25 and made["videos"] == 0
    assert made["rejected"] == {"file is missing": 2, "record does not follow the format": 1}
    assert (made["samples_per_shard"], made["max_words"], made["tokenizer"]) == (4, 3, None)
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(r["file"], r["line"], r["reason"]) for r in rejected] == [
        ("x.jsonl", 8, "file is missing"), ("x.jsonl", 12, "record does not follow the format"),
        ("x.jsonl", 21, "file is missing"),
    ]  # fmt: skip
    assert rejected[0]["detail"] == "'none.jpg'" and rejected[0]["unit"] == "records-000001"


def test_any_number_of_processes_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for workers in (1, 2, 3):
        make_shards(source, tmp_path / str(workers), OPTIONS, workers)
    assert len(contents(tmp_path / "1")) == 2 * 13 + 2  # shards, their indexes, manifest, rejected
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")


def test_units_take_small_files_together_and_large_ones_alone(tmp_path: Path) -> None:
    for name, count in (("a", 3), ("b", 2), ("c", 9), ("d", 1)):
        (tmp_path / f"{name}.jsonl").write_text("{}\n" * count)
    (tmp_path / "vqa").mkdir()
    (tmp_path / "vqa" / "v.json").write_text(json.dumps([{}] * 12))
    (tmp_path / "vqa" / "w.json").write_text(json.dumps([{}] * 2))
    blocks = [block for file in find_files(tmp_path) for block in find_blocks(file, 5)[0]]
    units = [(unit.name, [(b.file.name, b.first, b.count) for b in unit.blocks]) for unit in plan_units(blocks, 5)]
    assert units == [
        ("records-000000", [("a.jsonl", 1, 3), ("b.jsonl", 1, 2)]),
        ("records-000001", [("c.jsonl", 1, 5)]),
        ("records-000002", [("c.jsonl", 6, 4), ("d.jsonl", 1, 1)]),
        ("vqa-000000", [("vqa/v.json", 1, 12)]),
        ("vqa-000001", [("vqa/w.json", 1, 2)]),
    ]


def test_texts_are_measured_with_the_tokenizer(example_data: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "text").mkdir(parents=True)
    pages = {}
    for language in ("fr-FR", "zh-CN"):
        page = json.loads((example_data / "interleaved" / f"handbook_{language}_graphical-desktops.json").read_text())
        pages[language] = "\n\n".join(part["text"] for part in page["content"] if part["type"] == "text")
        (folder / "text" / f"{language}.txt").write_text(pages[language])
    line = {"kind": "text", "text": "short", "licence": "CC0"}
    (folder / "x.jsonl").write_text(json.dumps(line))
    make_shards(folder, tmp_path / "out", Options(tokenizer=str(example_data / "tokenizer.model"), max_tokens=256))
    index = ShardIndex([f"{tmp_path}/out/*.tar"])
    samples = [index.read(i) for i in range(len(index))]
    for language, page in pages.items():
        chunks = [s.meta["text"] for s in samples if s.key.startswith(f"text/{language}-000001-")]
        sizes = [len(tokenizer.encode(chunk)) + 2 for chunk in chunks]
        assert len(sizes) > 3 and max(sizes) <= 256 and min(sizes[:-1]) > 200
        assert "".join("".join(chunks).split()) == "".join(page.split())
    (short,) = [sample for sample in samples if sample.key.startswith("x-")]
    assert short == RawSample("x-000001-0000", line)
    made = json.loads((tmp_path / "out" / "manifest.json").read_text())
    digest = hashlib.sha256((example_data / "tokenizer.model").read_bytes()).hexdigest()
    assert (made["tokenizer"], made["max_tokens"]) == (digest, 256)


def test_a_failed_run_is_continued(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(source, tmp_path / "whole", OPTIONS)
    real = module.write_unit
    written: list[str] = []

    def failing(unit: module.Unit, output: Path, options: Options) -> manifest.Done:
        if len(written) == 3:
            real(unit, output, options)  # its shards are there, but nobody knows
            (output / "text-000000.tar").write_bytes(b"of a unit that is not through")
            (output / "text-000000_009.tar").write_bytes(b"of a unit that is not through")
            (output / "text-000000_009.tar.tmp").write_bytes(b"of a unit that is not through")
            raise OSError(28, "No space left on device", str(output))
        written.append(unit.name)
        return real(unit, output, options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_unit", failing)
        with pytest.raises(OSError, match="No space left"):
            make_shards(source, tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out" / "manifest.json").exists()
    with open(tmp_path / "out" / "progress.jsonl", "a") as progress:
        progress.write('{"unit": "records-0000')  # the run was killed while it wrote this
    times = {name: (tmp_path / "out" / f"{name}.tar").stat().st_mtime_ns for name in written}
    assert len(times) == 3
    make_shards(source, tmp_path / "out", OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert {name: (tmp_path / "out" / f"{name}.tar").stat().st_mtime_ns for name in written} == times  # left alone


def test_a_finished_run_writes_nothing_again(source: Path, tmp_path: Path) -> None:
    summary = make_shards(source, tmp_path / "out", OPTIONS)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert make_shards(source, tmp_path / "out", OPTIONS) == summary
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("lost", ["records-000001.tar", "text-000000_002.tar", "records-000003.tar.index.npy"])
def test_lost_shards_are_made_again(source: Path, tmp_path: Path, lost: str) -> None:
    make_shards(source, tmp_path / "out", OPTIONS)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / lost).unlink()
    make_shards(source, tmp_path / "out", OPTIONS)
    assert contents(tmp_path / "out") == before


@pytest.mark.slow
def test_a_killed_run_is_continued(tmp_path: Path) -> None:
    """SIGKILL with two processes at work: they end too, and the next run makes the rest."""
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"kind": "text", "text": f"{i} " * 200}) + "\n" for i in range(6000))
    )
    options = ["--samples-per-shard", "20", "--workers", "2"]

    def start(output: str) -> "subprocess.Popen[str]":
        arguments = ["tools/make_shards.py", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / output)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen([sys.executable, *arguments, *options], cwd=ROOT, env=environment, text=True)

    assert start("whole").wait(120) == 0
    run = start("out")
    progress = tmp_path / "out" / "progress.jsonl"
    deadline = time.monotonic() + 60
    while not progress.exists() or progress.read_bytes().count(b"\n") < 10:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    children = psutil.Process(run.pid).children(recursive=True)
    assert len(children) >= 2
    run.send_signal(signal.SIGKILL)
    assert run.wait(60) == -signal.SIGKILL
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert alive == [] and not (tmp_path / "out" / "manifest.json").exists()
    finished = {json.loads(line)["unit"] for line in progress.read_text().splitlines()[1:-1]}
    times = {name: (tmp_path / "out" / f"{name}.tar").stat().st_mtime_ns for name in finished}
    assert 8 <= len(times) < 300
    assert start("out").wait(120) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert {name: (tmp_path / "out" / f"{name}.tar").stat().st_mtime_ns for name in finished} == times


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"kind": "text", "text": "a " * 2000}) + "\n")
    with open(tmp_path / "in.jsonl", "a") as file:
        file.writelines(json.dumps({"kind": "text", "text": f"{i} " * 2000}) + "\n" for i in range(3000))
    arguments = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out"), "--workers", "2"]
    run = subprocess.Popen(
        [sys.executable, "tools/make_shards.py", *arguments, "--samples-per-shard", "20"], cwd=ROOT, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE,
    )  # fmt: skip
    while not (tmp_path / "out" / "progress.jsonl").exists():
        assert run.poll() is None
        time.sleep(0.005)
    workers = [p for p in psutil.Process(run.pid).children() if "spawn_main" in " ".join(p.cmdline())]
    workers[0].kill()
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 1
    assert errors == "error: a process was ended from outside (out of memory?); the same command continues\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples_per_shard": 5}, "made with samples_per_shard 4, not 5"),
        ({"max_words": 4}, "made with max_words 3, not 4"),
        ({"tokenizer": "TOKENIZER"}, "made with tokenizer None, not "),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_options_are_refused(
    source: Path, tmp_path: Path, example_data: Path, finished: bool, change: dict[str, Any], message: str
) -> None:
    make_shards(source, tmp_path / "out", OPTIONS)
    if not finished:
        _unfinish(tmp_path / "out")
    before = contents(tmp_path / "out")
    values = {"samples_per_shard": 4, "max_words": 3, **change}
    if "tokenizer" in values:
        values["tokenizer"] = str(example_data / "tokenizer.model")
    with pytest.raises(DataError, match=f"out: its shards were {message}.*; remove the folder or choose another"):
        make_shards(source, tmp_path / "out", Options(**values))
    assert contents(tmp_path / "out") == before


def _unfinish(folder: Path) -> None:
    """As if the run had been ended before its last unit."""
    made = json.loads((folder / "manifest.json").read_text())
    header = {name: made[name] for name in "format input samples_per_shard max_words tokenizer max_tokens".split()}
    shard = next(shard for shard in made["shards"] if shard["name"] == "records-000000.tar")
    unit = {"unit": "records-000000", "shards": [shard], "rejected": []}
    (folder / "progress.jsonl").write_text(f"{json.dumps(header)}\n{json.dumps(unit)}\n")
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize("finished", [True, False])
def test_another_input_is_refused(source: Path, tmp_path: Path, finished: bool) -> None:
    make_shards(source, tmp_path / "out", OPTIONS)
    if not finished:
        _unfinish(tmp_path / "out")
    (source / "text" / "1.txt").write_text("something else")
    with pytest.raises(DataError, match="made with another input, or it has changed; remove the folder"):
        make_shards(source, tmp_path / "out", OPTIONS)


def test_foreign_folders_are_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x.tar").write_bytes(b"mine")
    with pytest.raises(DataError, match="out already contains shards, and no manifest.json says of what"):
        make_shards(source, tmp_path / "out", OPTIONS)
    assert contents(tmp_path / "out") == {"x.tar": b"mine"}
    for text in ("", "{", "[]", '{"shards": [{"name": "a"}]}', '{"shards": 5}'):
        (tmp_path / "out" / "manifest.json").write_text(text)
        with pytest.raises(DataError, match="manifest.json: not a manifest of shards"):
            make_shards(source, tmp_path / "out", OPTIONS)
    (tmp_path / "out" / "manifest.json").unlink()
    for text in ("", "{\n", "[]\n", '{"format": 1}\n{"unit": "a"}\n'):
        (tmp_path / "out" / "progress.jsonl").write_text(text)
        with pytest.raises(DataError, match="progress.jsonl: cannot be read"):
            make_shards(source, tmp_path / "out", OPTIONS)
    with pytest.raises(DataError, match="a second run would read what the first one wrote"):
        make_shards(source, source / "out", OPTIONS)


def test_one_run_at_a_time(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with manifest.locked(tmp_path / "out"):
        with pytest.raises(DataError, match="another run is writing shards there"):
            make_shards(source, tmp_path / "out", OPTIONS)
    make_shards(source, tmp_path / "out", OPTIONS)


def test_all_bad_ends_in_an_error_and_can_be_tried_again(tmp_path: Path) -> None:
    line = json.dumps({"kind": "caption", "text": "a", "image": "a.jpg"})
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.jsonl").write_text(f"{line}\n{{\n{line}\n")
    for _ in range(2):
        with pytest.raises(
            DataError, match="none of the 3 records can be used .JSON is broken: 1, file is missing: 2.; "
        ):
            make_shards(tmp_path / "in", tmp_path / "out", OPTIONS)
        assert list(contents(tmp_path / "out")) == ["rejected.jsonl"]
        assert len((tmp_path / "out" / "rejected.jsonl").read_text().splitlines()) == 3
    (tmp_path / "in" / "a.jpg").write_bytes(b"1")
    assert "2 samples (2 caption), 2 pictures, 0 videos, 1 rejected" in make_shards(
        tmp_path / "in", tmp_path / "out", OPTIONS
    )


def test_verify(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert command("--input", source, "--output", out, "--samples-per-shard", 4, "--max-words", 3, "--workers", 1) == 0
    assert command("--verify", out, "--workers", 2) == 0
    assert f"{out}: 13 shards, all as manifest.json says\n" in capsys.readouterr().out
    flipped = bytearray((out / "records-000000.tar").read_bytes())
    flipped[2000] ^= 1
    (out / "records-000000.tar").write_bytes(flipped)
    (out / "records-000001.tar").write_bytes((out / "records-000001.tar").read_bytes()[:-512])
    (out / "records-000002.tar").unlink()
    (out / "records-000003.tar.index.npy").unlink()
    index_path(out / "records-000004.tar").write_bytes(index_path(out / "records-000005.tar").read_bytes())
    index_path(out / "text-000000.tar").write_bytes(b"junk")
    (out / "stray.tar").write_bytes(b"")
    with pytest.raises(DataError, match="out: 7 of 13 shards are not as manifest.json says"):
        command("--verify", out, "--workers", 1)
    lines = [line.removeprefix(f"{out}/") for line in capsys.readouterr().out.splitlines()]
    assert lines[:5] == [
        "records-000000.tar: damaged, its SHA-256 is another",
        "records-000001.tar: damaged, 9728 bytes instead of 10240",
        "records-000002.tar: missing",
        "records-000003.tar.index.npy: missing",
        "records-000004.tar.index.npy: damaged, it is not the index of its shard",
    ]
    assert lines[5].startswith("text-000000.tar: cannot be checked: ") and lines[6] == "stray.tar: not in the manifest"
    with pytest.raises(DataError, match="in: has no manifest.json"):
        command("--verify", source)
    manifest_text = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(manifest_text.replace("records-000002.tar", "../../etc/passwd"))
    with pytest.raises(DataError, match="not a manifest of shards.*is not in this folder"):
        command("--verify", out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--input PATH and --output DIR, to make shards, or --verify DIR"),
        (["--input", "a"], "--input PATH and --output DIR"),
        (["--input", "a", "--output", "b", "--verify", "c"], "--input PATH and --output DIR"),
        (["--input", "a", "--output", "b", "--samples-per-shard", "0"], "--samples-per-shard: 0; must be at least 1"),
        (["--input", "a", "--output", "b", "--max-words", "0"], "--max-words: 0; must be at least 1"),
        (["--input", "a", "--output", "b", "--max-tokens", "9"], "--max-tokens: 9; must be at least 16"),
        (["--input", "a", "--output", "b", "--workers", "-1"], "--workers: -1; must be at least 1"),
    ],
)
def test_options_that_cannot_be(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        command(*arguments)


def test_files_that_are_not_there(source: Path, tmp_path: Path) -> None:
    out = ["--output", tmp_path / "out", "--workers", 1]
    with pytest.raises(DataError, match="none: no records there"):
        command("--input", tmp_path / "none", *out)
    with pytest.raises(DataError, match="none.model: No such file"):
        command("--input", source, *out, "--tokenizer", tmp_path / "none.model")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        command("--input", source, *out, "--tokenizer", source / "1.jpg")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file.*Not a directory|File exists"):
        command("--input", source, "--output", tmp_path / "file", "--workers", 1)


def test_an_interrupted_command_says_so(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_unit", interrupt)
    assert command("--input", source, "--output", tmp_path / "out", "--workers", 1) == 130
    assert capsys.readouterr().err == "interrupted; the same command continues\n"


def test_every_sample_is_one_that_reading_gives(example_data: Path, tmp_path: Path) -> None:
    """The example data as a whole, through shards and directly."""
    make_shards(example_data, tmp_path / "out", Options(samples_per_shard=50, max_words=10**9), 2)
    index = ShardIndex([f"{tmp_path}/out/*.tar"])
    direct = [r for file in find_files(example_data) for block in find_blocks(file, 50)[0] for r in read_block(block)]
    read = {sample.key: sample for sample in map(index.read, range(len(index)))}
    for sample in direct:
        assert isinstance(sample, RawSample)
        if sample.meta["kind"] == "text":
            sample = RawSample(f"{sample.key}-0000", {**sample.meta, "text": sample.meta["text"].rstrip()})
        if sample.meta["kind"] != "interleaved":
            assert read.pop(sample.key) == sample
    assert {key.partition("/")[0] for key in read} == {"interleaved"} and len(read) == 9
