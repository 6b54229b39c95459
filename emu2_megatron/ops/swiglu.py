"""SwiGLU (arXiv 2002.05202) of a fused gate-up projection, in as few passes over memory as PyTorch allows.

Left to autograd, both halves' gradients are built apart and concatenated, and both factors are kept.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        of_gate, of_up = out.chunk(2, dim=-1)
        torch.mul(gradient, F.silu(gate), out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return out


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up`.

    Args:
        gate_up: [..., 2F], gate first. The backward pass keeps nothing else.

    Returns:
        [..., F], same dtype.
    """
    out: Tensor = _SwiGLU.apply(gate_up)  # type: ignore[no-untyped-call]
    return out


class SwiGLU(nn.Module):
    """`swiglu` as megatron-core's layer specs want it."""

    def __init__(self, config: Any) -> None:
        super().__init__()

    def forward(self, gate_up: Tensor) -> Tensor:
        return swiglu(gate_up)
