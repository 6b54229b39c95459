"""Against a loop over rows, forward and backward."""

import torch

from emu2_megatron.ops.interleave import interleave
from emu2_megatron.ops.regression_loss import squared_error_sum


def test_interleave() -> None:
    S, B, D = 5, 3, 4
    text = torch.randn(S, B, D, dtype=torch.float64, requires_grad=True)
    visual = torch.randn(4, D, dtype=torch.float64, requires_grad=True)
    places = [(2, 0), (3, 0), (0, 2), (4, 1)]  # (s, b) of each visual row
    positions = torch.tensor([s * B + b for s, b in places])
    out = interleave(text, visual, positions)
    for s in range(S):
        for b in range(B):
            wanted = visual[places.index((s, b))] if (s, b) in places else text[s, b]
            assert torch.equal(out[s, b], wanted)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    assert text.grad is not None and visual.grad is not None
    for r, (s, b) in enumerate(places):
        assert torch.equal(visual.grad[r], upstream[s, b]) and not text.grad[s, b].any()
    assert torch.equal(text.grad[0, 0], upstream[0, 0])


def test_interleave_without_pictures_still_reaches_the_projection() -> None:
    """A weight behind no row gets a zero gradient, not None: gradient buffers wait for every parameter."""
    weight = torch.randn(4, 6, requires_grad=True)
    out = interleave(torch.randn(2, 1, 4), torch.empty(0, 6) @ weight.T, torch.empty(0, dtype=torch.long))
    out.sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def test_squared_error_sum() -> None:
    predicted = torch.tensor([[1.0, 2.0], [3.0, -1.0]], requires_grad=True)
    target = torch.tensor([[0.0, 4.0], [3.0, 1.0]], requires_grad=True)
    loss = squared_error_sum(predicted, target)
    loss.backward()
    assert loss.item() == 1 + 4 + 0 + 4
    assert predicted.grad is not None and predicted.grad.tolist() == [[2, -4], [0, -4]]
    assert target.grad is None
    # bf16 inputs are summed in fp32: 4096 ones are lost in bf16, which has no integer between 256 and 258.
    ones = torch.ones(64, 64, dtype=torch.bfloat16)
    assert squared_error_sum(ones, torch.zeros_like(ones)).item() == 4096
