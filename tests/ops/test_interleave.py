"""Against a loop over rows, forward and backward, to the bit: nothing is computed, only moved."""

from typing import Any

import pytest
import torch
from ops_cases import DTYPES, misaligned, strided
from torch import Tensor

from emu2_megatron.ops.interleave import interleave, interleave_reference, visual_slots

SLOTS = torch.tensor([[-1, 2, -1], [-2, -1, 0], [-1, -1, -2], [4, -1, 1], [-1, -1, -1]], dtype=torch.int32)
"""Of five visual rows, number 3 stands nowhere."""


def expected(text: Tensor, visual: Tensor, slots: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Result and both gradients, row by row."""
    out, of_text, of_visual = torch.zeros_like(text), torch.zeros_like(text), torch.zeros_like(visual)
    for place in [(s, b) for s in range(text.shape[0]) for b in range(text.shape[1])]:
        slot = int(slots[place])
        if slot >= 0:
            out[place], of_visual[slot] = visual[slot], upstream[place]
        elif slot == -1:
            out[place], of_text[place] = text[place], upstream[place]
    return out, of_text, of_visual


def rows(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Text, visual rows and a gradient for SLOTS; every element another number."""
    torch.manual_seed(width)
    return tuple(torch.randn(*shape, width).to(dtype) for shape in ((5, 3), (5,), (5, 3)))


# Around the blocks of 16 bytes that large outputs are written in; 1792 and 6656 are the model's.
@pytest.mark.parametrize("layout", [torch.clone, misaligned, strided])
@pytest.mark.parametrize("width", [1, 2, 7, 8, 33, 1792])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_go_where_the_slots_say(implementation: str, dtype: torch.dtype, width: int, layout: Any) -> None:
    text, visual, upstream = rows(width, dtype)
    want = expected(text, visual, SLOTS, upstream)
    text, visual = layout(text).requires_grad_(), layout(visual).requires_grad_()
    out = interleave(text, visual, SLOTS)
    out.backward(layout(upstream))
    for got, wanted in zip((out, text.grad, visual.grad), want, strict=True):
        assert got.dtype == dtype and torch.equal(got, wanted)


@pytest.mark.parametrize("layout", [torch.clone, misaligned])
def test_large_rows_are_written_past_the_caches(compiled: Any, layout: Any) -> None:
    """More than 4 MiB a thread, and a width that is no multiple of 16 bytes: rows begin at every alignment."""
    torch.manual_seed(0)
    text, visual, upstream = (layout(torch.randn(*shape, 16411)) for shape in ((200, 2), (70,), (200, 2)))
    slots = torch.full((400,), -1, dtype=torch.int32)
    slots[torch.randperm(400)[:90]] = torch.cat([torch.randperm(70), torch.full((20,), -2)]).int()
    want = expected(text, visual, slots.view(200, 2), upstream)
    got = compiled.interleave(text, visual, slots), *compiled.interleave_backward(upstream, slots, 70)
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


def test_flat_rows(implementation: str) -> None:
    text, visual, upstream = rows(6, torch.float32)
    want = expected(text, visual, SLOTS, upstream)[0]
    assert torch.equal(interleave(text.flatten(0, 1), visual, SLOTS.flatten()), want.flatten(0, 1))


def test_ranks_with_parts_of_a_sum(implementation: str) -> None:
    """Tensor parallelism: text is the sum of what two ranks hold, a visual row is written by one of them alone. Each
    keeps its own part of text's gradient, and the visual row's gradient is on the rank that wrote it."""
    text, visual, upstream = rows(8, torch.float64)
    parts = [torch.randn_like(text).requires_grad_() for _ in range(2)]
    visuals = [visual.clone().requires_grad_() for _ in range(2)]
    slots = [torch.where((SLOTS >= 0) & (SLOTS % 2 != rank), -2, SLOTS) for rank in range(2)]
    out = sum(interleave(*args) for args in zip(parts, visuals, slots, strict=True))
    want, of_text, of_visual = expected(parts[0] + parts[1], visual, SLOTS, upstream)
    assert torch.equal(out, want)
    out.backward(upstream)
    assert all(torch.equal(part.grad, of_text) for part in parts)
    assert torch.equal(visuals[0].grad + visuals[1].grad, of_visual)


def test_rows_that_are_not_wanted_are_not_read(implementation: str) -> None:
    """A placeholder's text, a visual row without a place, and a gradient that goes nowhere may hold anything."""
    text, visual, upstream = rows(5, torch.float32)
    want = expected(text, visual, SLOTS, upstream)
    text[SLOTS != -1] = visual[3] = upstream[SLOTS == -2] = float("nan")
    text.requires_grad_(), visual.requires_grad_()
    out = interleave(text, visual, SLOTS)
    out.backward(upstream)
    assert all(torch.equal(*pair) for pair in zip((out, text.grad, visual.grad), want, strict=True))


@pytest.mark.parametrize("shape", [(0, 2), (4, 0), (3, 2)])
def test_nothing_to_merge(implementation: str, shape: tuple[int, int]) -> None:
    """No positions, or no pictures; a weight behind no row gets a zero gradient, not None: gradient buffers wait for
    every parameter."""
    weight = torch.randn(4, 6, requires_grad=True)
    text = torch.randn(*shape, 4, requires_grad=True)
    out = interleave(text, torch.empty(0, 6) @ weight.T, torch.full(shape, -1, dtype=torch.int32))
    assert torch.equal(out, text)
    out.sum().backward()
    assert weight.grad is not None and not weight.grad.any() and text.grad is not None and (text.grad == 1).all()


def test_threads_and_repeats_give_the_same_bits(compiled: Any, on_threads: Any) -> None:
    text, visual = torch.randn(700, 512), torch.randn(300, 512)
    slots = torch.full((700,), -1, dtype=torch.int32)
    slots[torch.randperm(700)[:300]] = torch.arange(300, dtype=torch.int32)
    want = interleave_reference(text, visual, slots)
    assert all(torch.equal(out, want) for out in on_threads(lambda: compiled.interleave(text, visual, slots)))
    first, *others = on_threads(lambda: compiled.interleave_backward(text, slots, 300))
    assert all(torch.equal(*pair) for out in others for pair in zip(out, first, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({(0, 0): 5}, r"emu2::interleave: slot 0 is 5, legal: -2, -1, and rows below 5"),
        ({(4, 2): -3}, r"emu2::interleave: slot 14 is -3, legal"),
        ({(2, 0): 4}, r"emu2::interleave: slots 6 and 9 both name row 4"),
    ],
)
def test_bad_slots(compiled: Any, change: dict[tuple[int, int], int], message: str) -> None:
    text, visual, upstream = rows(3, torch.float32)
    slots = SLOTS.clone()
    for place, value in change.items():
        slots[place] = value
    with pytest.raises(RuntimeError, match=message):
        interleave(text, visual, slots)
    with pytest.raises(RuntimeError, match=message.replace("interleave", "interleave_backward")):
        compiled.interleave_backward(upstream, slots, 5)


def test_what_does_not_fit_is_refused(compiled: Any) -> None:
    text, visual, _ = rows(3, torch.float32)
    for arguments, message in (
        ((text, visual.double(), SLOTS), "text and visual must have the same dtype"),
        ((text, visual[:, :2], SLOTS), r"visual must be \[rows, 3\]"),
        ((text, visual, SLOTS.long()), "slots must be int32"),
        ((text, visual, SLOTS[:4]), "12 slots for 15 rows"),
        ((text.int(), visual.int(), SLOTS), "dtype must be float32, float16 or bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            interleave(*arguments)


def test_gradcheck(implementation: str) -> None:
    text, visual, _ = rows(3, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *args: interleave(*args, SLOTS), (text.requires_grad_(), visual.requires_grad_())
    )


@pytest.mark.parametrize("visual_rows", [0, 5])
def test_opcheck(compiled: Any, visual_rows: int) -> None:
    text, visual, upstream = rows(3, torch.bfloat16)
    slots = torch.where(SLOTS < visual_rows, SLOTS, -1)
    arguments = text.requires_grad_(), visual[:visual_rows].requires_grad_(), slots
    torch.library.opcheck(compiled.interleave.default, arguments)
    torch.library.opcheck(compiled.interleave_backward.default, (upstream, slots, visual_rows))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(implementation: str, backend: str) -> None:
    """Nothing breaks the graph, and the result is the same, also for another length."""
    torch._dynamo.reset()
    function = torch.compile(lambda *args: interleave(*args) * 2, backend=backend, fullgraph=True)
    for copies in (1, 2, 3):
        text, visual, upstream = rows(6, torch.float32)
        text, upstream, slots = (t.repeat(copies, *[1] * (t.dim() - 1)) for t in (text, upstream, SLOTS))
        slots[5:][slots[5:] >= 0] = -1
        want = expected(text, visual, slots, 2 * upstream)
        text.requires_grad_(), visual.requires_grad_()
        out = function(text, visual, slots)
        out.backward(upstream)
        assert torch.equal(out, 2 * want[0])
        assert torch.equal(text.grad, want[1]) and torch.equal(visual.grad, want[2])


def test_slots_of_positions() -> None:
    assert visual_slots(torch.tensor([4, 0, 3]), 3, 2).tolist() == [[1, -1], [-1, 2], [0, -1]]
    none = visual_slots(torch.empty(0, dtype=torch.long), 2, 1)
    assert none.tolist() == [[-1], [-1]] and none.dtype == torch.int32
    for positions in ([6], [-1], [1, 2, 1]):
        with pytest.raises(ValueError, match="visual rows go to"):
            visual_slots(torch.tensor(positions), 3, 2)
