"""Writing a folder of shards that is whole or not there, and that an interrupted conversion continues.

Everything goes into `<output>.unfinished`, a shard under its own name only when all of it is on the disk, with its
SHA-256 in `conversion.json`. The folder gets its name last. So what a crash leaves behind is either a finished shard or
is written again.

Units of work are made in the calling thread while a second one writes the unit before, a third one hashes it, and a
fourth one waits until the shard before is on the disk.
"""

import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emu2_megatron.checkpoint.files import append, sync
from emu2_megatron.convert.places import Scratch
from emu2_megatron.errors import ConversionError

MANIFEST = "conversion.json"
"""What was converted, and bytes, CRC-32 and SHA-256 of every file."""

_BLOCK = 1 << 24
"""Bytes of a file read at a time."""

_SMALL = 1 << 16
"""Bytes below which handing over to a thread costs more than hashing."""


@dataclass(frozen=True)
class Output:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Unit:
    """Tensors that are made together, because they are made of the same ones."""

    outputs: tuple[Output, ...]
    make: Callable[[Scratch], list[Tensor]]
    """The tensors of `outputs`. They may lie in the scratch memory, which is the next unit's two units later."""

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(output.nbytes for output in self.outputs)


@dataclass(frozen=True)
class Shard:
    """A file and what goes into it, in order."""

    name: str
    units: tuple[Unit, ...]


class HashingFile:
    """A file being written that knows its SHA-256 and CRC-32. Large pieces are hashed by a thread of its own while they
    are written."""

    def __init__(self, path: Path, hasher: ThreadPoolExecutor) -> None:
        self._file = path.open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self._hasher = hasher
        self._at = self._crc32 = 0

    def write(self, data: bytes | memoryview) -> int:
        """Append all of it."""
        view = memoryview(data).cast("B")
        if len(view) < _SMALL:
            self._digest.update(view)
            hashed: Future[None] | None = None
        else:
            hashed = self._hasher.submit(self._digest.update, view)
        self._crc32 = append(self._file, view, self._crc32)
        if hashed is not None:
            hashed.result()
        self._at += len(view)
        return len(view)

    def tell(self) -> int:
        """Bytes written so far."""
        return self._at

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> None:
        """Give it up."""
        self._file.close()

    def finish(self) -> dict[str, Any]:
        """Close the file once it is on the disk; returns what the manifest says of it."""
        with self._file as file:
            os.fsync(file.fileno())
        return {"bytes": self._at, "crc32": self._crc32, "sha256": self._digest.hexdigest()}


@dataclass(frozen=True)
class Format:
    """How tensors become a file."""

    begin: Callable[[HashingFile, Shard], None]
    """Writes what comes before the tensors."""
    write: Callable[[HashingFile, Unit, list[Tensor]], dict[str, Any]]
    """Writes a unit's tensors; returns what the manifest is to remember of them."""


def group(units: Sequence[Unit], shard_size: int) -> list[tuple[Unit, ...]]:
    """Consecutive units, as many to a group as fit `shard_size` bytes, at least one."""
    groups: list[list[Unit]] = []
    size = 0
    for unit in units:
        if not groups or size + unit.nbytes > shard_size:
            groups.append([])
            size = 0
        groups[-1].append(unit)
        size += unit.nbytes
    return [tuple(g) for g in groups]


@dataclass
class Folder:
    """A folder being made."""

    path: Path
    """`<output>.unfinished`."""
    manifest: dict[str, Any] = field(default_factory=dict)
    scratches: tuple[Scratch, Scratch] = field(default_factory=lambda: (Scratch(), Scratch()))
    """One for the unit being made, one for the unit being written."""

    def add(self, name: str, content: bytes) -> None:
        """Write a small file.

        Raises:
            ConversionError: the disk is full.
        """
        with self._filling(name) as file:
            file.write(content)
        self._finish(name, file, {})

    def fill_shard(self, shard: Shard, format: Format, after_unit: Callable[[Unit], None]) -> Callable[[], None] | None:
        """Write the content of a shard, unless that was done before; `after_unit` is called after each unit either way.

        Returns:
            What is left to do: it waits for the disk, and names the file.

        Raises:
            ConversionError: a unit is not what it should be, or the disk is full.
        """
        if self._is_done(shard.name):
            for unit in shard.units:
                after_unit(unit)
            return None
        remembered: dict[str, Any] = {}
        with self._filling(shard.name) as file, ThreadPoolExecutor(1) as writer:
            format.begin(file, shard)
            writing: Future[dict[str, Any]] | None = None
            for number, unit in enumerate(shard.units):
                scratch = self.scratches[number % 2]
                scratch.reset()
                tensors = unit.make(scratch)
                for output, tensor in zip(unit.outputs, tensors, strict=True):
                    if tuple(tensor.shape) != output.shape or tensor.dtype is not output.dtype:
                        raise ConversionError(f"{output.name} came out as {tensor.dtype} {list(tensor.shape)}")
                if writing is not None:
                    remembered.update(writing.result())
                writing = writer.submit(format.write, file, unit, tensors)
                after_unit(unit)
            if writing is not None:
                remembered.update(writing.result())
        return partial(self._finish, shard.name, file, {"holds": remembered} if remembered else {})

    def remembered(self) -> dict[str, dict[str, Any]]:
        """File to what its format wanted remembered."""
        return {name: dict(entry.get("holds", {})) for name, entry in self.manifest["files"].items()}

    def finish(self, output: Path) -> None:
        """Give the folder its name."""
        sync(self.path)
        try:
            self.path.rename(output)
        except OSError as error:
            raise ConversionError(f"{output} cannot be made: {error.strerror}") from error
        sync(output.parent)

    def save_manifest(self) -> None:
        """Write the manifest as it is now."""
        path = self.path / MANIFEST
        part = path.with_name(MANIFEST + ".part")
        with part.open("w") as file:
            json.dump(self.manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)

    def _is_done(self, name: str) -> bool:
        entry = self.manifest["files"].get(name)
        if entry is None or not (self.path / name).is_file():
            return False
        return sha256(self.path / name) == str(entry["sha256"])

    @contextmanager
    def _filling(self, name: str) -> Iterator[HashingFile]:
        try:
            with ThreadPoolExecutor(1) as hasher:
                file = HashingFile(self.path / f"{name}.part", hasher)
                try:
                    yield file
                except BaseException:
                    file.close()
                    raise
        except OSError as error:
            raise ConversionError(f"{self.path / name} cannot be written: {error.strerror}") from error

    def _finish(self, name: str, file: HashingFile, also: dict[str, Any]) -> None:
        try:
            entry = file.finish()
            (self.path / f"{name}.part").rename(self.path / name)
            sync(self.path)
            self.manifest["files"][name] = entry | also
            self.save_manifest()
        except OSError as error:
            raise ConversionError(f"{self.path / name} cannot be written: {error.strerror}") from error


def identity(kind: str, sources: Sequence[Path], shards: Sequence[Shard]) -> dict[str, Any]:
    """All that the content of shards depends on, as JSON: what an unfinished folder must agree with to be gone on with.

    Source files are known by name, size and time of change, as to rsync.
    """
    plan = [[shard.name, [[o.name, list(o.shape), str(o.dtype)] for unit in shard.units for o in unit.outputs]]
            for shard in shards]  # fmt: skip
    return {
        "kind": kind,
        "format": 2,  # of the manifest
        "from": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sources],
        "tensors": sum(len(unit.outputs) for shard in shards for unit in shard.units),
        "plan": hashlib.sha256(json.dumps(plan).encode()).hexdigest(),
    }


def open_folder(output: Path, conversion: dict[str, Any], nbytes: int) -> Folder:
    """Begin the folder `output`, or go on with it.

    Args:
        output: its final name.
        conversion: all that its content depends on, as JSON.
        nbytes: how much it will hold, about.

    Raises:
        ConversionError: it is there already, an unfinished one is of another conversion, or the disk has no room.
    """
    if output.exists():
        raise ConversionError(f"{output} is already there: choose another --output, or remove it")
    path = output.with_name(output.name + ".unfinished")
    conversion = json.loads(json.dumps(conversion))
    try:
        if (path / MANIFEST).is_file():
            manifest = json.loads((path / MANIFEST).read_text())
            if manifest.get("conversion") != conversion:
                raise ConversionError(f"{path} was left by another conversion: remove it, or choose another --output")
            return Folder(path, manifest)
        path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path).free
    except OSError as error:
        raise ConversionError(f"{path} cannot be made: {error.strerror}") from error
    except ValueError as error:
        raise ConversionError(f"{path / MANIFEST} is damaged: remove {path}") from error
    if free < nbytes:
        raise ConversionError(f"{output} needs {nbytes / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free")
    folder = Folder(path, {"conversion": conversion, "files": {}})
    folder.save_manifest()
    return folder


def write_shards(folder: Folder, shards: Sequence[Shard], format: Format, label: str, check: "Check") -> None:
    """Write all shards, with a progress bar on a terminal.

    Raises:
        ConversionError: one cannot be made or written, or `check` found fault with the source.
    """
    with progress(label, sum(unit.nbytes for shard in shards for unit in shard.units)) as advance:

        def after_unit(unit: Unit) -> None:
            advance(unit.nbytes)
            check.poll()

        with ThreadPoolExecutor(1) as disk:
            finishing: Future[None] | None = None
            for shard in shards:
                finish = folder.fill_shard(shard, format, after_unit)
                if finishing is not None:
                    finishing.result()
                finishing = disk.submit(finish) if finish is not None else None
            if finishing is not None:
                finishing.result()


class Check:
    """Compares files with the SHA-256 that their folder's `conversion.json` has of them, beside other work.

    A folder that has no such file is taken as it is, and so are files it does not name.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._stop = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="check")
        self._found = self._thread.submit(check_files, files, self._stop)

    def __enter__(self) -> "Check":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.shutdown()

    def poll(self) -> None:
        """Raise what was found so far, if anything."""
        if self._found.done():
            self._found.result()

    def wait(self) -> None:
        """Raise what was found, after all files were looked at."""
        self._found.result()


def check_files(files: Sequence[Path], stop: threading.Event | None = None) -> None:
    """As `Check` does, at once.

    Raises:
        ConversionError: a file is not what its folder's manifest says.
    """
    manifests: dict[Path, dict[str, Any]] = {}
    for path in files:
        if path.parent not in manifests:
            manifests[path.parent] = _files_of(path.parent)
        entry = manifests[path.parent].get(path.name)
        if entry is None:
            continue
        found = sha256(path, stop)
        if stop is not None and stop.is_set():
            return
        if found != entry.get("sha256"):
            raise ConversionError(
                f"{path} has SHA-256 {found[:12]}..., {MANIFEST} beside it says {str(entry.get('sha256'))[:12]}...: "
                "it was damaged or changed, copy it again"
            )


def _files_of(folder: Path) -> dict[str, Any]:
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return {}
    try:
        return dict(json.loads(manifest.read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConversionError(f"{manifest} is damaged: remove it to go without checksums") from error


def sha256(path: Path, stop: threading.Event | None = None) -> str:
    """The SHA-256 of a file, in hexadecimal. Given up when `stop` is set.

    Raises:
        ConversionError: the file cannot be read.
    """
    digest, block = hashlib.sha256(), bytearray(_BLOCK)
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                digest.update(memoryview(block)[:count])
                if stop is not None and stop.is_set():
                    break
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over so many bytes on standard error, if that is a terminal; what it yields advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = TextColumn(f"[bold]{label}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)
