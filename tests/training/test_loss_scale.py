"""fp16's loss scale: one decision for all ranks, for encoder and decoder alike; what it does to scale and weights."""

from typing import Any

import harness
import pytest
import torch

from emu2_megatron.config.schema import Config, TrainingConfig
from emu2_megatron.parallel import topology, wrap
from emu2_megatron.parallel.loss_scale import SharedLossScale
from emu2_megatron.training.step import train_step

SCALE = 2.0**10


def worker(_rank: int, config: Config, culprit: tuple[int, str], bad: list[int]) -> dict[str, Any]:
    """Three steps; in those of `bad`, one rank's gradient of one parameter is infinite before ranks exchange it.

    Args:
        culprit: the rank, and the part of the model.
    """
    here = topology.initialize(config)
    engine = wrap.build(config, here)
    own = [harness.batch([1] * 8, 0)[i] for i in here.slots(8)]
    parameters = {"decoder": engine.stages[0].decoder.layers[0].self_attention.linear_qkv.weight,
                  "encoder": engine.encoder.blocks[0].mlp.fc1.weight}  # fmt: skip
    now = 0
    if here.rank == culprit[0]:
        parameters[culprit[1]].register_hook(lambda grad: grad * float("inf") if now in bad else grad)
    reports: list[list[Any]] = []
    problems = []
    for now in range(3):
        before = _weights(engine)
        report = train_step(engine, config, engine.step.prepare(own), now)
        reports.append([report.loss_scale, report.skipped_updates, report.grad_norm is None])
        problems.append(report.problem)
        after = _weights(engine)
        reports[-1] += [not torch.equal(before[part], after[part]) for part in ("decoder", "encoder")]
    updates = {float(state["step"]) for part in engine.optimizer.chained_optimizers
               for state in part.optimizer.state.values() if "step" in state}  # fmt: skip
    return {
        "reports": reports,
        "problems": problems,
        "updates": sorted(updates),
        "next": float(engine.loss_scale.scale),
    }


def _weights(engine: wrap.Engine) -> dict[str, torch.Tensor]:
    """All weights of this rank, fp16."""
    engine.settle()
    stages = [parameter.detach().flatten() for stage in engine.stages for parameter in stage.parameters()]
    return {
        "decoder": torch.cat(stages),
        "encoder": torch.cat([p.detach().flatten() for p in engine.encoder.parameters()]),
    }


LAYOUTS: dict[str, tuple[dict[str, Any], tuple[int, str]]] = {
    "decoder, first stage": ({"tp": 2, "pp": 2}, (1, "decoder")),
    "decoder, last stage": ({"tp": 2, "pp": 2}, (2, "decoder")),
    "encoder": ({"tp": 2, "pp": 2}, (3, "encoder")),
    "one replica, overlapped": ({"pp": 2, "overlap": True}, (1, "decoder")),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_rank_overflows(name: str) -> None:
    """Nobody applies anything, everybody halves the scale, once; the next step is applied by all."""
    layout, culprit = LAYOUTS[name]
    config = harness.config(**layout, train_encoder=True, precision="fp16", initial_loss_scale=SCALE)
    for result in harness.run(4, worker, config, culprit, [1]):
        assert result["reports"] == [
            [SCALE, 0, False, True, True],
            [SCALE, 1, True, False, False],
            [SCALE / 2, 1, False, True, True],
        ]
        assert result["updates"] == [2.0] and result["next"] == SCALE / 2
        assert result["problems"] == ["", "", ""]


def test_overflow_at_the_smallest_scale() -> None:
    """Two halvings from 4 to 1, then the model is to blame: all ranks say so, weights and scale stay as they are."""
    config = harness.config(tp=2, pp=2, train_encoder=True, precision="fp16", initial_loss_scale=4.0)
    for result in harness.run(4, worker, config, (3, "encoder"), [0, 1, 2]):
        assert result["reports"] == [
            [4.0, 1, True, False, False],
            [2.0, 2, True, False, False],
            [1.0, 2, True, False, False],
        ]
        assert result["problems"] == ["", "", "gradients are not finite at the smallest loss scale"]
        assert result["next"] == 1.0


def test_scale_doubles_after_enough_good_steps() -> None:
    scale = SharedLossScale(TrainingConfig(initial_loss_scale=8.0, loss_scale_window=2))
    seen = []
    for overflow in (False, True, False, False, False, True, False, False):
        scale.update(overflow)  # what every optimizer calls, any number of times: nothing happens
        scale.update(True)
        scale.conclude(overflow)
        seen.append(float(scale.scale))
    assert seen == [8, 4, 4, 8, 8, 4, 4, 8]
    assert scale.skipped == 2
    assert not scale.at_minimum
