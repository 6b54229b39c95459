"""Checkpoint to Hugging Face folder and back: the same bits, from one layout into another."""

from pathlib import Path
from typing import Any

import harness
import pytest
import torch
import weights
from safetensors import safe_open

from emu2_megatron.checkpoint.load import load_weights
from emu2_megatron.checkpoint.save import Saver
from emu2_megatron.config.schema import Config
from emu2_megatron.convert import from_hf
from emu2_megatron.convert.to_hf import to_hf
from emu2_megatron.model import parameters
from emu2_megatron.parallel import topology, wrap
from emu2_megatron.training.step import train_step


def _weights(engine: wrap.Engine) -> dict[str, Any]:
    return {
        "place": [engine.here.pp_rank, engine.here.tp_rank],
        "first_layers": engine.first_layers,
        "stages": [{name: p.data.clone() for name, p in stage.named_parameters()} for stage in engine.stages],
        "visual": {"visual." + name: p.data.clone() for name, p in engine.encoder.named_parameters()},
    }


def save_worker(_rank: int, config: Config, directory: str) -> dict[str, Any]:
    here = topology.initialize(config)
    engine = wrap.build(config, here)
    own = [harness.batch([1] * 8, 0)[i] for i in here.slots(8)]  # a step, so that biases are not all zero
    train_step(engine, config, engine.step.prepare(own), 0)
    path = Saver(config.checkpoint, Path(directory), engine, print).save(1, {"data": {}})
    return {**_weights(engine), "path": str(path)}


def load_worker(_rank: int, config: Config, path: str) -> dict[str, Any]:
    engine = wrap.build(config, topology.initialize(config))
    load_weights(path, engine)
    return _weights(engine)


def whole(results: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    released = dict(results[0]["visual"])
    for stage in {r["place"][0] for r in results}:
        ranks = {r["place"][1]: r for r in results if r["place"][0] == stage}
        for part, first_layer in enumerate(ranks[0]["first_layers"]):
            parts = [ranks[rank]["stages"][part] for rank in sorted(ranks)]
            released |= parameters.join_stage(harness.MODEL, parts, first_layer)
    return released


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_through_hugging_face_into_another_layout(tmp_path: Path, precision: str) -> None:
    """TP2 PP2 DP2 -> folder -> TP1 PP4, and TP2 with its padded vocabulary."""
    config = harness.config(tp=2, pp=2, train_encoder=True, precision=precision)
    saved = harness.run(8, save_worker, config, str(tmp_path))
    wanted = whole(saved)
    assert wanted["visual.blocks.0.attn.q_bias"].abs().max() > 0

    to_hf(Path(saved[0]["path"]), tmp_path / "hf", harness.MODEL, None, shard_size=50_000)
    exported = {}
    for shard in sorted((tmp_path / "hf").glob("*.safetensors")):
        with safe_open(str(shard), "pt") as file:
            exported |= {name: file.get_tensor(name) for name in file.keys()}
    for name, tensor in wanted.items():
        if name.endswith("q_bias"):
            q, k, v = exported["model." + name.replace("q_bias", "qkv.bias")].chunk(3)
            assert torch.equal(q, tensor) and torch.equal(v, wanted[name.replace("q_bias", "v_bias")]) and not k.any()
        elif not name.endswith("v_bias"):
            assert torch.equal(exported[name if name.startswith("project") else "model." + name], tensor)

    released = from_hf.whole(tmp_path / "hf")
    from_hf.write(released, tmp_path / "again", None, None, 50_000)
    for world_size, layout in ((4, {"pp": 4}), (2, {"tp": 2})):
        config = harness.config(**layout, train_encoder=True, precision=precision)  # type: ignore[arg-type]
        got = whole(harness.run(world_size, load_worker, config, str(tmp_path / "again")))
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


def test_neither_ranks_nor_model(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversion needs no process group and builds no module, in either direction."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a module was built")

    monkeypatch.setattr(torch.nn.Module, "__init__", refuse)
    to_hf(exported / "checkpoint", tmp_path / "hf", weights.shallow(), weights.TOKENIZER)
    from_hf.write(from_hf.whole(tmp_path / "hf"), tmp_path / "again", weights.TOKENIZER)
    assert not torch.distributed.is_initialized()
