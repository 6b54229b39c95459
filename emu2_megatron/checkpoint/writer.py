"""Writes one rank's tensors in the format of torch's distributed checkpoint (read back by its `FileSystemReader`).

torch's own writer keeps a copy of everything until all is written. This one has one tensor's copy at a time in each of
its threads, and knows the checksum of what it wrote without reading it again.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from emu2_megatron.checkpoint import files

THREADS = 2
"""Files of a rank, written side by side."""


class Writer(FileSystemWriter):
    """Attribute `checksums`: size and CRC-32 of this rank's files, by name, once they are written.

    The table of contents has no path and no random number in it, as torch's has: a checkpoint may be moved, and equal
    ones have equal bytes.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(folder)
        self.folder, self.rank = folder, rank
        self.checksums: dict[str, dict[str, int]] = {}

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        names = [f"__{self.rank}_{number}.distcp" for number in range(THREADS)]
        with ThreadPoolExecutor(THREADS) as pool:
            done = list(pool.map(lambda name, items: self._write(name, items, planner), names, _shared(plan.items)))
        future: Future[list[WriteResult]] = Future()
        future.set_result([result for results in done for result in results])
        return future

    def _write(self, name: str, items: Sequence[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        results: list[WriteResult] = []
        if not items:
            return results
        with open(self.folder / name, "wb", buffering=0) as file, without_crc32():
            stream: Any = _Summed(file)
            for item in items:
                start = stream.size
                tensor: Any = planner.resolve_data(item)
                tensor = tensor.detach().cpu()
                if tensor.untyped_storage().nbytes() != tensor.nbytes:
                    tensor = tensor.clone()  # torch.save writes whole storages
                torch.save(tensor, stream)
                place = _StorageInfo(name, start, stream.size - start)
                results.append(WriteResult(item.index, stream.size - start, place))
            os.fsync(file.fileno())
        self.checksums[name] = {"bytes": stream.size, "crc32": stream.crc32}
        return results


@contextmanager
def without_crc32() -> Iterator[None]:
    """torch.save's own checksum costs more than writing, and a file has one of all of it."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _Summed:
    """A file to write to, one end to the other."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.size = self.crc32 = 0

    def write(self, data: bytes) -> int:
        self.crc32 = files.append(self.file, data, self.crc32)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing: it is done once, at the end."""


def _shared(items: Sequence[WriteItem]) -> list[list[WriteItem]]:
    """The items in THREADS lists of about as many bytes."""
    lists: list[list[WriteItem]] = [[] for _ in range(THREADS)]
    totals = [0] * THREADS
    for item in sorted(items, key=_bytes, reverse=True):
        least = totals.index(min(totals))
        lists[least].append(item)
        totals[least] += _bytes(item)
    return lists


def _bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
