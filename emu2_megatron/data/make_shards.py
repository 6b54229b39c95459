"""Makes tar shards of folders, JSONL and Parquet files, in parallel (`emu2 shards`, tools/make_shards.py).

What a shard becomes depends on input and options alone: the input's blocks (`data/records.py`) are put together to
units, each of which one process writes as one or several shards. The main process notes what is finished
(`data/manifest.py`).
"""

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from emu2_megatron.data import chunks, manifest
from emu2_megatron.data.processes import each, processes
from emu2_megatron.data.records import Block, Rejected, find_blocks, find_files, read_block
from emu2_megatron.data.shards import PICTURE_EXTENSIONS, VIDEO_EXTENSIONS, RawSample, write_shard
from emu2_megatron.errors import ConfigError, DataError

FORMAT = 1
"""Of what is written; another one's shards are not continued."""


@dataclass(frozen=True)
class Options:
    """What decides, with the input, about every byte of the shards."""

    samples_per_shard: int = 1000
    """Most samples of a shard."""
    max_words: int = 400
    """Most words of a piece of a document, and without tokenizer of a text."""
    tokenizer: str = ""
    """SentencePiece model to measure texts with."""
    max_tokens: int = 2048
    """Most tokens of a piece of a text, `<s>` and `</s>` included."""


@dataclass(frozen=True)
class Unit:
    """What one process makes into shards at a time."""

    name: str
    blocks: tuple[Block, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options; `run` takes what they parse to."""
    default = Options()
    parser.add_argument("--input", type=Path, metavar="PATH", help="folder, .jsonl or .parquet file with the records")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the shards, outside the input")
    parser.add_argument(
        "--samples-per-shard", type=int, default=default.samples_per_shard, metavar="N", help="at most (%(default)s)"
    )
    parser.add_argument(
        "--max-words",
        type=int,
        default=default.max_words,
        metavar="N",
        help="words of a piece of a long document, and without --tokenizer of a text, at most (%(default)s)",
    )
    parser.add_argument(
        "--tokenizer", default="", metavar="FILE", help="tokenizer.model to measure texts with, for --max-tokens"
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=default.max_tokens,
        metavar="N",
        help="tokens of a piece of a long text, <s> and </s> included, at most (%(default)s)",
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--workers", type=int, default=min(16, cores), metavar="N", help="processes that write (%(default)s)"
    )
    parser.add_argument("--verify", type=Path, metavar="DIR", help="only check a folder of shards by its manifest")


def run(options: argparse.Namespace) -> int:
    """The command; prints its result and returns the exit code. Raises ConfigError for options that cannot be,
    DataError if there is nothing to make shards of, if the folder is another run's, or if files cannot be read or
    written."""
    if (options.verify is None) == (options.input is None or options.output is None):
        raise ConfigError("--input PATH and --output DIR, to make shards, or --verify DIR")
    for name, least in (("samples_per_shard", 1), ("max_words", 1), ("max_tokens", chunks.MIN_TOKENS), ("workers", 1)):
        if getattr(options, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')}: {getattr(options, name)}; must be at least {least}")
    try:
        if options.verify is not None:
            return _verify(options.verify, options.workers)
        chosen = Options(options.samples_per_shard, options.max_words, options.tokenizer, options.max_tokens)
        print(make_shards(options.input, options.output, chosen, options.workers))
        return 0
    except OSError as error:
        raise DataError(f"{error.filename or options.output}: {error.strerror or error}") from error
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130


def make_shards(source: Path, output: Path, options: Options, workers: int = 1) -> str:
    """Writes the shards, or those that an earlier run with the same input and options did not come to, and returns
    a summary of one line. Equal input and options give equal files, however many workers there are.

    Raises DataError if there is nothing to make shards of, no record can be used, or `output` has other shards.
    """
    if Path(os.path.abspath(output)).is_relative_to(os.path.abspath(source)):
        raise DataError(f"{output} lies in {source}: a second run would read what the first one wrote; choose another")
    tokenizer_hash = hashlib.sha256(Path(options.tokenizer).read_bytes()).hexdigest() if options.tokenizer else None
    _tokenizer(options.tokenizer)  # a file that is none ends the run here
    files = find_files(source)
    with processes(workers) as pool:
        found = dict(each(pool, partial(find_blocks, records=options.samples_per_shard), files, "reading"))
        checksums = [(file.group, file.name, found[file][1]) for file in files]
        header: manifest.Header = {
            "format": FORMAT,
            "input": hashlib.sha256(json.dumps(checksums).encode()).hexdigest(),
            "samples_per_shard": options.samples_per_shard,
            "max_words": options.max_words,
            "tokenizer": tokenizer_hash,
            "max_tokens": options.max_tokens if options.tokenizer else None,
        }
        units = list(plan_units(chain.from_iterable(found[file][0] for file in files), options.samples_per_shard))
        output.mkdir(parents=True, exist_ok=True)
        with manifest.locked(output):
            done = manifest.load_state(output, header)
            missing = [unit for unit in units if unit.name not in done]
            if missing or not (output / manifest.MANIFEST).exists():
                _remove_leftovers(output, {unit.name for unit in missing})
                with manifest.Progress(output, header, done.values()) as progress:
                    for unit, written in each(
                        pool, partial(write_unit, output=output, options=options), missing, "writing"
                    ):
                        done[unit.name] = written
                        progress.add(written)
                    progress.finish([done[unit.name] for unit in units])
    return _summary(output, [done[unit.name] for unit in units])


def plan_units(blocks: Iterable[Block], records: int) -> Iterator[Unit]:
    """Blocks of the same group, in order, put together up to so many records; a larger block is a unit of its own."""
    waiting: list[Block] = []
    numbers: Counter[str] = Counter()

    def unit() -> Unit:
        group = waiting[0].file.group
        numbers[group] += 1
        return Unit(f"{group}-{numbers[group] - 1:06d}", tuple(waiting))

    for block in blocks:
        full = sum(other.count for other in waiting) + block.count > records
        if waiting and (full or block.file.group != waiting[0].file.group):
            yield unit()
            waiting.clear()
        waiting.append(block)
    if waiting:
        yield unit()


def write_unit(unit: Unit, output: Path, options: Options) -> manifest.Done:
    """Writes the shards of a unit and returns what is in them."""
    done = manifest.Done(unit.name)
    samples = _samples(unit, options, done.rejected)
    while (first := next(samples, None)) is not None:
        kinds: Counter[str] = Counter()
        extensions: Counter[str] = Counter()
        path = output / manifest.shard_name(unit.name, len(done.shards))
        of_shard = chain([first], islice(samples, options.samples_per_shard - 1))
        count = write_shard(path, _counted(of_shard, kinds, extensions))
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        pictures = sum(extensions[extension] for extension in PICTURE_EXTENSIONS)
        videos = sum(extensions[extension] for extension in VIDEO_EXTENSIONS)
        size, by_kind = path.stat().st_size, dict(sorted(kinds.items()))
        done.shards.append(manifest.Shard(path.name, digest, size, count, by_kind, pictures, videos))
    return done


def _counted(samples: Iterable[RawSample], kinds: Counter[str], extensions: Counter[str]) -> Iterator[RawSample]:
    for sample in samples:
        kinds[sample.meta["kind"]] += 1
        extensions.update(name.rpartition(".")[2] for name in sample.files)
        yield sample


def _samples(unit: Unit, options: Options, rejected: list[Rejected]) -> Iterator[RawSample]:
    for block in unit.blocks:
        for found in read_block(block):
            if isinstance(found, Rejected):
                rejected.append(found)
            else:
                yield from cut(found, options)


def cut(sample: RawSample, options: Options) -> list[RawSample]:
    """A sample as it is, or the pieces of a long document or text, numbered in their keys."""
    kind, meta = sample.meta["kind"], sample.meta
    pieces: list[dict[str, Any]]
    if kind == "text":
        if tokenizer := _tokenizer(options.tokenizer):
            texts = chunks.split_tokens(meta["text"], options.max_tokens, lambda text: len(tokenizer.encode(text)) + 2)
        else:
            texts = chunks.split_words(meta["text"], options.max_words)
        pieces = [{**meta, "text": text} for text in texts]
    elif kind == "interleaved":
        # Pictures and videos travel through the cutting as their encoded names.
        parts = [item["text"] if "text" in item else _file(item).encode() for item in meta["content"]]
        pieces = [
            {**meta, "content": [{"text": part} if isinstance(part, str) else _item(part.decode()) for part in piece]}
            for piece in chunks.split_document(parts, options.max_words)
        ]
    else:
        return [sample]
    return [
        RawSample(f"{sample.key}-{number:04d}", piece, {name: sample.files[name] for name in _names(piece)})
        for number, piece in enumerate(pieces)
    ]


def _file(item: dict[str, str]) -> str:
    return item["image"] if "image" in item else item["video"]


def _item(name: str) -> dict[str, str]:
    return {"image" if name.rpartition(".")[2] in PICTURE_EXTENSIONS else "video": name}


def _names(meta: dict[str, Any]) -> list[str]:
    return [_file(item) for item in meta.get("content", []) if "text" not in item]


@lru_cache(maxsize=1)
def _tokenizer(path: str) -> Any:
    if not path:
        return None
    from emu2_megatron.data.tokenizer import Tokenizer

    return Tokenizer(path)


def _remove_leftovers(output: Path, units: set[str]) -> None:
    """Files of units that are about to be written: an earlier run may have been ended between two shards of one."""
    for path in output.iterdir():
        name, dot, rest = path.name.partition(".tar")
        if dot and rest in ("", ".tmp", ".index.npy") and manifest.unit_of(name) in units:
            path.unlink()


def _summary(output: Path, done: list[manifest.Done]) -> str:
    sums = manifest.totals(done)
    rejected = sum(sums["rejected"].values())
    reasons = ", ".join(f"{reason}: {count}" for reason, count in sums["rejected"].items())
    listing = output / manifest.REJECTED
    if not sums["samples"]:
        raise DataError(f"none of the {rejected} records can be used ({reasons}); {listing} lists them")
    kinds = ", ".join(f"{count} {kind}" for kind, count in sums["kinds"].items())
    return (
        f"{output}: {sum(len(unit.shards) for unit in done)} shards, {sums['samples']} samples ({kinds}), "
        f"{sums['pictures']} pictures, {sums['videos']} videos, {rejected} rejected"
        + (f" ({reasons}; {listing} lists them)" if rejected else "")
    )


def _verify(folder: Path, workers: int) -> int:
    shards = manifest.listed(folder)
    with processes(workers) as pool:
        found = each(pool, partial(manifest.damage, folder), shards, "checking")
        wrong = sorted(problem for _, problem in found if problem)
    names = {shard.name for shard in shards}
    wrong += [f"{path.name}: not in the manifest" for path in sorted(folder.glob("*.tar")) if path.name not in names]
    for line in wrong:
        print(f"{folder}/{line}")
    if wrong:
        raise DataError(f"{folder}: {len(wrong)} of {len(shards)} shards are not as {manifest.MANIFEST} says")
    print(f"{folder}: {len(shards)} shards, all as {manifest.MANIFEST} says")
    return 0
