"""The visual decoder starts from SDXL's UNet: which tensors can be taken, and how the others begin."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from emu2_megatron.errors import ConversionError
from emu2_megatron.model.parameters import initial_value

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

REPLACED = (".attn2.to_k.weight", ".attn2.to_v.weight", "add_embedding.linear_1.weight")
"""Ends of the names of what reads embeddings, which are of another width than SDXL's."""


def to_reinitialize(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that SDXL has in another shape. Only shapes are looked at.

    Args:
        wanted: the UNet's, by name.
        found: SDXL's.

    Raises:
        ConversionError: a tensor is missing or too many, or differs that should not.
    """
    if missing := sorted(wanted.keys() - found.keys()):
        raise ConversionError(f"SDXL's UNet: {missing[0]} is missing ({len(missing)} of {len(wanted)} tensors)")
    if surplus := sorted(found.keys() - wanted.keys()):
        raise ConversionError(f"SDXL's UNet: {surplus[0]} is too many ({len(surplus)} in all)")
    differing = [name for name, tensor in wanted.items() if tensor.shape != found[name].shape]
    if other := [name for name in differing if not name.endswith(REPLACED)]:
        raise ConversionError(
            f"SDXL's UNet: {other[0]} is {list(found[other[0]].shape)}, the visual decoder has "
            f"{list(wanted[other[0]].shape)}: its configuration is of another size"
        )
    return differing


@torch.no_grad()
def load_sdxl(unet: "UNet2DConditionModel", state: Mapping[str, Tensor], seed: int = 0) -> list[str]:
    """Fill the UNet with SDXL's tensors where they fit.

    The others read embeddings (keys and values of cross-attention, the added embedding) and begin anew, with the
    variance that torch's Linear layers have and values that depend on (seed, name) alone.

    Args:
        unet: of `build_unet`, with memory (`to_empty`). Values are cast to its dtype.
        state: SDXL's, by diffusers' names.
        seed: of the new tensors.

    Returns:
        Names of the new tensors.

    Raises:
        ConversionError: as `to_reinitialize`; the UNet is then as it was.
    """
    own = unet.state_dict()
    new = to_reinitialize(own, state)
    taken = {name: tensor for name, tensor in state.items() if name not in set(new)}
    for name in new:
        std = (3 * own[name].shape[1]) ** -0.5  # of uniform numbers between ± 1/sqrt(inputs)
        taken[name] = initial_value(name, own[name].shape, std, seed, torch.device("cpu"))
    unet.load_state_dict(taken, strict=True)
    return new
