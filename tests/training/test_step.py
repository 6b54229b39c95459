"""A step that has nothing to learn leaves the weights alone on every rank and says so. (Of steps that are not finite:
test_guards.py.)"""

from dataclasses import replace
from typing import Any

import harness
import numpy as np
import torch

from emu2_megatron.config.schema import Config
from emu2_megatron.errors import DataError
from emu2_megatron.parallel import topology, wrap
from emu2_megatron.training.step import train_step


def worker(_rank: int, config: Config) -> dict[str, Any]:
    here = topology.initialize(config)
    engine = wrap.build(config, here)
    own = [harness.batch([0] * 8, 0)[i] for i in here.slots(8)]
    train_step(engine, config, engine.step.prepare(own), 0)
    before = {name: parameter.clone() for name, parameter in engine.stages[0].named_parameters()}
    own = [replace(sequence, roles_S=np.zeros_like(sequence.roles_S)) for sequence in own]
    try:
        train_step(engine, config, engine.step.prepare(own), 1)
        message = "did not raise"
    except DataError as error:
        message = str(error)
    same = all(torch.equal(parameter, before[name]) for name, parameter in engine.stages[0].named_parameters())
    return {"message": message, "weights unchanged": same}


def test_nothing_to_learn() -> None:
    for result in harness.run(4, worker, harness.config(pp=2)):
        assert result["message"].startswith("step 2: nothing in the global batch is to be learnt")
        assert result["weights unchanged"]
