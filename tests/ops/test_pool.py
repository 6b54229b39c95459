"""Against means written as loops, in float64."""

from typing import Any

import pytest
import torch
from ops_cases import DTYPES, UNIT, misaligned, strided
from torch import Tensor

from emu2_megatron.ops.pool import pool

# Patches to a side, windows to a side. The model's are 32 to 8 (pictures) or 4 (frames), at 224 pixels 16 to 8.
GRIDS = [(1, 1), (4, 4), (6, 2), (6, 3), (5, 1), (16, 8)]
PAIRS = [(a, b) for a in DTYPES for b in DTYPES if (a is torch.float64) == (b is torch.float64)]


def expected(hidden: Tensor, across: int) -> Tensor:
    """[I, Q, E] in float64."""
    side = int((hidden.shape[1] - 1) ** 0.5)
    window = side // across
    out = torch.zeros(len(hidden), across**2, hidden.shape[2], dtype=torch.float64)
    for y in range(side):
        for x in range(side):
            out[:, y // window * across + x // window] += hidden[:, 1 + y * side + x].double() / window**2
    return out


@pytest.mark.parametrize("layout", [torch.clone, misaligned, strided])
@pytest.mark.parametrize("width", [1, 37])
@pytest.mark.parametrize(("side", "across"), GRIDS)
@pytest.mark.parametrize(("dtype", "out_dtype"), PAIRS)
def test_pool(
    implementation: str, dtype: torch.dtype, out_dtype: torch.dtype, side: int, across: int, width: int, layout: Any
) -> None:
    """window² - 1 additions and a quotient in fp32, of numbers up to 5, then one rounding. Backward one division and
    one rounding, of fp16's smallest numbers to half of 2^-24."""
    torch.manual_seed(0)
    window = side // across
    hidden = torch.randn(2, 1 + side**2, width).to(dtype)
    want = expected(hidden, across)
    hidden = layout(hidden).requires_grad_()
    out = pool(hidden, across**2, out_dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert out.dtype == out_dtype and out.shape == want.shape and out.is_contiguous()
    assert ((out.double() - want).abs() <= UNIT[out_dtype] * want.abs() + 5 * window**2 * UNIT[wide]).all()
    upstream = torch.randn(want.shape).to(out_dtype)
    out.backward(layout(upstream))
    assert hidden.grad.dtype == dtype and not hidden.grad[:, 0].any()
    for y in range(side):
        for x in range(side):
            wanted = upstream[:, y // window * across + x // window].double() / window**2
            error = (hidden.grad[:, 1 + y * side + x].double() - wanted).abs()
            assert (error <= (UNIT[dtype] + 2 * UNIT[wide]) * wanted.abs() + 2.0**-25).all()


def test_dtype_is_hiddens_by_default(implementation: str) -> None:
    assert pool(torch.randn(1, 5, 3).bfloat16(), 1).dtype == torch.bfloat16


def test_cls_is_not_read(implementation: str) -> None:
    hidden = torch.randn(2, 5, 3)
    hidden[:, 0] = float("nan")
    assert pool(hidden, 1).isfinite().all()


@pytest.mark.parametrize("shape", [(0, 17, 8), (2, 17, 0)])
def test_nothing_to_pool(implementation: str, shape: tuple[int, ...]) -> None:
    hidden = torch.randn(shape, requires_grad=True)
    out = pool(hidden, 4)
    out.sum().backward()
    assert out.shape == (shape[0], 4, shape[2]) and hidden.grad.shape == shape


def test_threads_and_repeats_give_the_same_bits(compiled: Any, on_threads: Any) -> None:
    hidden = torch.randn(7, 1 + 16**2, 333).bfloat16()
    first, *others = on_threads(lambda: compiled.pool(hidden, 64, torch.float32))
    assert all(torch.equal(other, first) for other in others)
    first, *others = on_threads(lambda: compiled.pool_backward(first, 257, torch.bfloat16))
    assert all(torch.equal(other, first) for other in others)


@pytest.mark.parametrize(
    ("patches", "queries", "dtype", "message"),
    [
        (18, 4, torch.float32, r"17 patches \(without CLS\) are no square"),
        (17, 3, torch.float32, "3 queries are no square"),
        (17, 9, torch.float32, "3 windows to a side do not divide 4 patches"),
        (17, 0, torch.float32, "0 queries are no square"),
        (17, 4, torch.float64, "float64 is pooled to float64 alone"),
    ],
)
def test_what_does_not_fit_is_refused(
    compiled: Any, patches: int, queries: int, dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(RuntimeError, match="emu2::pool: " + message):
        pool(torch.randn(1, patches, 2), queries, dtype)


def test_gradcheck(implementation: str) -> None:
    hidden = torch.randn(2, 10, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: pool(h, 1), hidden)
    assert torch.autograd.gradcheck(lambda h: pool(h, 9), hidden)


def test_opcheck(compiled: Any) -> None:
    hidden = torch.randn(2, 17, 3, requires_grad=True)
    torch.library.opcheck(compiled.pool.default, (hidden, 4, torch.bfloat16))
    torch.library.opcheck(compiled.pool_backward.default, (torch.randn(2, 4, 3), 17, torch.float16))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(implementation: str, backend: str) -> None:
    torch._dynamo.reset()
    function = torch.compile(lambda hidden: pool(hidden, 4), backend=backend, fullgraph=True)
    for pictures in (1, 2, 3):
        hidden = torch.randn(pictures, 17, 5, requires_grad=True)
        function(hidden).square().sum().backward()
        assert torch.allclose(hidden.grad.sum(1), 2 * expected(hidden.detach(), 2).float().sum(1), rtol=1e-5, atol=1e-6)
