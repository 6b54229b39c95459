"""What shards are made of: records in folders, JSONL and Parquet files, read as samples one by one.

A folder's files are found by convention (`CONVENTION`): each has a record or several, in fields of its own. Any other
*.jsonl or *.parquet file has the shards' JSON, one record a line or row, with the path of a file where a picture's or
video's name stands. Paths are relative to the folder with the convention, or to the JSONL or Parquet file's own, and
stay inside it. docs/data-format.md has an example of each.

A file is read in blocks (`find_blocks`), so that several processes can share it; `read_block` gives the samples of one.
"""

import hashlib
import importlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from emu2_megatron.data import conventions, media
from emu2_megatron.data.shards import RawSample
from emu2_megatron.errors import DataError

CONVENTION = {
    "images": "images/captions.jsonl",
    "interleaved": "interleaved/*.json",
    "videos": "videos/captions.json",
    "grounded": "grounded/*.json",
    "text": "text/*.txt",
    "vqa": "vqa/*.json",
}
"""Group of records -> where a folder has them."""

RECORDS = "records"
"""Group of what comes from JSONL and Parquet files: any kind of sample."""

ORIGIN = ("id", "url", "title", "author", "source", "licence", "license")
"""Fields that travel with a sample although training does not look at them."""


@dataclass(frozen=True)
class SourceFile:
    """A file with records."""

    path: Path
    """Absolute."""
    name: str
    """Its path below the input."""
    group: str
    """Of `CONVENTION`, or `RECORDS`."""
    root: Path
    """Absolute; the folder that its paths are relative to."""

    @property
    def stem(self) -> str:
        """What the keys of its samples begin with; a key has no dots."""
        return self.name[: -len(self.path.suffix)].replace(".", "_")


@dataclass(frozen=True)
class Block:
    """Consecutive records of a file, which are read together."""

    file: SourceFile
    start: int
    """Where to begin: byte of a JSONL file, row group of a Parquet file, else 0."""
    first: int
    """Number of its first record in the file, from 1: its line or row."""
    count: int
    """How many."""


@dataclass(frozen=True)
class Rejected:
    """A record that no sample can be made of."""

    file: str
    """The source file's name."""
    line: int
    """Line, row or place in the file's list, from 1."""
    reason: str
    """The same for all records with the same fault."""
    detail: str


def find_files(source: Path) -> list[SourceFile]:
    """The files with records of a folder, or the one that `source` is, in a fixed order; hidden ones are left out.

    Raises DataError if there is none, or if two would give their samples the same keys.
    """
    source = Path(os.path.abspath(source))
    if source.is_file():
        if source.suffix not in (".jsonl", ".parquet"):
            raise DataError(f"{source}: not a .jsonl or .parquet file, and not a folder")
        return [SourceFile(source, source.name, RECORDS, source.parent)]
    files = [
        SourceFile(path, path.relative_to(source).as_posix(), group, source)
        for group, pattern in CONVENTION.items()
        for path in source.glob(pattern)
    ]
    known = {file.path for file in files}
    files += [
        SourceFile(path, path.relative_to(source).as_posix(), RECORDS, path.parent)
        for suffix in ("jsonl", "parquet")
        for path in source.rglob(f"*.{suffix}")
        if path not in known
    ]
    files = [file for file in files if not any(part.startswith(".") for part in file.name.split("/"))]
    files = sorted((file for file in files if file.path.is_file()), key=lambda file: (file.group, file.name))
    if not files:
        patterns = ", ".join(CONVENTION.values())
        raise DataError(f"{source}: no records there: neither {patterns}, nor any *.jsonl or *.parquet file")
    by_stem: dict[str, SourceFile] = {}
    for file in files:
        other = by_stem.setdefault(file.stem, file)
        if other is not file:
            raise DataError(f"{source}: {other.name} and {file.name} would give samples the same keys; rename one")
    return files


def find_blocks(file: SourceFile, records: int) -> tuple[list[Block], str]:
    """A file's blocks and a checksum of it (of a Parquet file: of its table of contents). JSONL files are cut after
    every so many records, Parquet files into their row groups, others not at all. OSError if it cannot be read."""
    blocks: list[Block] = []
    with open(file.path, "rb") as stream:
        if file.path.suffix == ".parquet":
            digest = hashlib.sha256(_parquet_footer(file.path))
            try:
                with _parquet(file.path) as table:
                    groups = table.metadata.num_row_groups
                    counts = [table.metadata.row_group(i).num_rows for i in range(groups)]
            except (OSError, ValueError):
                counts = [1]  # one bad record, when it is read
            blocks = [Block(file, i, 1 + sum(counts[:i]), count) for i, count in enumerate(counts) if count]
        elif file.path.suffix == ".jsonl":
            digest, first, start = hashlib.sha256(), 1, 0
            while lines := list(islice(stream, records)):
                blocks.append(Block(file, start, first, len(lines)))
                first += len(lines)
                start += sum(map(len, lines))
                digest.update(b"".join(lines))
        else:
            content = stream.read()
            digest, count = hashlib.sha256(content), 1
            if file.path.suffix == ".json":
                try:
                    rows = json.loads(content)
                    count = len(rows) if isinstance(rows, list) else 1
                except (ValueError, RecursionError):
                    pass  # one bad record, when it is read
            if count:
                blocks = [Block(file, 0, 1, count)]
    return blocks, digest.hexdigest()


def read_block(block: Block) -> Iterator[RawSample | Rejected]:
    """The samples of a block, each with its files, and its bad records, in order.

    A sample's key is the source file's name without its extension, and the line. Nothing of the file is trusted:
    whatever is wrong with a record makes it a bad one. OSError if the source file itself cannot be read.
    """
    for line, row in _rows(block):
        try:
            if isinstance(row, DataError):
                raise row
            yielded: RawSample | Rejected = _sample(block.file, line, row)
        except DataError as error:
            reason, _, detail = str(error).partition(": ")
            yielded = Rejected(block.file.name, line, reason, detail[:300])
        yield yielded


def _rows(block: Block) -> Iterator[tuple[int, Any]]:
    """(line, what is there): parsed JSON, {"text": ...} of a text file, or the DataError that stands in its place."""
    path = block.file.path
    if path.suffix == ".parquet":
        yield from _parquet_rows(block)
    elif path.suffix == ".jsonl":
        with open(path, "rb") as stream:
            stream.seek(block.start)
            for line, content in enumerate(islice(stream, block.count), start=block.first):
                if content.strip():
                    yield line, _loads(content)
    elif path.suffix == ".json":
        rows = _loads(path.read_bytes())
        yield from enumerate(rows if isinstance(rows, list) else [rows], start=1)
    else:
        try:
            yield 1, {"text": path.read_text(encoding="utf-8-sig")}
        except UnicodeDecodeError as error:
            yield 1, DataError(f"text is not UTF-8: {error.reason} at byte {error.start}")


def _loads(content: bytes | str) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig") if isinstance(content, bytes) else content)
    except RecursionError:
        return DataError(_TOO_DEEP)
    except ValueError as error:
        return DataError(f"JSON is broken: {error}")


def _sample(file: SourceFile, line: int, row: object) -> RawSample:
    if not isinstance(row, dict):
        raise DataError(f"record is not an object: it is a {type(row).__name__}")
    if not _is_shallow(row, _LEVELS):
        raise DataError(_TOO_DEEP)
    record = {name: value for name, value in row.items() if value is not None}
    meta = conventions.TO_SAMPLE[file.group](record)
    for name in ("content", "turns"):
        if isinstance(meta.get(name), str):  # nested values in a Parquet column of strings
            meta[name] = _loads(meta[name])
            if isinstance(meta[name], DataError):
                raise meta[name]
            if not _is_shallow(meta[name], _LEVELS):
                raise DataError(_TOO_DEEP)
    origin = {name: record[name] for name in ORIGIN if name in record}
    files: dict[str, bytes] = {}
    try:
        meta = media.collect(meta, file.root, files)
        conventions.check(meta)
        json.dumps({**meta, **origin}, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"text is not valid Unicode: {error.reason}") from error
    except (ValueError, TypeError) as error:  # NaN; dates and the like in Parquet
        raise DataError(f"JSON is broken: {error}") from error
    return RawSample(f"{file.stem}-{line:06d}", {**meta, **origin}, files)


_LEVELS = 32
_TOO_DEEP = f"JSON is broken: nested deeper than {_LEVELS} levels"  # what Python can take depends on the moment


def _is_shallow(node: Any, levels: int) -> bool:
    items = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return levels > 0 and all(_is_shallow(item, levels - 1) for item in items)


def _parquet(path: Path) -> Any:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(f"{path}: Parquet files need pyarrow: pip install 'emu2-megatron[parquet]'") from error
    return parquet.ParquetFile(path)


def _parquet_footer(path: Path) -> bytes:
    """Size and table of contents of a Parquet file; it has the statistics of every column."""
    with open(path, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 8))
        footer = int.from_bytes(stream.read(4), "little") + 8
        stream.seek(max(0, size - footer))
        return size.to_bytes(8, "little") + stream.read()


def _parquet_rows(block: Block) -> Iterator[tuple[int, Any]]:
    line = block.first
    try:
        with _parquet(block.file.path) as file:
            wanted = {*conventions.FIELDS, *ORIGIN}
            columns = [name for name in file.schema_arrow.names if name in wanted]
            for batch in file.iter_batches(batch_size=64, row_groups=[block.start], columns=columns):
                for row in batch.to_pylist():
                    yield line, row
                    line += 1
    except (OSError, ValueError, TypeError, NotImplementedError) as error:  # pyarrow's own are of these types
        yield line, DataError(f"Parquet file cannot be read: to row {block.first + block.count - 1}: {error}")
