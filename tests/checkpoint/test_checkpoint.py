"""Weights saved from one layout are the weights loaded into another."""

from pathlib import Path
from typing import Any

import harness
import pytest
import torch

from emu2_megatron.checkpoint.load import load_weights
from emu2_megatron.checkpoint.save import save
from emu2_megatron.config.schema import Config
from emu2_megatron.errors import CheckpointError
from emu2_megatron.model import parameters
from emu2_megatron.parallel import topology, wrap
from emu2_megatron.training.step import train_step

CURSORS = [3, 1, 4, 1, 5, 9, 2, 6]


def _weights(engine: wrap.Engine) -> dict[str, Any]:
    here = engine.here
    return {
        "place": [here.pp_rank, here.tp_rank],
        "first_layers": engine.first_layers,
        "stages": [{name: p.data.clone() for name, p in stage.named_parameters()} for stage in engine.stages],
        "visual": {"visual." + name: p.data.clone() for name, p in engine.encoder.named_parameters()},
        "masters": float(sum(p.double().sum() for group in engine.optimizer.param_groups for p in group["params"])),
    }


def save_worker(_rank: int, config: Config, directory: str) -> dict[str, Any]:
    here = topology.initialize(config)
    engine = wrap.build(config, here)
    # Away from what a fresh model has.
    own = [harness.batch([1] * 8, 0)[i] for i in here.slots(8)]
    train_step(engine, config, engine.step.prepare(own), 0)
    path = save(directory, engine, 1, CURSORS)
    with pytest.raises(CheckpointError, match="already there"):
        save(directory, engine, 1, CURSORS)
    return {**_weights(engine), "path": str(path)}


def load_worker(_rank: int, config: Config, path: str) -> dict[str, Any]:
    engine = wrap.build(config, topology.initialize(config))
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        load_weights(Path(path).parent, engine)
    step, cursors = load_weights(path, engine)
    return {**_weights(engine), "step": step, "cursors": cursors}


def whole(results: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    released = dict(results[0]["visual"])
    for stage in {r["place"][0] for r in results}:
        ranks = {r["place"][1]: r for r in results if r["place"][0] == stage}
        for part, first_layer in enumerate(ranks[0]["first_layers"]):
            parts = [ranks[rank]["stages"][part] for rank in sorted(ranks)]
            released |= parameters.join_stage(harness.MODEL, parts, first_layer)
    return released


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_layouts(tmp_path: Path, precision: str) -> None:
    config = harness.config(tp=2, pp=2, train_encoder=True, precision=precision)
    saved = harness.run(4, save_worker, config, str(tmp_path))
    wanted = whole(saved)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    for world_size, layout in (
        (1, {}),
        (4, {"pp": 2, "cp": 2}),
        (2, {"pp": 2, "layout": (1, 3)}),
        (2, {"pp": 2, "vpp": 2}),
    ):
        config = harness.config(**layout, train_encoder=True, precision=precision)  # type: ignore[arg-type]
        loaded = harness.run(world_size, load_worker, config, saved[0]["path"])
        assert all(r["step"] == 1 and r["cursors"] == CURSORS for r in loaded)
        got = whole(loaded)
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())
        if world_size == 1:
            # The optimizer's masters follow the loaded weights: their sum is that of all weights.
            total = float(sum(tensor.double().sum() for tensor in wanted.values()))
            assert loaded[0]["masters"] == pytest.approx(total, rel=1e-6)
