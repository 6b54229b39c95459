"""What of the optimizer is not a tensor of the weights' shape: Adam's count of updates, and fp16's loss scale."""

from typing import Any

import torch
from torch.optim import Adam, AdamW

from emu2_megatron.parallel.wrap import Engine


def make_moments(engine: Engine) -> None:
    """Give Adam the moments it otherwise makes in its first update, so that there is something to save or load into
    (under fp16, the first steps may all be skipped)."""
    for inner in _inner(engine):
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            state = inner.state[parameter]
            if "exp_avg" in state:
                continue
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=torch.float32)
            if isinstance(inner, (Adam, AdamW)):  # NVIDIA's count in the group
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)


def scalars(engine: Engine) -> dict[str, Any]:
    """As JSON: `updates` that were applied, and `loss_scale`, None unless the precision is fp16."""
    return {"updates": _updates(engine), "loss_scale": engine.loss_scale.as_json() if engine.loss_scale else None}


def restore_scalars(engine: Engine, saved: dict[str, Any]) -> None:
    """Continue from a `scalars`. A loss scale is taken where both runs have one."""
    for inner in _inner(engine):
        for group in inner.param_groups:
            if not isinstance(inner, (Adam, AdamW)):
                group["step"] = saved["updates"]
        for state in inner.state.values():
            if "step" in state:
                state["step"].fill_(saved["updates"])
    if engine.loss_scale and saved["loss_scale"]:
        engine.loss_scale.restore(saved["loss_scale"])


def _updates(engine: Engine) -> int:
    counts = [0]
    for inner in _inner(engine):
        counts += [int(group["step"]) for group in inner.param_groups if "step" in group]
        counts += [int(state["step"]) for state in inner.state.values() if "step" in state]
    return max(counts)


def _inner(engine: Engine) -> list[Any]:
    """Adam itself, inside megatron-core's optimizers."""
    return [part.optimizer for part in engine.optimizer.chained_optimizers]
