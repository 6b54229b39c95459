"""Checks a checkpoint's table of contents before torch reads it.

torch.distributed.checkpoint keeps that table (`.metadata`) as a pickle and loads it without restriction, so a
checkpoint from elsewhere could run any code. `check` reads the same bytes first with an unpickler that knows only the
classes such a table is made of. The tensors themselves and `common.pt` are read by torch with `weights_only=True`.
"""

import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from emu2_megatron.errors import CheckpointError

_DCP = "torch.distributed.checkpoint."
ALLOWED = {
    *((_DCP + "metadata", name) for name in (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
        "ChunkStorageMetadata", "BytesStorageMetadata",
    )),
    *((_DCP + "planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    (_DCP + "filesystem", "_StorageInfo"),
    (_DCP + "filesystem", "_StoragePrefix"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *(("torch", name) for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool")),
    ("collections", "OrderedDict"),
}  # fmt: skip
"""(module, name) of everything a table of contents may refer to."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise CheckpointError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


def check(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read the table of contents of a checkpoint, and nothing else.

    Returns:
        Name and shape of every tensor in it, over all its shards.

    Raises:
        CheckpointError: the table is missing, damaged, or refers to something that no such table needs.
    """
    contents = read(folder).state_dict_metadata
    return {name: tuple(entry.size) for name, entry in contents.items() if hasattr(entry, "size")}


def read(folder: Path) -> Metadata:
    """The table of contents of a checkpoint, in torch's classes: shapes and dtypes, and where the bytes are.

    Raises:
        CheckpointError: the table is missing, damaged, or refers to something that no such table needs.
    """
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            contents = _Reader(file).load()
        if not isinstance(contents.state_dict_metadata, dict) or not isinstance(contents, Metadata):
            raise TypeError("it is a " + type(contents).__name__)
        return contents
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CheckpointError(f"{path} is not a table of contents that torch wrote: {error}") from error
