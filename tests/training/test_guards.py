"""What the guards do on ranks that share nothing but collectives: bad updates, who is blamed for them, stragglers.
(test_stopping.py has the real processes.)"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from emu2_megatron.config.schema import Config, GuardsConfig, LoggingConfig
from emu2_megatron.errors import TrainingDiverged
from emu2_megatron.parallel import topology, wrap
from emu2_megatron.training.guards import Guards, z_scores
from emu2_megatron.training.step import train_step

NAN = float("nan")


def guarded(directory: Path, guards: GuardsConfig, **layout: Any) -> Config:
    return replace(harness.config(steps=20, **layout), guards=guards, logging=LoggingConfig(directory=str(directory)))


def batch_of(step: int) -> list[Any]:
    """8 sequences with a picture each; that of slot 3 has one sample, `b3`, in step 1 (from 0)."""
    rows = harness.batch([1] * 8, step)
    for slot, row in enumerate(rows):
        row.keys, row.shards = [f"{'abcdef'[step]}{slot}"], ["/data/images-000000.tar"]
    return rows


def worker(_rank: int, config: Config, where: str, culprit: int, bad: list[int], steps: int) -> dict[str, Any]:
    """Train, and plant something in steps of `bad` (from 0) on the rank `culprit`, before ranks exchange it."""
    here = topology.initialize(config)
    engine = wrap.build(config, here)
    now = 0

    def planted() -> bool:
        return here.rank == culprit and now in bad

    _plant(engine, where, planted)
    said: list[str] = []
    changed, problems = [], []
    with Guards(config, engine, said.append) as guards:
        for now in range(steps):
            weight = engine.stages[0].decoder.layers[0].self_attention.linear_qkv.weight
            if where == "weight" and planted():
                weight.data[0, 0] = NAN
            before = _weights(engine)
            batch = engine.step.prepare([batch_of(now)[slot] for slot in here.slots(8)])
            report = train_step(engine, config, batch, now, guards.flags, guards.judge)
            problems.append(report.problem)
            try:
                guards.after(now + 1, batch, report)
            except TrainingDiverged as error:
                said.append(str(error))
            changed.append(not torch.equal(before.nan_to_num(), _weights(engine).nan_to_num()))
            if where == "weight" and planted():
                weight.data[0, 0] = 0.0
        state = json.dumps(guards.state())
    return {"said": said, "changed": changed, "skipped": guards.skipped, "problems": problems, "state": state}


def _plant(engine: wrap.Engine, where: str, planted: Callable[[], bool]) -> None:
    stage = engine.stages[-1]
    if where == "gradient":
        engine.stages[0].decoder.layers[0].mlp.linear_fc1.weight.register_hook(
            lambda grad: grad * NAN if planted() else grad
        )
    if where == "encoder gradient":
        engine.encoder.blocks[1].mlp.fc1.weight.register_hook(lambda grad: grad * NAN if planted() else grad)
    if where == "embedding":  # of the second picture that the rank encodes

        def spoil(module: torch.nn.Module, arguments: Any, rows_RE: Tensor) -> Tensor:
            spoilt = torch.zeros_like(rows_RE)
            spoilt[harness.QUERIES : 2 * harness.QUERIES] = NAN if planted() else 0.0
            return rows_RE + spoilt

        engine.encoder.register_forward_hook(spoil)
    if where in ("loss", "spike"):
        compute, calls = stage.losses, [0]

        def spoilt_losses(*args: Any) -> Tensor:
            calls[0] += 1
            second = calls[0] % 2 == 0  # of two micro-batches
            return compute(*args) * ((NAN if where == "loss" else 50.0) if planted() and second else 1.0)

        stage.losses = spoilt_losses  # type: ignore[method-assign]


def _weights(engine: wrap.Engine) -> Tensor:
    """All of this rank's, bit for bit."""
    engine.settle()
    return torch.cat([p.detach().flatten().clone() for m in (*engine.stages, engine.encoder) for p in m.parameters()])


# Four ranks as two replicas of two stages: ranks 0 and 2 are replica 0. A replica has 4 sequences in 2 micro-batches.
# Rank 2 loads slots 1 and 3 and encodes their pictures.
PLANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "gradient": ({}, 1, "gradients of decoder.layers.0.mlp.linear_fc1.weight of rank 1; samples b4, b5, b6, b7 of"),
    "gradient, overlap": ({"overlap": True}, 0, "linear_fc1.weight of rank 0; samples b0, b1, b2, b3 of"),
    "encoder gradient": ({"train_encoder": True}, 3, "gradients of visual.blocks.1.mlp.fc1.weight of rank 3; samples"),
    "embedding": ({}, 2, "not finite: embeddings that rank 2 made; samples b3 of images-000000.tar"),
    "loss": ({}, 3, "not finite: the loss of micro-batch 1 of rank 3; samples b6, b7 of images-000000.tar"),
    "weight": ({}, 1, "not finite: weights decoder.layers.0.self_attention.linear_qkv.weight of rank 1"),
}


@pytest.mark.parametrize(
    "plant",
    [pytest.param(plant, marks=[] if plant in ("gradient", "embedding") else pytest.mark.slow) for plant in PLANTS],
)
def test_a_bad_update_is_skipped_by_all_and_blamed_on_one(plant: str, tmp_path: Path) -> None:
    layout, culprit, blamed = PLANTS[plant]
    config = guarded(tmp_path, GuardsConfig(max_skips=2), pp=2, **layout)
    for result in harness.run(4, worker, config, plant.partition(",")[0], culprit, [1], 3):
        assert result["changed"] == [True, False, True]
        assert result["skipped"] == 1 and [bool(problem) for problem in result["problems"]] == [False, True, False]
        (line,) = result["said"]
        assert line.startswith("step 2: ") and "nan" in line and blamed in line, line
        assert line.endswith("update skipped, 1 in a row, 2 end the run (guards.max_skips)")
    assert not (tmp_path / "skipped").exists()


def test_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    """A good step in between starts the count anew. The batch is on disk, each rank's share, with what was found."""
    config = guarded(tmp_path, GuardsConfig(max_skips=2), pp=2)
    for result in harness.run(4, worker, config, "loss", 3, [0, 2, 3], 4):
        assert result["changed"] == [False, True, False, False]
        assert result["skipped"] == 3 and len(result["said"]) == 3
        message = result["said"][-1]
        assert "\n" not in message and message.startswith("step 4: losses nan (text), nan (image); ")
        assert "micro-batch 1 of rank 3; samples d6, d7 of images-000000.tar" in message
        assert f"the batch is in {tmp_path}/skipped/step_00000004; " in message
        assert message.endswith("guards.steps_to_skip=[3,4] goes on without them")
    folder = tmp_path / "skipped" / "step_00000004"
    tensors = {name: t for rank in range(4) for name, t in load_file(folder / f"rank_{rank:05d}.safetensors").items()}
    for slot, row in enumerate(batch_of(3)):
        assert torch.equal(tensors.pop(f"slot_{slot:05d}.tokens_S"), torch.from_numpy(row.tokens_S))
        assert torch.equal(tensors.pop(f"slot_{slot:05d}.roles_S"), torch.from_numpy(row.roles_S))
        assert torch.equal(tensors.pop(f"slot_{slot:05d}.picture_0"), row.pictures[0])
    assert not tensors
    report = json.loads((folder / "report.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert report["cause"]["ranks"] == [3]
    assert [(row["slot"], row["keys"]) for row in report["cause"]["rows"]] == [(6, ["d6"]), (7, ["d7"])]
    assert sorted(row["slot"] for rank in report["ranks"] for row in rank["rows"]) == list(range(8))


def test_a_spike_is_skipped(tmp_path: Path) -> None:
    """Step 1's spike comes before there is a window. What was skipped is no measure of what follows."""
    config = guarded(tmp_path, GuardsConfig(spike_factor=3.0, spike_window=2), pp=2)
    for result in harness.run(4, worker, config, "spike", 2, [0, 3, 4], 6):
        assert result["changed"] == [True, True, True, False, False, True]
        assert result["skipped"] == 2 and len(result["said"]) == 2
        assert "is a spike, " in result["said"][0] and "times the median of 2 steps (guards.spike" in result["said"][0]
        assert "most of it is from micro-batch 1 of rank 2; samples d2, d3 of images-000000.tar" in result["said"][0]
        assert len(json.loads(result["state"])["losses"]) == 2


def test_the_guards_state_is_part_of_a_checkpoint(tmp_path: Path) -> None:
    topology.start("gloo")
    try:
        config = guarded(tmp_path, GuardsConfig(spike_factor=2.0, spike_window=3))
        engine = wrap.build(config, topology.initialize(config))
        guards, resumed = Guards(config, engine, print), Guards(config, engine, print)
        guards.load_state({"skipped": 5, "in_a_row": [7, 8], "losses": [1.0, 0.1, 3.0]})
        resumed.load_state(json.loads(json.dumps(guards.state())))
        assert resumed.state() == guards.state() and resumed.skipped == 5
        assert not resumed.judge(1.0, 2.0)  # the image loss weighs 0.5, the median is 1
        assert resumed.judge(1.0, 2.1).startswith("loss 2.05 is a spike, 2.05 times")
        resumed.load_state({})
        assert resumed.skipped == 0
    finally:
        topology.stop()


def test_z_scores_by_hand() -> None:
    """Seconds of a rank's own work: the median is 10, distances from it are 0 1 1 2 10, their median is 1."""
    assert z_scores([9.0, 11.0, 10.0, 20.0, 8.0], 1.0) == pytest.approx([-0.6745, 0.6745, 0, 6.745, -1.349], rel=1e-3)
    # Alike to a hair: a deviation is 5% of the median.
    assert z_scores([10.0, 10.0, 10.0, 11.0], 1.0)[3] == pytest.approx(2)
    # Little of the step: a deviation is 1% of that.
    assert z_scores([0.1, 0.1, 0.1, 0.2], 100.0)[3] == pytest.approx(0.1)
    assert z_scores([0.0], 0.0) == [0.0]


def test_stragglers_are_named_once_after_some_records(tmp_path: Path) -> None:
    topology.start("gloo")
    try:
        config = guarded(tmp_path, GuardsConfig(straggler_z=4.0, straggler_records=2))
        said: list[str] = []
        guards = Guards(config, wrap.build(config, topology.initialize(config)), said.append)
        for scores in ([0, 5, 0], [0, 3, 5], [0, 5, 0], [0, 6, 0], [0, 7, 0]):
            guards.stragglers([float(z) for z in scores])
            assert len(said) == (scores[1] >= 6)
        assert said[0].startswith("rank 1 is a straggler: ") and "6.0 deviations" in said[0]
    finally:
        topology.stop()
