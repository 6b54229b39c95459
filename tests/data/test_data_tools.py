"""The command lines that prepare data, run on the example data."""

import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from torch import Tensor

from emu2_megatron.config.schema import Config
from emu2_megatron.data.decode import decode
from emu2_megatron.data.samples import build_sample
from emu2_megatron.data.sequence import Features
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


def test_example_data_becomes_shards(
    tmp_path: Path, example_data: Path, make_shards: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--input", str(example_data), "--output", str(tmp_path), "--workers", "2"]
    command += ["--samples-per-shard", "50", "--max-words", "60"]
    assert make_shards(command) == 0
    summary = capsys.readouterr().out
    index = ShardIndex([f"{tmp_path}/*.tar"])
    raws = [index.read(i) for i in range(len(index))]
    captions = [raw for raw in raws if "image" in raw.meta and raw.meta["kind"] == "caption"]
    records = [json.loads(line) for line in (example_data / "images" / "captions.jsonl").read_text().splitlines()]
    assert [raw.meta["text"] for raw in captions] == [record["caption"] for record in records]
    assert captions[0].files["0.jpg"] == (example_data / records[0]["file"]).read_bytes()
    assert captions[0].meta["licence"] == records[0]["licence"]  # attribution travels along
    # Documents: all text and pictures, in order.
    for path in sorted((example_data / "interleaved").glob("*.json")):
        parts = json.loads(path.read_text())["content"]
        cuts = [raw for raw in raws if raw.key.startswith(f"interleaved/{path.stem}-")]
        content = [(raw, item) for raw in cuts for item in raw.meta["content"]]
        texts = "".join(part["text"] for part in parts if part["type"] == "text")
        joined = "".join("".join(i["text"] for _, i in content if "text" in i).split())
        assert joined == "".join(texts.split())
        pictures = [(example_data / part["file"]).read_bytes() for part in parts if part["type"] == "image"]
        assert [raw.files[i["image"]] for raw, i in content if "image" in i] == pictures
    kinds = Counter(raw.meta["kind"] for raw in raws)
    assert (kinds["caption"], kinds["chat"], kinds["grounded"]) == (44 + 3, 231 + 21, 5)
    pictures_in_shards = sum(len(raw.files) for raw in raws) - 3
    assert pictures_in_shards == 44 + 30 + 5 + kinds["chat"]
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    assert f"{len(index.paths)} shards, {len(raws)} samples ({listed}), {pictures_in_shards} pictures, 3 " in summary


def test_all_example_data_loads(
    tmp_path: Path, example_data: Path, make_config: Callable[..., Config], make_shards: Callable[[list[str]], int]
) -> None:
    """At the released context: every sample of every kind, every picture and frame of it."""
    assert make_shards(["--input", str(example_data), "--output", str(tmp_path)]) == 0
    index = ShardIndex([f"{tmp_path}/*.tar"])
    tokenizer = Tokenizer(example_data / "tokenizer.model", chat=True)
    config = make_config(sequence_length=2048, document_tokens=2048)
    raws = [index.read(i) for i in range(len(index))]
    samples = [build_sample(raw, tokenizer, config, 0, i) for i, raw in enumerate(raws)]
    total = 44 + 30 + 5 + 231 + 21 + 3 * 8
    assert sum(len(sample.queries) for sample in samples) == total
    decoded = decode([visual for s in samples for visual in s.visuals if not isinstance(visual, Features)], 28)
    assert sum(len(pictures) for pictures in decoded if isinstance(pictures, Tensor)) == total


def test_errors_are_one_line_and_an_exit_code(
    tmp_path: Path, make_shards: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_shards(["--input", str(tmp_path), "--output", str(tmp_path.parent / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}: no records there: neither images/captions.jsonl, ")
    assert error.count("\n") == 1
    assert make_shards(["--input", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: --input PATH and --output DIR, to make shards, or --verify DIR\n"


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
