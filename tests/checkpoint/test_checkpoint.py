"""Weights saved from one layout are the weights loaded into another, and into an encoder for other pictures."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import pytest
import torch

from emu2_megatron.checkpoint.load import load_weights
from emu2_megatron.checkpoint.save import Saver
from emu2_megatron.config.schema import Config
from emu2_megatron.errors import CheckpointError
from emu2_megatron.model import parameters
from emu2_megatron.model.eva_vit import resize_positions
from emu2_megatron.parallel import topology, wrap
from emu2_megatron.training.step import train_step

PLACE = {"samples": [23], "slots": {"0": {"rows": 1, "drawn": [3], "waiting": [[0, 1]], "used": [40, 2]}}}


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
    saver = Saver(config.checkpoint, Path(directory), engine, print)
    path = saver.save(1, {"data": PLACE})
    with pytest.raises(CheckpointError, match="already there"):
        saver.save(1, {"data": PLACE})
    return {**_weights(engine), "path": str(path)}


def load_worker(_rank: int, config: Config, path: str) -> dict[str, Any]:
    engine = wrap.build(config, topology.initialize(config))
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        load_weights(Path(path).parent, engine)
    trainer = load_weights(path, engine)
    return {**_weights(engine), "step": trainer["step"], "place_in_data": trainer["data"]}


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
        assert all(r["step"] == 1 and r["place_in_data"] == PLACE for r in loaded)
        got = whole(loaded)
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())
        if world_size == 1:
            # The optimizer's masters follow the loaded weights: their sum is that of all weights.
            total = float(sum(tensor.double().sum() for tensor in wanted.values()))
            assert loaded[0]["masters"] == pytest.approx(total, rel=1e-6)


def with_encoder(config: Config, **fields: int) -> Config:
    return replace(config, model=replace(config.model, encoder=replace(config.model.encoder, **fields)))


def other_pictures_worker(_rank: int, config: Config, path: str) -> dict[str, Any]:
    """Load, and train a step on pictures of this run's size."""
    here = topology.initialize(config)
    engine = wrap.build(config, here)
    load_weights(path, engine)
    loaded = _weights(engine)
    # The encoder's optimizer is the last; its masters are shared out over all ranks.
    groups = engine.optimizer.chained_optimizers[-1].param_groups
    masters = float(sum(p.double().sum() for group in groups for p in group["params"]))
    own = [harness.batch([1] * 8, 0)[i] for i in here.slots(8)]
    size = config.model.encoder.image_size
    for sequence in own:
        sequence.pictures = [torch.arange(3 * size * size).view(3, size, size).remainder(251).to(torch.uint8)]
    train_step(engine, config, engine.step.prepare(own), 0)
    engine.settle()
    return {**loaded, "masters": masters, "trained": engine.encoder.pos_embed.data.clone()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_another_picture_size(tmp_path: Path, precision: str) -> None:
    """Saved at 56 pixels, loaded at 112: the position table is resized, all else is equal to the bit."""
    config = harness.config(tp=2, train_encoder=True, precision=precision)
    saved = harness.run(2, save_worker, config, str(tmp_path))
    wanted = whole(saved)
    table = wanted["visual.pos_embed"]
    assert table.shape == (1, 1 + 16, 28)
    wanted["visual.pos_embed"] = resize_positions(table.float(), 64).to(table.dtype)
    for world_size, layout in ((1, {}), (2, {"pp": 2}), (2, {})):
        config = with_encoder(harness.config(**layout, train_encoder=True, precision=precision), image_size=112)
        loaded = harness.run(world_size, other_pictures_worker, config, saved[0]["path"])
        got = whole(loaded)
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())
        encoder = sum(tensor.double().sum() for name, tensor in wanted.items() if name.startswith("visual."))
        assert sum(result["masters"] for result in loaded) == pytest.approx(float(encoder), rel=1e-6)
        # A step goes on from there: Adam's first one moves a weight by the learning rate. Masters of the fresh model
        # would put other numbers in the place of all.
        moved = (loaded[0]["trained"].double() - wanted["visual.pos_embed"].double()).abs().max()
        assert 1e-5 < moved < 1e-3 < (table.double().std() / 10)


def refused_worker(_rank: int, config: Config, path: str) -> dict[str, Any]:
    engine = wrap.build(config, topology.initialize(config))
    with pytest.raises(CheckpointError, match="cannot be loaded into this model"):
        load_weights(path, engine)
    return {}


@pytest.mark.parametrize("fields", [{"hidden_size": 56}, {"image_size": 112, "hidden_size": 56}])
def test_another_encoder_is_refused(tmp_path: Path, fields: dict[str, int]) -> None:
    saved = harness.run(1, save_worker, harness.config(train_encoder=True), str(tmp_path))
    harness.run(1, refused_worker, with_encoder(harness.config(train_encoder=True), **fields), saved[0]["path"])
