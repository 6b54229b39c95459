"""Released weights, or the models the paper starts from, to a checkpoint that loads into any layout."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import yaml
from torch import Tensor

from emu2_megatron.config.schema import ModelConfig
from emu2_megatron.convert import huggingface, sources
from emu2_megatron.convert.places import Scratch
from emu2_megatron.convert.shards import Check, Output, Shard, Unit, group, identity, open_folder, write_shards
from emu2_megatron.convert.sources import Released, open_source
from emu2_megatron.convert.stored import FORMAT, finish_checkpoint
from emu2_megatron.convert.to_hf import SHARD_SIZE
from emu2_megatron.errors import ConversionError
from emu2_megatron.model.parameters import Rule, fresh, stored_parameters, stored_shapes, unpadded

TOKENIZER = "tokenizer.model"
CONFIG = "config.yaml"
"""The model and its tokenizer, in the checkpoint's folder, for `--config`."""


def whole(path: Path, model: ModelConfig | None = None) -> Released:
    """A released folder (base, Chat, Gen or its encoder), an export, or a native file.

    Args:
        path: folder or file.
        model: None takes it from the folder's `config.json`.

    Raises:
        ConversionError: something is missing, damaged or too many, or does not fit the model.
    """
    folder = path / "multimodal_encoder" if (path / "multimodal_encoder").is_dir() else path
    model = model or huggingface.model_of((folder if folder.is_dir() else folder.parent) / "config.json")
    return Released(model, [open_source(folder, sources.emu2_names)])


def parts(decoder: Path, encoder: Path, model: ModelConfig, seed: int) -> Released:
    """What the paper's first stage starts from.

    The decoder's vocabulary grows by the added tokens, whose rows become the mean of the others, as in Emu1 (for Emu2
    nothing is published). The encoder's position table is resized to `model.encoder.image_size`. The projections are
    random, as a run with this seed would make them, in the decoder's dtype.

    Args:
        decoder: Hugging Face folder of LLaMA-33B, or a file.
        encoder: file or folder of EVA-02-CLIP-E-plus.
        model: what they become together.
        seed: training.seed.

    Raises:
        ConversionError: as `whole`.
    """
    llama = open_source(decoder, sources.llama_names, grows=True)
    eva = open_source(encoder, sources.eva_names, resizes=True)
    random = fresh(model, seed, torch.device("cpu"))
    norm = f"{sources.LM}model.norm.weight"
    own = llama.places[norm].dtype if norm in llama.places else torch.float32
    made = {name: random(name).to(own) for name in ("project_up.weight", "project_down.weight")}
    return Released(model, [llama, eva], made)


def find_tokenizer(path: Path) -> Path | None:
    """The SentencePiece file of a folder (of Emu2-Gen, or its encoder's: beside it), if it has one."""
    folders = (path, path / "tokenizer", path.parent / "tokenizer") if path.is_dir() else (path.parent,)
    return next(filter(Path.is_file, (folder / TOKENIZER for folder in folders)), None)


def write(
    released: Released,
    output: Path,
    tokenizer: Path | None,
    dtype: torch.dtype | None = None,
    shard_size: int = SHARD_SIZE,
) -> None:
    """Write a checkpoint of released tensors.

    An interrupted call is continued by the next one with the same arguments. Two tensors of a checkpoint, and what they
    are made of, are in memory at a time.

    Args:
        released: of `whole` or `parts`.
        output: the checkpoint's folder, to be made.
        tokenizer: SentencePiece file, for the checkpoint to bring along.
        dtype: of all tensors; None leaves them as they are. A run loads any dtype.
        shard_size: bytes of tensors in a file, at most, unless a single tensor has more.

    Raises:
        ConversionError: the tokenizer does not fit, a file is damaged, or the disk is full.
    """
    model = huggingface.named(released.model)
    if tokenizer is not None:
        huggingface.open_tokenizer(tokenizer, model, released=True)
    units = import_units(released, dtype)
    shards = [Shard(f"__0_{i}.distcp", part) for i, part in enumerate(group(units, shard_size))]
    files = [file for source in released.sources for file in source.files()]
    folder = open_folder(output, identity("from-hf", files, shards), sum(unit.nbytes for unit in units))
    with Check(files) as check:
        write_shards(folder, shards, FORMAT, "importing", check)
        if tokenizer is not None:
            folder.add(TOKENIZER, tokenizer.read_bytes())
        config = {"model": asdict(model), "data": {"tokenizer": str(output.resolve() / TOKENIZER) if tokenizer else ""}}
        folder.add(CONFIG, yaml.safe_dump(config, sort_keys=False).encode())
        check.wait()
        finish_checkpoint(folder, shards, model)
    folder.finish(output)


def import_units(released: Released, dtype: torch.dtype | None) -> list[Unit]:
    """Every tensor of a checkpoint."""
    model = unpadded(released.model)

    def make(rule: Rule, natives: Sequence[str], output: Output, scratch: Scratch) -> list[Tensor]:
        fused = scratch.empty(output.shape, output.dtype)
        for native, part in zip(natives, rule.parts(model, fused), strict=True):
            released.fill(native, part, scratch)
        return [fused]

    units = []
    shapes = stored_shapes(model)
    for name, (rule, natives) in stored_parameters(model).items():
        found = {released.dtype(native) for native in natives}
        if dtype is None and len(found) > 1:
            raise ConversionError(f"{', '.join(natives)} are of several dtypes and become one tensor: give --dtype")
        output = Output(name, shapes[name], dtype or found.pop())
        units.append(Unit((output,), partial(make, rule, natives, output)))
    return units
