"""`emu2 generate`, from the command line to what is printed and written."""

import io
import json
from pathlib import Path

import pytest
import weights
from PIL import Image
from safetensors.torch import load_file

from emu2_megatron import cli

DOG = str(weights.TOKENIZER.parent / "images" / "gc_dog.jpg")
CLIP = str(next((weights.TOKENIZER.parent / "videos").glob("*.mp4")))


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def run(*arguments: object) -> int:
    return cli.main(["generate", *map(str, arguments)])


def test_checkpoint_and_folder_say_the_same(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a picture, a video, few-shot examples; by beams, greedy and drawn."""
    prompt = [DOG, "a dog.", CLIP, "a clip.", DOG]
    for options in ([], ["--beams", 1], ["--temperature", 1, "--top-p", 0.9, "--seed", 3]):
        said = []
        for model in (["--checkpoint", exported / "checkpoint"], ["--model", exported / "hf"]):
            assert run(*model, *prompt, "--max-new-tokens", 6, "--min-new-tokens", 6, *options) == 0
            said.append(capsys.readouterr().out)
        assert said[0] == said[1] and said[0].strip()


def test_image_embeddings(exported: Path, tmp_path: Path) -> None:
    file = tmp_path / "made" / "image.safetensors"
    assert run("--model", exported / "hf", "An oil painting of", DOG, "--image", file) == 0
    assert load_file(file)["embeddings"].shape == (1, 4, 56)


def test_json_lines_with_history(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches of two, and one by one, the same answers; a chat by hand is the one by `turns`."""
    (tmp_path / "dog.jpg").write_bytes(Path(DOG).read_bytes())
    shown = [{"image": "dog.jpg"}, {"text": "What is this?"}]
    records = [
        {"turns": [{"user": shown, "assistant": "A dog."}, {"user": "Is it old?"}]},
        {"content": "Once upon a time"},
        {"content": [{"text": "[USER]:"}, *shown, {"text": "[ASSISTANT]: A dog.</s>[USER]: Is it old?[ASSISTANT]:"}]},
    ]
    records[0]["system"] = ""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    answers = []
    for size in (1, 2):
        call = ["--model", exported / "hf", "--prompts", tmp_path / "prompts.jsonl", "--max-new-tokens", 8]
        assert run(*call, "--batch-size", size, "--beams", 2) == 0
        answers.append([json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()])
    assert answers[0] == answers[1] and answers[0][0] == answers[0][2] != answers[0][1]
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(records[1])))
    assert run("--model", exported / "hf", "--prompts", "-", "--max-new-tokens", 8, "--beams", 2) == 0
    assert json.loads(capsys.readouterr().out)["text"] == answers[0][1]


def test_boxes_are_drawn(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The picture is written in its own size, whatever an untrained model says."""
    drawn = tmp_path / "boxes.png"
    assert run("--model", exported / "hf", "--chat", DOG, "Where is the dog?", "--draw-boxes", drawn) == 0
    assert f"wrote {drawn}" in capsys.readouterr().out
    with Image.open(drawn) as picture, Image.open(DOG) as original:
        assert picture.size == original.size


@pytest.mark.slow
def test_ranks_are_started(exported: Path, capfd: pytest.CaptureFixture[str]) -> None:
    call = ["--checkpoint", exported / "checkpoint", "--chat", DOG, "What is it?", "--max-new-tokens", 6]
    said = []
    for layout in ([], ["--tensor-parallel-size", 2, "--pipeline-parallel-size", 2]):
        assert run(*call, *layout) == 0
        said.append(capfd.readouterr().out)
    assert said[0] == said[1]


BAD = {
    "no model": (["hello"], "give either --checkpoint or --model"),
    "no prompt": (["--model", "HF"], "give either a prompt or --prompts FILE"),
    "no picture": (["--model", "HF", "missing.jpg"], "missing.jpg: No such file or directory"),
    "no folder": (["--model", "nowhere", "hello"], "--model: nowhere is no folder"),
    "no checkpoint": (["--checkpoint", "nowhere", "hello"], "nowhere is not a complete checkpoint"),
    "beams": (["--model", "HF", "hello", "--beams", "0"], "beams: "),
    "draws": (["--model", "HF", "hello", "--beams", "3", "--temperature", "1"], "beams: 3 with a temperature"),
    "layout": (["--model", "HF", "hello", "--tensor-parallel-size", "3"], "tensor_parallel_size: 3; legal"),
    "embedding": (["--model", "HF", "a <image> here"], "<image> in a prompt stands for an embedding"),
    "JSON": (["--model", "HF", "--prompts", "BAD"], "line 1: not JSON"),
    "draw": (["--model", "HF", "hello", "--draw-boxes", "x.png"], "--draw-boxes: the prompt has no picture"),
}


@pytest.mark.parametrize("what", BAD)
def test_errors_are_one_line(
    what: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text("{")
    arguments, message = BAD[what]
    places = {"HF": exported / "hf", "BAD": tmp_path / "bad.jsonl"}
    assert run(*(places.get(argument, argument) for argument in arguments)) in (1, 2)
    printed = capsys.readouterr()
    assert printed.err.startswith("emu2: ") and message in printed.err and printed.err.count("\n") == 1
    assert not printed.out
