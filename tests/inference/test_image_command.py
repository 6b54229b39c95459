"""`emu2 generate --image-out` against the pipeline that travels with an export, in diffusers and transformers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sdxl
import torch
import weights
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from emu2_megatron import cli
from emu2_megatron.config.presets import VISUAL_DECODERS
from emu2_megatron.data import decode

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

DOG, CAT = (weights.TOKENIZER.parent / "images" / f"gc_{name}.jpg" for name in ("dog", "cat"))
CONFIG = replace(VISUAL_DECODERS["emu2_gen_tiny"], image_size=32)
STEPS = 4
BOX = (0.25, 0.25, 0.75, 0.875)
Pixels = np.ndarray


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, in which Pillow decodes, as in the pipeline: DALI's pictures differ by a level here and there."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(decode, "backend", lambda: "pillow")


@pytest.fixture(scope="module")
def folders(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A visual decoder as diffusers itself saves it, and Emu2-Gen's folder with it."""
    root = tmp_path_factory.mktemp("folders")
    for name, network in zip(("unet", "vae"), sdxl.networks(CONFIG, 56), strict=True):
        network.save_pretrained(root / "decoder" / name)
    made = ["--checkpoint", exported / "checkpoint", "--decoder", root / "decoder", "--output", root / "gen"]
    assert cli.main(["convert", "to-diffusers", *map(str, made)]) == 0
    return root / "decoder", root / "gen"


@pytest.fixture(scope="module")
def pipe(folders: tuple[Path, Path]) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folders[1], trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(*arguments: object) -> int:
    return cli.main(["generate", "--steps", str(STEPS), *map(str, arguments)])


def paint(pipe: Any, inputs: Any, seed: int, **arguments: Any) -> Pixels:
    generator = torch.Generator().manual_seed(seed)
    return np.asarray(pipe(inputs, generator=generator, num_inference_steps=STEPS, **arguments).image, dtype=np.float32)


def read(file: Path) -> Pixels:
    with Image.open(file) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture, dtype=np.float32)


def same(found: Pixels, wanted: Pixels) -> bool:
    """Equal but for a level here and there that is rounded the other way: transformers and the engine sum in another
    order, 2e-6 of the embeddings, which guidance makes 1e-5 of, far below the 4e-3 of a level."""
    difference = np.abs(found - wanted)
    return found.shape == wanted.shape and difference.max() <= 1 and difference.mean() < 2e-3


def box_by_hand() -> Image.Image:
    """What OpenCV draws of BOX with thickness 3: 5 pixels wide, without the 3 outermost pixels of each corner."""
    x0, y0, x1, y1 = (round(56 * share) for share in BOX)
    picture = Image.new("RGB", (56, 56))
    ImageDraw.Draw(picture).rectangle((x0 - 2, y0 - 2, x1 + 2, y1 + 2), outline="white", width=5)
    for x, right in ((x0 - 2, 1), (x1 + 2, -1)):
        for y, down in ((y0 - 2, 1), (y1 + 2, -1)):
            for cut in ((x, y), (x + right, y), (x, y + down)):
                picture.putpixel(cut, (0, 0, 0))
    return picture


PROMPTS: dict[str, list[dict[str, Any]]] = {
    "again": [{"image": "gc_dog.jpg"}],
    "text": [{"text": "a red boat"}],
    "generated from a picture": [{"text": ""}, {"image": "gc_dog.jpg"}],
    "edited": [{"image": "gc_dog.jpg"}, {"text": "make it an oil painting"}],
    "subject-driven, with boxes": [
        {"text": "<grounding>"}, {"text": "A photo of "}, {"text": "<phrase>the first dog</phrase>"},
        {"text": "<object>"}, {"box": list(BOX)}, {"text": "</object>"}, {"image": "gc_dog.jpg"},
        {"text": "<phrase>a cat</phrase>"}, {"image": "gc_cat.jpg"},
    ],
}  # fmt: skip


def inputs(content: list[dict[str, Any]]) -> list[Any]:
    """For the pipeline."""
    pictures = {file.name: Image.open(file).convert("RGB") for file in (DOG, CAT)}
    return [pictures[i["image"]] if "image" in i else i["text"] if "text" in i else box_by_hand() for i in content]


def test_the_pipeline_paints_the_same(
    folders: tuple[Path, Path], pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every mode, in one call; prompt i from seed 7 + i."""
    lines = [json.dumps({"content": content}) for content in PROMPTS.values()]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(lines))
    for file in (DOG, CAT):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert run("--model", folders[1], "--prompts", prompts, "--image-out", tmp_path / "out", "--seed", 7) == 0
    files = [Path(json.loads(line)["image"]) for line in capsys.readouterr().out.splitlines()]
    assert files == [tmp_path / "out" / f"{i:05d}.png" for i in range(5)]
    wanted = [paint(pipe, inputs(content), 7 + i) for i, content in enumerate(PROMPTS.values())]
    for name, file, picture in zip(PROMPTS, files, wanted, strict=True):
        assert same(read(file), picture), name
        assert 15 < picture.std() < 40, name  # there is something in it, and hardly a number is clamped
    # What was compared could tell: what another prompt paints from the same seed is another picture.
    for i, picture in enumerate(wanted):
        other = inputs(PROMPTS["edited" if i == 1 else "text"])
        assert np.abs(paint(pipe, other, 7 + i) - picture).mean() > 4


def test_from_the_command_line(folders: tuple[Path, Path], exported: Path, pipe: Any, tmp_path: Path) -> None:
    """Parts as arguments, a checkpoint, a decoder beside it; other sizes, no guidance, another null condition."""
    decoder, gen = folders
    boxed = ["<grounding>", "A photo of ", "<phrase>the first dog</phrase>", "<object>", "box:0.25,0.25,0.75,0.875",
             "</object>", DOG, "<phrase>a cat</phrase>", CAT]  # fmt: skip
    png = tmp_path / "made" / "x.png"
    model = ["--checkpoint", exported / "checkpoint", "--precision", "fp32", "--decoder", decoder, "--image-out", png]
    assert run(*model, *boxed, "--seed", 3) == 0
    assert same(read(png), paint(pipe, inputs(PROMPTS["subject-driven, with boxes"]), 3))
    assert run(*model, DOG, "--guidance", 1, "--size", "32x48") == 0
    assert same(read(png), paint(pipe, inputs(PROMPTS["again"]), 0, guidance_scale=1.0, height=32, width=48))

    (decoder / "model_index.json").write_text('{"null_condition": "zeros"}')
    zeros = diffusers.DiffusionPipeline.from_pretrained(gen, trust_remote_code=True, null_condition="zeros")
    zeros.set_progress_bar_config(disable=True)
    try:
        assert run(*model, DOG) == 0
    finally:
        (decoder / "model_index.json").unlink()
    assert same(read(png), paint(zeros, inputs(PROMPTS["again"]), 0))
    assert np.abs(paint(pipe, inputs(PROMPTS["again"]), 0) - read(png)).mean() > 1


def test_painted_later(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `--image` has written is painted without the language model, to the bit; one picture, or several."""
    file, png, folder = tmp_path / "embeddings", tmp_path / "x.png", tmp_path / "out"
    asked = ["--model", folders[1], DOG, "make it red"]
    assert run(*asked, "--image", file) == 0
    assert run(*asked, "--image-out", png, "--seed", 5) == 0
    wanted = read(png)
    later = ["--embeddings", file, "--decoder", folders[0], "--seed", 5, "--image-out"]
    assert run(*later, png) == 0
    assert np.array_equal(read(png), wanted)

    tensors = load_file(file)
    save_file({"embeddings": tensors["embeddings"].repeat(2, 1, 1)}, file)
    capsys.readouterr()
    assert run(*later, folder) == 1
    assert "has no `null`, from which guidance leads away" in capsys.readouterr().err and not folder.exists()
    assert run(*later, folder, "--guidance", 1) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["00000.png", "00001.png"]
    assert np.abs(read(folder / "00000.png") - read(folder / "00001.png")).mean() > 1  # of another seed


@pytest.mark.slow
def test_ranks_are_started(folders: tuple[Path, Path], pipe: Any, tmp_path: Path) -> None:
    """Both modes; whoever paints has the embeddings, also of the encoder, which the first stage alone has."""
    prompts = tmp_path / "prompts.jsonl"
    kinds = "text", "again"
    (tmp_path / DOG.name).write_bytes(DOG.read_bytes())
    prompts.write_text("\n".join(json.dumps({"content": PROMPTS[kind]}) for kind in kinds))
    call = ["--model", folders[1], "--prompts", prompts, "--image-out", tmp_path / "out"]
    assert run(*call, "--pipeline-parallel-size", 2) == 0
    for i, kind in enumerate(kinds):
        # The ranks decode by DALI where it is installed, a level from Pillow; 0.003 levels were seen of that.
        difference = np.abs(read(tmp_path / "out" / f"{i:05d}.png") - paint(pipe, inputs(PROMPTS[kind]), i))
        assert difference.max() <= 1 and difference.mean() < 0.05


BAD: dict[str, tuple[list[str], str]] = {
    "no decoder": (["--model", "HF", "a", "--image-out", "x.png"], "--decoder: give a folder with unet and vae"),
    "not a decoder": (["--model", "HF", "a", "--image-out", "x.png", "--decoder", "HF"],
                      "unet/config.json: No such file or directory; give a folder in diffusers' layout"),
    "another width": (["--model", "HF", "a", "--image-out", "x.png", "--decoder", "SDXL"],
                      "unet reads embeddings of width 40, the model's have 56"),
    "another kind": (["--model", "HF", "a", "--image-out", "x.png", "--decoder", "SD"],
                     "is no visual decoder of SDXL's kind: its unet_attention_heads would be 8"),
    "without weights": (["--model", "HF", "a", "--image-out", "x.png", "--decoder", "EMPTY"], "unet has no weights"),
    "many, into a file": (["--model", "GEN", "--prompts", "TWO", "--image-out", "x.png"],
                          "--image-out: x.png; a folder is wanted for several pictures"),
    "one, not into a PNG": (["--model", "GEN", "a", "--image-out", "x.jpg"],
                            "--image-out: x.jpg; a file that ends with .png is wanted"),
    "no prompts": (["--model", "GEN", "--prompts", "NONE", "--image-out", "x"], "there are no prompts"),
    "no prompt": (["--model", "GEN", "--image-out", "x.png"], "give either a prompt or --prompts FILE"),
    "both": (["--model", "GEN", "a", "--image-out", "x.png", "--image", "y"], "give either --image"),
    "nothing to paint": (["--model", "GEN", "a", "--decoder", "GEN"], "are for painting: give --image-out too"),
    "a prompt, and embeddings": (["--embeddings", "y", "a", "--image-out", "x.png", "--decoder", "GEN"],
                                 "--embeddings stands in the place of a prompt"),
    "no embeddings": (["--embeddings", "TWO", "--image-out", "x.png", "--decoder", "GEN"], "TWO: "),
    "boxes": (["--model", "GEN", "a", "--image-out", "x.png", "--grounding"], "ask for boxes; for a picture begin"),
    "size": (["--model", "GEN", "a", "--image-out", "x.png", "--size", "40x32"], "40x32; legal: multiples of 16"),
    "steps": (["--model", "GEN", "a", "--image-out", "x.png", "--steps", "0"], "--steps: 0; legal: 1 to 1000"),
    "seed": (["--model", "GEN", "a", "--image-out", "x.png", "--seed", "-1"], "--seed: -1; legal: 0 to"),
    "outside": (["--model", "GEN", "box:0.1,0.2,0.5,1.2", "--image-out", "x.png"],
                "box:0.1,0.2,0.5,1.2: the box [0.1, 0.2, 0.5, 1.2] is none"),
    "no number": (["--model", "GEN", "box:0.1,0.2,0.5,nan", "--image-out", "x.png"], "nan] is none: left < right"),
    "three numbers": (["--model", "GEN", "box:0.1,0.2,0.5", "--image-out", "x.png"], "a box is four numbers"),
    "no place": (["--model", "GEN", "a", "--image-out", "TWO/x.png", "--steps", "1"], "x.png cannot be written: "),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_errors_are_one_line(
    what: str, folders: tuple[Path, Path], exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name, changes in (
        ("SDXL", {"cross_attention_dim": 40}), ("SD", {"attention_head_dim": 8}), ("EMPTY", {})
    ):  # fmt: skip
        for network in ("unet", "vae"):
            config = json.loads((folders[0] / network / "config.json").read_text())
            place = tmp_path / name / network
            place.mkdir(parents=True)
            (place / "config.json").write_text(json.dumps(config | changes))
    (tmp_path / "TWO").write_text('{"content": "a"}\n{"content": "b"}')
    (tmp_path / "NONE").touch()
    before = sorted(tmp_path.rglob("*"))
    arguments, message = BAD[what]
    places = {"HF": exported / "hf", "GEN": folders[1]}
    assert run(*(places.get(argument, argument) for argument in arguments)) in (1, 2)
    printed = capsys.readouterr()
    assert printed.err.startswith("emu2: ") and message in printed.err and printed.err.count("\n") == 1
    assert not printed.out and sorted(tmp_path.rglob("*")) == before
