"""The CUDA kernels on a GPU, by the checks that `tests/csrc` runs on the emulator."""

import subprocess
import sys

import pytest
import torch
from kernel_cases import Rows, all_checks, check_loss_scale, equal_to_the_bit, matrix, scalar, slots
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CHECKS = all_checks()


class OnDevice:
    """torch.ops.emu2 as `kernel_cases.Kernels`."""

    device = "cuda"

    def interleave(self, text: Tensor, visual: Tensor, slot: Tensor) -> Tensor:
        return torch.ops.emu2.interleave(text, visual, slot)

    def interleave_backward(self, gradient: Tensor, slot: Tensor, visual_rows: int) -> tuple[Tensor, Tensor]:
        return torch.ops.emu2.interleave_backward(gradient, slot, visual_rows)

    def regression_loss(
        self,
        predicted: Tensor,
        target: Tensor,
        slot: Tensor,
        denominator: Tensor,
        gradient_scale: Tensor,
        needs_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        arguments = predicted, target, slot, denominator, gradient_scale, needs_gradient
        return torch.ops.emu2.regression_loss(*arguments)

    def rescale(self, gradient: Tensor, upstream: Tensor, folded: Tensor) -> Tensor:
        return torch.ops.emu2.rescale(gradient, upstream, folded)

    def pool(self, hidden: Tensor, queries: int, dtype: torch.dtype) -> Tensor:
        return torch.ops.emu2.pool(hidden, queries, dtype)

    def pool_backward(self, gradient: Tensor, patches: int, dtype: torch.dtype) -> Tensor:
        return torch.ops.emu2.pool_backward(gradient, patches, dtype)


@pytest.fixture(scope="module")
def kernels() -> OnDevice:
    from emu2_megatron.platform import library

    assert library.has_cuda, f"the ops are not there for CUDA: {library.problem or 'built without nvcc'}"
    return OnDevice()


@pytest.mark.parametrize("name", CHECKS)
def test_numbers_and_bits(kernels: OnDevice, name: str) -> None:
    first, second = CHECKS[name](kernels), CHECKS[name](kernels)
    assert all(map(equal_to_the_bit, first, second))


def test_loss_scale(kernels: OnDevice) -> None:
    check_loss_scale(kernels)


def test_a_graph_replays_the_loss(kernels: OnDevice) -> None:
    """Captured once, replayed on other values: nothing waits for the host, and the counter is 0 again each time."""
    case = Rows(40, 11, 1032)
    predicted = matrix(case, 0, (case.rows, case.width), torch.bfloat16, "cuda")
    target = matrix(case, 1, (case.visual_rows, case.width), torch.bfloat16, "cuda")
    arguments = predicted, target, slots(case, "cuda"), scalar(7.0, "cuda"), scalar(2.0, "cuda"), True
    kernels.regression_loss(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = kernels.regression_loss(*arguments)
    for _ in range(3):
        predicted.mul_(1.5)
        graph.replay()
        wanted_loss, wanted_gradient = kernels.regression_loss(*arguments)
        assert equal_to_the_bit(loss, wanted_loss) and equal_to_the_bit(gradient, wanted_gradient)


TRAP = """
import torch
from emu2_megatron.platform import library
rows = torch.zeros(4, 8, device="cuda")
slot = torch.tensor([-1, 0, 3, -2], dtype=torch.int32, device="cuda")
torch.ops.emu2.interleave(rows, rows[:3], slot)
torch.cuda.synchronize()
"""


def test_a_slot_out_of_range_traps(kernels: OnDevice) -> None:
    """In a process of its own: nothing runs on a context behind a trap."""
    done = subprocess.run([sys.executable, "-c", TRAP], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "launch failure" in done.stderr, done.stderr
