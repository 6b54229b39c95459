"""Weights saved from one layout are the weights loaded into another, and into an encoder for other pictures."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from emu2_megatron.checkpoint import files
from emu2_megatron.checkpoint.load import load, load_weights
from emu2_megatron.checkpoint.save import Saver
from emu2_megatron.checkpoint.writer import Writer
from emu2_megatron.config.schema import Config, ModelConfig
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
    trainer, said = load_weights(path, engine)
    assert said[0].endswith("weights taken from " + path + ", none is missing") and "the optimizer's" in said[-2]
    return {**_weights(engine), "step": trainer["step"], "place_in_data": trainer["data"]}


def whole(results: list[dict[str, Any]], model: ModelConfig = harness.MODEL) -> dict[str, torch.Tensor]:
    released = dict(results[0]["visual"])
    for stage in {r["place"][0] for r in results}:
        ranks = {r["place"][1]: r for r in results if r["place"][0] == stage}
        for part, first_layer in enumerate(ranks[0]["first_layers"]):
            parts = [ranks[rank]["stages"][part] for rank in sorted(ranks)]
            released |= parameters.join_stage(model, parts, first_layer)
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


def not_finite_worker(rank: int, config: Config, directory: str) -> dict[str, Any]:
    """Two checkpoints; before the second, one element of one rank's optimizer is spoilt."""
    engine = wrap.build(config, topology.initialize(config))
    saver = Saver(config.checkpoint, Path(directory), engine, print)
    finite = [files.read_trainer(saver.save(1, {"data": PLACE}))["finite"]]
    if rank == 1:
        part = engine.optimizer.chained_optimizers[0].optimizer
        part.state[part.param_groups[0]["params"][0]]["exp_avg"].view(-1)[0] = float("nan")
    path = saver.save(2, {"data": PLACE})
    with pytest.raises(CheckpointError, match=r"numbers that are not finite: in optimizer\.exp_avg\."):
        load(path, engine)
    return {"finite": [*finite, files.read_trainer(path)["finite"]]}


def test_a_nan_on_one_rank(tmp_path: Path) -> None:
    """All ranks know of it: the checkpoint says so, and is not gone on from."""
    results = harness.run(2, not_finite_worker, harness.config(train_encoder=True), str(tmp_path))
    assert [result["finite"] for result in results] == [[True, False]] * 2


def disagreeing_worker(rank: int, config: Config, directory: str) -> dict[str, Any]:
    """The checkpoint is whole on one rank's disk, and missing on the other's."""
    engine = wrap.build(config, topology.initialize(config))
    path = Saver(config.checkpoint, Path(directory), engine, print).save(1, {"data": PLACE})
    for function in (load, load_weights):
        with pytest.raises(CheckpointError, match="not a complete checkpoint"):
            function(path if rank else Path(directory) / "elsewhere", engine)
    return {"step": load(path, engine)["step"]}


def test_ranks_agree_on_what_cannot_be_read(tmp_path: Path) -> None:
    results = harness.run(2, disagreeing_worker, harness.config(), str(tmp_path))
    assert [result["step"] for result in results] == [1, 1]


STATE = {f"tensor {i}": torch.arange(100 * i) for i in range(1, 9)}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", ["__0_0.distcp", "__0_1.distcp", ".metadata.tmp"])
def test_a_file_that_cannot_be_written(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Whichever of the threads it is that fails: torch's own prints its traceback and goes on without the tensors."""
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointException) as caught:
        state_dict_saver.save(STATE, storage_writer=Writer(tmp_path, 0), no_dist=True)
    ((error, _),) = caught.value.failures.values()
    assert isinstance(error, IsADirectoryError) and name in str(error)
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_equal_checkpoints_have_equal_bytes(tmp_path: Path) -> None:
    contents = []
    for i in range(10):
        state_dict_saver.save(STATE, storage_writer=Writer(tmp_path / str(i), 0), no_dist=True)
        contents.append({file.name: file.read_bytes() for file in (tmp_path / str(i)).iterdir()})
    assert len(contents[0]) == 3 and all(content == contents[0] for content in contents)


def refused_worker(_rank: int, config: Config, path: str) -> dict[str, Any]:
    engine = wrap.build(config, topology.initialize(config))
    with pytest.raises(CheckpointError, match="cannot be loaded into this model"):
        load_weights(path, engine)
    return {}


@pytest.mark.parametrize("fields", [{"hidden_size": 56}, {"image_size": 112, "hidden_size": 56}])
def test_another_encoder_is_refused(tmp_path: Path, fields: dict[str, int]) -> None:
    saved = harness.run(1, save_worker, harness.config(train_encoder=True), str(tmp_path))
    harness.run(1, refused_worker, with_encoder(harness.config(train_encoder=True), **fields), saved[0]["path"])


def grown_worker(_rank: int, config: Config, path: str) -> dict[str, Any]:
    engine = wrap.build(config, topology.initialize(config))
    _, said = load_weights(path, engine)
    return {**_weights(engine), "said": "; ".join(said)}


@pytest.mark.slow
def test_a_vocabulary_that_has_grown(tmp_path: Path) -> None:
    """Chat's two tokens more, on one rank and on two whose share of the rows they are in or not."""
    saved = harness.run(2, save_worker, harness.config(tp=2, train_encoder=True), str(tmp_path))
    wanted = whole(saved)
    for world_size, layout in ((1, {}), (2, {"tp": 2}), (2, {"pp": 2})):
        config = harness.config(**layout, train_encoder=True)
        model = replace(
            config.model, decoder=replace(config.model.decoder, vocab_size=harness.MODEL.decoder.vocab_size + 2)
        )
        loaded = harness.run(world_size, grown_worker, replace(config, model=model), saved[0]["path"])
        assert "output_layer.weight grown from 101 to 103 rows" in loaded[0]["said"]
        got = whole(loaded, model)
        for name, tensor in wanted.items():
            new = got[name][len(tensor) :]
            assert torch.equal(got[name][: len(tensor)], tensor), name
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                assert len(new) == 2
                # fp32 sums of 101 numbers in another order.
                torch.testing.assert_close(new, tensor.mean(0).expand(2, -1), rtol=1e-5, atol=1e-7)


def too_small_worker(_rank: int, config: Config, path: str) -> dict[str, Any]:
    engine = wrap.build(config, topology.initialize(config))
    with pytest.raises(CheckpointError, match="the model has no decoder.layers.2.* more"):
        load_weights(path, engine)
    return {}


def test_layers_that_the_model_does_not_have_are_not_passed_over(tmp_path: Path) -> None:
    saved = harness.run(1, save_worker, harness.config(), str(tmp_path))
    harness.run(1, too_small_worker, harness.config(layers=2), saved[0]["path"])
