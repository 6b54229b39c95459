"""Against the definition in float64, row by row, and its derivative by hand."""

from typing import Any

import pytest
import torch
from ops_cases import DTYPES, UNIT, misaligned, strided
from torch import Tensor

from emu2_megatron.ops.regression_loss import regression_loss

ROWS = torch.tensor([3, -1, 0, 2, -2, 1, -1], dtype=torch.int32)
"""Seven predictions; target 4 is not predicted."""


def expected(predicted: Tensor, target: Tensor, rows: Tensor, denominator: float) -> tuple[float, Tensor]:
    """Loss and gradient in float64."""
    loss, gradient = 0.0, [[0.0] * predicted.shape[1] for _ in rows]
    targets = target.tolist()
    for n, (row, numbers) in enumerate(zip(rows.tolist(), predicted.tolist(), strict=True)):
        if row >= 0:
            errors = [a - b for a, b in zip(numbers, targets[row], strict=True)]
            loss += sum(error**2 for error in errors) / denominator
            gradient[n] = [2 * error / denominator for error in errors]
    return loss, torch.tensor(gradient, dtype=torch.float64)


def tensors(width: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(7, width).to(dtype), torch.randn(5, width).to(dtype)


def number(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype)


# Around the 32 accumulators and the blocks of 1024; 1792 is the encoder's width.
@pytest.mark.parametrize("layout", [torch.clone, misaligned, strided])
@pytest.mark.parametrize("width", [1, 31, 33, 100, 1027, 1792])
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradient(implementation: str, dtype: torch.dtype, width: int, layout: Any) -> None:
    """The loss: a difference, a square, at most width / 32 + 5 additions in a row (torch's own sum has no more) and a
    quotient in fp32, each within a unit roundoff. The gradient: a factor, a difference and a product in fp32, then one
    rounding to the dtype, which below fp16's normal numbers is good to half of 2^-24.
    """
    predicted, target = tensors(width, dtype)
    loss, gradient = expected(predicted, target, ROWS, 123.0)
    predicted = layout(predicted).requires_grad_()
    out = regression_loss(predicted, layout(target), ROWS, number(123.0), number(0.75))
    (0.75 * out).backward()
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert out.shape == () and out.dtype == wide
    assert out.item() == pytest.approx(loss, rel=(width / 32 + 10) * UNIT[wide])
    bound = (UNIT[dtype] + 4 * UNIT[wide]) * gradient.abs() + (2.0**-25 if dtype is torch.float16 else 0)
    assert predicted.grad.dtype == dtype and ((predicted.grad.double() - 0.75 * gradient).abs() <= bound).all()
    assert not predicted.grad[ROWS < 0].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_predictions_without_a_target_are_not_read(implementation: str, dtype: torch.dtype) -> None:
    predicted, target = tensors(40, dtype)
    loss, gradient = expected(predicted, target, ROWS, 9.0)
    predicted[ROWS < 0] = target[4] = float("nan")
    predicted.requires_grad_()
    out = regression_loss(predicted, target, ROWS, number(9.0), number(1.0))
    out.backward()
    assert out.item() == pytest.approx(loss, rel=1e-5)
    assert predicted.grad.isfinite().all() and not predicted.grad[ROWS < 0].any()
    # and what is read shows
    predicted.data[0, 0] = float("inf")
    assert regression_loss(predicted, target, ROWS, number(9.0), number(1.0)).isinf()


@pytest.mark.parametrize(("count", "width", "targets"), [(0, 8, 3), (0, 8, 0), (3, 0, 2), (3, 8, 0)])
def test_nothing_to_predict(implementation: str, count: int, width: int, targets: int) -> None:
    """The loss is 0, and zeros reach the weight that predicted nothing."""
    weight = torch.randn(width, 6, requires_grad=True)
    rows = torch.full((count,), -1, dtype=torch.int32)
    loss = regression_loss(
        torch.randn(count, 6) @ weight.T, torch.randn(targets, width), rows, number(1.0), number(1.0)
    )
    loss.backward()
    assert loss == 0 and weight.grad is not None and not weight.grad.any()


def test_targets_have_no_gradient(implementation: str) -> None:
    predicted, target = tensors(6, torch.float32)
    target.requires_grad_()
    regression_loss(predicted.requires_grad_(), target, ROWS, number(1.0), number(1.0)).backward()
    assert predicted.grad.any() and target.grad is None
    assert not regression_loss(predicted.detach(), target, ROWS, number(1.0), number(1.0)).requires_grad


def test_a_mean_over_many_in_fp16(implementation: str) -> None:
    """2,000 pictures of 64 embeddings: the mean's gradients are about 1e-8, and fp16 ends at 6e-8. With the loss scale
    multiplied in, they are as good as any numbers of fp16."""
    predicted, target = tensors(1792, torch.float16)
    denominator, scale = 2000 * 64 * 1792.0, 2.0**16
    _, gradient = expected(predicted, target, ROWS, denominator)
    predicted.requires_grad_()
    loss = regression_loss(predicted, target, ROWS, number(denominator), number(scale))
    (scaled,) = torch.autograd.grad(loss * scale, predicted)
    assert (scaled.double() / scale - gradient).norm() < 2.0**-11 * gradient.norm()
    (unscaled,) = torch.autograd.grad(
        regression_loss(predicted, target, ROWS, number(denominator), number(1.0)), predicted
    )
    assert (unscaled != 0).double().mean() < 0.01, "the case is one that underflows"


@pytest.mark.parametrize("upstream", [0.0, -3.0, 0.3, float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_another_factor_than_was_folded_in(implementation: str, dtype: torch.dtype, upstream: float) -> None:
    """What comes back is believed, not what was promised. One rounding more than otherwise."""
    predicted, target = tensors(100, dtype)
    _, gradient = expected(predicted, target, ROWS, 5.0)
    predicted.requires_grad_()
    loss = regression_loss(predicted, target, ROWS, number(5.0), number(2.0))
    (got,) = torch.autograd.grad(loss, predicted, torch.full_like(loss, upstream))
    there = ROWS >= 0
    if upstream == upstream and abs(upstream) != float("inf"):
        assert (
            (got.double() - upstream * gradient).abs() <= 2.1 * UNIT[dtype] * (upstream * gradient).abs() + 2e-7
        ).all()
    else:
        assert not got[there].isfinite().any()


def test_the_gradient_can_be_taken_again(implementation: str) -> None:
    """The stored gradient is handed out as it is, and must not be written to by whoever adds gradients up."""
    predicted, target = tensors(64, torch.float32)
    _, gradient = expected(predicted, target, ROWS, 5.0)
    predicted.requires_grad_()
    loss = regression_loss(predicted, target, ROWS, number(5.0), number(1.0))
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        assert torch.allclose(predicted.grad.double(), times * gradient, rtol=1e-6)
    # Used twice in a graph: two gradients that autograd adds up.
    predicted.grad = None
    twice = [regression_loss(p, target, ROWS, number(5.0), number(1.0)) for p in (predicted, predicted)]
    (twice[0] + twice[1]).backward(retain_graph=True)
    assert torch.allclose(predicted.grad.double(), 2 * gradient, rtol=1e-6)
    (twice[0] + twice[1]).backward()
    assert torch.allclose(predicted.grad.double(), 4 * gradient, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_repeats_give_the_same_bits(compiled: Any, on_threads: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    predicted, target = torch.randn(900, 301).to(dtype), torch.randn(600, 301).to(dtype)
    rows = torch.randint(-1, 600, (900,), dtype=torch.int32)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    arguments = predicted, target, rows, number(7.0, wide), number(3.0, wide), True
    (loss, gradient), *others = on_threads(lambda: compiled.regression_loss(*arguments))
    for other in others:
        assert torch.equal(other[0], loss) and torch.equal(other[1], gradient)
    without = compiled.regression_loss(*arguments[:-1], False)
    assert torch.equal(without[0], loss) and without[1].shape == (0,)
    first, *others = on_threads(lambda: compiled.rescale(gradient, number(0.7, wide), number(3.0, wide)))
    assert all(torch.equal(other, first) for other in others)


def test_large_gradients_are_written_past_the_caches(compiled: Any) -> None:
    """More than 4 MiB a thread, rows that begin at every alignment: equal to the same rows a few at a time."""
    torch.manual_seed(0)
    predicted, target = misaligned(torch.randn(400, 12301)), misaligned(torch.randn(300, 12301))
    rows = torch.randint(-2, 300, (400,), dtype=torch.int32)
    one = number(1.0)
    gradient = compiled.regression_loss(predicted, target, rows, one, one, True)[1]
    for start in range(0, 400, 20):
        part = slice(start, start + 20)
        alone = compiled.regression_loss(predicted[part], target, rows[part], one, one, True)[1]
        assert torch.equal(gradient[part], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_is_converted_as_torch_does(compiled: Any, dtype: torch.dtype) -> None:
    """Read: all of them, times 1. Written: each halfway to the next, and a little off that, besides all exponents."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    one = number(1.0)
    got, numbers = compiled.rescale(every, one, one), ~every.isnan()
    assert torch.equal(got[numbers].view(torch.int16), every[numbers].view(torch.int16)) and got[~numbers].isnan().all()
    for factor in (1 + 2.0**-12, 1 + 2.0**-9, 1 - 2.0**-12, 1.5, 2.0**-10, 3 * 2.0**-13, 2.0**-24, 3e4, 1e38):
        got, want = compiled.rescale(every, number(factor), one), (every.float() * factor).to(dtype)
        assert torch.equal(got[numbers].view(torch.int16), want[numbers].view(torch.int16)), factor


def test_what_does_not_fit_is_refused(compiled: Any) -> None:
    predicted, target = tensors(6, torch.float32)
    one = number(1.0)
    for arguments, message in (
        ((predicted, target.half(), ROWS, one, one), "predicted and target must have the same dtype"),
        ((predicted, target[:, :2], ROWS, one, one), r"target must be \[rows, 6\]"),
        ((predicted, target, ROWS + 2, one, one), "slot 0 is 5, legal: negative, and rows below 5"),
        ((predicted, target, ROWS.long(), one, one), "slots must be int32"),
        ((predicted, target, ROWS[:3], one, one), "3 slots for 7 rows"),
        ((predicted, target, ROWS, torch.ones(2), one), "denominator must be one number"),
        ((predicted, target, ROWS, one, number(0.0)), "a gradient_scale of 0"),
    ):
        with pytest.raises(RuntimeError, match="emu2::regression_loss: .*" + message):
            regression_loss(*arguments)
    loss = compiled.regression_loss(predicted.requires_grad_(), target, ROWS, one, one, False)[0]
    with pytest.raises(RuntimeError, match="no gradient is needed"):
        loss.backward()


def test_gradcheck(implementation: str) -> None:
    predicted, target = tensors(5, torch.float64)
    for scale in (1.0, 7.0):
        numbers = number(9.0, torch.float64), number(scale, torch.float64)
        assert torch.autograd.gradcheck(
            lambda p, numbers=numbers: regression_loss(p, target, ROWS, *numbers), predicted.requires_grad_()
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(compiled: Any, dtype: torch.dtype) -> None:
    predicted, target = tensors(6, dtype)
    arguments = predicted.requires_grad_(), target, ROWS, number(3.0), torch.ones(1)
    torch.library.opcheck(compiled.regression_loss.default, (*arguments, True))
    torch.library.opcheck(compiled.regression_loss.default, (predicted.detach(), *arguments[1:], False))
    torch.library.opcheck(compiled.rescale.default, (target, number(3.0), torch.ones(1)))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("upstream", [2.0, 3.0])
def test_compile(implementation: str, backend: str, upstream: float) -> None:
    """One graph, in which nobody can compare the factor that comes back with the one folded in."""
    torch._dynamo.reset()
    predicted, target = tensors(50, torch.float32)
    arguments = target, ROWS, number(3.0), number(2.0)
    want, got = (predicted.clone().requires_grad_() for _ in range(2))
    loss = regression_loss(want, *arguments)
    (loss * upstream).backward()
    function = torch.compile(lambda p, *args: regression_loss(p, *args) * upstream, backend=backend, fullgraph=True)
    compiled_loss = function(got, *arguments)
    compiled_loss.backward()
    assert float(compiled_loss) == pytest.approx(float(loss) * upstream, rel=1e-6)
    assert torch.allclose(got.grad, want.grad, rtol=1e-6)
