"""Where tensors lie in files, and reading them from there into memory that is used again.

A file's table of contents is read when it is opened; bytes only when a tensor is asked for. Nothing in a file can run
code: safetensors have a JSON header, and torch's own files are read with `weights_only=True`.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import RawIOBase
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from emu2_megatron.errors import ConversionError

SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64,
                      "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8,
                      "BOOL": torch.bool}  # fmt: skip
"""The safetensors names of what may stand in a folder of weights."""

_LONGEST_HEADER = 100_000_000
"""Bytes; safetensors' own limit."""


@dataclass(frozen=True)
class Place:
    """A contiguous tensor in a file."""

    path: Path
    offset: int
    """Of its first byte in the file."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize


class Scratch:
    """Memory for the tensors of one unit of work, used again for the next: fresh pages cost more than copying does."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def reset(self) -> None:
        """Forget the tensors handed out. They must not be used any more."""
        if self._used > len(self._block):
            self._block = torch.empty(0, dtype=torch.uint8)  # freed before the larger one is taken
            self._block = torch.empty(self._used, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor, not filled."""
        start, size = self._used, prod(shape) * dtype.itemsize
        self._used += -(-size // 64) * 64  # aligned for any dtype
        if self._used > len(self._block):
            return torch.empty(tuple(shape), dtype=dtype)
        return self._block[start : start + size].view(dtype).view(tuple(shape))


def read(place: Place, into: Tensor) -> Tensor:
    """Fill a tensor of the place's dtype and as many elements: a contiguous one, or one whose rows are.

    Raises:
        ConversionError: the file is shorter than its table of contents says, or cannot be read.
    """
    try:
        with place.path.open("rb", buffering=0) as file:
            file.seek(place.offset)
            for part in [into] if into.is_contiguous() else into:
                buffer = as_bytes(part)
                while buffer:  # one call reads 2 GiB at most
                    count = file.readinto(buffer)
                    if not count:
                        raise ConversionError(f"{place.path} is cut short: copy it again")
                    buffer = buffer[count:]
    except OSError as error:
        raise ConversionError(f"{place.path} cannot be read: {error.strerror}") from error
    return into


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def safetensors_places(path: Path) -> dict[str, Place]:
    """Every tensor of a safetensors file.

    Raises:
        ConversionError: the file is missing, or no safetensors file, or cut short.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > min(size - 8, _LONGEST_HEADER):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        places = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            place = Place(path, 8 + length + start, SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"]))
            if place.nbytes != end - start or start < 0 or 8 + length + end > size:
                raise ValueError(f"{name} is not where its header says")
            places[name] = place
        return places
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ConversionError(f"{path} is no whole safetensors file ({_short(error)}): copy it again") from error


def torch_places(path: Path, offset: int = 0, length: int | None = None) -> dict[str, Place]:
    """Every tensor of a file that `torch.save` wrote, or of the part of a file that holds one; not read, only located.

    What is not a tensor is passed over. Names of nested dicts are joined by dots; a single tensor has the name "".

    Raises:
        ConversionError: the file is missing, or no such file, or holds objects other than tensors and plain values, or
            tensors that are not contiguous.
    """
    try:
        with path.open("rb") as file:
            view = _Part(file, offset, path.stat().st_size - offset if length is None else length)
            with FakeTensorMode():  # reads names, shapes and where the bytes are, and no bytes
                contents = torch.load(view, weights_only=True)  # type: ignore[arg-type]
    except Exception as error:  # a damaged file raises nearly anything
        raise ConversionError(f"{path} is no whole file of tensors that torch wrote ({_short(error)})") from error
    places = {}
    for name, tensor in _tensors(contents, ""):
        start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if start is None or not tensor.is_contiguous():
            raise ConversionError(
                f"{path}: {name or 'a tensor'} is not contiguous, or stored as torch before 1.6: load and save it anew"
            )
        start += offset + tensor.storage_offset() * tensor.itemsize
        places[name] = Place(path, start, tensor.dtype, tuple(tensor.shape))
    return places


def _tensors(contents: Any, prefix: str) -> list[tuple[str, Tensor]]:
    if isinstance(contents, Tensor):
        return [(prefix, contents)]
    if not isinstance(contents, Mapping):
        return []
    return [item for name, value in contents.items() for item in _tensors(value, f"{prefix}.{name}".lstrip("."))]


class _Part(RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, to: int, whence: int = 0) -> int:
        self._at = to + (0, self._at, self._length)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        wanted = memoryview(buffer)[: max(0, self._length - self._at)]
        count = self._file.readinto(wanted)  # type: ignore[attr-defined]
        self._at += count
        return int(count)


def _short(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
