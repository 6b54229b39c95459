"""Samples on disk: uncompressed WebDataset tar shards, written once and read by random access.

The members of one sample are adjacent in the tar and share a key (a name without dots):

    dog_17.json     what the sample says (UTF-8)
    dog_17.0.jpg    its pictures, as they came: .jpg, .jpeg, .png or .webp
    dog_17.1.png

(`emu2 embed` puts what the encoder makes of a picture in its place: .safetensors, see `data/features.py`.)

The JSON is one of

    {"kind": "caption", "text": "A dog.", "image": "0.jpg"}
    {"kind": "interleaved", "content": [{"text": "First, a dog."}, {"image": "0.jpg"}, {"text": "Then ..."}]}

where a picture is called by its member's name without the key; `content` is in reading order. Other fields (licence,
author, source) may be present and are ignored.

The index keeps 20 bytes a sample: where its run of members begins and ends. A sample is then one read and is parsed in
memory; nothing is ever extracted to disk. Shards that break the rules above are refused when they are indexed; what is
*inside* the members is only looked at when the sample is read.
"""

import io
import json
import os
import tarfile
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

from emu2_megatron.errors import DataError

PICTURE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "safetensors")
"""Members that are pictures, or features of them; a sample's only other member is its json."""

UNREADABLE = "shard cannot be read"
"""Reason of an error that lies with the disk, not with the sample."""

_BLOCK = 512  # every tar header and member is padded to this many bytes


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
    """Writes samples to a tar shard and returns how many; equal samples give equal bytes.

    The shard appears under its name only when it is complete (a temporary file beside it is renamed).
    Raises DataError for a key or a member name that `ShardIndex` would refuse, or a key used twice.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    keys: set[str] = set()
    try:
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            for sample in samples:
                if sample.key in keys:
                    raise DataError(f"{path}: two samples have the key {sample.key}")
                keys.add(sample.key)
                text = json.dumps(sample.meta, ensure_ascii=False, sort_keys=True)
                for name, data in {"json": text.encode(), **sample.files}.items():
                    member = tarfile.TarInfo(f"{sample.key}.{name}")  # time, owner and mode are constants
                    if _split(member.name, str(path)) != (sample.key, name):
                        raise DataError(f"{path}: {sample.key!r} is no key for a sample: it must not contain dots")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return len(keys)


class ShardIndex:
    """All samples of a set of shards, in a fixed order: shards by path, samples as they lie in the shard.

    `patterns` are paths or glob patterns (`**` crosses folders); a shard that several of them match counts once.
    Raises DataError if a pattern matches nothing, if a shard cannot be read, is cut off or breaks the format (the
    message names shard and member), or if there is no sample at all (unless `may_be_empty`). Reading is safe from
    several threads.
    """

    def __init__(self, patterns: Sequence[str], may_be_empty: bool = False) -> None:
        self.paths = shard_paths(patterns)
        self._shards = array("i")
        self._starts = array("q")
        self._stops = array("q")
        for number, path in enumerate(self.paths):
            for start, stop in _scan(path):
                self._shards.append(number)
                self._starts.append(start)
                self._stops.append(stop)
        if not self._starts and not may_be_empty:
            raise DataError(f"no samples in {', '.join(self.paths) or 'data.shards, which is empty'}; {_ADVICE}")

    def __len__(self) -> int:
        return len(self._starts)

    def locate(self, i: int) -> tuple[str, int]:
        """Shard of sample i and the byte in it at which the sample begins."""
        return self.paths[self._shards[i]], self._starts[i]

    def read(self, i: int) -> RawSample:
        """Reads sample i, 0 <= i < len. Raises DataError if it cannot be read or its JSON is missing or broken."""
        path, start = self.locate(i)
        size = self._stops[i] - start
        try:
            with open(path, "rb") as shard:
                data = os.pread(shard.fileno(), size, start)
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
                members = [(member.name, tar.extractfile(member)) for member in tar if member.isreg()]
                contents = [(*_split(name, path), file.read()) for name, file in members if file is not None]
        except (OSError, tarfile.TarError) as error:
            raise DataError(f"{UNREADABLE}: {error}") from error
        if len(data) != size or len({key for key, _, _ in contents}) != 1:
            raise DataError(f"{UNREADABLE}: {path} has changed since it was indexed")
        key = contents[0][0]
        files = {name: content for _, name, content in contents}
        if "json" not in files:
            raise DataError(f"sample has no JSON: {key} has only {', '.join(files)}")
        return RawSample(key, _parse(files.pop("json"), key), files)


_ADVICE = "make shards with `python tools/make_shards.py --input DIR --output DIR`"


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


def _scan(path: str) -> list[tuple[int, int]]:
    """[start, stop) of each sample's run of tar members, reading headers only."""
    spans: list[tuple[int, int]] = []
    keys: set[str] = set()
    names: set[str] = set()
    last_key = None
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                start, end = member.offset, member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                key, name = _split(member.name, path, directory=member.isdir())
                if member.isdir():
                    continue
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
                    raise DataError(f"{path}: {member.name} is not a plain file (links and devices are refused)")
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
        with open(path, "rb") as shard:
            trailer = os.pread(shard.fileno(), _BLOCK, end)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path}: not a readable uncompressed tar shard: {error}") from error
    # tarfile takes a damaged header for the end of the archive; the real end is a block of zeros.
    if trailer != bytes(_BLOCK):
        raise DataError(f"{path}: cut off or damaged after byte {end}: no end-of-archive mark there; write it again")
    return spans


def _split(member: str, path: str, directory: bool = False) -> tuple[str, str]:
    """A member's name as (key, name within the sample); refuses what no shard of ours may contain."""
    clean = member.removeprefix("./")
    folder, _, base = clean.rpartition("/")
    stem, _, name = base.partition(".")
    if clean.startswith("/") or ".." in clean.split("/"):
        raise DataError(f"{path}: member {member} points outside the shard")
    if directory:
        return "", ""
    if not stem or (name != "json" and name.rpartition(".")[2].lower() not in PICTURE_EXTENSIONS):
        allowed = ", ".join(f".{extension}" for extension in ("json", *PICTURE_EXTENSIONS))
        raise DataError(f"{path}: member {member} is neither KEY.json nor a picture KEY.NAME ({allowed})")
    return (f"{folder}/{stem}" if folder else stem), name


def _parse(text: bytes, key: str) -> dict[str, Any]:
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested beyond all reason
        raise DataError(f"sample's JSON is broken: {key}.json: {error}") from error
    if not isinstance(meta, dict):
        raise DataError(f"sample's JSON is broken: {key}.json is not an object")
    return meta
