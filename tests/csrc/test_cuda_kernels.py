"""The CUDA kernels on the emulator: numbers, bits, and what they refuse. `tests/gpu` runs the same checks on a GPU."""

import pytest
import torch
from emulation import DTYPE_CODES, Emulated, Stopped
from kernel_cases import DTYPES, Rows, all_checks, check_loss_scale, equal_to_the_bit, matrix, scalar, slots

CHECKS = all_checks()
SCHEDULES = ((1, 0), (1, 1), (2, 2), (3, 3), (5, 4))  # (multiprocessors, seed)


@pytest.mark.parametrize("name", CHECKS)
def test_numbers(emulated: Emulated, name: str) -> None:
    emulated.configure(2, 0)
    CHECKS[name](emulated)


@pytest.mark.parametrize("kernel", ["interleave", "regression_loss", "rescale", "pool"])
def test_schedule_does_not_change_a_bit(emulated: Emulated, kernel: str) -> None:
    """However many blocks there are, and in whatever order threads run."""
    for name, check in CHECKS.items():
        if not name.startswith(kernel) or "float16-float16" in name:
            continue
        first = None
        for multiprocessors, seed in SCHEDULES:
            emulated.configure(multiprocessors, seed)
            outputs = check(emulated)
            first = first or outputs
            assert all(map(equal_to_the_bit, first, outputs)), f"{name}, {multiprocessors} blocks, seed {seed}"


def test_loss_scale(emulated: Emulated) -> None:
    emulated.configure(2, 0)
    check_loss_scale(emulated)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rescale_in_place(emulated: Emulated, dtype: torch.dtype) -> None:
    gradient = torch.randn(1030).to(dtype)
    wanted = emulated.rescale(gradient, scalar(3.0, "cpu"), scalar(7.0, "cpu"))
    numbers = scalar(3.0, "cpu"), scalar(7.0, "cpu")
    emulated.call("emu2_rescale", gradient, *numbers, gradient, 1030, DTYPE_CODES[dtype])
    assert equal_to_the_bit(gradient, wanted)


def test_sizes_that_cannot_be_are_refused(emulated: Emulated) -> None:
    values = torch.zeros(64)
    for images, side, window, width in ((1, 5, 2, 1), (1, 4, 0, 1), (2**20, 40, 2, 1), (-1, 4, 2, 1)):
        for name in ("emu2_pool", "emu2_pool_backward"):
            with pytest.raises(AssertionError, match="returned 1$"):
                emulated.call(name, values, values, images, side, window, width, 0, 0)
    with pytest.raises(AssertionError, match="returned 1$"):
        emulated.call("emu2_interleave", values, values, values, values, 2**31, 1, 4)
    with pytest.raises(AssertionError, match="returned 1$"):
        emulated.call("emu2_rescale", values, values, values, values, 4, 3)


def test_slots_out_of_range_trap(emulated: Emulated) -> None:
    emulated.configure(2, 0)
    case = Rows(6, 3, 16)
    text, visual = (matrix(case, 0, (rows, case.width), torch.float32, "cpu") for rows in (case.rows, case.visual_rows))
    slot = slots(case, "cpu")
    slot[4] = case.visual_rows
    calls = (
        lambda k: k.interleave(text, visual, slot),
        lambda k: k.interleave_backward(text, slot, case.visual_rows),
        lambda k: k.regression_loss(text, visual, slot, scalar(1, "cpu"), scalar(1, "cpu"), True),
    )
    for call in calls:
        with pytest.raises(Stopped, match="^trap: .*[.]cu:"):
            call(emulated)
    slot[4] = 2**31 - 1
    with pytest.raises(Stopped, match="^trap"):
        emulated.interleave(text, visual, slot)
