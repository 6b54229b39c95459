"""What every implementation of the compiled ops owes: cases, references written from the formulas, and tolerances.

`tests/csrc` runs them on the CUDA kernels under the emulator, `tests/gpu` on a GPU. An implementation is a `Kernels`:
the signatures of `torch.ops.emu2`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TEXT, NOTHING = -1, -2
NAN = float("nan")


class Kernels(Protocol):
    device: str

    def interleave(self, text: Tensor, visual: Tensor, slot: Tensor) -> Tensor: ...

    def interleave_backward(self, gradient: Tensor, slot: Tensor, visual_rows: int) -> tuple[Tensor, Tensor]: ...

    def regression_loss(
        self,
        predicted: Tensor,
        target: Tensor,
        slot: Tensor,
        denominator: Tensor,
        gradient_scale: Tensor,
        needs_gradient: bool,
    ) -> tuple[Tensor, Tensor]: ...

    def rescale(self, gradient: Tensor, upstream: Tensor, folded: Tensor) -> Tensor: ...

    def pool(self, hidden: Tensor, queries: int, dtype: torch.dtype) -> Tensor: ...

    def pool_backward(self, gradient: Tensor, patches: int, dtype: torch.dtype) -> Tensor: ...


class Rows(NamedTuple):
    """A case of interleave and of the regression loss."""

    rows: int
    visual_rows: int
    width: int
    offset: int = 0
    """Elements by which matrices start beside an aligned address."""
    only: int | None = None
    """The one matrix that does so, of the arguments (0, 1); None: all do, outputs too where they can be chosen."""


class Windows(NamedTuple):
    """A case of pooling."""

    images: int
    side: int
    window: int
    width: int
    offset: int = 0
    only: int | None = None
    """0 is the patches, 1 the windows' gradient."""


ROWS = (
    Rows(13, 7, 64),  # vectors; fewer of them than a warp or block has threads
    Rows(9, 4, 37),  # odd
    Rows(5, 5, 72, offset=1),  # would do for vectors, but stands beside an aligned address
    Rows(5, 5, 72, offset=1, only=0),
    Rows(5, 5, 72, offset=1, only=1),
    Rows(6, 2, 36, offset=2),  # 4 bytes at a time in 16 bits
    Rows(40, 11, 1032),  # a warp's loop with a tail, more rows than a small device holds warps
    Rows(3, 1, 8200),  # a block's loop with a tail, in both widths of a vector
    Rows(300, 129, 8),  # more rows than a block has threads: the final sum goes round
    Rows(17, 0, 24),  # no visual rows
    Rows(1, 1, 1),
    Rows(0, 0, 16),
    Rows(0, 3, 16),
)
WINDOWS = (
    Windows(2, 4, 2, 64),
    Windows(3, 4, 1, 24),
    Windows(1, 6, 3, 37),
    Windows(2, 8, 4, 40, offset=1),
    Windows(2, 8, 4, 40, offset=1, only=0),
    Windows(2, 8, 4, 40, offset=1, only=1),
    Windows(1, 4, 4, 8),
    Windows(1, 2, 2, 2056),  # a block's loop with a tail
    Windows(1, 9, 3, 1),
    Windows(0, 4, 2, 16),
)


def matrix(case: Rows | Windows, number: int, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Standard normal values, exact in the dtype, for the argument of this number, where the case wants it to start."""
    offset = case.offset if case.only in (None, number) else 0
    generator = torch.Generator().manual_seed(number)
    values = torch.randn(shape, generator=generator).to(dtype)
    memory = torch.empty(values.numel() + offset, dtype=dtype, device=device)[offset:]
    return memory.view(shape).copy_(values)


def slots(case: Rows, device: str) -> Tensor:
    """Every visual row once (as many as fit), in no order; of the other rows, every third is nobody's."""
    generator = torch.Generator().manual_seed(case.rows)
    slot = torch.full((case.rows,), TEXT, dtype=torch.int32)
    slot[2::3] = NOTHING
    visual = torch.randperm(case.visual_rows, generator=generator, dtype=torch.int32)[: case.rows]
    slot[torch.randperm(case.rows, generator=generator)[: len(visual)]] = visual
    return slot.to(device)


def scalar(value: float, device: str) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=device)


def equal_to_the_bit(a: Tensor, b: Tensor) -> bool:
    """Also where both are NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (x.reshape(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)


def check_interleave(kernels: Kernels, case: Rows, dtype: torch.dtype) -> list[Tensor]:
    """Rows are moved, not computed with: every bit must arrive."""
    device, shape = kernels.device, (case.rows, case.width)
    text, gradient = matrix(case, 0, shape, dtype, device), matrix(case, 0, shape, dtype, device).neg_()
    visual = matrix(case, 1, (case.visual_rows, case.width), dtype, device)
    slot = slots(case, device)
    out = kernels.interleave(text, visual, slot)
    text_gradient, visual_gradient = kernels.interleave_backward(gradient, slot, case.visual_rows)
    wanted, wanted_text = torch.zeros_like(text), torch.zeros_like(text)
    wanted_visual = torch.zeros_like(visual)
    for row, source in enumerate(slot.tolist()):
        if source == TEXT:
            wanted[row], wanted_text[row] = text[row], gradient[row]
        elif source >= 0:
            wanted[row], wanted_visual[source] = visual[source], gradient[row]
    assert equal_to_the_bit(out, wanted), "interleave"
    assert equal_to_the_bit(text_gradient, wanted_text), "text gradient"
    assert equal_to_the_bit(visual_gradient, wanted_visual), "visual gradient"
    return [out, text_gradient, visual_gradient]


def rounding(dtype: torch.dtype) -> tuple[float, float]:
    """(relative, absolute) error of one rounding to the dtype after some five fp32 operations (2^-24 each).

    Half a unit in the last place is at most 2^-11 of the value in fp16 and 2^-8 in bf16. Below fp16's normal numbers it
    is absolute: half of 2^-24. In fp32 the operations count: the difference, two products, the division.
    """
    return {
        torch.float32: (5 * 2**-24, 0.0),
        torch.float16: (2**-11 + 5 * 2**-24, 2**-25 * (1 + 2**-10)),
        torch.bfloat16: (2**-8 + 5 * 2**-24, 0.0),
    }[dtype]


def assert_rounded(found: Tensor, wanted: Tensor, what: str) -> None:
    """`found` is `wanted` (float64) computed in fp32 and rounded once."""
    relative, absolute = rounding(found.dtype)
    wrong = (found.double() - wanted).abs() > relative * wanted.abs() + absolute
    wrong |= found.isnan()
    assert not wrong.any(), f"{what}: {int(wrong.sum())} of {wrong.numel()} values"


def check_regression_loss(
    kernels: Kernels, case: Rows, dtype: torch.dtype, scale: float = 1.0, spread: float = 1.0
) -> list[Tensor]:
    """Against float64; rows that no slot names and rows nobody needs hold NaN.

    The loss is a sum of terms that are none negative, so its relative error is below the number of roundings on a
    value's way times 2^-24: width / 32 additions in a lane, rows / 256 in a thread of the final sum, 13 between lanes
    and warps, and a few for the difference, its square and the division. `spread` is the order of the differences.
    """
    device = kernels.device
    predicted = matrix(case, 0, (case.rows, case.width), dtype, device).mul_(spread)
    target = matrix(case, 1, (case.visual_rows, case.width), dtype, device).mul_(spread)
    slot = slots(case, device)
    used = slot >= 0
    predicted[~used] = NAN
    named = torch.zeros(case.visual_rows, dtype=torch.bool, device=device)
    named[slot[used].long()] = True
    target[~named] = NAN
    denominator = 0.75 * max(1, case.rows) * case.width
    arguments = predicted, target, slot, scalar(denominator, device), scalar(scale, device)
    loss, gradient = kernels.regression_loss(*arguments, True)
    loss_alone, _ = kernels.regression_loss(*arguments, False)

    error = torch.zeros(predicted.shape, dtype=torch.float64, device=device)
    error[used] = predicted[used].double() - target[slot[used].long()].double()
    wanted = error.square().sum() / denominator
    additions = case.width / 32 + case.rows / 256 + 20
    assert abs(loss.double() - wanted) <= additions * 2**-24 * wanted, f"loss {loss.item()}, wanted {wanted.item()}"
    assert equal_to_the_bit(loss, loss_alone), "the loss depends on whether the gradient is wanted"
    assert_rounded(gradient, 2 * scale * error / denominator, "gradient")
    return [loss, gradient]


def check_loss_scale(kernels: Kernels) -> None:
    """fp16: a gradient that is below all numbers without the loss scale arrives with it."""
    case = Rows(8, 8, 1024)
    device = kernels.device
    for scale in (1.0, 65536.0):
        _, gradient = check_regression_loss(kernels, case, torch.float16, scale=scale, spread=2.0**-17)
        assert bool(gradient.any()) == (scale > 1)
        # Backward is called with the scale itself: folded / folded is 1, nothing changes.
        again = kernels.rescale(gradient, scalar(scale, device), scalar(scale, device))
        assert equal_to_the_bit(again, gradient)


def check_rescale(kernels: Kernels, elements: int, offset: int, dtype: torch.dtype) -> list[Tensor]:
    case = Rows(1, 1, elements, offset)
    gradient = matrix(case, 0, (elements,), dtype, kernels.device)
    out = kernels.rescale(gradient, scalar(3.0, kernels.device), scalar(7.0, kernels.device))
    assert_rounded(out, gradient.double() * 3 / 7, "rescale")
    return [out]


RESCALES = ((0, 0), (1, 0), (1024, 0), (1027, 0), (4103, 0), (1024, 1))  # (elements, offset)


def check_pool(kernels: Kernels, case: Windows, dtype: torch.dtype, out_dtype: torch.dtype) -> list[Tensor]:
    """Against float64. Forward adds up to 16 values before the one rounding: that many units of the largest sum."""
    device, side, window = kernels.device, case.side, case.window
    across, patches = side // window, 1 + side * side
    hidden = matrix(case, 0, (case.images, patches, case.width), dtype, device)
    gradient = matrix(case, 1, (case.images, across * across, case.width), out_dtype, device)
    hidden[:, 0] = NAN  # CLS
    out = kernels.pool(hidden, across * across, out_dtype)
    hidden_gradient = kernels.pool_backward(gradient, patches, dtype)

    wanted = torch.zeros(gradient.shape, dtype=torch.float64, device=device)
    magnitude = torch.zeros_like(wanted)
    wanted_gradient = torch.zeros(hidden.shape, dtype=torch.float64, device=device)
    for y in range(side):
        for x in range(side):
            place, patch = y // window * across + x // window, 1 + y * side + x
            wanted[:, place] += hidden[:, patch].double() / window**2
            magnitude[:, place] += hidden[:, patch].double().abs() / window**2
            wanted_gradient[:, patch] = gradient[:, place].double() / window**2
    relative, absolute = rounding(out_dtype)
    allowed = relative * wanted.abs() + absolute + (window**2 + 2) * 2**-24 * magnitude
    assert not out.isnan().any(), "pool: NaN"
    assert ((out.double() - wanted).abs() <= allowed).all(), "pool"
    assert_rounded(hidden_gradient, wanted_gradient, "pool's gradient")
    return [out, hidden_gradient]


def shift(case: Rows | Windows) -> str:
    return "" if case.offset == 0 else f"+{case.offset}{'' if case.only is None else 'ab'[case.only]}"


Check = Callable[[Kernels], list[Tensor]]


def all_checks() -> dict[str, Check]:
    """Every case by a name that pytest can show. A check returns its outputs, for comparisons to the bit."""
    checks: dict[str, Check] = {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for rows in ROWS:
            place = f"{name}-{rows.rows}x{rows.width}-{rows.visual_rows}{shift(rows)}"
            checks[f"interleave-{place}"] = partial(check_interleave, case=rows, dtype=dtype)
            checks[f"regression_loss-{place}"] = partial(check_regression_loss, case=rows, dtype=dtype)
        for elements, offset in RESCALES:
            check = partial(check_rescale, elements=elements, offset=offset, dtype=dtype)
            checks[f"rescale-{name}-{elements}+{offset}"] = check
        for out_dtype in DTYPES:
            names = f"{name}-{str(out_dtype).removeprefix('torch.')}"
            for case in WINDOWS:
                place = f"{names}-{case.images}x{case.side}-{case.window}x{case.width}{shift(case)}"
                checks[f"pool-{place}"] = partial(check_pool, case=case, dtype=dtype, out_dtype=out_dtype)
    return checks
