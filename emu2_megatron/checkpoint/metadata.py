"""Checks a checkpoint's table of contents before torch reads it.

torch.distributed.checkpoint keeps that table (`.metadata`) as a pickle and loads it without restriction, so a
checkpoint from elsewhere could run any code. `Reader` is torch's reader of checkpoints with an unpickler that knows
only the classes such a table is made of. The tensors themselves are read by torch with `weights_only=True`.
"""

import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

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


class Reader(FileSystemReader):
    """torch's, with a table of contents that was read, and checked, before."""

    def __init__(self, folder: Path, table: Metadata) -> None:
        super().__init__(folder)
        self.table = table

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self.table.storage_meta = StorageMeta(load_id=self.load_id)
        return self.table


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise CheckpointError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


def shapes(contents: Metadata) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a table of contents."""
    entries = contents.state_dict_metadata.items()
    return {name: tuple(entry.size) for name, entry in entries if hasattr(entry, "size")}


def table(folder: Path, files: Collection[str] | None = None) -> Metadata:
    """The table of contents of a checkpoint, in torch's classes: shapes and dtypes, and where the bytes are.

    Args:
        files: names of files in the folder; it may refer to no other ones. None does not look at that.

    Raises:
        CheckpointError: the table is missing, damaged, or refers to something that no such table needs.
    """
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            found = _Unpickler(file).load()
        if not isinstance(found, Metadata):
            raise CheckpointError(f"it is a {type(found).__name__}")
        named = {info.relative_path for info in found.storage_data.values()}
        if files is not None and (strange := sorted(named - set(files))):
            raise CheckpointError(f"it refers to {strange[0]}, which is no file of this checkpoint")
        return found
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CheckpointError(f"{path} is not a table of contents that torch wrote: {error}") from error
