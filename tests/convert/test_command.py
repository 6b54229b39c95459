"""`emu2 convert` and the two programs in tools/."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sdxl
import torch
import weights
from safetensors import safe_open
from safetensors.torch import load_file

from emu2_megatron import cli
from emu2_megatron.config import loading
from emu2_megatron.config.presets import VISUAL_DECODERS
from emu2_megatron.config.schema import Config, TrainingConfig
from emu2_megatron.convert.command import _bytes
from emu2_megatron.convert.shards import Check, Output, Shard, Unit, open_folder, write_shards
from emu2_megatron.convert.stored import FORMAT, finish_checkpoint

ROOT = Path(__file__).parents[2]


def test_there_and_back(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An imported checkpoint brings its model and tokenizer along: nothing else needs to be said."""
    checkpoint, hf = str(tmp_path / "checkpoint"), str(tmp_path / "hf")
    assert cli.main(["convert", "from-hf", "--input", str(exported / "hf"), "--output", checkpoint]) == 0
    config = loading.load(f"{checkpoint}/config.yaml")
    assert config.data.tokenizer == f"{checkpoint}/tokenizer.model"
    assert config.model.decoder == weights.shallow().decoder and config.model.encoder == weights.TINY.encoder
    command = ["convert", "to-hf", "--checkpoint", checkpoint, "--output", hf, "--dtype", "bf16", "--shard-size", "1MB"]
    assert cli.main(command) == 0
    assert capsys.readouterr().out == f"wrote {checkpoint}\nwrote {hf}\n"
    dtypes = set()
    for file in Path(hf).glob("*.safetensors"):
        with safe_open(str(file), "pt") as opened:
            dtypes |= {(name.endswith("inv_freq"), opened.get_tensor(name).dtype) for name in opened.keys()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert json.loads(Path(hf, "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(("arguments", "code", "says"), [
    (["to-hf", "--checkpoint", "nowhere", "--output", "x"], 2, "emu2: --config: nowhere has no config.yaml"),
    (["to-hf", "--checkpoint", "nowhere", "--output", "x", "--config", "tiny_interleaved", "--no-tokenizer"], 1,
     "emu2: nowhere is not a complete checkpoint"),
    (["to-hf", "--checkpoint", "nowhere", "--output", "x", "--config", "tiny_interleaved", "--tokenizer", "y"], 1,
     "emu2: y is not there: give --tokenizer FILE, or --no-tokenizer"),
    (["to-diffusers", "--checkpoint", "nowhere", "--decoder", "y", "--output", "x"], 2,
     "emu2: --config: nowhere has no config.yaml"),
    (["to-diffusers", "--checkpoint", "nowhere", "--decoder", "y", "--output", "x", "--config", "tiny_interleaved",
      "--tokenizer", "z"], 1, "emu2: z is not there: give --tokenizer FILE\n"),
    (["to-diffusers", "--checkpoint", "nowhere", "--decoder", "y", "--output", "x", "--config", "tiny_interleaved",
      "--tokenizer", str(weights.TOKENIZER)], 1, "emu2: nowhere is not a complete checkpoint"),
    (["from-hf", "--output", "x"], 2, "emu2: give either --input, or --decoder and --encoder"),
    (["from-hf", "--output", "x", "--decoder", "y"], 2, "emu2: give either --input, or --decoder and --encoder"),
    (["from-hf", "--output", "x", "--decoder", "y", "--encoder", "z"], 2, "emu2: --config: say which model"),
    (["from-hf", "--output", "x", "--input", "y"], 1, "emu2: config.json: No such file or directory"),
])  # fmt: skip
def test_one_line_says_what_to_do(
    arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", *arguments]) == code
    error = capsys.readouterr().err
    assert error.startswith(says) and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_to_diffusers(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All tensors rounded, under the names that diffusers and `to-hf` give them; nothing is made of SDXL's own UNet, or
    of a folder that its own table of hashes contradicts."""
    pytest.importorskip("diffusers")
    unet, vae = sdxl.networks(replace(VISUAL_DECODERS["emu2_gen_tiny"], image_size=32), 56)
    for name, network in (("unet", unet), ("vae", vae)):
        network.save_pretrained(tmp_path / "decoder" / name)
    command = ["convert", "to-diffusers", "--checkpoint", str(exported / "checkpoint"), "--dtype", "bf16", "--decoder"]
    assert cli.main([*command, str(tmp_path / "decoder"), "--output", str(tmp_path / "gen")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'gen'}\n"
    for name, network in (("unet", unet), ("vae", vae)):
        found = load_file(tmp_path / "gen" / name / "diffusion_pytorch_model.safetensors")
        wanted = network.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], tensor.bfloat16()) for key, tensor in wanted.items())
    (encoder,) = (tmp_path / "gen" / "multimodal_encoder").glob("*.safetensors")
    language = load_file(encoder)
    for shard in (exported / "hf").glob("*.safetensors"):
        for key, tensor in load_file(shard).items():
            assert torch.equal(language.pop(key), tensor if key.endswith("inv_freq") else tensor.bfloat16())
    assert not language

    def refused(decoder: Path) -> str:
        assert cli.main([*command, str(decoder), "--output", str(tmp_path / "other")]) == 1
        assert not list(tmp_path.glob("other*"))
        return capsys.readouterr().err

    config = tmp_path / "decoder" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"cross_attention_dim": 40}))
    assert "unet reads embeddings of width 40, the model's have 56: give the decoder" in refused(tmp_path / "decoder")
    weights_file = tmp_path / "gen" / "vae" / "diffusion_pytorch_model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-1] + b"x")
    assert f"{weights_file} has SHA-256" in refused(tmp_path / "gen")


def test_a_decoder_of_a_run(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found with the sizes and the null condition of its run, checked, and exported with its moving average."""
    pytest.importorskip("diffusers")
    decoder = replace(VISUAL_DECODERS["emu2_gen_tiny"], image_size=32, null_condition="zeros")
    unet, vae = (network.state_dict() for network in sdxl.networks(decoder, 56))
    stored = {f"unet.{name}": torch.zeros_like(tensor) for name, tensor in unet.items()}
    stored |= {f"average.unet.{name}": tensor for name, tensor in unet.items()}
    stored |= {f"vae.{name}": tensor for name, tensor in vae.items()}
    units = [Unit((Output(name, tuple(t.shape), t.dtype),), lambda _, t=t: [t]) for name, t in stored.items()]
    shards = [Shard("__0_0.distcp", tuple(units))]
    folder = open_folder(tmp_path / "run" / "step_00000002", {}, 0)
    with Check([]) as check:
        write_shards(folder, shards, FORMAT, "", check)
    finish_checkpoint(folder, shards, weights.shallow())
    folder.finish(checkpoint := tmp_path / "run" / "step_00000002")
    run = Config(model=weights.TINY, visual_decoder=decoder, training=TrainingConfig(objective="visual_decoder"))

    def convert(config: Config, output: str) -> int:
        (tmp_path / "run" / "config.yaml").write_text(loading.to_yaml(config))
        made = ["--checkpoint", exported / "checkpoint", "--decoder", checkpoint, "--output", tmp_path / output]
        return cli.main(["convert", "to-diffusers", *map(str, made)])

    assert convert(run, "gen") == 0
    for name, wanted in (("unet", unet), ("vae", vae)):
        found = load_file(tmp_path / "gen" / name / "diffusion_pytorch_model.safetensors")
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], t) for key, t in wanted.items())
    assert json.loads((tmp_path / "gen" / "model_index.json").read_text())["null_condition"] == "zeros"

    capsys.readouterr()
    assert convert(replace(run, training=TrainingConfig()), "other") == 1
    assert "is of a run with training.objective language, not visual_decoder" in capsys.readouterr().err
    wider = replace(weights.TINY, encoder=replace(weights.TINY.encoder, hidden_size=112))
    assert convert(replace(run, model=wider), "other") == 1
    assert f"{checkpoint} reads embeddings of width 112, the model's have 56" in capsys.readouterr().err
    file = checkpoint / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-9] + b"x" + file.read_bytes()[-8:])
    assert convert(run, "other") == 1
    assert f"{file}" in capsys.readouterr().err and not list(tmp_path.glob("other*"))


def test_sizes() -> None:
    assert [_bytes(text) for text in ("5GB", "500mb", "1GiB", "1000", "1.5 kB")] == [
        5 * 10**9,
        5 * 10**8,
        2**30,
        1000,
        1500,
    ]
    for text in ("five", "0", "-1GB", "5TB5"):
        with pytest.raises(Exception, match="is no size"):
            _bytes(text)


@pytest.mark.slow
def test_tools(exported: Path, tmp_path: Path) -> None:
    """As programs, verified, without a word of other libraries' on the way."""
    environment = {"PYTHONPATH": str(ROOT)}
    for tool, arguments in (
        ("convert_from_hf.py", ["--input", str(exported / "hf"), "--output", str(tmp_path / "checkpoint")]),
        (
            "convert_to_hf.py",
            ["--checkpoint", str(tmp_path / "checkpoint"), "--output", str(tmp_path / "hf"), "--verify"],
        ),
    ):
        done = subprocess.run(
            [sys.executable, str(ROOT / "tools" / tool), *arguments], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        assert "megatron" not in done.stderr
    assert "every bit are right" in done.stdout and "logits: largest difference" in done.stdout
    wrong = [sys.executable, str(ROOT / "tools" / "convert_to_hf.py"), "--checkpoint", "x", "--output", "y"]
    done = subprocess.run(wrong, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2 and done.stderr.startswith("error: --config: ")
