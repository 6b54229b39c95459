"""The engine's checkpoints, read and written tensor by tensor, without ranks and without a model.

A checkpoint is in torch's distributed format: `.metadata` says for each global tensor which pieces there are, and
in which part of which `.distcp` file. Reading puts pieces together; writing makes one piece of each tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from emu2_megatron.checkpoint import files, metadata
from emu2_megatron.checkpoint.writer import Writer, without_crc32
from emu2_megatron.config.schema import ModelConfig
from emu2_megatron.convert.places import Scratch, read, torch_places
from emu2_megatron.convert.shards import Folder, Format, HashingFile, Shard, Unit
from emu2_megatron.errors import ConversionError
from emu2_megatron.model.parameters import VOCABULARY, Source, stored_parameters, stored_shapes


@dataclass(frozen=True)
class _Piece:
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of any layout, as whole tensors."""

    folder: Path
    shapes: dict[str, tuple[int, ...]]
    """Of every tensor in it."""
    dtypes: dict[str, torch.dtype]
    pieces: dict[str, list[_Piece]]

    def files(self) -> list[Path]:
        """All files with tensors."""
        return sorted({piece.file for pieces in self.pieces.values() for piece in pieces})

    def read(self, name: str, scratch: Scratch) -> Tensor:
        """A whole tensor, from the byte ranges of its pieces.

        Raises:
            ConversionError: a file is missing or damaged.
        """
        whole = scratch.empty(self.shapes[name], self.dtypes[name])
        for piece in self.pieces[name]:
            place = torch_places(piece.file, piece.start, piece.length).get("")
            if place is None or place.shape != piece.sizes or place.dtype is not self.dtypes[name]:
                raise ConversionError(
                    f"{piece.file} does not hold the piece of {name} that .metadata says: copy it again"
                )
            part = whole[tuple(slice(o, o + s) for o, s in zip(piece.offsets, piece.sizes, strict=True))]
            if part.is_contiguous():
                read(place, part)
            else:
                part.copy_(read(place, scratch.empty(place.shape, place.dtype)))
        return whole


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the table of contents of a checkpoint.

    Raises:
        CheckpointError: the table is missing or damaged.
        ConversionError: the checkpoint is not complete: it was not finished, or a file or piece is missing.
    """
    if not (folder / files.TRAINER).is_file():
        raise ConversionError(
            f"{folder} is not a complete checkpoint: it has no {files.TRAINER}; give a folder such as step_00000400"
        )
    table = metadata.table(folder)
    tensors = {
        name: entry for name, entry in table.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
    }
    where = {
        (index.fqn, tuple(index.offset)): info for index, info in table.storage_data.items() if index.offset is not None
    }
    pieces: dict[str, list[_Piece]] = {}
    for name, entry in tensors.items():
        pieces[name] = [_piece(folder, name, chunk, where.get((name, tuple(chunk.offsets)))) for chunk in entry.chunks]
        if sum(prod(piece.sizes) for piece in pieces[name]) != prod(entry.size):
            raise ConversionError(
                f"{folder}: the pieces of {name} do not make up the whole of it; copy the checkpoint again"
            )
    return Checkpoint(
        folder,
        {name: tuple(entry.size) for name, entry in tensors.items()},
        {name: entry.properties.dtype for name, entry in tensors.items()},
        pieces,
    )


def _piece(folder: Path, name: str, chunk: ChunkStorageMetadata, info: Any) -> _Piece:
    file = folder / Path(str(info.relative_path)).name if info is not None else None
    if file is None or not file.is_file():
        missing = file.name if file is not None else "its place"
        raise ConversionError(f"{folder}: {missing} is missing, a piece of {name} is there: copy the checkpoint again")
    if getattr(info, "transform_descriptors", None):
        raise ConversionError(f"{file}: {name} is compressed, which conversion does not read; save it without")
    return _Piece(tuple(chunk.offsets), tuple(chunk.sizes), file, info.offset, info.length)


def check_model(checkpoint: Checkpoint, model: ModelConfig) -> None:
    """Every tensor of the model is there with its shape, and no other. What is not the model's (an optimizer's state)
    is passed over.

    Raises:
        ConversionError: otherwise; names the first tensor that is not right.
    """
    wanted = stored_shapes(model)
    where = f"{checkpoint.folder} is not a checkpoint of this model (is --config the run's?)"
    if missing := [name for name in wanted if name not in checkpoint.shapes]:
        raise ConversionError(f"{where}: {missing[0]} is missing, {len(missing)} in all")
    parts = {name.partition(".")[0] for name in wanted}
    if surplus := [name for name in checkpoint.shapes if name.partition(".")[0] in parts and name not in wanted]:
        raise ConversionError(f"{where}: {surplus[0]} is too many, {len(surplus)} in all")
    rules = stored_parameters(model)
    for name, shape in wanted.items():
        found = checkpoint.shapes[name]
        if rules[name][0] is VOCABULARY and found[1:] == shape[1:] and found[0] != shape[0]:
            if found[0] < shape[0]:
                raise ConversionError(f"{where}: its vocabulary has {found[0]} rows, the model's {shape[0]}")
        elif found != shape:
            raise ConversionError(f"{where}: {name} has shape {list(found)}, the model wants {list(shape)}")


def released_tensors(checkpoint: Checkpoint, model: ModelConfig) -> Source:
    """Released tensors by name, from a checkpoint of this model. Reads only what it is asked for."""
    home = {native: (name, rule, natives)
            for name, (rule, natives) in stored_parameters(model).items() for native in natives}  # fmt: skip
    # q, k and v are asked for one after another, and stored as one tensor.
    latest: dict[str, dict[str, Tensor]] = {}

    def read_released(native: str) -> Tensor:
        name, rule, natives = home[native]
        if name not in latest:
            latest.clear()
            whole = checkpoint.read(name, Scratch())
            latest[name] = dict(zip(natives, rule.join(model, [whole]), strict=True))
        return latest[name][native]

    return read_released


def _begin(_file: HashingFile, _shard: Shard) -> None:
    pass


def _write(file: HashingFile, unit: Unit, tensors: list[Tensor]) -> dict[str, Any]:
    places = {}
    with without_crc32():
        for output, tensor in zip(unit.outputs, tensors, strict=True):
            start = file.tell()
            # torch.save writes all of a tensor's storage, which may be the scratch memory: give it one of its own.
            own = torch.from_numpy(tensor.reshape(-1).view(torch.uint8).numpy()).view(tensor.dtype).view(tensor.shape)
            torch.save(own, file)  # type: ignore[arg-type]  # it only writes
            places[output.name] = [start, file.tell() - start]
    return places


FORMAT = Format(_begin, _write)
"""`.distcp` files."""


def finish_checkpoint(folder: Folder, shards: Sequence[Shard], model: ModelConfig) -> None:
    """Write what makes a checkpoint of `.distcp` files: the table of contents and `trainer.json`. The checkpoint is at
    step 0, at the beginning of the data."""
    contents: dict[str, Any] = {}
    results: list[WriteResult] = []
    places = folder.remembered()
    for shard in shards:
        for output in (output for unit in shard.units for output in unit.outputs):
            start, length = places[shard.name][output.name]
            origin, size = torch.Size([0] * len(output.shape)), torch.Size(output.shape)
            properties = TensorProperties(dtype=output.dtype)
            contents[output.name] = TensorStorageMetadata(properties, size, [ChunkStorageMetadata(origin, size)])
            index = MetadataIndex(output.name, origin)
            results.append(WriteResult(index, length, _StorageInfo(shard.name, start, length)))
    Writer(folder.path, 0).finish(Metadata(contents), [results])
    written = {name: folder.manifest["files"][name] for name in (shard.name for shard in shards)}
    trainer = {
        "format": files.FORMAT, "step": 0, "finite": True, "optimizer": {"updates": 0, "loss_scale": None}, "data": {},
        "files": {".metadata": files.checksum(folder.path / ".metadata")}
        | {name: {key: entry[key] for key in ("bytes", "crc32")} for name, entry in written.items()},
    }  # fmt: skip
    folder.add(files.TRAINER, files.trainer_text(trainer).encode())
