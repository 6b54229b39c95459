"""Against silu(gate) * up left to autograd: the same operations in the same precision, so the same bits."""

import pytest
import torch
from torch.nn import functional as F

from emu2_megatron.ops.swiglu import swiglu


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 2, 14), (3, 0, 8), (64, 1, 176)])
def test_value_and_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ours = torch.randn(shape, dtype=dtype).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    gate, up = theirs.chunk(2, dim=-1)
    value, wanted = swiglu(ours), F.silu(gate) * up
    assert torch.equal(value, wanted)
    upstream = torch.randn_like(value)
    value.backward(upstream)
    wanted.backward(upstream)
    assert ours.grad is not None and theirs.grad is not None and torch.equal(ours.grad, theirs.grad)


def test_against_the_formula() -> None:
    assert torch.autograd.gradcheck(swiglu, torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True))
    gate, up = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([3.0, 2.0, 0.5])
    wanted = torch.tensor([0.0, 2 * 0.7310586, -1 * 0.1192029])  # gate * up / (1 + exp(-gate)), by hand
    torch.testing.assert_close(swiglu(torch.cat([gate, up])), wanted)
