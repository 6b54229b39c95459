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
    """torch's, which does not run what a table of contents refers to, and reads no file but those it may."""

    def __init__(self, folder: Path, files: Collection[str]) -> None:
        """`files` are the names in the folder that were checked."""
        super().__init__(folder)
        self.folder, self.files = folder, files

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        table = _table(self.folder)
        named = {info.relative_path for info in table.storage_data.values()}
        if strange := sorted(named - set(self.files)):
            raise CheckpointError(f"{self.folder / '.metadata'} refers to {strange[0]}, which is no file of it")
        if table.storage_meta is None:
            table.storage_meta = StorageMeta()
        table.storage_meta.load_id = self.load_id
        return table


class _Unpickler(pickle.Unpickler):
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
    contents = _table(folder).state_dict_metadata
    return {name: tuple(entry.size) for name, entry in contents.items() if hasattr(entry, "size")}


def _table(folder: Path) -> Metadata:
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            table = _Unpickler(file).load()
        if not isinstance(table, Metadata):
            raise CheckpointError(f"it is a {type(table).__name__}")
        return table
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CheckpointError(f"{path} is not a table of contents that torch wrote: {error}") from error
