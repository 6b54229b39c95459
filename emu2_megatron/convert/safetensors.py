"""Writing safetensors files tensor by tensor, so that a shard need not be in memory."""

import json
import struct
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from emu2_megatron.convert.places import SAFETENSORS_DTYPES, as_bytes
from emu2_megatron.convert.shards import Format, HashingFile, Shard, Unit

_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def by_alignment(units: Sequence[Unit]) -> tuple[Unit, ...]:
    """Tensors of wide numbers first: without gaps, every tensor is then aligned for its dtype."""
    return tuple(sorted(units, key=lambda unit: -max(output.dtype.itemsize for output in unit.outputs)))


def _begin(file: HashingFile, shard: Shard) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for output in (output for unit in shard.units for output in unit.outputs):
        header[output.name] = {"dtype": _NAMES[output.dtype], "shape": list(output.shape),
                               "data_offsets": [at, at + output.nbytes]}  # fmt: skip
        at += output.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)


def _write(file: HashingFile, unit: Unit, tensors: list[Tensor]) -> dict[str, Any]:
    for tensor in tensors:
        file.write(as_bytes(tensor))
    return {}


FORMAT = Format(_begin, _write)
"""Safetensors files."""
