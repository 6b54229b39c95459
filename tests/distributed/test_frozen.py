"""Frozen means frozen: no gradient, no gradient buffer, no optimizer state, the same weights afterwards."""

from typing import Any

import harness
import pytest

from emu2_megatron.config.schema import Config
from emu2_megatron.parallel import topology, wrap
from emu2_megatron.training.step import train_step


def worker(_rank: int, config: Config) -> dict[str, Any]:
    here = topology.initialize(config)
    engine = wrap.build(config, here)
    before = {name: p.clone() for name, p in engine.encoder.named_parameters()}
    own = [harness.batch([2] * 8, 0)[i] for i in here.slots(8)]
    train_step(engine, config, engine.step.prepare(own), 0)
    parts = engine.optimizer.chained_optimizers
    return {
        "trained": sum(p.numel() for p in engine.stages[0].parameters()),
        "encoder": sum(p.numel() for p in engine.encoder.parameters()),
        "buffered": sum(p.numel() for part in engine.wrapped for buffer in part.buffers for p in buffer.params),
        "moments": sum(
            state["exp_avg"].numel() for part in parts for state in part.optimizer.state.values() if "exp_avg" in state
        ),
        "gradients": sum(
            p.grad is not None or p.requires_grad or hasattr(p, "main_grad") for p in engine.encoder.parameters()
        ),
        "moved": sum(not p.equal(before[name]) for name, p in engine.encoder.named_parameters()),
        "parameters": len(before),
    }


@pytest.mark.parametrize("train_encoder", [False, True], ids=["frozen", "trained"])
def test_frozen(train_encoder: bool) -> None:
    """On two replicas: each holds buffers for what it trains, and together they hold one set of moments of it."""
    results = harness.run(2, worker, harness.config(train_encoder=train_encoder))
    for result in results:
        wanted = result["trained"] + (result["encoder"] if train_encoder else 0)
        assert result["buffered"] == wanted
        assert sum(r["moments"] for r in results) == wanted
        assert result["gradients"] == (result["parameters"] if train_encoder else 0)
        assert result["moved"] == (result["parameters"] if train_encoder else 0)
