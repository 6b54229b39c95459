"""Runs of flat elements as boxes: against marking every element one by one."""

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emu2_megatron.checkpoint.pieces import Pieces, Region, add, boxes

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@settings(deadline=None)
@given(SHAPES, st.data())
def test_boxes_are_the_run(shape: tuple[int, ...], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, prod(shape)))
    stop = data.draw(st.integers(start, prod(shape)))
    marks = torch.zeros(shape, dtype=torch.int)
    found = list(boxes(shape, start, stop))
    for offset, size in found:
        assert min(size) > 0
        marks[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))] += 1
    wanted = torch.zeros(prod(shape), dtype=torch.int)
    wanted[start:stop] = 1
    assert torch.equal(marks.flatten(), wanted)
    assert len(found) <= 2 * len(shape) - 1


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.data())
def test_pieces_of_a_tensor_whose_rows_stand_apart(rows: int, columns: int, data: st.DataObject) -> None:
    """A rank's tensor of 2 rows halves, as of a gated MLP: each element must land where the whole has it, as a view."""
    ranks = 3
    whole = torch.arange(2 * rows * ranks * columns).view(2 * rows * ranks, columns)
    seen = torch.zeros_like(whole)
    for rank in range(ranks):
        local = torch.cat([half[rank * rows : (rank + 1) * rows] for half in whole.chunk(2)]).flatten()
        regions = [Region(0, rows, (rank * rows, 0)), Region(rows, rows, ((ranks + rank) * rows, 0))]
        cut = data.draw(st.integers(0, len(local)))  # two data-parallel ranks
        for start, stop in ((0, cut), (cut, len(local))):
            pieces = Pieces(tuple(whole.shape), whole.dtype)
            add(pieces, (2 * rows, columns), regions, start, local[start:stop])
            for (row, column), box in pieces.boxes.items():
                place = (slice(row, row + box.shape[0]), slice(column, column + box.shape[1]))
                assert torch.equal(whole[place], box)
                assert box.untyped_storage().data_ptr() == local.untyped_storage().data_ptr()
                seen[place] += 1
    assert (seen == 1).all()


def test_rows_in_no_region_are_left_out() -> None:
    """Padding of the vocabulary: 3 real rows of 4."""
    pieces = Pieces((3, 2), torch.float32)
    add(pieces, (4, 2), [Region(0, 3, (0, 0))], 3, torch.arange(3.0, 8.0))
    assert {offset: box.tolist() for offset, box in pieces.boxes.items()} == {(1, 1): [[3.0]], (2, 0): [[4.0, 5.0]]}
    padding = Pieces((3, 2), torch.float32)
    add(padding, (4, 2), [Region(0, 0, (4, 0))], 0, torch.arange(8.0))
    assert padding.boxes == {} and padding.nbytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_finite(dtype: torch.dtype, value: float) -> None:
    boxes = {(0,): torch.zeros(5, dtype=dtype), (5,): torch.ones(2, dtype=dtype)}
    pieces = Pieces((7,), dtype, boxes)
    assert pieces.finite and Pieces((7,), dtype).finite
    boxes[(5,)][1] = value
    assert not pieces.finite
    assert Pieces((1,), torch.uint8, {(0,): torch.ones(1, dtype=torch.uint8)}).finite
