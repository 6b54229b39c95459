"""A run that stops and goes on is the run that never stopped: to the bit in the same layout, and in any other with the
same weights, masters, moments and counts, tensor by tensor."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from torch import Tensor

from emu2_megatron.checkpoint import files
from emu2_megatron.checkpoint.adam import scalars
from emu2_megatron.checkpoint.load import load
from emu2_megatron.checkpoint.save import Saver
from emu2_megatron.checkpoint.state import stored, weights
from emu2_megatron.config.schema import CheckpointConfig, Config, Fp8Config
from emu2_megatron.parallel import topology, wrap
from emu2_megatron.training.step import train_step

PICTURES = [1, 0, 2, 1, 1, 0, 3, 1]


def worker(_rank: int, config: Config, directory: str, resume: str, steps: int) -> dict[str, Any]:
    """Train until `steps` updates are done, from nothing or from a checkpoint, and save."""
    here = topology.initialize(config)
    engine = wrap.build(config, here)
    done = int(load(resume, engine)["step"]) if resume else 0
    begun = _boxes(engine) if resume else {}
    losses = []
    for step in range(done, steps):
        batch = harness.batch(PICTURES, step)
        report = train_step(engine, config, engine.step.prepare([batch[i] for i in here.slots(8)]), step)
        losses += [report.text_loss, report.image_loss]
    saver = Saver(config.checkpoint, Path(directory), engine, print)
    saver.save(steps, {"data": {}})
    saver.finish()
    return {"losses": losses, "begun": begun, "ended": _boxes(engine), "scalars": str(scalars(engine)),
            "weights": {name: dict(pieces.boxes) for name, pieces in weights(engine).items()}}  # fmt: skip


def _boxes(engine: wrap.Engine) -> dict[str, Any]:
    engine.settle()
    return {
        name: {"shape": pieces.shape, "boxes": {str(list(o)): box.clone() for o, box in pieces.boxes.items()}}
        for name, pieces in stored(engine).items()
        if not name.startswith("rng.")
    }


def whole(results: list[dict[str, Any]], when: str) -> dict[str, Tensor]:
    """Every tensor, put together from what the ranks have; each element is there."""
    found: dict[str, Tensor] = {}
    for result in results:
        for name, pieces in result[when].items():
            for offset, box in pieces["boxes"].items():
                tensor = found.setdefault(name, torch.full(pieces["shape"], float("nan"), dtype=box.dtype))
                corner = [int(number) for number in offset.strip("[]").split(",")]
                tensor[tuple(slice(o, o + s) for o, s in zip(corner, box.shape, strict=True))] = box
    assert not any(tensor.isnan().any() for tensor in found.values())
    return found


def equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    different = [name for name, tensor in wanted.items() if not torch.equal(got[name], tensor)]
    assert not different, different


FP8 = Fp8Config(recipe="delayed", emulate=True, amax_history=4)
SAME = {
    "one process": (1, harness.config(train_encoder=True)),
    "TP2 PP2 DP2": (8, harness.config(tp=2, pp=2, train_encoder=True, precision="bf16")),
    "TP2 SP, encoder frozen": (4, harness.config(tp=2, sp=True, train_encoder=False, precision="bf16")),
    "PP2 VPP2, overlap": (4, harness.config(pp=2, vpp=2, overlap=True, train_encoder=True, precision="bf16")),
    "CP2, fp16": (4, harness.config(cp=2, train_encoder=True, precision="fp16", initial_loss_scale=2.0**24)),
    "PP2, delayed scaling": (2, replace(harness.config(pp=2, train_encoder=False, precision="bf16"), fp8=FP8)),
}


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("name", SAME)
def test_to_the_bit(tmp_path: Path, name: str, asynchronous: bool) -> None:
    world_size, config = SAME[name]
    config = replace(config, checkpoint=CheckpointConfig(asynchronous=asynchronous))
    straight = harness.run(world_size, worker, config, str(tmp_path / "straight"), "", 4)
    first = harness.run(world_size, worker, config, str(tmp_path / "stopped"), "", 2)
    saved = files.folder(tmp_path / "stopped", 2)
    rest = harness.run(world_size, worker, config, str(tmp_path / "stopped"), str(saved), 4)
    equal(whole(rest, "begun"), whole(first, "ended"))
    equal(whole(rest, "ended"), whole(straight, "ended"))
    for a, b, c in zip(straight, first, rest, strict=True):
        assert a["losses"] == b["losses"] + c["losses"] and a["scalars"] == c["scalars"]
        assert a["scalars"] != b["scalars"]


OTHERS = {
    "TP1 PP1 DP4": (4, harness.config(train_encoder=True, precision="bf16")),
    "TP4": (4, harness.config(tp=4, train_encoder=True, precision="bf16")),
    "PP4": (4, harness.config(pp=4, train_encoder=True, precision="bf16")),
    "PP2 VPP2 CP2 DP2": (8, harness.config(pp=2, vpp=2, cp=2, train_encoder=True, precision="bf16")),
    "PP2 of 1 and 3 layers": (2, harness.config(pp=2, layout=(1, 3), train_encoder=True, precision="bf16")),
}


@pytest.mark.slow
def test_in_other_layouts(tmp_path: Path) -> None:
    """TP2 PP2, continued in each of OTHERS and in its own: the same state, and much the same next step."""
    config = harness.config(tp=2, pp=2, train_encoder=True, precision="bf16")
    first = harness.run(4, worker, config, str(tmp_path / "first"), "", 2)
    saved, wanted = str(files.folder(tmp_path / "first", 2)), whole(first, "ended")
    assert {"optimizer.param.output_layer.weight", "optimizer.exp_avg.visual.blocks.1.attn.q_bias",
            "optimizer.exp_avg_sq.decoder.layers.3.mlp.linear_fc1.weight"} <= set(wanted)  # fmt: skip
    assert all(tensor.any() for name, tensor in wanted.items() if name.startswith("optimizer.exp_avg_sq"))
    same = harness.run(4, worker, config, str(tmp_path / "same"), saved, 3)
    for name, (world_size, other) in OTHERS.items():
        result = harness.run(world_size, worker, other, str(tmp_path / name), saved, 3)
        equal(whole(result, "begun"), wanted)
        # bf16 sums in another order: 8 bits of each product's result. The losses are averages of hundreds of them.
        assert result[0]["losses"] == pytest.approx(same[0]["losses"], rel=2e-3)
        assert result[0]["scalars"] == same[0]["scalars"]


@pytest.mark.slow
def test_in_another_precision(tmp_path: Path) -> None:
    """fp32 has no masters apart from its weights: they become those of bf16, and the other way round."""
    train = {"train_encoder": True}
    full, half = harness.config(tp=2, precision="fp32", **train), harness.config(pp=2, precision="bf16", **train)
    first = whole(harness.run(2, worker, full, str(tmp_path / "1"), "", 2), "ended")
    second = harness.run(2, worker, half, str(tmp_path / "2"), str(files.folder(tmp_path / "1", 2)), 3)
    begun, ended = whole(second, "begun"), whole(second, "ended")
    for name, tensor in first.items():
        master = name if name.startswith("optimizer.") else f"optimizer.param.{name}"
        assert torch.equal(begun[master], tensor), name
    third = whole(harness.run(2, worker, full, str(tmp_path / "3"), str(files.folder(tmp_path / "2", 3)), 4), "begun")
    for name, tensor in third.items():
        master = name if name.startswith("optimizer.") else f"optimizer.param.{name}"
        assert torch.equal(tensor, ended[master]), name
