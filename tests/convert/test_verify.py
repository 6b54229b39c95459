"""--verify finds what is wrong, and what two models compute."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import weights
from safetensors.torch import load_file, save_file

from emu2_megatron.convert import from_hf, verify
from emu2_megatron.convert.shards import MANIFEST
from emu2_megatron.convert.stored import open_checkpoint
from emu2_megatron.errors import ConversionError

MODEL = weights.shallow()


def copy_without_manifest(exported: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(exported / "hf", tmp_path / "hf"))
    (folder / MANIFEST).unlink()
    return folder


@pytest.mark.slow
def test_both_directions(exported: Path) -> None:
    pytest.importorskip("transformers")
    lines = verify.verify_export(exported / "hf", exported / "checkpoint", MODEL, None)
    assert lines[0].startswith("53 tensors of ") and len(lines) == 4
    lines = verify.verify_import(exported / "checkpoint", from_hf.whole(exported / "native.safetensors", MODEL))
    assert lines[0].startswith("47 tensors of ") and len(lines) == 4


@pytest.mark.parametrize(("change", "says"), [
    ("number", "linear_fc1.weight is not made of the same numbers as decoder.lm.model.layers.0.mlp.gate_proj.weight"),
    ("missing", "is missing (1 of 53 tensors)"),
    ("surplus", "more is too many (1 in all)"),
    ("dtype", "torch.float16 [128], should be torch.float32 [128]"),
    ("shape", "[2, 64], should be torch.float32 [128]"),
])  # fmt: skip
def test_what_is_wrong_is_found(exported: Path, tmp_path: Path, change: str, says: str) -> None:
    """One bit of one number is enough."""
    folder = copy_without_manifest(exported, tmp_path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = "model.decoder.lm.model.layers.0.mlp.gate_proj.weight"
    norm = "model.decoder.lm.model.layers.0.input_layernorm.weight"
    path = folder / index["weight_map"][name if change in ("number", "surplus") else norm]
    tensors = load_file(path)
    if change == "number":
        tensors[name].view(torch.int32)[-1, -1] ^= 1
    elif change == "missing":
        del tensors[norm]
        del index["weight_map"][norm]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif change == "surplus":
        tensors["more"] = torch.zeros(1)
    else:
        tensors[norm] = tensors[norm].half() if change == "dtype" else tensors[norm].view(2, 64)
    save_file(tensors, path)
    with pytest.raises(ConversionError) as error:
        verify.verify_export(folder, exported / "checkpoint", MODEL, torch.float32)
    assert says in str(error.value) and "\\n" not in str(error.value)


@pytest.mark.slow
def test_other_outputs_are_found(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remote code that computes something else, with the right weights."""
    pytest.importorskip("transformers")
    from emu2_megatron.convert.hf_code import modeling_emu

    monkeypatch.setattr(modeling_emu.Mlp, "forward", lambda self, x: self.fc2(torch.relu(self.fc1(x))))
    released = from_hf.whole(exported / "native.safetensors", MODEL)
    with pytest.raises(ConversionError, match="visual features of both models differ by"):
        verify.compare_outputs(released, open_checkpoint(exported / "checkpoint"), None)


def test_models_that_do_not_fit_are_not_compared() -> None:
    from emu2_megatron.config.presets import PRESETS

    why = verify.can_compare_outputs(PRESETS["emu2_37b"])
    assert "need 295.3 GB" in why or "transformers" in why


@pytest.mark.parametrize("how", ["changed", "another", "of another repository"])
def test_code_that_is_not_ours_is_not_run(how: str, exported: Path, tmp_path: Path) -> None:
    folder = copy_without_manifest(exported, tmp_path)
    evil = f"open({str(tmp_path / 'made')!r}, 'w')\n"
    if how == "changed":
        code = folder / "modeling_emu.py"
        code.write_text(evil + code.read_text())
    elif how == "another":
        (folder / "other.py").write_text(evil)
    else:
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"]["AutoModelForCausalLM"] = "somebody/else--modeling_emu.EmuForCausalLM"
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match="would run .*py, which is not what an export gets"):
        verify._check_code(folder)
    with pytest.raises(ConversionError):
        verify.verify_export(folder, exported / "checkpoint", MODEL, None)
    assert not (tmp_path / "made").exists()
