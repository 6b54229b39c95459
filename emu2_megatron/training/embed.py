"""`emu2 embed`: the visual embeddings of a frozen encoder, computed once and kept in shards.

Every shard becomes another with the same samples in the same order, in which features stand in the place of pictures
(`data/features.py`). Training on them is the same run, to the bit where the encoder's arithmetic does not depend on
which pictures share a batch (it does not on a CPU): a sample that cannot be embedded stays as it is, so that training
finds it where it was and skips or uses it as it would have. (One whose JSON cannot be read is replaced by one that says
so, and is skipped for that.)
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from emu2_megatron.config.schema import Config
from emu2_megatron.data.decode import decode, normalize
from emu2_megatron.data.features import ENCODER, EXTENSION, to_bytes
from emu2_megatron.data.probe import picture
from emu2_megatron.data.samples import reason_of
from emu2_megatron.data.shards import UNREADABLE, VIDEO_EXTENSIONS, RawSample, ShardIndex, shard_paths, write_shard
from emu2_megatron.data.visuals import EncodedPicture
from emu2_megatron.errors import ConfigError, DataError, FeaturesError
from emu2_megatron.model.eva_vit import EvaVisionTransformer
from emu2_megatron.model.parameters import fingerprint
from emu2_megatron.parallel.wrap import build_encoder
from emu2_megatron.platform.device import activate, to_device
from emu2_megatron.platform.precision import DTYPES

_UNUSABLE = "unusable"
"""`kind` of a sample that takes the place of one whose JSON cannot be read."""


def embed(config: Config, output: Path) -> Counter[str]:
    """Embed the pictures of all shards; under torchrun each process takes its share of them.

    Shards that `output` has already are left alone, so that an interrupted run can be started again.

    Args:
        config: a validated configuration; its encoder, image_queries, precision and encoder_micro_batch_size count.
        output: folder of the new shards, which keep their names and the folders between them.

    Returns:
        How many shards, samples and pictures were embedded; shards that were there; samples left as they were, by
        reason.

    Raises:
        ConfigError: `output` is where the shards come from, or they would be in another order there; the encoder is to
            be trained, or cannot run here.
        FeaturesError: `output` holds features of another encoder.
        DataError: a shard cannot be read.
    """
    if config.training.train_encoder:
        raise ConfigError("training.train_encoder: true; features are a frozen encoder's, legal: false")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    activate()
    paths = shard_paths(config.data.shards)
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    targets = {path: output / os.path.relpath(os.path.abspath(path), root) for path in paths}
    new = [str(target) for target in targets.values()]
    if new != sorted(set(new)):
        raise ConfigError(
            f"data.shards: {', '.join(config.data.shards)}; below --output they would be in another order, or one "
            "twice, and training would read other samples; give them as patterns below one folder"
        )
    encoder = build_encoder(config).requires_grad_(False).eval()
    name = fingerprint(encoder, config)
    for path, target in targets.items():
        if target.exists() and target.samefile(path):
            raise ConfigError(f"--output: {output} is where data.shards come from; choose another folder")

    done: Counter[str] = Counter()
    columns = TextColumn("[bold]embedding"), BarColumn(), MofNCompleteColumn(), TextColumn("samples")
    console = Console()
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=rank > 0 or not console.is_terminal) as bar:
        for path in paths[rank::world_size]:
            index, target = ShardIndex([path], may_be_empty=True), targets[path]
            if target.exists():
                _check_encoder(target, name)
                done["shards that were there"] += 1
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            task = bar.add_task(path, total=len(index))
            samples = _embedded(config, encoder, name, index, done)
            write_shard(target, bar.track(samples, task_id=task))
            done["shards"] += 1
    return done


def _check_encoder(shard: Path, name: str) -> None:
    """Refuse features of another encoder than `name`."""
    index = ShardIndex([str(shard)], may_be_empty=True)
    found = (index.read(i).meta.get(ENCODER) for i in range(len(index)))
    other = next((encoder for encoder in found if encoder is not None), name)
    if other != name:
        raise FeaturesError(
            f"--output: {shard} has features of encoder {other}, this configuration's is {name} (its weights, settings "
            "and model.image_queries count); choose another folder"
        )


def _embedded(
    config: Config, encoder: EvaVisionTransformer, name: str, index: ShardIndex, done: Counter[str]
) -> Iterator[RawSample]:
    """The samples of a shard with features for pictures; some chunks of pictures at a time."""
    size, queries = config.training.encoder_micro_batch_size, config.model.image_queries
    dtype = DTYPES[config.training.precision]
    waiting: list[tuple[RawSample, dict[str, torch.Tensor] | None]] = []

    def flush() -> Iterator[RawSample]:
        pixels = [p for _, pictures in waiting for p in (pictures or {}).values()]
        rows: list[torch.Tensor] = []
        with torch.no_grad():
            for start in range(0, len(pixels), size):
                chunk = to_device(torch.stack(pixels[start : start + size]))
                rows += encoder(normalize(chunk, dtype), [queries] * len(chunk)).cpu().split(queries)
        features = iter(rows)
        for raw, pictures in waiting:
            yield raw if pictures is None else _with_features(raw, name, {p: next(features) for p in pictures})
        done["samples"] += sum(pictures is not None for _, pictures in waiting)
        done["pictures"] += len(pixels)
        waiting.clear()

    for start in range(0, len(index), size):
        chunk = [_read(index, i) for i in range(start, min(start + size, len(index)))]
        for raw, pictures, reason in _decoded(chunk, config.model.encoder.image_size):
            waiting.append((raw, pictures))
            done[f"samples left as they were: {reason}"] += pictures is None
        yield from flush()


def _read(index: ShardIndex, i: int) -> tuple[RawSample, str]:
    """A sample, and why it stays as it is, if that is known before its pictures are decoded."""
    try:
        raw = index.read(i)
    except DataError as error:
        if reason_of(error) == UNREADABLE:
            raise  # another try may read it: it must not be lost for good
        meta = {"kind": _UNUSABLE, "reason": str(error)}
        return RawSample(f"{_UNUSABLE}_{i}", meta), reason_of(error)
    extensions = {name.rpartition(".")[2].lower() for name in raw.files}
    if EXTENSION in extensions:
        return raw, "has features already"
    if extensions & set(VIDEO_EXTENSIONS):
        return raw, "has a video"
    try:
        for name, data in raw.files.items():
            picture(name, data)
    except DataError as error:
        return raw, reason_of(error)
    return raw, ""


def _decoded(
    chunk: list[tuple[RawSample, str]], size: int
) -> Iterator[tuple[RawSample, dict[str, torch.Tensor] | None, str]]:
    """Each sample, its pictures by name, and why there are none if it stays as it is; all are decoded together."""
    pixels = iter(decode([EncodedPicture(data) for raw, no in chunk if not no for data in raw.files.values()], size))
    for raw, reason in chunk:
        if reason:
            yield raw, None, reason
            continue
        results = {name: next(pixels) for name in raw.files}
        errors = [result for result in results.values() if isinstance(result, DataError)]
        if errors:
            yield raw, None, reason_of(errors[0])
        else:
            yield raw, {name: result[0] for name, result in results.items() if isinstance(result, torch.Tensor)}, ""


def _with_features(raw: RawSample, encoder: str, rows: dict[str, torch.Tensor]) -> RawSample:
    if not rows:
        return raw
    names = {name: f"{name}.{EXTENSION}" for name in rows}
    files = {names[name]: to_bytes(rows_QE) for name, rows_QE in rows.items()}
    return RawSample(raw.key, {**_renamed(raw.meta, names), ENCODER: encoder}, files)


def _renamed(node: Any, names: dict[str, str]) -> Any:
    """A sample's JSON in which `"image": name` says the new name, at any depth."""
    if isinstance(node, list):
        return [_renamed(item, names) for item in node]
    if isinstance(node, dict):
        return {
            key: names.get(value, value) if key == "image" and isinstance(value, str) else _renamed(value, names)
            for key, value in node.items()
        }
    return node
