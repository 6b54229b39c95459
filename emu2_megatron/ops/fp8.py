"""The arithmetic of FP8: how recipes scale and round a tensor, in plain PyTorch, as Transformer Engine does it.

References: FP8 formats (arXiv 2209.05433), MXFP8 (OCP Microscaling 1.0), Transformer Engine's `recipe_common.cuh`,
`delayed_scaling.cu` and `ptx.cuh`.

Shapes: L entries of an amax history, T tensors it is kept for.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
"""The largest finite value of each format."""
GRADIENTS = {"delayed": E5M2, "current": E5M2, "block": E4M3, "mxfp8": E4M3}
"""fp8.recipe to the format of dy; x and w are E4M3."""
FP32_LARGEST = torch.finfo(torch.float32).max

Quantize = Callable[[Tensor, str, int], Tensor]
"""(matrix, operand "x", "w" or "dy", dimension the product sums over) to fp32 values that FP8 and a scale can hold."""


def cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x · scale in the FP8 format: to the nearest, ties to even, too large values to the largest."""
    # torch's own cast of a too large value to E5M2 is inf.
    return (x.float() * scale).clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


def rounded(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32: what is left of x after `cast` and division by the scale."""
    return cast(x, scale, dtype).float() * (1.0 / scale)


def scale_of(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32: the scale that takes amax to the format's largest value; 1 if amax is 0, inf or nan."""
    scale = (LARGEST[dtype] / amax.float()).clamp(max=FP32_LARGEST)
    return torch.where(torch.isfinite(amax) & (amax > 0), scale, torch.ones_like(scale))


def power_of_two_scale(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale_of`, rounded down to a power of two (block scaling)."""
    exponents = scale_of(amax, dtype).view(torch.int32) & 0x7F800000
    return exponents.view(torch.float32)


def e8m0_scale(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale of MXFP8: 2^-e for the smallest integer e with amax / largest <= 2^e, within E8M0's -127 to 127."""
    bits = (amax.float() * (1.0 / LARGEST[dtype])).view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    # 2^-127 itself is a subnormal of fp32 with this mantissa.
    up = (mantissa > 0) & ~((exponent == 0) & (mantissa <= 0x400000))
    return (254 - (exponent + up).clamp(max=254) << 23).view(torch.float32)


def rounded_in_blocks(
    x: Tensor, rows: int, columns: int, scale_rule: Callable[[Tensor, torch.dtype], Tensor], dtype: torch.dtype
) -> Tensor:
    """fp32: x with a scale of its own for every block of `rows` x `columns`; blocks at the edge may be smaller."""
    height, width = x.shape
    padded = F.pad(x.float(), (0, -width % columns, 0, -height % rows))
    blocks = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    scale = scale_rule(blocks.abs().amax(dim=(1, 3), keepdim=True), dtype)
    return rounded(blocks, scale, dtype).view(padded.shape)[:height, :width]


def updated(history_LT: Tensor, scale_T: Tensor, largest: float, compute: str, margin: int) -> tuple[Tensor, Tensor]:
    """History and scales after the amaxes of a pass stand in row 0 of the history.

    The row moves to the end and the oldest drops out; a tensor that was not seen (0) keeps its history. The new scale
    is largest / amax / 2^margin with the largest or the most recent amax, and the old one if that is 0, inf or nan.
    """
    last_T = history_LT[0]
    amax_T = history_LT.amax(0) if compute == "max" else last_T
    rolled_LT = history_LT.roll(-1, 0)
    rolled_LT[0] = 0
    new_T = (largest / amax_T / 2**margin).clamp(max=FP32_LARGEST)
    usable_T = torch.isfinite(amax_T) & (amax_T > 0)
    return torch.where(last_T != 0, rolled_LT, history_LT), torch.where(usable_T, new_T, scale_T)


def current(x: Tensor, operand: str, dim: int) -> Tensor:
    """Current scaling: one scale for the tensor, from its own amax."""
    dtype = GRADIENTS["current"] if operand == "dy" else E4M3
    return rounded(x, scale_of(amax(x), dtype), dtype)


def block(x: Tensor, operand: str, dim: int) -> Tensor:
    """Block scaling: 128 values along the sum for x and dy, squares of 128 x 128 for w."""
    rows, columns = (128, 128) if operand == "w" else (1, 128) if dim == 1 else (128, 1)
    return rounded_in_blocks(x, rows, columns, power_of_two_scale, E4M3)


def mxfp8(x: Tensor, operand: str, dim: int) -> Tensor:
    """MXFP8: 32 values along the sum."""
    rows, columns = (1, 32) if dim == 1 else (32, 1)
    return rounded_in_blocks(x, rows, columns, e8m0_scale, E4M3)


STATELESS: dict[str, Quantize] = {"current": current, "block": block, "mxfp8": mxfp8}
"""Recipes whose scales depend on nothing but the tensor."""


def amax(x: Tensor) -> Tensor:
    """fp32 scalar: the largest magnitude."""
    return x.abs().amax().float()
