"""A step that is not finite, or has nothing to learn, leaves the weights alone on every rank and says which it was."""

from dataclasses import replace
from typing import Any

import harness
import numpy as np
import pytest
import torch

from emu2_megatron.config.schema import Config
from emu2_megatron.errors import DataError, TrainingDiverged
from emu2_megatron.parallel import topology, wrap
from emu2_megatron.training.step import train_step


def worker(_rank: int, config: Config, where: str) -> dict[str, Any]:
    here = topology.initialize(config)
    engine = wrap.build(config, here)
    own = [harness.batch([0 if where == "nowhere" else 1] * 8, 0)[i] for i in here.slots(8)]
    train_step(engine, config, engine.step.prepare(own), 0)
    if where == "loss" and here.last_stage:
        engine.stages[0].project_down.weight.data[0, 0] = float("nan")
    if where == "gradient" and here.first_stage and here.dp_rank == 0:
        # The loss stays finite, one replica's gradient does not.
        engine.stages[0].project_up.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = {name: parameter.clone() for name, parameter in engine.stages[0].named_parameters()}
    if where == "nowhere":
        own = [replace(sequence, roles_S=np.zeros_like(sequence.roles_S)) for sequence in own]
    try:
        train_step(engine, config, engine.step.prepare(own), 1)
        message = "did not raise"
    except (TrainingDiverged, DataError) as error:
        message = str(error)
    same = all(torch.equal(p.nan_to_num(), before[n].nan_to_num()) for n, p in engine.stages[0].named_parameters())
    return {"message": message, "weights unchanged": same}


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_not_finite(where: str) -> None:
    for result in harness.run(4, worker, harness.config(pp=2), where):
        assert result["message"].startswith("step 1: ") and "nan" in result["message"]
        assert result["weights unchanged"]


def test_nothing_to_learn() -> None:
    for result in harness.run(4, worker, harness.config(pp=2), "nowhere"):
        assert result["message"].startswith("step 1: nothing in the global batch is to be learnt")
        assert result["weights unchanged"]
