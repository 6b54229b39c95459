"""The schedule in time, against the formula of the bubble."""

import pytest

from emu2_megatron.parallel.schedule import operations, timeline


@pytest.mark.parametrize(("stages", "chunks", "micro_batches"), [(1, 1, 3), (4, 1, 8), (4, 1, 2), (2, 3, 8), (4, 3, 8)])
def test_every_micro_batch_goes_through_every_part_once(stages: int, chunks: int, micro_batches: int) -> None:
    for stage in range(stages):
        done = operations(stages, chunks, micro_batches, stage)
        assert len(done) == len(set(done)) == 2 * chunks * micro_batches


@pytest.mark.parametrize(("stages", "chunks", "micro_batches"), [(1, 1, 3), (4, 1, 16), (2, 3, 8), (4, 5, 16)])
def test_the_whole_takes_what_the_formula_says(stages: int, chunks: int, micro_batches: int) -> None:
    """(m + (p - 1) / v) x (forward + backward of a stage), with a backward pass twice a forward one."""
    blocks = timeline(stages, chunks, micro_batches, [1.0] * (stages * chunks), [2.0] * (stages * chunks))
    end = max(block.end for row in blocks for block in row)
    assert end == pytest.approx((micro_batches + (stages - 1) / chunks) * 3 * chunks)


def test_nothing_starts_before_what_it_needs() -> None:
    stages, chunks, micro_batches = 4, 2, 8
    blocks = timeline(stages, chunks, micro_batches, [1.0, 2.0] * 4, [3.0, 1.0] * 4)
    when = {(b.operation.forward, b.operation.chunk * stages + s, b.operation.micro_batch): b
            for s, row in enumerate(blocks) for b in row}  # fmt: skip
    for (forward, part, micro_batch), block in when.items():
        if forward and part:
            assert block.start >= when[True, part - 1, micro_batch].end
        if not forward:
            needs = (True, part, micro_batch) if part == 7 else (False, part + 1, micro_batch)
            assert block.start >= when[needs].end
    for row in blocks:
        assert all(a.end <= b.start for a, b in zip(row, row[1:], strict=False))
