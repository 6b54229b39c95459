"""One table from the released parameter names to this engine's, for initialisation, conversion and comparison.

Released names are those of the authors' native files (no `model.` prefix, `attn.q_bias` / `attn.v_bias`). The encoder
uses them as they are. Decoder parameters are fused and cut for tensor parallelism; `RULES` says how. The Hugging Face
folders name and fuse them in yet another way: `hf_parameters`.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from emu2_megatron.config.schema import Config, ModelConfig
from emu2_megatron.errors import ConversionError

_LM = "decoder.lm."
_LAYER = _LM + "model.layers.{layer}."


def released_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a whole model, in the released order of modules."""
    e, d = model.encoder, model.decoder
    E, F, D, G, V = e.hidden_size, e.ffn_hidden_size, d.hidden_size, d.ffn_hidden_size, d.vocab_size
    patch = e.patch_size
    block = {
        "attn.qkv.weight": (3 * E, E), "attn.q_bias": (E,), "attn.v_bias": (E,),
        "attn.proj.weight": (E, E), "attn.proj.bias": (E,),
        "norm1.weight": (E,), "norm1.bias": (E,),
        "mlp.fc1.weight": (F, E), "mlp.fc1.bias": (F,), "mlp.fc2.weight": (E, F), "mlp.fc2.bias": (E,),
        "norm2.weight": (E,), "norm2.bias": (E,),
    }  # fmt: skip
    layer = {
        **{f"self_attn.{name}_proj.weight": (D, D) for name in "qkvo"},
        "mlp.gate_proj.weight": (G, D), "mlp.up_proj.weight": (G, D), "mlp.down_proj.weight": (D, G),
        "input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,),
    }  # fmt: skip
    return {
        "project_up.weight": (D, E),
        "project_down.weight": (E, D),
        "visual.cls_token": (1, 1, E),
        "visual.pos_embed": (1, 1 + (e.image_size // patch) ** 2, E),
        "visual.patch_embed.proj.weight": (E, 3, patch, patch),
        "visual.patch_embed.proj.bias": (E,),
        **{f"visual.blocks.{i}.{name}": shape for i in range(e.num_layers) for name, shape in block.items()},
        _LM + "model.embed_tokens.weight": (V, D),
        **{_LAYER.format(layer=i) + name: shape for i in range(d.num_layers) for name, shape in layer.items()},
        _LM + "model.norm.weight": (D,),
        _LM + "lm_head.weight": (V, D),
    }


@dataclass(frozen=True)
class Rule:
    """How released tensors become the part of a parameter that one of `tp` tensor-parallel ranks holds, and back."""

    cut: Callable[[ModelConfig, list[Tensor], int], list[Tensor]]
    """(model, whole released tensors, tp) to the tp local tensors."""
    join: Callable[[ModelConfig, list[Tensor]], list[Tensor]]
    """(model, the tp local tensors) to the whole released tensors."""
    parts: Callable[[ModelConfig, Tensor], list[Tensor]]
    """(model, the local tensor of a single rank) to where in it each released tensor lies: views with its elements in
    order, in a shape whose first dimension may be cut once more (a head each of q, k and v)."""
    dim: int | None
    """The dimension that is cut, or None if every rank holds the whole."""


def _pad_rows(model: ModelConfig, whole: Tensor, tp: int) -> Tensor:
    padding = -len(whole) % (model.decoder.make_vocab_size_divisible_by * tp)
    return nn.functional.pad(whole, (0, 0, 0, padding)) if padding else whole


def _fuse_qkv(model: ModelConfig, whole: list[Tensor], tp: int) -> list[Tensor]:
    # megatron-core keeps q, k and v of a head together, so that a rank's rows are whole heads.
    N = model.decoder.num_attention_heads
    fused = torch.stack([x.view(N, -1, x.shape[-1]) for x in whole], dim=1)
    return list(fused.flatten(0, 2).chunk(tp))


def _joined(local: list[Tensor], dim: int = 0) -> Tensor:
    """Concatenated; the only one of a list as it is, since conversion would copy most of a model for nothing."""
    return torch.cat(local, dim) if len(local) > 1 else local[0]


def _heads_of_qkv(model: ModelConfig, fused: Tensor) -> list[Tensor]:
    return list(fused.view(model.decoder.num_attention_heads, 3, -1, fused.shape[-1]).unbind(1))


REPLICATED = Rule(
    lambda m, whole, tp: [whole[0]] * tp,
    lambda m, local: [local[0]],
    lambda m, fused: [fused],
    None,
)
ROW = Rule(
    lambda m, whole, tp: list(whole[0].chunk(tp, dim=1)),
    lambda m, local: [_joined(local, 1)],
    lambda m, fused: [fused],
    1,
)
VOCABULARY = Rule(
    lambda m, whole, tp: list(_pad_rows(m, whole[0], tp).chunk(tp)),
    lambda m, local: [_joined(local)[: m.decoder.vocab_size]],
    lambda m, fused: [fused[: m.decoder.vocab_size]],
    0,
)
QKV = Rule(
    _fuse_qkv,
    lambda m, local: [heads.flatten(0, 1) for heads in _heads_of_qkv(m, _joined(local))],
    _heads_of_qkv,
    0,
)
GATED_MLP = Rule(
    lambda m, whole, tp: [_joined(list(pair)) for pair in zip(*(x.chunk(tp) for x in whole), strict=True)],
    lambda m, local: [_joined(list(half)) for half in zip(*(x.chunk(2) for x in local), strict=True)],
    lambda m, fused: list(fused.chunk(2)),
    0,
)

RULES: dict[str, tuple[Rule, tuple[str, ...]]] = {
    "embedding.word_embeddings.weight": (VOCABULARY, (_LM + "model.embed_tokens.weight",)),
    "output_layer.weight": (VOCABULARY, (_LM + "lm_head.weight",)),
    "decoder.final_layernorm.weight": (REPLICATED, (_LM + "model.norm.weight",)),
    "project_up.weight": (REPLICATED, ("project_up.weight",)),
    "project_down.weight": (REPLICATED, ("project_down.weight",)),
    "input_layernorm.weight": (REPLICATED, (_LAYER + "input_layernorm.weight",)),
    "pre_mlp_layernorm.weight": (REPLICATED, (_LAYER + "post_attention_layernorm.weight",)),
    # Transformer Engine fuses these two norms into the linear layer that follows.
    "self_attention.linear_qkv.layer_norm_weight": (REPLICATED, (_LAYER + "input_layernorm.weight",)),
    "mlp.linear_fc1.layer_norm_weight": (REPLICATED, (_LAYER + "post_attention_layernorm.weight",)),
    "self_attention.linear_qkv.weight": (QKV, tuple(_LAYER + f"self_attn.{x}_proj.weight" for x in "qkv")),
    "self_attention.linear_proj.weight": (ROW, (_LAYER + "self_attn.o_proj.weight",)),
    "mlp.linear_fc1.weight": (GATED_MLP, (_LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": (ROW, (_LAYER + "mlp.down_proj.weight",)),
}
"""A decoder stage's parameter (without `decoder.layers.N.`) to its rule and the released tensors it is made of."""


STORED_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""Checkpoints have Transformer Engine's names of the two norms, whoever wrote them."""


def stored_parameters(model: ModelConfig) -> dict[str, tuple[Rule, tuple[str, ...]]]:
    """Every tensor of a checkpoint of a whole model, to its rule and the released tensors it is made of.

    What is stored is whole, whatever the layout: the one part of a single tensor-parallel rank, but for the padding of
    the vocabulary. In the order of the released modules.
    """
    order = {name: place for place, name in enumerate(released_shapes(model))}
    stored: dict[str, tuple[Rule, tuple[str, ...]]] = {}
    stored |= {name: (REPLICATED, (name,)) for name in order if name.startswith("visual.")}
    for key, (rule, names) in RULES.items():
        if key not in STORED_NAMES and any("{layer}" in name for name in names):
            for i in range(model.decoder.num_layers):
                stored[f"decoder.layers.{i}.{key}"] = rule, tuple(name.format(layer=i) for name in names)
        elif key not in STORED_NAMES:
            stored[key] = rule, names
    return dict(sorted(stored.items(), key=lambda item: order[item[1][1][0]]))


def unpadded(model: ModelConfig) -> ModelConfig:
    """The model with a vocabulary that a single tensor-parallel rank does not pad."""
    return replace(model, decoder=replace(model.decoder, make_vocab_size_divisible_by=1))


def stored_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a checkpoint, the vocabulary without padding."""
    whole = {name: torch.empty(shape, device="meta") for name, shape in released_shapes(model).items()}
    model = unpadded(model)
    return {
        name: tuple(rule.cut(model, [whole[released] for released in names], 1)[0].shape)
        for name, (rule, names) in stored_parameters(model).items()
    }


@dataclass(frozen=True)
class HfRule:
    """How released tensors become one of a Hugging Face folder, and back."""

    merge: Callable[[ModelConfig, list[Tensor]], Tensor]
    """(model, released tensors) to the tensor of the folder."""
    split: Callable[[ModelConfig, Tensor], list[Tensor]]
    """(model, tensor of the folder) to the released tensors."""


def _rotary_frequencies(model: ModelConfig) -> Tensor:
    width = model.decoder.hidden_size // model.decoder.num_attention_heads
    return 1 / model.decoder.rotary_base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)


AS_IT_IS = HfRule(lambda m, native: native[0], lambda m, hf: [hf])
# Keys have no bias. One that was trained all the same moves all scores of a query alike, which softmax does not see.
QKV_BIAS = HfRule(
    lambda m, native: torch.cat([native[0], torch.zeros_like(native[0]), native[1]]),
    lambda m, hf: [hf.chunk(3)[0], hf.chunk(3)[2]],
)
ROTARY = HfRule(lambda m, native: _rotary_frequencies(m), lambda m, hf: [])


def hf_parameters(model: ModelConfig) -> dict[str, tuple[HfRule, tuple[int, ...], tuple[str, ...]]]:
    """Every tensor of a Hugging Face folder of a whole model, to its rule, its shape and the released tensors it is
    made of, in the released order of modules.

    The rotary frequencies are made of none: fp32 numbers that follow from the configuration, which the released code
    wants to find.
    """
    shapes = released_shapes(model)
    frequencies = tuple(_rotary_frequencies(model).shape)
    table: dict[str, tuple[HfRule, tuple[int, ...], tuple[str, ...]]] = {}
    for name, shape in shapes.items():
        hf_name = name if name.startswith("project_") else f"model.{name}"
        if name.endswith("attn.q_bias"):
            v_bias = name.replace("q_bias", "v_bias")
            table[hf_name.replace("q_bias", "qkv.bias")] = QKV_BIAS, (3 * shape[0],), (name, v_bias)
        elif not name.endswith("attn.v_bias"):
            table[hf_name] = AS_IT_IS, shape, (name,)
        if name.endswith("self_attn.o_proj.weight"):
            table[hf_name.replace("o_proj.weight", "rotary_emb.inv_freq")] = ROTARY, frequencies, ()
    return table


def rule_of(name: str, first_layer: int) -> tuple[Rule, tuple[str, ...]]:
    """Rule and released names of a decoder stage's parameter.

    Args:
        name: its name in `DecoderStage`, layers counted from 0 within the stage.
        first_layer: global index of the stage's first layer.
    """
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    key, layer = (match[2], int(match[1]) + first_layer) if match else (name, 0)
    if key not in RULES:
        raise ConversionError(f"no rule says which released tensors make up {name}")
    rule, names = RULES[key]
    return rule, tuple(released.format(layer=layer) for released in names)


def stage_parameters(stage: nn.Module, first_layer: int) -> Iterator[tuple[nn.Parameter, Rule, tuple[str, ...]]]:
    """Every parameter of a decoder stage with its rule and released names."""
    for name, parameter in stage.named_parameters():
        yield parameter, *rule_of(name, first_layer)


def mark_tensor_parallel(stage: nn.Module) -> None:
    """Tell megatron-core which parameters are cut over tensor-parallel ranks.

    Whether its layers say so themselves depends on the version and on who initialises the weights. Unmarked, a cut
    parameter counts as a duplicate on all but the first rank and is missing from the gradient norm, without an error.
    """
    for name, parameter in stage.named_parameters():
        rule, _ = rule_of(name, 0)
        if rule.dim is not None:
            marks = {"tensor_model_parallel": True, "partition_dim": rule.dim, "partition_stride": 1}
            for mark, value in marks.items():
                setattr(parameter, mark, value)


def initial_value(name: str, shape: Sequence[int], std: float, seed: int, device: torch.device) -> Tensor:
    """The fp32 value a released parameter starts from, depending on nothing but (seed, name, shape, device type).

    Norm weights are 1, biases 0, everything else normal with `std`.
    """
    if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
        return torch.ones(*shape, device=device)
    if name.endswith("bias"):
        return torch.zeros(*shape, device=device)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.empty(*shape, device=device).normal_(0.0, std, generator=generator)


Source = Callable[[str], Tensor]
"""Released name to its whole tensor."""


def fresh(model: ModelConfig, seed: int, device: torch.device) -> Source:
    """A source of initial values (`initial_value`) for every released name."""
    shapes, std = released_shapes(model), model.decoder.init_method_std
    return lambda name: initial_value(name, shapes[name], std, seed, device)


@torch.no_grad()
def fill_decoder(stage: nn.Module, model: ModelConfig, source: Source, first_layer: int, tp_rank: int, tp: int) -> None:
    """Copy released tensors into one stage's tensor-parallel part.

    Raises:
        ConversionError: a tensor of the source does not have the shape the model wants.
    """
    shapes = released_shapes(model)
    for parameter, rule, names in stage_parameters(stage, first_layer):
        whole = [_checked(name, source(name), shapes[name]) for name in names]
        parameter.copy_(rule.cut(model, whole, tp)[tp_rank])


def join_stage(model: ModelConfig, parts: Sequence[dict[str, Tensor]], first_layer: int) -> dict[str, Tensor]:
    """The reverse of cutting: whole released tensors of one stage.

    Args:
        parts: for each tensor-parallel rank, in order, a tensor for every parameter name of the stage (weights,
            gradients or moments alike).
        first_layer: global index of the stage's first layer.
    """
    whole: dict[str, Tensor] = {}
    for name in parts[0]:
        rule, released = rule_of(name, first_layer)
        whole |= zip(released, rule.join(model, [part[name] for part in parts]), strict=True)
    return whole


@torch.no_grad()
def fill_encoder(encoder: nn.Module, model: ModelConfig, source: Source) -> None:
    """Copy released tensors into the encoder. Raises ConversionError like `fill_decoder`."""
    shapes = released_shapes(model)
    for name, parameter in encoder.named_parameters():
        parameter.copy_(_checked("visual." + name, source("visual." + name), shapes["visual." + name]))


def _checked(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise ConversionError(f"{name} has shape {list(tensor.shape)}, the model wants {list(shape)}")
    return tensor


@torch.no_grad()
def fingerprint(encoder: nn.Module, config: Config) -> str:
    """16 hexadecimal digits that say whose features are whose.

    They depend on every bit, name and dtype of the encoder's parameters, and on what else its output depends on: heads,
    epsilon, FP8, and how many embeddings are made of a picture. They do not depend on the device.


    Integer sums over the bits of each tensor, so that billions of numbers cost a read of the memory and not a hash.
    """
    vit, recipe = config.model.encoder, config.fp8.recipe if config.fp8.encoder else "none"
    digest = hashlib.sha256(
        f"{vit.num_attention_heads} {vit.layernorm_epsilon} {recipe} {config.model.image_queries}".encode()
    )
    for name, parameter in sorted(encoder.named_parameters()):
        bits = parameter.detach().flatten().view({2: torch.int16, 4: torch.int32}[parameter.element_size()])
        sums = [0, 0]
        for start in range(0, len(bits), 2**24):  # 128 MiB at a time as int64
            part = bits[start : start + 2**24].long()
            place = torch.arange(start + 1, start + 1 + len(part), device=part.device)
            sums = [(a + int(b)) % 2**64 for a, b in zip(sums, (part.sum(), (part * place).sum()), strict=True)]
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)} {sums}\n".encode())
    return digest.hexdigest()[:16]
