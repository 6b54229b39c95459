"""What tests of the ops share: dtypes, their rounding, and tensors that lie in memory in uncommon ways."""

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
"""What the CPU ops take."""

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Unit roundoff: a rounding to the nearest changes a normal number by at most this, relatively."""


def misaligned(tensor: Tensor) -> Tensor:
    """A copy whose data begins one element after an allocation does."""
    out = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    return out.copy_(tensor)


def strided(tensor: Tensor) -> Tensor:
    """A copy whose rows are apart and whose elements are, too."""
    out = torch.empty(*tensor.shape[:-1], 2 * tensor.shape[-1] + 3, dtype=tensor.dtype)[..., 1:-2:2]
    assert not out.is_contiguous() or tensor.numel() < 2
    return out.copy_(tensor)
