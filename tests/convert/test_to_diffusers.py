"""Emu2-Gen's folder: in plain diffusers, in a process that has nothing of this package, and read back."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import oracle
import pytest
import sdxl
import torch
import weights
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from emu2_megatron.config.presets import VISUAL_DECODERS
from emu2_megatron.convert.diffusers_config import decoder_of
from emu2_megatron.convert.shards import check_files
from emu2_megatron.convert.to_diffusers import from_diffusers, to_diffusers
from emu2_megatron.convert.to_hf import to_hf
from emu2_megatron.data.decode import normalize
from emu2_megatron.errors import ConversionError
from emu2_megatron.model.paint import paint
from emu2_megatron.model.sdxl import load_sdxl
from emu2_megatron.model.visual_decoder import build_unet

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

CONFIG = replace(VISUAL_DECODERS["emu2_gen_tiny"], image_size=32)
MODEL = weights.shallow()
WIDTH = MODEL.encoder.hidden_size
PICTURE = weights.TOKENIZER.parent / "images" / "gc_dog.jpg"
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def networks() -> tuple[Any, Any]:
    return sdxl.networks(CONFIG, WIDTH)


@pytest.fixture(scope="module")
def export(exported: Path, networks: Any) -> Callable[..., None]:
    """`to_diffusers` of them and of the small model."""
    unet, vae = (network.state_dict() for network in networks)
    encoder = partial(to_hf, exported / "checkpoint", model=MODEL, tokenizer=weights.TOKENIZER)

    def write(output: Path, **changes: Any) -> None:
        arguments = {"config": CONFIG, "unet": unet, "vae": vae, "encoder": encoder, "tokenizer": weights.TOKENIZER}
        to_diffusers(output, MODEL, **(arguments | changes))

    return write


@pytest.fixture(scope="module")
def folder(export: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gen") / "gen"
    export(path)
    return path


PROGRAM = """
import sys
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

folder, picture, outputs = sys.argv[1:]
picture = Image.open(picture)
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
assert pipe.config.null_condition == "image"

def draw(inputs, **arguments):
    generator = torch.Generator().manual_seed(7)
    image = pipe(inputs, generator=generator, num_inference_steps=6, **arguments).image
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)

prompt, text = ["a red boat", picture, "at night"], "a red boat[<IMG_PLH>]at night"
model, tokenizer = pipe.multimodal_encoder, pipe.tokenizer
drawn = {
    "again": draw(picture),
    "again_in_a_list": draw([picture]),
    "wide": draw(picture, height=32, width=48, original_size=(300, 500), crop_info=(4, 5), guidance_scale=5.0),
    "plain": draw(picture, guidance_scale=1.0),
    "from_prompt": draw(prompt),
    "from_picture": draw(["", picture]),
    "prompt": model.generate_image([text], tokenizer, image=[picture]),
    "picture": model.generate_image(["[<IMG_PLH>]"], tokenizer, image=[picture]),
    "nothing": model.generate_image([""], tokenizer),
}
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16, null_condition="zeros")
drawn["bf16_zeros"] = draw(picture)
assert (pipe.unet.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)
save_file(drawn, outputs)
assert not {"emu2_megatron", "megatron"} & {name.partition(".")[0] for name in sys.modules}
"""


@pytest.mark.slow
def test_plain_diffusers(folder: Path, networks: Any, tmp_path: Path) -> None:
    """A picture painted again, and one generated, are what `paint` makes of the same embeddings and seed."""
    shutil.copytree(folder, tmp_path / "away")  # nothing above it in the tree is ours
    command = [sys.executable, "-I", "-c", PROGRAM, "away", str(PICTURE), "outputs"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "outputs")

    squashed = Image.open(PICTURE).convert("RGB").resize((56, 56), Image.Resampling.BICUBIC)
    levels = torch.frombuffer(bytearray(squashed.tobytes()), dtype=torch.uint8).view(1, 56, 56, 3).permute(0, 3, 1, 2)
    sizes = oracle.Sizes(encoder_heads=4, decoder_heads=4)
    tensors = weights.native(MODEL)
    pixels = torch.cat([normalize(levels, torch.float32), torch.zeros(1, 3, 56, 56)])
    seen, zero = oracle.pool(oracle.encode(tensors, sizes, pixels), MODEL.image_queries)
    draw = partial(paint, *networks, seeds=[7], steps=6)
    nothing = found["nothing"][0]
    wanted = {
        "again": draw(seen[None], zero),
        "again_in_a_list": draw(seen[None], zero),
        "wide": draw(seen[None], zero, size=(32, 48), original_size=(300, 500), crop=(4, 5), guidance=5.0),
        "plain": draw(seen[None], zero, guidance=1.0),
        "from_prompt": draw(found["prompt"], nothing),
        "from_picture": draw(found["picture"], nothing),
    }
    for name, pictures in wanted.items():
        difference = (found[name].float() - pictures[0].float()).abs()
        # Equal to 1e-3 of the range before rounding: then few levels are rounded the other way.
        assert difference.max() <= 1 and difference.mean() < 1e-3 * 255, name
        assert 15 < pictures.float().std() < 40, name  # there is something in it, and hardly a number is clamped
    # bf16 rounds at 2**-9, so of pictures with deviations of 25 levels a part in a hundred; 0.12 levels were seen.
    zeros = draw(seen[None], torch.zeros_like(zero))
    assert (found["bf16_zeros"].float() - zeros[0].float()).abs().mean() < 1
    assert (zeros.float() - wanted["again"].float()).abs().mean() > 4
    # And the pictures differ from each other, so that the comparison means something.
    for name in ("plain", "from_prompt", "from_picture"):
        assert (found[name].float() - found["again"].float()).abs().mean() > 1, name


def test_released_layout(folder: Path) -> None:
    """Folders and files as in the released one; every file but the tables of hashes has its hash in one of them."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {
        "model_index.json", "pipeline_emu2_gen.py", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json",
        "tokenizer/tokenizer.model", "tokenizer/added_tokens.json", "unet/config.json", "vae/config.json",
        "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
        "multimodal_encoder/config.json", "multimodal_encoder/modeling_emu.py",
    } <= names  # fmt: skip
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".part"))]
    hashed = set()
    for table in folder.rglob("conversion.json"):
        for name in json.loads(table.read_text())["files"]:
            hashed.add(str((table.parent / name).relative_to(folder)))
    assert hashed == {name for name in names if not name.endswith("conversion.json")}
    check_files([path for path in folder.rglob("*") if path.is_file() and path.name != "conversion.json"])
    found = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    theirs = diffusers.EulerDiscreteScheduler.from_config(sdxl.SCHEDULER).config
    assert {key: value for key, value in found.items() if not key.startswith("_")} == {
        key: theirs[key] for key in found if not key.startswith("_")
    }


@pytest.mark.parametrize("shard_size", [10**9, 2_000_000])
def test_there_and_back(
    export: Callable[..., None], networks: Any, folder: Path, tmp_path: Path, shard_size: int
) -> None:
    """To the bit, in one file or in several, which diffusers itself reads alike."""
    if shard_size < 10**9:
        export(folder := tmp_path / "gen", shard_size=shard_size)
        assert len(list((folder / "unet").glob("*.safetensors"))) > 3
    unet, vae = from_diffusers(folder, CONFIG, WIDTH)
    for state, network in zip((unet, vae), networks, strict=True):
        wanted = network.state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())
    loaded = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in unet.items())


def test_the_null_condition_travels(export: Callable[..., None], folder: Path, tmp_path: Path) -> None:
    export(tmp_path / "gen", config=replace(CONFIG, null_condition="zeros"))
    found = [
        json.loads((path / "model_index.json").read_text())["null_condition"] for path in (folder, tmp_path / "gen")
    ]
    assert found == ["image", "zeros"]


def test_rounded_to_bf16(export: Callable[..., None], networks: Any, tmp_path: Path) -> None:
    export(tmp_path / "gen", dtype=torch.bfloat16)
    for name in ("unet", "vae"):  # as the released file is called
        file = tmp_path / "gen" / name / "diffusion_pytorch_model.safetensors"
        file.rename(file.with_name("diffusion_pytorch_model.bf16.safetensors"))
    unet, _ = from_diffusers(tmp_path / "gen", CONFIG, WIDTH)
    assert all(torch.equal(unet[name], tensor.bfloat16()) for name, tensor in networks[0].state_dict().items())


def test_sdxl_is_read_by_itself(tmp_path: Path, networks: Any) -> None:
    """A folder of SDXL's, with its own widths and a variant beside the plain file."""
    theirs = diffusers.UNet2DConditionModel.from_config(sdxl.TINY_UNET)
    theirs.save_pretrained(tmp_path / "unet")
    networks[1].save_pretrained(tmp_path / "vae")
    torch.save({}, tmp_path / "unet" / "diffusion_pytorch_model.bin")  # as the released folders have some
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({"half": torch.zeros(1)}, file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    unet, _ = from_diffusers(tmp_path, CONFIG)
    ours = build_unet(CONFIG, WIDTH)
    assert len(load_sdxl(ours, unet)) == 15
    assert torch.equal(ours.conv_in.weight, theirs.conv_in.weight)
    with pytest.raises(ConversionError, match="cross_attention_dim is 40, the visual decoder's configuration makes it"):
        from_diffusers(tmp_path, CONFIG, WIDTH)


def test_sizes_are_found_in_a_folder(folder: Path, tmp_path: Path) -> None:
    """In the released Emu2-Gen's configuration files (SDXL's but for two widths), and in an export."""
    widths = {"cross_attention_dim": 1792, "projection_class_embeddings_input_dim": 3328}
    for name, content in (("unet", sdxl.UNET | widths), ("vae", sdxl.VAE)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    assert decoder_of(tmp_path) == (VISUAL_DECODERS["emu2_gen"], 1792)
    assert decoder_of(folder) == (replace(CONFIG, preset="emu2_gen", min_picture_size=512), WIDTH)


def test_an_interrupted_export_goes_on(export: Callable[..., None], networks: Any, tmp_path: Path) -> None:
    output = tmp_path / "gen"

    def stopped(path: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(output, encoder=stopped)
    assert not output.exists()
    written = tmp_path / "gen.unfinished" / "unet" / "diffusion_pytorch_model.safetensors"
    before = written.stat().st_mtime_ns
    # Other weights are not mixed in.
    unet = {name: tensor + (name == "conv_in.bias") for name, tensor in networks[0].state_dict().items()}
    with pytest.raises(ConversionError, match="was left by another conversion"):
        export(output, unet=unet)
    export(output)
    assert (output / "unet" / written.name).stat().st_mtime_ns == before
    with pytest.raises(ConversionError, match="is already there"):
        export(output)


def without(name: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    "network, change, message",
    [
        ("unet", without("conv_in.bias"), r"unet: conv_in\.bias is missing \(1 of"),
        ("unet", lambda state: state | {"x": torch.zeros(1)}, "unet: x is too many"),
        ("vae", lambda state: state | {"quant_conv.bias": torch.zeros(9)}, r"vae: quant_conv\.bias is \[9\]"),
    ],
)
def test_other_tensors_are_not_exported(
    export: Callable[..., None], networks: Any, tmp_path: Path, network: str, change: Any, message: str
) -> None:
    state = networks[network == "vae"].state_dict()
    with pytest.raises(ConversionError, match=message):
        export(tmp_path / "gen", **{network: change(state)})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_its_language_model_is_not_finished(export: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="multimodal_encoder was not made"):
        export(tmp_path / "gen", encoder=lambda path: None)
    assert not (tmp_path / "gen").exists()


def _config(folder: Path, **changes: Any) -> None:
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _save(folder: Path, change: Callable[[State], State]) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(change(load_file(file)), file)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: shutil.rmtree(f / "unet"), r"unet/config\.json: No such file.*diffusers' layout"),
        (lambda f: (f / "unet/config.json").write_text("{"), r"unet/config\.json is no JSON"),
        (lambda f: _config(f, _class_name="UNet3DConditionModel"), "is of a UNet3DConditionModel, wanted: a UNet2D"),
        (lambda f: _config(f, layers_per_block=2), "layers_per_block is 2, the visual decoder's configuration makes"),
        (lambda f: (f / "vae/diffusion_pytorch_model.safetensors").unlink(), "vae has no weights"),
        (lambda f: (f / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"x" * 99), "no whole safetensors file"),
        (lambda f: _save(f, without("quant_conv.bias")), r"vae: quant_conv\.bias is missing"),
    ],
)
def test_a_damaged_folder_is_named(folder: Path, tmp_path: Path, damage: Any, message: str) -> None:
    shutil.copytree(folder, tmp_path / "gen", ignore=shutil.ignore_patterns("multimodal_encoder"))
    damage(tmp_path / "gen")
    with pytest.raises(ConversionError, match=message):
        from_diffusers(tmp_path / "gen", CONFIG, WIDTH)
