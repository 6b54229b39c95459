"""Samples on disk: uncompressed WebDataset tar shards, written once and read by random access.

The members of one sample are adjacent in the tar and share a key (a name without dots):

    dog_17.json     what the sample says (UTF-8): an object, whose `kind` says what else is in it
    dog_17.0.jpg    its pictures and videos, as they came
    dog_17.1.mp4

docs/data-format.md shows the JSON of every kind. (`emu2 embed` puts what the encoder makes of a picture in its place:
.safetensors, see `data/features.py`.)

Beside `shard.tar` lies `shard.tar.index.npy`, which says where its samples are (`data/index_file.py`); a tar without
one, or with one that does not fit, is scanned.

A sample is one read and is parsed in memory; nothing is ever extracted to disk. A tar that breaks the rules above is
refused when it is scanned, or, with an index, when the sample is read; what is *inside* the members is not looked at.
"""

import io
import json
import logging
import os
import tarfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np

from emu2_megatron.data.filetypes import PICTURE_FORMATS, VIDEO_FORMATS
from emu2_megatron.data.index_file import count_samples, index_bytes, index_path, load_spans
from emu2_megatron.errors import DataError

logger = logging.getLogger(__name__)

PICTURE_EXTENSIONS = tuple(PICTURE_FORMATS)
VIDEO_EXTENSIONS = tuple(VIDEO_FORMATS)
MEMBER_EXTENSIONS = (*PICTURE_EXTENSIONS, *VIDEO_EXTENSIONS, "safetensors")
"""What a sample's members end with, besides its json: pictures, videos, features of pictures."""

UNREADABLE = "shard cannot be read"
"""Reason of an error that lies with the disk, not with the sample."""

PAUSES = (0.1, 1.0)
"""Seconds before a read that the operating system refused is tried again."""

_BLOCK = 512  # every tar header and member is padded to this many bytes
_BROKEN = (OSError, EOFError, ValueError, OverflowError, RecursionError, tarfile.TarError)  # what tarfile raises


@dataclass
class RawSample:
    """One sample as stored: nothing decoded but the JSON."""

    key: str
    """Name of the sample, unique in its shard."""
    meta: dict[str, Any]
    """The sample's JSON object."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Its other members by their names without the key, e.g. "0.jpg"."""


def write_shard(path: str | Path, samples: Iterable[RawSample]) -> int:
    """Writes samples to a tar shard with its index and returns how many; equal samples give equal bytes.

    The shard appears under its name only when it is complete (a temporary file beside it is renamed).
    Raises DataError for a key or a member name that `ShardIndex` would refuse, or a key used twice.
    """
    path = Path(path)
    temporary, index = path.with_name(path.name + ".tmp"), index_path(path)
    keys: set[str] = set()
    spans: list[tuple[int, int]] = []
    try:
        with open(temporary, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for sample in samples:
                    if sample.key in keys:
                        raise DataError(f"{path}: two samples have the key {sample.key}")
                    keys.add(sample.key)
                    start = tar.offset
                    text = json.dumps(sample.meta, ensure_ascii=False, sort_keys=True)
                    for name, data in {"json": text.encode(), **sample.files}.items():
                        member = tarfile.TarInfo(f"{sample.key}.{name}")  # time, owner and mode are constants
                        if _split(member.name, str(path)) != (sample.key, name):
                            raise DataError(f"{path}: {sample.key!r} is no key for a sample: it must not contain dots")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
                    spans.append((start, tar.offset))
            file.flush()
            os.fsync(file.fileno())  # what has its name is whole, also after the machine has lost power
            size = file.tell()
        index.unlink(missing_ok=True)  # the old one's: never beside the new tar
        os.replace(temporary, path)
        with open(temporary, "wb") as file:
            file.write(index_bytes(size, spans))
        os.replace(temporary, index)
    finally:
        temporary.unlink(missing_ok=True)
    return len(spans)


class ShardIndex:
    """All samples of a set of shards, in a fixed order: shards by path, samples as they lie in the shard.

    `patterns` are paths or glob patterns (`**` crosses folders); a shard that several of them match counts once.
    Kept in memory is one number a shard. Where its samples lie is read from its index file when one of them is asked
    for, and a limited number of shards is remembered; only of shards without a fitting index file are 16 bytes a sample
    kept. Reading is safe from several threads.

    Raises DataError if a pattern matches nothing, if a shard cannot be read, is cut off or breaks the format (the
    message names shard and member), or if there is no sample at all (unless `may_be_empty`).
    """

    def __init__(self, patterns: Sequence[str], may_be_empty: bool = False) -> None:
        self.paths = shard_paths(patterns)
        with ThreadPoolExecutor(16) as pool:  # many small reads, slow one by one on a network's file system
            opened = list(pool.map(_open, self.paths))
        self._versions = np.array([version for version, _, _ in opened], dtype=np.int64).reshape(-1, 2)
        self._scanned = {number: spans for number, (_, _, spans) in enumerate(opened) if spans is not None}
        self._firsts = np.cumsum([0, *(count for _, count, _ in opened)])
        """int64 [shards + 1]: the number of each shard's first sample."""
        self._lost: set[str] = set()
        """Shards that could not be read, however often it was tried."""
        if not len(self) and not may_be_empty:
            raise DataError(f"no samples in {', '.join(self.paths) or 'data.shards, which is empty'}; {_ADVICE}")

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def locate(self, i: int) -> tuple[str, int]:
        """Shard of sample i and the byte in it at which the sample begins, -1 if the shard cannot be read any more."""
        try:
            path, start, _ = self._span(i)
        except DataError:
            path, start = self.paths[self._shard(i)], -1
        return path, start

    def read(self, i: int) -> RawSample:
        """Reads sample i, 0 <= i < len. Raises DataError if it cannot be read or its JSON is missing or broken.

        A network's file system may fail for a moment: what the operating system refuses is tried again, a few times for
        the first sample of a shard that meets it.
        """
        path = self.paths[self._shard(i)]
        for pause in () if path in self._lost else PAUSES:
            try:
                return self._read(i)
            except DataError as error:
                if not _refused(error):
                    raise
                logger.warning("%s; trying again in %g s", error, pause)
                time.sleep(pause)
        try:
            sample = self._read(i)
        except DataError as error:
            if _refused(error):
                self._lost.add(path)
            raise
        self._lost.discard(path)
        return sample

    def _read(self, i: int) -> RawSample:
        path, start, stop = self._span(i)
        try:
            with open(path, "rb") as shard:
                data = os.pread(shard.fileno(), stop - start, start)
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
                members = list(_members(tar, path))
                files = {name: (tar.extractfile(member) or io.BytesIO()).read() for member, _, name in members}
            end = max(_end(member) for member, _, _ in members)
        except (*_BROKEN, DataError) as error:
            raise DataError(f"{UNREADABLE}: {error}") from error
        keys = {key for _, key, _ in members}
        if end != stop - start or len(keys) != 1 or len(files) != len(members):
            raise DataError(f"{UNREADABLE}: {path} has changed since it was indexed")
        key = keys.pop()
        if "json" not in files:
            raise DataError(f"sample has no JSON: {key} has only {', '.join(files)}")
        return RawSample(key, _parse(files.pop("json"), key), files)

    def _shard(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return int(np.searchsorted(self._firsts, i, side="right")) - 1

    def _span(self, i: int) -> tuple[str, int, int]:
        """Path of sample i's shard, and where its members begin and end."""
        number = self._shard(i)
        path, first = self.paths[number], int(self._firsts[number])
        spans = self._scanned.get(number)
        if spans is None:
            size, written = self._versions[number].tolist()
            spans = _spans(path, (size, written), int(self._firsts[number + 1]) - first)
        start, stop = spans[i - first]
        return path, int(start), int(stop)


def _refused(error: BaseException | None) -> bool:
    """Whether the operating system's refusal is at the bottom of an error."""
    return isinstance(error, OSError) or (error is not None and _refused(error.__cause__))


_ADVICE = "`emu2 shards --input FOLDER --output FOLDER` makes shards"


def shard_paths(patterns: Sequence[str]) -> list[str]:
    """The files that paths and glob patterns stand for, each once, sorted. Raises DataError if one matches nothing."""
    paths: set[str] = set()
    for pattern in patterns:
        # A path that exists is taken as it is: it may contain glob's special characters.
        matches = [pattern] if os.path.exists(pattern) else glob(pattern, recursive=True)
        if not matches:
            raise DataError(f"data.shards: no file matches {pattern!r}; {_ADVICE}")
        paths.update(os.path.normpath(match) for match in matches)
    return sorted(paths)


_Version = tuple[int, int]
"""Size of a tar in bytes and when it was written: another version of it has another."""


def _open(path: str) -> tuple[_Version, int, np.ndarray | None]:
    """Version of a shard, its number of samples, and their spans if no index file says them."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: not a readable uncompressed tar shard: {error}") from error
    version = (found.st_size, found.st_mtime_ns)
    count = count_samples(path, found.st_size)
    if count is not None:
        return version, count, None
    spans = scan(path)
    return version, len(spans), spans


@lru_cache(maxsize=1024)
def _spans(path: str, version: _Version, count: int) -> np.ndarray:
    """int64 [count, 2] spans of a shard that had an index file; scans it if the file turns out to be wrong."""
    spans = load_spans(path, version[0])
    if spans is None or len(spans) != count:
        try:
            spans = scan(path)
        except DataError as error:
            raise DataError(f"{UNREADABLE}: {error}") from error
    if len(spans) != count:
        raise DataError(f"{UNREADABLE}: {index_path(path)} is not of this shard; delete it and start again")
    return spans


def scan(path: str) -> np.ndarray:
    """int64 [samples, 2]: [start, stop) of each sample's run of tar members, reading all headers. DataError if the
    shard breaks the rules."""
    spans: list[tuple[int, int]] = []
    keys: set[str] = set()
    names: set[str] = set()
    last_key = None
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member, key, name in _members(tar, path):
                start, end = member.offset, _end(member)
                if key != last_key:
                    if key in keys:
                        raise DataError(f"{path}: {member.name}: the members of sample {key} do not lie side by side")
                    keys.add(key)
                    names.clear()
                    spans.append((start, end))
                if name in names:
                    raise DataError(f"{path}: {member.name} appears twice")
                names.add(name)
                last_key = key
                spans[-1] = (spans[-1][0], end)
            end = max(end, *(_end(member) for member in tar.getmembers()), 0)  # the last may be a folder
        with open(path, "rb") as shard:
            trailer = os.pread(shard.fileno(), _BLOCK, end)
    except _BROKEN as error:
        raise DataError(f"{path}: not a readable uncompressed tar shard: {error}") from error
    # tarfile takes a damaged header for the end of the archive; the real end is a block of zeros.
    if trailer != bytes(_BLOCK):
        raise DataError(f"{path}: cut off or damaged after byte {end}: no end-of-archive mark there; write it again")
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def _members(tar: tarfile.TarFile, path: str) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """The files of a tar, each with its sample's key and its name in it; refuses what no shard of ours may contain."""
    for member in tar:
        key, name = _split(member.name, path, directory=member.isdir())
        if member.isdir():
            continue
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
            raise DataError(f"{path}: {member.name} is not a plain file (links and devices are refused)")
        yield member, key, name


def _end(member: tarfile.TarInfo) -> int:
    """Where the next member of the tar begins."""
    return member.offset_data + -(-member.size // _BLOCK) * _BLOCK


def _split(member: str, path: str, directory: bool = False) -> tuple[str, str]:
    """A member's name as (key, name within the sample); refuses what no shard of ours may contain."""
    clean = member.removeprefix("./")
    folder, _, base = clean.rpartition("/")
    stem, _, name = base.partition(".")
    if clean.startswith("/") or ".." in clean.split("/"):
        raise DataError(f"{path}: member {member} points outside the shard")
    if directory:
        return "", ""
    if not stem or (name != "json" and name.rpartition(".")[2].lower() not in MEMBER_EXTENSIONS):
        allowed = ", ".join(f".{extension}" for extension in ("json", *MEMBER_EXTENSIONS))
        raise DataError(f"{path}: member {member} is neither KEY.json nor a picture or video KEY.NAME ({allowed})")
    return (f"{folder}/{stem}" if folder else stem), name


def _parse(text: bytes, key: str) -> dict[str, Any]:
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested beyond all reason
        raise DataError(f"sample's JSON is broken: {key}.json: {error}") from error
    if not isinstance(meta, dict):
        raise DataError(f"sample's JSON is broken: {key}.json is not an object")
    return meta
