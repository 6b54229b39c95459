"""The picture and video files that a record names or contains, collected as members of a sample."""

from pathlib import Path, PurePosixPath
from typing import Any

from emu2_megatron.data.filetypes import container, picture_format
from emu2_megatron.data.shards import PICTURE_EXTENSIONS, VIDEO_EXTENSIONS
from emu2_megatron.errors import DataError

EXTENSIONS = {"image": PICTURE_EXTENSIONS, "target": PICTURE_EXTENSIONS, "video": VIDEO_EXTENSIONS}
"""Field of a record that stands for a file -> what its name may end with."""


def collect(node: Any, root: Path, files: dict[str, bytes]) -> Any:
    """A record's JSON in which members' names (0.jpg, 1.mp4, ... by the order of fields' names and of lists) stand for
    files, and fields without a value are gone. The contents go into `files`.

    A file is given by its path (relative to `root`, or absolute and inside it), by its bytes, or as Hugging Face's
    datasets do: {"bytes": ..., "path": ...}. Raises DataError ("reason: detail") if one is missing, lies elsewhere or
    is of a type that shards do not have.
    """
    if isinstance(node, list):
        return [collect(item, root, files) for item in node]
    if not isinstance(node, dict):
        return node
    collected = {}
    for name in sorted(node):
        value = node[name]
        if value is not None:
            collected[name] = _member(value, name, root, files) if name in EXTENSIONS else collect(value, root, files)
    return collected


def _member(value: Any, field: str, root: Path, files: dict[str, bytes]) -> str:
    data: bytes | None = None
    path = value
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
    elif isinstance(value, bytes):
        data, path = value, None
    if not isinstance(data, bytes):
        if not isinstance(path, str):
            raise DataError(f"record does not follow the format: `{field}` is neither a path nor a file's content")
        extension = _extension(path, field)
        data = _read(path, root)
    else:
        extension = sniff(data)
        if extension not in EXTENSIONS[field]:
            raise DataError(f"file type is unknown: the content of `{field}` is none of {', '.join(EXTENSIONS[field])}")
    name = f"{len(files)}.{extension}"
    files[name] = data
    return name


def _extension(path: str, field: str) -> str:
    extension = PurePosixPath(path).suffix.removeprefix(".").lower()
    if extension not in EXTENSIONS[field]:
        raise DataError(f"file type is unknown: {path!r} for `{field}`, which may be {', '.join(EXTENSIONS[field])}")
    return extension


def _read(path: str, root: Path) -> bytes:
    full = root / path
    if ".." in PurePosixPath(path).parts or not full.is_relative_to(root):
        raise DataError(f"path points outside its folder: {path!r}")
    try:
        if not full.is_file():  # nor a pipe, which would never end
            raise DataError(f"file is missing: {path!r}")
        return full.read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"file cannot be read: {path!r}: {error.__class__.__name__}") from error


def sniff(data: bytes) -> str:
    """The extension of a picture's or video's content by its first bytes; empty if it is none of ours."""
    if picture := picture_format(data):
        return _PICTURE_EXTENSION[picture]
    kind = container(data)
    if kind == "matroska":  # which says further on whether it is a webm
        return "webm" if b"webm" in data[:64] else "mkv"
    if kind == "mp4" and data[4:8] == b"ftyp":
        return "mov" if data[8:12] == b"qt  " else "mp4"
    return "avi" if kind == "avi" else ""


_PICTURE_EXTENSION = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif"}
