"""What a folder of shards consists of: `manifest.json`, and the state of a run that is not through.

    manifest.json     input and options, totals, and for every shard its size, SHA-256 and what is in it
    rejected.jsonl    the records that are in no shard, one a line, with source file, line and reason
    progress.jsonl    only while shards are written: input and options, then a line for every finished unit of work

A unit is a part of the input that one process makes into shards: one, or several where texts are cut in many.
"""

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from emu2_megatron.data.index_file import index_path
from emu2_megatron.data.records import Rejected
from emu2_megatron.data.shards import scan
from emu2_megatron.errors import DataError

MANIFEST, REJECTED, PROGRESS = "manifest.json", "rejected.jsonl", "progress.jsonl"


@dataclass(frozen=True)
class Shard:
    """A shard as the manifest has it."""

    name: str
    """Of the file, in the manifest's folder."""
    sha256: str
    bytes: int
    samples: int
    kinds: dict[str, int]
    """Samples by kind."""
    pictures: int
    videos: int


@dataclass(frozen=True)
class Done:
    """What became of a unit."""

    unit: str
    shards: list[Shard] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)


Header = dict[str, Any]
"""What decides about every byte of the shards: version, options and a checksum of the input."""


def totals(done: Iterable[Done]) -> dict[str, Any]:
    """Samples, kinds, pictures, videos and rejected records (by reason) of some units together."""
    sums: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for unit in done:
        reasons.update(record.reason for record in unit.rejected)
        for shard in unit.shards:
            sums.update({"samples": shard.samples, "pictures": shard.pictures, "videos": shard.videos})
            kinds.update(shard.kinds)
    counts = {name: sums[name] for name in ("samples", "pictures", "videos")}
    return {**counts, "kinds": dict(sorted(kinds.items())), "rejected": dict(sorted(reasons.items()))}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other runs from writing into a folder; DataError if one does already."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise DataError(
            f"{folder}: another run is writing shards there; wait for it, or choose another folder"
        ) from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(handle)


def load_state(folder: Path, header: Header) -> dict[str, Done]:
    """The finished units of an earlier run of the same input and options whose shards are all there, by name.

    Raises DataError if the folder's shards are of another input or other options, or nobody knows of what.
    """
    if (folder / MANIFEST).exists():
        found, units = _read_manifest(folder)
    elif (folder / PROGRESS).exists():
        found, units = _read_progress(folder)
    elif any(folder.glob("*.tar")):
        raise DataError(f"{folder} already contains shards, and no {MANIFEST} says of what; choose another folder")
    else:
        return {}
    for name, value in header.items():
        if found.get(name) != value:
            what = "another input, or it has changed" if name == "input" else f"{name} {found.get(name)}, not {value}"
            raise DataError(f"{folder}: its shards were made with {what}; remove the folder or choose another")
    return {unit.unit: unit for unit in units if all(_is_there(folder / s.name, s.bytes) for s in unit.shards)}


def _is_there(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size and index_path(path).is_file()


class Progress:
    """The units finished so far, on disk as soon as they are known. Use in a `with` block."""

    def __init__(self, folder: Path, header: Header, finished: Iterable[Done]) -> None:
        """Begins anew with what is finished already."""
        self._folder, self._header = folder, header
        temporary = folder / f"{PROGRESS}.tmp"
        temporary.write_text("".join(_line(part) for part in (header, *map(asdict, finished))), encoding="utf-8")
        os.replace(temporary, folder / PROGRESS)
        (folder / MANIFEST).unlink(missing_ok=True)  # it speaks of shards that are about to be written again
        self._file = open(folder / PROGRESS, "a", encoding="utf-8")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, unit: Done) -> None:
        """Notes a finished unit."""
        self._file.write(_line(asdict(unit)))
        self._file.flush()

    def finish(self, units: list[Done]) -> None:
        """Puts the manifest and the list of rejected records, of all units in their order, in this file's place.
        With no shard at all there is no manifest: the next run begins anew."""
        rejected = [{"unit": unit.unit, **asdict(record)} for unit in units for record in unit.rejected]
        shards = [asdict(shard) for unit in units for shard in unit.shards]
        _replace(self._folder / REJECTED, "".join(map(_line, rejected)))
        if shards:
            manifest = {**self._header, **totals(units), "shards": shards}
            _replace(self._folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        self._file.close()
        (self._folder / PROGRESS).unlink()


def _line(value: Any) -> str:
    return json.dumps(value) + "\n"


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _read_progress(folder: Path) -> tuple[Header, list[Done]]:
    path = folder / PROGRESS
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last line's end was cut off with the run
    try:
        header, *units = map(json.loads, lines)
        return _object(header), [
            Done(unit["unit"], [Shard(**s) for s in unit["shards"]], [Rejected(**r) for r in unit["rejected"]])
            for unit in units
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: cannot be read ({error}); remove the folder and start again") from error


def _read_manifest(folder: Path) -> tuple[Header, list[Done]]:
    path = folder / MANIFEST
    units: dict[str, Done] = {}
    try:
        manifest = _object(json.loads(path.read_bytes()))
        for entry in manifest["shards"]:
            shard = Shard(**entry)
            if os.path.basename(shard.name) != shard.name:
                raise ValueError(f"{shard.name} is not in this folder")
            units.setdefault(unit_of(shard.name), Done(unit_of(shard.name))).shards.append(shard)
        if (folder / REJECTED).exists():
            for line in (folder / REJECTED).read_bytes().splitlines():
                record = json.loads(line)
                unit = record.pop("unit")
                units.setdefault(unit, Done(unit)).rejected.append(Rejected(**record))
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: not a manifest of shards: {error!r}") from error
    return manifest, list(units.values())


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"it is a {type(value).__name__}")
    return value


def shard_name(unit: str, part: int) -> str:
    """Name of the part-th shard of a unit. By name, shards are in the order of the records."""
    return f"{unit}.tar" if part == 0 else f"{unit}_{part:03d}.tar"


def unit_of(shard: str) -> str:
    """The unit that a shard is of, by its name."""
    return shard.removesuffix(".tar").partition("_")[0]


def listed(folder: Path) -> list[Shard]:
    """The shards that a folder should have. DataError if it has no manifest that can be read."""
    if not (folder / MANIFEST).exists():
        unfinished = f"; its {PROGRESS} is of a run that is not through" if (folder / PROGRESS).exists() else ""
        raise DataError(f"{folder}: has no {MANIFEST}{unfinished}")
    return [shard for unit in _read_manifest(folder)[1] for shard in unit.shards]


def damage(folder: Path, shard: Shard) -> str:
    """What is wrong with a shard or its index file; empty if nothing is."""
    path = folder / shard.name
    try:
        if not path.is_file():
            return f"{shard.name}: missing"
        if path.stat().st_size != shard.bytes:
            return f"{shard.name}: damaged, {path.stat().st_size} bytes instead of {shard.bytes}"
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                return f"{shard.name}: damaged, its SHA-256 is another"
        index = index_path(path)
        if not index.is_file():
            return f"{index.name}: missing"
        table = np.load(index, allow_pickle=False)
        if not np.array_equal(table[1:], scan(str(path))) or table[0, 0] != shard.bytes:
            return f"{index.name}: damaged, it is not the index of its shard"
    except (OSError, ValueError, IndexError, EOFError, DataError) as error:
        return f"{shard.name}: cannot be checked: {error}"
    return ""
