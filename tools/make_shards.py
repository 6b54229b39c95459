"""Turns folders of captioned pictures and interleaved documents into the tar shards that training reads.

    python tools/make_shards.py --input examples/data --output shards

reads, below the input,

    images/captions.jsonl   a line per picture: {"file": "images/dog.jpg", "caption": "A dog.", ...}
    interleaved/*.json      {"content": [{"type": "text", "text": ...} | {"type": "image", "file": ...}, ...], ...}

with files relative to the input folder. The fields licence, author and source travel with each sample. Documents are
cut into sub-documents of at most 8 pictures and --max-words words. The shards' format: `emu2_megatron/data/shards.py`.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from emu2_megatron.data.samples import split_document
from emu2_megatron.data.shards import RawSample, write_shard
from emu2_megatron.errors import DataError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="folder with images/ and interleaved/")
    parser.add_argument("--output", type=Path, required=True, help="folder for shard-000000.tar and so on")
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="samples in a shard (default 1000)")
    parser.add_argument("--max-words", type=int, default=400, help="words in a sub-document (default 400)")
    options = parser.parse_args(arguments)
    if options.samples_per_shard < 1 or options.max_words < 1:
        parser.error("--samples-per-shard and --max-words must be at least 1")
    try:
        print(make_shards(options.input, options.output, options.samples_per_shard, options.max_words))
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def make_shards(source: Path, output: Path, samples_per_shard: int, max_words: int) -> str:
    """Writes the shards and returns a summary of one line. Refuses an output folder that has shards already: those of
    a longer earlier run would be trained on together with the new ones."""
    if any(output.glob("*.tar")):
        raise DataError(f"{output} already contains shards; remove them or choose another folder")
    samples = [*_captions(source), *_documents(source, max_words)]
    if not samples:
        raise DataError(f"{source} has neither images/captions.jsonl nor interleaved/*.json")
    output.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(samples), samples_per_shard)
    bar = track(starts, "writing shards", console=Console(stderr=True), disable=not sys.stderr.isatty())
    for number, start in enumerate(bar):
        write_shard(output / f"shard-{number:06d}.tar", map(_load, samples[start : start + samples_per_shard]))
    kinds = [sample.meta["kind"] for sample in samples]
    return (
        f"{output}: {len(starts)} shards, {kinds.count('caption')} captions, {kinds.count('interleaved')} documents, "
        f"{sum(len(sample.pictures) for sample in samples)} pictures"
    )


@dataclass
class _Planned:
    """A sample whose pictures have not been read yet, so that only one is in memory at a time."""

    key: str
    meta: dict[str, Any]
    pictures: dict[str, Path]


def _load(sample: _Planned) -> RawSample:
    return RawSample(sample.key, sample.meta, {name: path.read_bytes() for name, path in sample.pictures.items()})


def _captions(source: Path) -> Iterator[_Planned]:
    listing = source / "images" / "captions.jsonl"
    if not listing.exists():
        return
    for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            picture, caption = source / record["file"], record["caption"]
            if not picture.is_file():
                raise ValueError(f"{picture} is not a file; paths are relative to {source}")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{listing}, line {number}: needs `file` and `caption`: {error!r}") from error
        name = f"0{picture.suffix}"
        meta = {"kind": "caption", "text": caption, "image": name, **_origin(record)}
        yield _Planned(f"caption-{_key(picture)}", meta, {name: picture})


def _documents(source: Path, max_words: int) -> Iterator[_Planned]:
    for path in sorted((source / "interleaved").glob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            # Pictures travel through the cutting as their encoded names.
            parts = [part["text"] if part["type"] == "text" else part["file"].encode() for part in document["content"]]
            if not all(isinstance(part, str | bytes) for part in parts):
                raise TypeError("a text is not a string")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: not an interleaved document: {error!r}") from error
        for number, cut in enumerate(split_document(parts, max_words)):
            content: list[dict[str, str]] = []
            pictures: dict[str, Path] = {}
            for part in cut:
                if isinstance(part, str):
                    content.append({"text": part})
                    continue
                picture = source / part.decode()
                name = f"{len(pictures)}{picture.suffix}"
                pictures[name] = picture
                content.append({"image": name})
            meta = {"kind": "interleaved", "content": content, **_origin(document)}
            yield _Planned(f"interleaved-{_key(path)}-{number:04d}", meta, pictures)


def _key(path: Path) -> str:
    return path.stem.replace(".", "_")  # a key has no dots


def _origin(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("licence", "author", "source") if name in record}


if __name__ == "__main__":
    sys.exit(main())
