"""From patch tokens to visual embeddings: means over square windows (Emu2 §2.1: 32² patches to 8² or 16²)."""

from math import isqrt
from typing import Any

import torch
from torch import Tensor

from emu2_megatron.platform import library


def pool(hidden_IPE: Tensor, queries: int, dtype: torch.dtype | None = None) -> Tensor:
    """Average the patch tokens over square windows, without CLS.

    Args:
        hidden_IPE: [I, P, E] CLS first, then a square of patches in raster order.
        queries: windows Q wanted of each picture: a square whose side divides the patches'.
        dtype: of the result; None takes hidden's. fp64 goes with fp64 alone.

    Returns:
        [I, Q, E] in raster order; accumulated in fp32 (fp64 of fp64) and rounded once.

    Raises:
        RuntimeError: patches or queries are no square, or do not fit each other.
    """
    if not library.serves(hidden_IPE):
        return pool_reference(hidden_IPE, queries, dtype)
    out: Tensor = torch.ops.emu2.pool(hidden_IPE, queries, dtype or hidden_IPE.dtype)
    return out


def pool_reference(hidden_IPE: Tensor, queries: int, dtype: torch.dtype | None = None) -> Tensor:
    """`pool` in plain PyTorch."""
    I, P, E = hidden_IPE.shape  # noqa: E741
    side, across = isqrt(P - 1), isqrt(queries)
    windows = hidden_IPE[:, 1:].unflatten(1, (across, side // across, across, side // across))
    wide = torch.float64 if hidden_IPE.dtype is torch.float64 else torch.float32
    pooled_IQE: Tensor = windows.mean(dim=(2, 4), dtype=wide).view(I, queries, E)
    return pooled_IQE.to(dtype or hidden_IPE.dtype)


def _setup(ctx: Any, inputs: tuple[Tensor, int, torch.dtype], output: Tensor) -> None:
    ctx.patches, ctx.dtype = inputs[0].shape[1], inputs[0].dtype


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.emu2.pool_backward(gradient, ctx.patches, ctx.dtype), None, None


def _fake(hidden: Tensor, queries: int, dtype: torch.dtype) -> Tensor:
    return hidden.new_empty((hidden.shape[0], queries, hidden.shape[2]), dtype=dtype)


def _fake_backward(gradient: Tensor, patches: int, dtype: torch.dtype) -> Tensor:
    return gradient.new_empty((gradient.shape[0], patches, gradient.shape[2]), dtype=dtype)


if not library.problem:
    torch.library.register_fake("emu2::pool", _fake)
    torch.library.register_fake("emu2::pool_backward", _fake_backward)
    torch.library.register_autograd("emu2::pool", _backward, setup_context=_setup)
