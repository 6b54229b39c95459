"""A checkpoint of any layout to a folder that transformers loads."""

import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from emu2_megatron.config.schema import ModelConfig
from emu2_megatron.convert import huggingface, safetensors
from emu2_megatron.convert.places import Scratch
from emu2_megatron.convert.shards import Check, Output, Shard, Unit, group, identity, open_folder, write_shards
from emu2_megatron.convert.stored import Checkpoint, check_model, open_checkpoint
from emu2_megatron.data.tokens import BASE_COUNT, CHAT_COUNT
from emu2_megatron.model.parameters import ROTARY, hf_parameters, released_shapes, stored_parameters

INDEX = "model.safetensors.index.json"
SHARD_SIZE = 5 * 10**9
"""Bytes; what the Hub recommends."""


def to_hf(
    checkpoint: Path,
    output: Path,
    model: ModelConfig,
    tokenizer: Path | None,
    dtype: torch.dtype | None = None,
    shard_size: int = SHARD_SIZE,
) -> None:
    """Write a Hugging Face folder of a checkpoint.

    An interrupted call is continued by the next one with the same arguments. Two units of work (q, k and v of a layer;
    gate and up; any other tensor) are in memory at a time.

    Args:
        checkpoint: folder of a checkpoint, of any layout.
        output: the folder to be made.
        model: the checkpoint's model.
        tokenizer: its SentencePiece file; None exports no tokenizer.
        dtype: of all tensors but the rotary frequencies; None leaves them as they are.
        shard_size: bytes of tensors in a file, at most, unless a single unit has more.

    Raises:
        CheckpointError, ConversionError: something is missing or damaged or does not fit, or the disk is full.
    """
    stored = open_checkpoint(checkpoint)
    check_model(stored, model)
    chat = model.decoder.vocab_size == huggingface.LLAMA_PIECES + CHAT_COUNT
    small = huggingface.code_files()
    if tokenizer is not None:
        _, chat = huggingface.open_tokenizer(tokenizer, model, released=False)
        small |= huggingface.tokenizer_files(tokenizer, chat)
    pad_token = max(0, model.decoder.vocab_size - (CHAT_COUNT if chat else BASE_COUNT))

    units = export_units(stored, model, dtype)
    groups = group(units, shard_size)
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    shards = [Shard(name, safetensors.by_alignment(g)) for name, g in zip(names, groups, strict=True)]
    total = sum(unit.nbytes for unit in units)
    main = main_dtype(units)
    parameters = sum(prod(shape) for shape in released_shapes(model).values())
    small |= {
        "config.json": huggingface.to_text(huggingface.config_json(model, main, chat, pad_token)),
        "generation_config.json": huggingface.to_text(huggingface.generation_config(pad_token)),
        "README.md": huggingface.model_card(model, parameters, main, chat, checkpoint.name),
        INDEX: index(shards, total),
    }
    folder = open_folder(output, identity("to-hf", stored.files(), shards), total)
    with Check(stored.files()) as check:
        write_shards(folder, shards, safetensors.FORMAT, "exporting", check)
        for name, content in small.items():
            folder.add(name, content)
        check.wait()
    folder.finish(output)


def export_units(stored: Checkpoint, model: ModelConfig, dtype: torch.dtype | None) -> list[Unit]:
    """Every tensor of a Hugging Face folder, together with those that are made of the same stored ones."""
    table = stored_parameters(model)
    home = {native: name for name, (_, natives) in table.items() for native in natives}
    hf = hf_parameters(model)

    def made_of(name: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(home[native] for native in hf[name][2]))

    def output(name: str) -> Output:
        rule, shape, _ = hf[name]
        wanted = torch.float32 if rule is ROTARY else dtype or stored.dtypes[made_of(name)[0]]
        return Output(name, shape, wanted)

    def make(parts: tuple[str, ...], outputs: Sequence[Output], scratch: Scratch) -> list[Tensor]:
        native: dict[str, Tensor] = {}
        for part in parts:
            rule, natives = table[part]
            native |= zip(natives, rule.parts(model, stored.read(part, scratch)), strict=True)
        return [_as(o, hf[o.name][0].merge(model, [native[n] for n in hf[o.name][2]]), scratch) for o in outputs]

    units = []
    for parts, group_of_names in groupby(hf, made_of):
        outputs = tuple(output(name) for name in group_of_names)
        units.append(Unit(outputs, partial(make, parts, outputs)))
    return units


def _as(output: Output, tensor: Tensor, scratch: Scratch) -> Tensor:
    """Contiguous, in the dtype and shape of an output."""
    if tensor.dtype is not output.dtype or not tensor.is_contiguous():
        tensor = scratch.empty(tensor.shape, output.dtype).copy_(tensor)
    return tensor.view(output.shape)


def main_dtype(units: Sequence[Unit]) -> torch.dtype:
    """The dtype of most bytes."""
    sizes: Counter[torch.dtype] = Counter()
    for unit in units:
        for output in unit.outputs:
            sizes[output.dtype] += output.nbytes
    return sizes.most_common(1)[0][0]


def index(shards: Sequence[Shard], total: int) -> bytes:
    """The index of a folder of shards: which file has which tensor, and the bytes of all of them."""
    where = {output.name: shard.name for shard in shards for unit in shard.units for output in unit.outputs}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()
