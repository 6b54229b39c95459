"""Emu2-Gen's folder for diffusers: written from a visual decoder and a language model, and its networks read back.

```
model_index.json  pipeline_emu2_gen.py  README.md
scheduler/  tokenizer/  unet/  vae/      small files and safetensors
multimodal_encoder/                      what `to_hf` writes
```

Two lines load it, without this package:

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe("a red boat").image.save("boat.png")

`model_index.json` names the file of the pipeline's class, and the file of the encoder's class in its folder; diffusers
runs both if it is told to trust them. (The released folder's entry for the encoder is a module's path that only existed
in the process that wrote it, which is why encoder and tokenizer have to be loaded by hand there.) There is no safety
checker.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emu2_megatron.config.schema import ModelConfig, VideoDecoderConfig, VisualDecoderConfig
from emu2_megatron.convert import huggingface, safetensors
from emu2_megatron.convert.diffusers_config import read_json
from emu2_megatron.convert.places import Place, as_bytes, read
from emu2_megatron.convert.shards import Check, Output, Shard, Unit, group, open_folder, write_shards
from emu2_megatron.convert.sources import Source, open_source
from emu2_megatron.convert.to_hf import index, written_as
from emu2_megatron.errors import ConversionError
from emu2_megatron.model.video_decoder import build_2d
from emu2_megatron.model.visual_decoder import build_unet, build_vae, sampling_scheduler

PIPELINE = "pipeline_emu2_gen"
WEIGHTS = "diffusion_pytorch_model"
ENCODER = "multimodal_encoder"
SHARD_SIZE = 10 * 10**9
"""Bytes; diffusers' own limit, so that the UNet in bf16 is one file, as released."""

# Widths of the conditioning; SDXL's differ, and what that means is model/sdxl.py's business.
_WIDTHS = ("cross_attention_dim", "projection_class_embeddings_input_dim")


def to_diffusers(
    output: Path,
    model: ModelConfig,
    config: VisualDecoderConfig,
    unet: Mapping[str, Tensor],
    vae: Mapping[str, Tensor],
    encoder: Callable[[Path], None],
    tokenizer: Path,
    dtype: torch.dtype | None = None,
    shard_size: int = SHARD_SIZE,
) -> None:
    """Write the folder. An interrupted call is continued by the next one with the same arguments.

    Args:
        output: the folder to be made.
        model: the language model's sizes.
        config: the visual decoder's sizes.
        unet: its tensors by diffusers' names, on the CPU.
        vae: likewise.
        encoder: makes the folder it is given, of the language model and its encoder: `partial(to_hf, checkpoint, ...)`.
        tokenizer: the language model's SentencePiece file.
        dtype: of all tensors of UNet and VAE; None leaves them as they are.
        shard_size: bytes of tensors in a file of the UNet, at most.

    Raises:
        CheckpointError, ConversionError: something is missing or does not fit, or the disk is full.
    """
    import diffusers

    width = model.encoder.hidden_size
    with torch.device("meta"):
        networks = {"unet": (build_unet(config, width), unet), "vae": (build_vae(config), vae)}
    for name, (network, tensors) in networks.items():
        check_tensors(name, network.state_dict(), tensors)
    _, chat = huggingface.open_tokenizer(tokenizer, model, released=False)
    classes = {name: ["diffusers", type(network).__name__] for name, (network, _) in networks.items()}
    scheduler = sampling_scheduler()
    model_index = {
        "_class_name": [PIPELINE, "EmuVisualGenerationPipeline"],
        "_diffusers_version": diffusers.__version__,
        ENCODER: ["modeling_emu", "EmuForCausalLM"],
        "null_condition": config.null_condition,
        "scheduler": ["diffusers", type(scheduler).__name__],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        **classes,
    }
    small = {
        "": {
            "model_index.json": huggingface.to_text(model_index),
            f"{PIPELINE}.py": (files("emu2_megatron.convert") / "hf_code" / f"{PIPELINE}.py").read_bytes(),
            "README.md": model_card(model, config, dtype or next(iter(unet.values())).dtype),
        },
        "scheduler": {"scheduler_config.json": scheduler.to_json_string().encode()},
        "tokenizer": huggingface.tokenizer_files(tokenizer, chat),
    }

    total = sum(t.numel() * (dtype or t.dtype).itemsize for tensors in (unet, vae) for t in tensors.values())
    what = {
        "kind": "to-diffusers",
        "dtype": str(dtype),
        **{n: _digest(tensors) for n, (_, tensors) in networks.items()},
    }
    folder = open_folder(output, what, total)
    for name, (network, tensors) in networks.items():
        if not (folder.path / name).exists():  # else it was finished by a call before, with the same tensors
            contents = {"config.json": network.to_json_string().encode()}
            _write(folder.path / name, what | {"part": name}, contents, tensors, dtype, shard_size)
    for name, contents in small.items():
        (folder.path / name).mkdir(exist_ok=True)
        for file, content in contents.items():
            folder.add(f"{name}/{file}".lstrip("/"), content)
    encoder(folder.path / ENCODER)
    if not (folder.path / ENCODER / "modeling_emu.py").is_file():
        raise ConversionError(f"{folder.path / ENCODER} was not made: the pipeline needs the language model")
    folder.finish(output)


def open_diffusers(
    folder: Path, config: VisualDecoderConfig | VideoDecoderConfig, width: int | None = None
) -> dict[str, Source]:
    """Where the tensors of `unet` and `vae` are, by diffusers' names, in a folder such as Emu2-Gen's or SDXL's. Reads
    none of them.

    Args:
        folder: with `unet/` and `vae/`. Where both have a plain file and variants, the plain one is taken.
        config: the sizes they must have; of the video decoder, those of the 2D UNet that it begins from.
        width: E that the UNet must have been made for; None takes any, for SDXL (`model/sdxl.py`).

    Raises:
        ConversionError: a file is missing or damaged, or is of another network.
    """
    with torch.device("meta"):
        reads = width or 1
        unet = build_2d(config, reads) if isinstance(config, VideoDecoderConfig) else build_unet(config, reads)
        networks: dict[str, Any] = {"unet": unet, "vae": build_vae(config)}
    found = {}
    for name, network in networks.items():
        free = _WIDTHS if name == "unet" and width is None else ()
        _same_config(folder / name / "config.json", network, free)
        plain = folder / name / f"{WEIGHTS}.safetensors"
        found[name] = open_source(plain if plain.is_file() else folder / name, lambda name: name)
        if not free:
            check_tensors(str(folder / name), network.state_dict(), found[name].places)
    return found


def from_diffusers(
    folder: Path, config: VisualDecoderConfig | VideoDecoderConfig, width: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of UNet and VAE, on the CPU; arguments and errors as of `open_diffusers`. Files that the folder has a
    SHA-256 of are compared with it."""
    sources = open_diffusers(folder, config, width)
    with Check([file for source in sources.values() for file in source.files()]) as check:
        found = [
            {name: read(place, torch.empty(place.shape, dtype=place.dtype)) for name, place in source.places.items()}
            for source in (sources["unet"], sources["vae"])
        ]
        check.wait()
    return found[0], found[1]


def model_card(model: ModelConfig, config: VisualDecoderConfig, dtype: torch.dtype) -> bytes:
    """`README.md`."""
    name = str(dtype).removeprefix("torch.")
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags:
- emu2
- multimodal
- custom_code
---

# Emu2-Gen

A model of the Emu2-Gen architecture ([arXiv 2312.13286](https://arxiv.org/abs/2312.13286)): from text and pictures, in
any order, a language model of {model.decoder.num_layers} layers regresses {model.image_queries} visual embeddings, and
a UNet of SDXL's kind paints a picture of {config.image_size} x {config.image_size} pixels that has them. Exported by
emu2_megatron, UNet and VAE in {name}.

**To be written by whoever publishes this:** data, intended use, limits, licence. There is no safety checker in this
folder, which the released Emu2-Gen has: whoever offers the pictures to others should look for one.

```python
import torch
from diffusers import DiffusionPipeline
from PIL import Image

pipe = DiffusionPipeline.from_pretrained(".", trust_remote_code=True, dtype=torch.{name}).to("cuda")

pipe("impressionist painting of an astronaut in a jungle").image.save("astronaut.png")
dog = Image.open("dog.jpg").convert("RGB")
pipe([dog, "wearing a red hat, on the beach."]).image.save("beach.png")
pipe(dog).image.save("the_same_dog.png")  # from its own embeddings; pipe(["", dog]) lets the language model continue
```

`trust_remote_code=True` runs `{PIPELINE}.py` and `{ENCODER}/modeling_emu.py`, which are short. Older versions of
diffusers call `dtype` `torch_dtype`. For the same picture every time give
`generator=torch.Generator().manual_seed(0)`. Without the pipeline, the parts load by themselves:
`UNet2DConditionModel.from_pretrained(".", subfolder="unet")`, `AutoencoderKL` from `vae`, `AutoModelForCausalLM` from
`{ENCODER}`, and `pipe.decode(embeddings, negative)` is all that paints.

The files `conversion.json` have the SHA-256 of all others.
""".encode()


def check_tensors(what: str, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor | Place]) -> None:
    """Raise ConversionError unless names and shapes are equal."""
    if missing := sorted(wanted.keys() - found.keys()):
        raise ConversionError(f"{what}: {missing[0]} is missing ({len(missing)} of {len(wanted)} tensors)")
    if surplus := sorted(found.keys() - wanted.keys()):
        raise ConversionError(f"{what}: {surplus[0]} is too many ({len(surplus)} in all)")
    for name, tensor in wanted.items():
        if tensor.shape != found[name].shape:
            raise ConversionError(
                f"{what}: {name} is {list(found[name].shape)}, its configuration says {list(tensor.shape)}"
            )


def _same_config(path: Path, network: Any, free: tuple[str, ...]) -> None:
    """Raise ConversionError unless a `config.json` describes the network, but for the keys `free` and those that change
    no result: the size it was trained at, and precisions."""
    theirs = read_json(path)
    if theirs.get("_class_name") != type(network).__name__:
        raise ConversionError(f"{path} is of a {theirs.get('_class_name')}, wanted: a {type(network).__name__}")
    defaults = {name: p.default for name, p in inspect.signature(type(network).__init__).parameters.items()}
    for key, ours in json.loads(network.to_json_string()).items():
        value = theirs.get(key, json.loads(json.dumps(defaults.get(key))))
        if key.startswith("_") or key in (*free, "sample_size", "force_upcast", "upcast_attention"):
            continue
        if (value or None) != (ours or None):  # SDXL has null where diffusers has false by now
            raise ConversionError(f"{path}: {key} is {value}, the visual decoder's configuration makes it {ours}")


def _write(
    path: Path,
    what: dict[str, str],
    small: Mapping[str, bytes],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    shard_size: int,
) -> None:
    """A network's folder."""

    def unit(name: str, tensor: Tensor) -> Unit:
        output = Output(name, tuple(tensor.shape), dtype or tensor.dtype)
        return Unit((output,), lambda scratch: [written_as(output, tensor, scratch)])

    groups = group([unit(*item) for item in tensors.items()], shard_size)
    endings = [f"-{i:05d}-of-{len(groups):05d}" if len(groups) > 1 else "" for i in range(1, len(groups) + 1)]
    shards = [
        Shard(f"{WEIGHTS}{ending}.safetensors", safetensors.by_alignment(g))
        for ending, g in zip(endings, groups, strict=True)
    ]
    total = sum(unit.nbytes for units in groups for unit in units)
    if len(shards) > 1:
        small = {**small, f"{WEIGHTS}.safetensors.index.json": index(shards, total)}
    folder = open_folder(path, what, total)
    with Check([]) as check:  # nothing is read from files
        write_shards(folder, shards, safetensors.FORMAT, f"exporting {path.name}", check)
    for name, content in small.items():
        folder.add(name, content)
    folder.finish(path)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bits."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(as_bytes(tensor.detach().contiguous()))
    return digest.hexdigest()
