"""What weights can be imported from, each as released tensors: folders and files of several namings.

| source | names | what is passed over |
|---|---|---|
| released folder (base, Chat, Gen's encoder) | `model.visual.*`, `model.decoder.lm.*` | rotary frequencies |
| native file | `visual.*`, `decoder.lm.*` (Gen: below `multimodal_encoder.`) | Gen's UNet, VAE, safety checker |
| EVA-02-CLIP-E-plus | `visual.*` | text tower, final norm, head |
| LLaMA folder | `model.layers.*`, `lm_head.weight` | rotary frequencies |
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from emu2_megatron.config.schema import ModelConfig
from emu2_megatron.convert.places import Place, Scratch, read, safetensors_places, torch_places
from emu2_megatron.errors import ConversionError
from emu2_megatron.model.eva_vit import resize_positions
from emu2_megatron.model.parameters import hf_parameters, released_shapes

LM = "decoder.lm."
_EMBEDDINGS = (LM + "model.embed_tokens.weight", LM + "lm_head.weight")
_POSITIONS = "visual.pos_embed"

Names = Callable[[str], str | None]
"""A source's name of a tensor to its name in `hf_parameters` without `model.`, or None to pass over it."""


def emu2_names(name: str) -> str | None:
    """Released folders and native files of Emu2, Emu2-Chat and Emu2-Gen."""
    if name.startswith(("unet.", "vae.", "safety_checker.")) or name.endswith("rotary_emb.inv_freq"):
        return None
    name = name.removeprefix("multimodal_encoder.")
    return re.sub(r"^model\.(?=visual\.|decoder\.)", "", name)


def eva_names(name: str) -> str | None:
    """A file of EVA-CLIP, with both towers or with one, plain or below the key of a training framework."""
    name = re.sub(r"^(state_dict|module|model)\.", "", name)
    if re.match(r"(text\.|logit_scale$|(visual\.)?(norm|head)\.)", name):
        return None
    return name if name.startswith("visual.") else f"visual.{name}"


def llama_names(name: str) -> str | None:
    """A Hugging Face folder of LLaMA."""
    return None if name.endswith("rotary_emb.inv_freq") else LM + name


@dataclass(frozen=True)
class Source:
    """Released tensors that lie somewhere."""

    what: str
    """For messages."""
    places: dict[str, Place]
    """By their names in `hf_parameters` without `model.`, or released names."""
    grows: bool = False
    """Whether its vocabulary may be smaller: new rows are the mean of the others."""
    resizes: bool = False
    """Whether its position table may be of another picture size."""

    def files(self) -> list[Path]:
        """All files with tensors."""
        return sorted({place.path for place in self.places.values()})


def open_source(path: Path, names: Names, grows: bool = False, resizes: bool = False) -> Source:
    """Find all tensors of a file, or of a folder with or without an index.

    Raises:
        ConversionError: a file is missing or damaged, or there are no weights.
    """
    places: dict[str, Place] = {}
    for file, listed in _files(path).items():
        found = safetensors_places(file) if file.suffix == ".safetensors" else torch_places(file)
        if absent := sorted(set(listed) - set(found)):
            raise ConversionError(f"{file} has no {absent[0]}, which the index of {path} says: copy both again")
        for name, place in found.items():
            ours = names(name)
            if ours is not None and ours in places:
                raise ConversionError(f"{file}: {name} is there a second time, also in {places[ours].path.name}")
            if ours is not None:
                places[ours] = place
    return Source(str(path), places, grows, resizes)


def _files(path: Path) -> dict[Path, list[str]]:
    """Files with weights, and the tensors that an index expects in each."""
    if path.is_file():
        return {path: []}
    if not path.is_dir():
        raise ConversionError(f"{path} is not there: give a folder of Hugging Face's, or a file of weights")
    indices = [path / "model.safetensors.index.json", *sorted(path.glob("*.safetensors.index*.json")),
               path / "pytorch_model.bin.index.json"]  # fmt: skip
    for index in filter(Path.is_file, indices):
        try:
            listed = json.loads(index.read_text())["weight_map"]
            shards: dict[Path, list[str]] = {}
            for name, file in listed.items():
                shards.setdefault(path / Path(file).name, []).append(name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConversionError(f"{index} is no index of shards: copy it again") from error
        if missing := [shard for shard in shards if not shard.is_file()]:
            raise ConversionError(
                f"{missing[0]} is missing, {index.name} lists it ({len(missing)} of {len(shards)} shards)"
            )
        return shards
    for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth"):
        if found := sorted(path.glob(pattern)):
            if len(found) > 1:
                raise ConversionError(
                    f"{path} has {len(found)} files {pattern} and no index: give one of them, or add the index"
                )
            return {found[0]: []}
    raise ConversionError(f"{path} has no weights (*.safetensors, *.bin, *.pt, *.pth)")


class Released:
    """Released tensors of a whole model, from one or several sources.

    Every tensor of every source is used, and every tensor of the model is there, with its shape.
    """

    def __init__(self, model: ModelConfig, sources: Iterable[Source], made: dict[str, Tensor] | None = None) -> None:
        """`made` are tensors that no source has.

        Raises:
            ConversionError: names the first tensor that is missing, too many, or of another shape.
        """
        self.model = model
        self.sources = list(sources)
        self._made = made or {}
        self._where: dict[str, tuple[Source, str]] = {}
        self._fused = {native: (name.removeprefix("model."), rule, natives)
                       for name, (rule, _, natives) in hf_parameters(model).items() for native in natives}  # fmt: skip
        self.shapes = released_shapes(model)
        used: set[tuple[str, str]] = set()
        for native in self.shapes:
            if native in self._made:
                continue
            fused = self._fused[native][0]
            found = [(s, name) for s in self.sources for name in dict.fromkeys((native, fused)) if name in s.places]
            if not found:
                raise ConversionError(
                    f"{self.sources[0].what if len(self.sources) == 1 else 'the sources'}: {native} is missing"
                )
            self._where[native] = found[0]
            used.add((found[0][0].what, found[0][1]))
        for source in self.sources:
            if surplus := [name for name in source.places if (source.what, name) not in used]:
                file = source.places[surplus[0]].path
                raise ConversionError(
                    f"{file}: {surplus[0]} is too many ({len(surplus)} in all): the model has no place for it"
                )
        for native in self.shapes:
            self.dtype(native)
            self._check_shape(native)

    def dtype(self, native: str) -> torch.dtype:
        """The dtype a tensor comes in."""
        if native in self._made:
            return self._made[native].dtype
        source, name = self._where[native]
        return source.places[name].dtype

    def read(self, native: str, scratch: Scratch) -> Tensor:
        """A released tensor with the model's shape, in the dtype it comes in."""
        if native in self._made:
            return self._made[native]
        source, name = self._where[native]
        place = source.places[name]
        tensor = read(place, scratch.empty(place.shape, place.dtype))
        if name != native:
            _, rule, natives = self._fused[native]
            tensor = rule.split(self.model, tensor)[natives.index(native)]
        if native in _EMBEDDINGS and len(tensor) < self.shapes[native][0]:
            mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
            tensor = torch.cat([tensor, mean.expand(self.shapes[native][0] - len(tensor), -1)])
        if native == _POSITIONS:
            tensor = resize_positions(tensor, self.shapes[native][1] - 1)
        return tensor

    def fill(self, native: str, into: Tensor, scratch: Scratch) -> None:
        """Fill a tensor (`places.read` says which) with a released tensor, in order, in whatever dtype it has; from the
        file without a copy, where it is there as it is."""
        source, name = self._where.get(native, (None, ""))
        place = source.places[name] if source is not None else None
        if place is not None and name == native and (place.shape, place.dtype) == (self.shapes[native], into.dtype):
            read(place, into)
        else:
            into.copy_(self.read(native, scratch).view(into.shape))

    def _check_shape(self, native: str) -> None:
        if native in self._made:
            return
        source, name = self._where[native]
        place, wanted = source.places[name], self.shapes[native]
        found = place.shape if name == native else (place.shape[0] // 3, *place.shape[1:])
        if found == wanted:
            return
        if native in _EMBEDDINGS and found[1:] == wanted[1:]:
            if source.grows and found[0] < wanted[0]:
                return
            raise ConversionError(
                f"{place.path}: the vocabulary has {found[0]} rows ({name}), the model {wanted[0]}: "
                "set model.decoder.vocab_size, or take the preset of the other model (Emu2-Chat has two tokens more)"
            )
        if native == _POSITIONS and source.resizes and found[2:] == wanted[2:] and _is_square(found[1] - 1):
            return
        raise ConversionError(
            f"{place.path}: {name} has shape {list(place.shape)}, the model wants {list(wanted)} of {native}"
        )


def _is_square(n: int) -> bool:
    return n > 0 and round(n**0.5) ** 2 == n
