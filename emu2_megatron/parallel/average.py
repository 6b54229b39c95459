"""A moving average of trained weights, in fp32 and shared out over the ranks as the optimizer's state is.

After update t the average is decay times itself plus (1 - decay) times the weights; it begins as the weights.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from emu2_megatron.parallel import topology
from emu2_megatron.parallel.wrap import Engine


def restart(engine: Engine) -> None:
    """Begin anew, from the weights as they are."""
    engine.average = {parameter: owned.master.float().clone() for parameter, owned in engine.owned().items()}


@torch.no_grad()
def update(engine: Engine, decay: float) -> None:
    """Take in what an update made of the weights."""
    owned = engine.owned()
    for parameter, average in engine.average.items():
        average.lerp_(owned[parameter].master.float(), 1 - decay)


@torch.no_grad()
def gathered(engine: Engine, module: nn.Module) -> dict[str, Tensor]:
    """The average of a whole module that every rank has all of, in its dtype, by parameter name; called by all ranks
    together."""
    owned, found = engine.owned(), {}
    for name, parameter in module.named_parameters():
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if parameter in owned:
            whole[owned[parameter].start : owned[parameter].stop] = engine.average[parameter]
        dist.all_reduce(whole, group=topology.world_group())
        found[name] = whole.view_as(parameter).to(parameter.dtype)
    return found
