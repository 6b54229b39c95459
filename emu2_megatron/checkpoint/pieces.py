"""Parts of a global tensor, as torch's distributed checkpoint wants them: boxes with offsets.

The distributed optimizer gives a rank a run of the *flat* elements of a parameter. In the parameter's own coordinates
such a run is a few boxes: the end of a row, whole rows, the beginning of a row. Stored that way it needs no gathering
when it is written, and any layout can read it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Region:
    """Where a block of whole rows (along dimension 0) of a rank's tensor stands in the global one."""

    first: int
    """The first of these rows in the rank's tensor."""
    rows: int
    """How many."""
    offset: Shape
    """Where its corner stands in the global tensor."""


@dataclass
class Pieces:
    """What one rank has of a global tensor. torch's planners know it by the methods with underscores."""

    shape: Shape
    """Of the global tensor."""
    dtype: torch.dtype
    boxes: dict[Shape, Tensor] = field(default_factory=dict)
    """Offset in the global tensor to a view of what stands there."""

    def size(self) -> torch.Size:
        """The global shape, under the name tensors have for it."""
        return torch.Size(self.shape)

    @property
    def nbytes(self) -> int:
        """Of this rank's part."""
        return sum(box.nbytes for box in self.boxes.values())

    @property
    def finite(self) -> bool:
        """Whether all of this rank's part is: one pass over it, and nothing as large as it is made."""
        if not self.dtype.is_floating_point:
            return True
        ends = [end for box in self.boxes.values() for end in box.aminmax()]
        return not ends or bool(torch.stack(ends).isfinite().all())

    def copied(self, memory: "Pieces | None" = None) -> "Pieces":
        """The same in memory of its own, on the CPU: that of an earlier copy, if it is given."""
        boxes = {}
        for offset, box in self.boxes.items():
            boxes[offset] = memory.boxes[offset] if memory else torch.empty_like(box, device="cpu")
            boxes[offset].copy_(box.detach())
        return Pieces(self.shape, self.dtype, boxes)

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offset), box.shape) for offset, box in self.boxes.items()]


class Writing(DefaultSavePlanner):
    """torch's planner, which finds boxes in `Pieces`."""

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return _box(self.state_dict, index)


class Reading(DefaultLoadPlanner):
    """torch's planner, which finds boxes in `Pieces`, and leaves alone what it reads into."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return _box(self.state_dict, index)


def _box(state: Mapping[str, Any], index: MetadataIndex) -> Tensor:
    assert index.offset is not None
    box: Tensor = state[index.fqn].boxes[tuple(index.offset)]
    return box


def first_rows(pieces: Pieces, rows: int) -> Pieces:
    """What a rank has of the first rows of a global tensor, as views."""
    boxes = {offset: box[: max(0, rows - offset[0])] for offset, box in pieces.boxes.items()}
    return Pieces((rows, *pieces.shape[1:]), pieces.dtype, {offset: box for offset, box in boxes.items() if len(box)})


def add(pieces: Pieces, shape: Shape, regions: list[Region], start: int, flat: Tensor) -> None:
    """Add a run of flat elements of a rank's tensor.

    Args:
        shape: of the rank's whole tensor.
        regions: where its rows stand in the global tensor; rows in none of them (padding) are left out.
        start: the first element.
        flat: the elements, contiguous; what is added are views of it.
    """
    row = prod(shape[1:])
    for region in regions:
        first, last = region.first * row, (region.first + region.rows) * row
        begin, end = max(start, first), min(start + flat.numel(), last)
        for offset, size in boxes((region.rows, *shape[1:]), begin - first, end - first):
            corner = sum(o * prod(shape[i + 1 :]) for i, o in enumerate(offset)) + first - start
            place = tuple(a + b for a, b in zip(offset, region.offset, strict=True))
            pieces.boxes[place] = flat[corner : corner + prod(size)].view(size)


def boxes(shape: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    """Offset and size of the boxes that elements start..stop of a row-major tensor of this shape consist of."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    inner = prod(shape[1:])
    first, last = -(-start // inner), stop // inner  # whole rows
    ends: list[tuple[int, int, int]] = []  # row, and the elements in it
    if first > last:
        ends.append((last, start - last * inner, stop - last * inner))
    else:
        if start < first * inner:
            ends.append((first - 1, start - (first - 1) * inner, inner))
        if last * inner < stop:
            ends.append((last, 0, stop - last * inner))
        if first < last:
            yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    for row, begin, end in ends:
        for offset, size in boxes(shape[1:], begin, end):
            yield (row, *offset), (1, *size)
