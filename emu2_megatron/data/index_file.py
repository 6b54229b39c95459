"""The index file beside a shard: where each sample lies in the tar, so that nobody has to read all its headers.

`shard.tar.index.npy` is int64 [samples + 1, 2] in numpy's format: first the size of the tar in bytes and the version of
this format, then the bytes where each sample's run of members begins and ends. Made with the shard and never needed:
what does not fit its tar is not used.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

VERSION = 1

_HEADER = 128  # bytes before the data


def index_path(shard: str | Path) -> Path:
    """Where the index of a shard lies."""
    return Path(f"{shard}.index.npy")


def index_bytes(size: int, spans: Sequence[tuple[int, int]]) -> bytes:
    """Content of the index file of a tar of so many bytes."""
    return _header(len(spans) + 1) + np.array([(size, VERSION), *spans], dtype="<i8").tobytes()


def count_samples(shard: str, size: int) -> int | None:
    """How many samples a shard's index file has, by its first row and its length; None if there is no such file, or
    one that is not of a tar of so many bytes."""
    found = _read(shard, size, only_first=True)
    return None if found is None else found[0] - 1


def load_spans(shard: str, size: int) -> np.ndarray | None:
    """int64 [samples, 2] of a shard's index file; None as `count_samples`, and if it does not cover the whole tar
    without a gap: then samples could be missing. Whether each span is one sample, the tar itself says."""
    found = _read(shard, size, only_first=False)
    if found is None:
        return None
    spans = found[1][1:]
    edges = np.concatenate([[0], spans[:, 1]])
    if (spans[:, 0] != edges[:-1]).any() or (edges[1:] <= edges[:-1]).any():
        return None
    try:
        with open(shard, "rb") as file:
            trailer = os.pread(file.fileno(), 512, int(edges[-1]))
    except OSError:
        return None
    return spans if trailer == bytes(512) else None  # the end of a tar is a block of zeros


def _header(rows: int) -> bytes:
    """What numpy's format has before the data of int64 [rows, 2]."""
    description = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({rows}, 2), }}"
    return b"\x93NUMPY\x01\x00v\x00" + description.ljust(_HEADER - 11).encode() + b"\n"


def _read(shard: str, size: int, only_first: bool) -> tuple[int, np.ndarray] | None:
    """Number of rows, and all of them or the first."""
    try:
        with open(index_path(shard), "rb") as file:
            rows, rest = divmod(os.fstat(file.fileno()).st_size - _HEADER, 16)
            wanted = _HEADER + 16 * (1 if only_first else rows)
            content = file.read(wanted)
    except OSError:
        return None
    # A header that numpy would write for another array means something else: it need not be understood.
    if rest or rows < 1 or len(content) != wanted or content[:_HEADER] != _header(rows):
        return None
    table = np.frombuffer(content, dtype="<i8", offset=_HEADER).reshape(-1, 2)
    return (rows, table) if tuple(table[0]) == (size, VERSION) else None
