"""The command lines that prepare data, run on the example data."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from emu2_megatron.config.schema import Config
from emu2_megatron.data.samples import build_sample
from emu2_megatron.data.shards import ShardIndex
from emu2_megatron.data.tokenizer import Tokenizer

TOOLS = Path(__file__).parents[2] / "tools"


def _tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"emu2_tool_{name}", TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make_shards() -> Callable[[list[str]], int]:
    main: Callable[[list[str]], int] = _tool("make_shards").main
    return main


def test_example_data_becomes_shards_that_all_load(
    tmp_path: Path, example_data: Path, tokenizer: Tokenizer, make_config: Callable[..., Config],
    make_shards: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command = ["--input", str(example_data), "--output", str(tmp_path)]
    command += ["--samples-per-shard", "50", "--max-words", "60"]
    assert make_shards(command) == 0
    summary = capsys.readouterr().out
    index = ShardIndex([f"{tmp_path}/shard-*.tar"])
    raws = [index.read(i) for i in range(len(index))]
    captions = [raw for raw in raws if raw.meta["kind"] == "caption"]
    records = [json.loads(line) for line in (example_data / "images" / "captions.jsonl").read_text().splitlines()]
    assert [raw.meta["text"] for raw in captions] == [record["caption"] for record in records]
    assert captions[0].files["0.jpg"] == (example_data / records[0]["file"]).read_bytes()
    assert captions[0].meta["licence"] == records[0]["licence"]  # attribution travels along
    # Documents: all text and pictures, in order.
    for path in sorted((example_data / "interleaved").glob("*.json")):
        parts = json.loads(path.read_text())["content"]
        cuts = [raw for raw in raws if raw.key.startswith(f"interleaved-{path.stem}-")]
        content = [(raw, item) for raw in cuts for item in raw.meta["content"]]
        texts = "".join(part["text"] for part in parts if part["type"] == "text")
        joined = "".join("".join(i["text"] for _, i in content if "text" in i).split())
        assert joined == "".join(texts.split())
        pictures = [(example_data / part["file"]).read_bytes() for part in parts if part["type"] == "image"]
        assert [raw.files[i["image"]] for raw, i in content if "image" in i] == pictures
    samples = [build_sample(raw, tokenizer, make_config(sequence_length=128), 0, i) for i, raw in enumerate(raws)]
    pictures_in_shards = sum(len(raw.files) for raw in raws)
    assert f"{-(-len(raws) // 50)} shards, 44 captions, {len(raws) - 44} documents" in summary
    assert f"{pictures_in_shards} pictures" in summary and pictures_in_shards == 44 + 30
    assert 44 < sum(len(sample.pictures) for sample in samples) <= pictures_in_shards

    assert make_shards(command) == 1  # would mix with the shards of the first run
    assert "already contains shards" in capsys.readouterr().err


def test_same_input_gives_same_shards(
    tmp_path: Path, example_data: Path, make_shards: Callable[[list[str]], int]
) -> None:
    source = tmp_path / "source"
    (source / "images").mkdir(parents=True)
    lines = (example_data / "images" / "captions.jsonl").read_text().splitlines()[:2]
    (source / "images" / "captions.jsonl").write_text("\n".join(lines))
    for line in lines:
        shutil.copy(example_data / json.loads(line)["file"], source / "images")
    for name in ("a", "b"):
        assert make_shards(["--input", str(source), "--output", str(tmp_path / name)]) == 0
    first, second = ((tmp_path / name / "shard-000000.tar").read_bytes() for name in ("a", "b"))
    assert first == second


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("images/captions.jsonl", '{"file": "images/a.jpg"}', "captions.jsonl, line 1"),
        ("images/captions.jsonl", "{", "captions.jsonl, line 1"),
        ("images/captions.jsonl", '{"file": "images/a.jpg", "caption": "x"}', "a.jpg"),
        ("interleaved/d.json", '{"content": [{"type": "text", "text": 5}]}', "d.json: not an interleaved document"),
        ("interleaved/d.json", "[]", "d.json: not an interleaved document"),
        ("elsewhere.txt", "", "neither images/captions.jsonl nor interleaved"),
    ],
)
def test_unusable_input_is_named(
    tmp_path: Path, make_shards: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str],
    name: str, text: str, message: str,
) -> None:  # fmt: skip
    (tmp_path / "in" / name).parent.mkdir(parents=True)
    (tmp_path / "in" / name).write_text(text)
    assert make_shards(["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


def test_example_tokenizer_is_what_the_tool_makes(tmp_path: Path, example_data: Path) -> None:
    tool = _tool("train_tokenizer")
    for name in ("a", "b"):
        assert tool.main(["--input", str(example_data), "--output", str(tmp_path / name), "--vocab-size", "1000"]) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    made, shipped = Tokenizer(tmp_path / "a"), Tokenizer(example_data / "tokenizer.model")
    text = "In 1863 the whale. 图形桌面 Où est-il?"
    assert made.vocab_size == shipped.vocab_size == 1272
    assert made.encode(text) == shipped.encode(text)
    # Digits stand alone, and Chinese is spelled in bytes: 4 characters, 3 bytes each.
    assert len(made.encode("1863")) == 1 + 4
    assert len(made.encode("图形桌面")) == 1 + 4 * 3
    assert tool.main(["--input", str(tmp_path / "none"), "--output", str(tmp_path / "c")]) == 1
