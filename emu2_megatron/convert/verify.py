"""Is what was converted the same model? Every key, shape, dtype and count, every bit, and what both compute."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from emu2_megatron.config.layout import part_layers
from emu2_megatron.config.schema import Config, ModelConfig, TrainingConfig
from emu2_megatron.convert import huggingface, sources
from emu2_megatron.convert.places import Scratch
from emu2_megatron.convert.shards import MANIFEST, check_files, progress
from emu2_megatron.convert.sources import Released, open_source
from emu2_megatron.convert.stored import Checkpoint, check_model, open_checkpoint, released_tensors
from emu2_megatron.convert.to_hf import INDEX
from emu2_megatron.errors import ConversionError
from emu2_megatron.model.parameters import ROTARY, hf_parameters, released_shapes, stored_parameters, unpadded

TOLERANCE = 1e-4
"""Largest difference of outputs, over their largest value. Both compute in fp32 and in another order: 1e-7 a rounding,
through some thousand of them that add up like a random walk."""


@dataclass(frozen=True)
class Audit:
    """What was looked at."""

    tensors: int
    numbers: int
    files: int


def audit_export(folder: Path, dtype: torch.dtype | None, model: ModelConfig) -> Audit:
    """Keys, shapes, dtypes and count of an export, its index, and the SHA-256 of all its files.

    Raises:
        ConversionError: names what is not as it should be.
    """
    files = [path for path in sorted(folder.iterdir()) if path.name != MANIFEST]
    check_files(files)
    found = open_source(folder, lambda name: name).places
    wanted = hf_parameters(model)
    if missing := [name for name in wanted if name not in found]:
        raise ConversionError(f"{folder}: {missing[0]} is missing ({len(missing)} of {len(wanted)} tensors)")
    if surplus := [name for name in found if name not in wanted]:
        raise ConversionError(f"{folder}: {surplus[0]} is too many ({len(surplus)} in all)")
    for name, (rule, shape, _) in wanted.items():
        place = found[name]
        type_wanted = torch.float32 if rule is ROTARY else dtype or place.dtype
        if place.shape != shape or place.dtype is not type_wanted:
            raise ConversionError(
                f"{place.path}: {name} is {place.dtype} {list(place.shape)}, should be {type_wanted} {list(shape)}"
            )
    index = json.loads((folder / INDEX).read_text())
    total = sum(place.nbytes for place in found.values())
    if index["metadata"]["total_size"] != total or set(index["weight_map"]) != set(wanted):
        raise ConversionError(f"{folder / INDEX} does not list the tensors of its shards ({total} bytes)")
    return Audit(len(found), sum(prod(place.shape) for place in found.values()), len(files))


def audit_checkpoint(folder: Path, model: ModelConfig) -> Audit:
    """Keys, shapes and count of a checkpoint, and the SHA-256 of all its files.

    Raises:
        CheckpointError, ConversionError: names what is not as it should be.
    """
    stored = open_checkpoint(folder)
    files = [path for path in sorted(folder.iterdir()) if path.name != MANIFEST]
    check_files(files)
    check_model(stored, model)
    names = list(stored_parameters(model))
    return Audit(len(names), sum(prod(stored.shapes[name]) for name in names), len(files))


def compare_bits(released: Released, stored: Checkpoint, exported: bool) -> None:
    """Every tensor of a checkpoint is that of the other side, to the bit, after rounding to the dtype of what was made.

    Args:
        released: the folder, file or parts.
        stored: the checkpoint.
        exported: the checkpoint came first.

    Raises:
        ConversionError: names the first tensor that differs.
    """
    model = unpadded(released.model)
    table = stored_parameters(model)
    scratch = Scratch()
    with progress(
        "comparing", sum(prod(stored.shapes[name]) * stored.dtypes[name].itemsize for name in table)
    ) as advance:
        for name, (rule, natives) in table.items():
            scratch.reset()
            ours = stored.read(name, scratch)
            advance(ours.nbytes)
            theirs = rule.cut(model, [released.read(native, scratch) for native in natives], 1)[0]
            ours = ours[: len(theirs)]  # the vocabulary's padding is the layout's
            same = torch.equal(ours.to(theirs.dtype), theirs) if exported else torch.equal(ours, theirs.to(ours.dtype))
            if not same:
                raise ConversionError(
                    f"{stored.folder}: {name} is not made of the same numbers as {', '.join(natives)}"
                )


def can_compare_outputs(model: ModelConfig) -> str:
    """Why not, or nothing: needs transformers, and memory for the model twice in fp32."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    needed = 2 * 4 * sum(prod(shape) for shape in released_shapes(model).values())
    available = psutil.virtual_memory().available
    if needed > available / 2:
        return f"two models in fp32 need {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB of memory are free"
    return ""


def compare_outputs(released: Released, stored: Checkpoint, export: Path | None) -> dict[str, float]:
    """Run the engine on the checkpoint and the remote code on the other side, in fp32, on the same random pictures,
    frames and tokens.

    Precondition: no process group, or one of a single rank.

    Args:
        released, stored: both sides.
        export: the folder, if it is to be loaded as a user would.

    Returns:
        For logits, visual features and regressed embeddings the largest difference over the largest value.

    Raises:
        ConversionError: one of them is more than TOLERANCE.
    """
    model = released.model
    inputs = _inputs(model)
    source = released_tensors(stored, model)
    wanted = _engine_outputs(model, lambda name: source(name).float(), *inputs)
    got = _remote_outputs(released, export, *inputs)
    differences = {}
    for name, tensor in wanted.items():
        differences[name] = float((got[name] - tensor).abs().max() / tensor.abs().max())
        if not differences[name] <= TOLERANCE:
            raise ConversionError(
                f"{name} of both models differ by {differences[name]:.1e} of their size, over {TOLERANCE}"
            )
    return differences


def _inputs(model: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Two pictures [2, 3, H, W], tokens [1, S] of the visual embeddings of both among random text, and where they
    are."""
    draw = torch.Generator().manual_seed(0)
    size, queries = model.encoder.image_size, model.image_queries
    pixels = torch.randn(2, 3, size, size, generator=draw)
    text = torch.randint(3, min(1000, model.decoder.vocab_size), (1, 24), generator=draw)
    visual = torch.ones(1, queries, dtype=torch.long)
    parts = [text[:, :8], visual, text[:, 8:16], visual, text[:, 16:]]
    is_visual = torch.cat([torch.full_like(part, part is visual) for part in parts], dim=1).bool()
    return pixels, torch.cat(parts, dim=1), is_visual


@torch.no_grad()
def _engine_outputs(
    model: ModelConfig, source: Callable[[str], Tensor], pixels: Tensor, tokens_BS: Tensor, visual_BS: Tensor
) -> dict[str, Tensor]:
    from emu2_megatron.data.batch import targets
    from emu2_megatron.data.sequence import VISUAL
    from emu2_megatron.model import parameters
    from emu2_megatron.model.decoder import DecoderStage, MicroBatch, transformer_config
    from emu2_megatron.parallel import topology
    from emu2_megatron.parallel.wrap import build_encoder
    from emu2_megatron.platform.device import device, to_device

    config = Config(model=model, training=TrainingConfig(precision="fp32"))
    topology.start()
    pixels, tokens_BS, visual_BS = (to_device(x) for x in (pixels, tokens_BS, visual_BS))
    try:
        topology.initialize(config)
        encoder = build_encoder(config, source)
        layers = part_layers(config)
        stage = DecoderStage(transformer_config(config, layers), model, layers).to(device())
        parameters.fill_decoder(stage, model, source, 0, 0, 1)
        features_RE = encoder(pixels, [model.image_queries] * len(pixels))
        hidden_SBD = stage(MicroBatch(tokens_BS, targets(tokens_BS, visual_BS.byte() * VISUAL), features_RE))
        return {
            "visual features": features_RE.cpu(),
            "logits": stage.logits(hidden_SBD)[:, 0, : model.decoder.vocab_size].cpu(),
            "regressed embeddings": stage.project_down(hidden_SBD)[:, 0].cpu(),
        }
    finally:
        topology.stop()


def _check_code(export: Path) -> None:
    """Refuse to run any code but that which every export gets: somebody may have had the folder since."""
    ours = huggingface.code_files()
    auto = json.loads((export / "config.json").read_bytes()).get("auto_map", {})
    modules = {str(name).rpartition(".")[0] + ".py" for name in auto.values()}
    for name in sorted({file.relative_to(export).as_posix() for file in export.rglob("*.py")} | modules):
        if name not in ours or (export / name).read_bytes() != ours[name]:
            raise ConversionError(f"{export} would run {name}, which is not what an export gets: export again")


@torch.no_grad()
def _remote_outputs(
    released: Released, export: Path | None, pixels: Tensor, tokens_BS: Tensor, visual_BS: Tensor
) -> dict[str, Tensor]:
    model: Any
    if export is not None:
        from transformers import AutoModelForCausalLM

        _check_code(export)
        model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True, dtype=torch.float32)
    else:
        model = _remote_model(released)
    features_IQE = model.encode_image(pixels)
    embedded_BSD = model.model.decoder.lm.model.embed_tokens(tokens_BS)
    embedded_BSD[visual_BS] = model.project_up(features_IQE.flatten(0, 1))
    out = model(inputs_embeds=embedded_BSD, output_hidden_states=True)
    return {
        "visual features": features_IQE.flatten(0, 1),
        "logits": out.logits[0],
        "regressed embeddings": model.project_down(out.hidden_states[-1])[0],
    }


def _remote_model(released: Released) -> Any:
    """The remote code's model, filled from released tensors of a source."""
    from emu2_megatron.convert.hf_code.configuration_emu import EmuConfig
    from emu2_megatron.convert.hf_code.modeling_emu import EmuForCausalLM

    content = huggingface.config_json(released.model, torch.float32, False, 0)
    model = EmuForCausalLM(EmuConfig(**content))
    tensors = {}
    for name, (rule, _, natives) in hf_parameters(released.model).items():
        if rule is not ROTARY:
            tensors[name] = rule.merge(released.model, [released.read(native, Scratch()).float() for native in natives])
    model.load_state_dict(tensors)
    return model.eval()


def verify_export(export: Path, checkpoint: Path, model: ModelConfig, dtype: torch.dtype | None) -> list[str]:
    """All of the above of an export; returns what to tell."""
    audit = audit_export(export, dtype, model)
    released = Released(model, [open_source(export, sources.emu2_names)])
    stored = open_checkpoint(checkpoint)
    compare_bits(released, stored, exported=True)
    return [_told(audit), *_outputs_told(released, stored, export)]


def verify_import(checkpoint: Path, released: Released) -> list[str]:
    """All of the above of an import; returns what to tell."""
    audit = audit_checkpoint(checkpoint, released.model)
    stored = open_checkpoint(checkpoint)
    compare_bits(released, stored, exported=False)
    return [_told(audit), *_outputs_told(released, stored, None)]


def _told(audit: Audit) -> str:
    return (f"{audit.tensors:,} tensors of {audit.numbers:,} numbers: names, shapes, dtypes and every bit are right; "
            f"{audit.files} files have their SHA-256")  # fmt: skip


def _outputs_told(released: Released, stored: Checkpoint, export: Path | None) -> list[str]:
    if why_not := can_compare_outputs(released.model):
        return [f"outputs not compared: {why_not}"]
    return [f"{name}: largest difference {difference:.1e} of the largest value"
            for name, difference in compare_outputs(released, stored, export).items()]  # fmt: skip
