"""What megatron-core's pipeline schedules do on every stage, in which order: for memory (how many micro-batches are in
flight) and for the picture of a step.

Stages s of PP, each with VPP parts ("model chunks"); part j of stage s is part j * PP + s of the whole pipeline.
Follows `megatron.core.pipeline_parallel.schedules` (1F1B, arXiv 2104.04473; interleaved with groups of PP
micro-batches).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple


class Operation(NamedTuple):
    """One micro-batch through one part."""

    forward: bool
    chunk: int
    """Which of the stage's parts."""
    micro_batch: int


class Block(NamedTuple):
    """An operation in time."""

    operation: Operation
    start: float
    end: float


@lru_cache
def operations(stages: int, chunks: int, micro_batches: int, stage: int) -> tuple[Operation, ...]:
    """What a stage does, in order."""
    order = [
        (chunk, micro_batch)
        for start in range(0, micro_batches, stages)
        for chunk in range(chunks)
        for micro_batch in range(start, min(start + stages, micro_batches))
    ]
    warmup = stages - stage - 1 if chunks == 1 else 2 * (stages - stage - 1) + (chunks - 1) * stages
    warmup = min(warmup, len(order))
    forward = [Operation(True, chunk, micro_batch) for chunk, micro_batch in order]
    backward = [Operation(False, chunks - 1 - chunk, micro_batch) for chunk, micro_batch in order]
    done = forward[:warmup]
    for pair in zip(forward[warmup:], backward, strict=False):
        done += pair
    return tuple(done + backward[len(order) - warmup :])


@lru_cache
def in_flight(stages: int, chunks: int, micro_batches: int, stage: int) -> frozenset[tuple[int, ...]]:
    """How many micro-batches each part of a stage remembers, at all moments when it remembers most in sum."""
    # The pattern repeats with every group of micro-batches: four groups have all there is to see.
    alive = [0] * chunks
    moments = set()
    for operation in operations(stages, chunks, min(micro_batches, 4 * stages), stage):
        alive[operation.chunk] += 1 if operation.forward else -1
        moments.add(tuple(alive))
    most = max(map(sum, moments))
    return frozenset(moment for moment in moments if sum(moment) == most)


def timeline(
    stages: int, chunks: int, micro_batches: int, forward: Sequence[float], backward: Sequence[float]
) -> list[list[Block]]:
    """When every stage does what.

    Args:
        stages, chunks, micro_batches: the schedule.
        forward, backward: seconds of one micro-batch through each part, in the order data flows.

    Returns:
        Blocks of each stage, from time 0.
    """
    parts = stages * chunks
    todo = [list(operations(stages, chunks, micro_batches, stage)) for stage in range(stages)]
    blocks: list[list[Block]] = [[] for _ in range(stages)]
    ended: dict[tuple[bool, int, int], float] = {}
    position = [0] * stages
    while any(position[s] < len(todo[s]) for s in range(stages)):
        before = sum(position)
        for stage in range(stages):
            while position[stage] < len(todo[stage]):
                operation = todo[stage][position[stage]]
                part = operation.chunk * stages + stage
                if operation.forward:
                    needs = (True, part - 1, operation.micro_batch) if part else None
                else:
                    last = part == parts - 1
                    needs = (last, part if last else part + 1, operation.micro_batch)
                if needs is not None and needs not in ended:
                    break
                ready = ended[needs] if needs is not None else 0.0
                start = max(ready, blocks[stage][-1].end if blocks[stage] else 0.0)
                end = start + (forward if operation.forward else backward)[part]
                ended[operation.forward, part, operation.micro_batch] = end
                blocks[stage].append(Block(operation, start, end))
                position[stage] += 1
        assert sum(position) > before, "stages wait for each other"
    return blocks
