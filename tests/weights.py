"""Small models as other programs would have written them: names and fusions by hand, not by the table under test."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from emu2_megatron.config.presets import PRESETS
from emu2_megatron.config.schema import ModelConfig
from emu2_megatron.model.parameters import released_shapes

TINY = PRESETS["emu2_tiny"]
TOKENIZER = Path(__file__).parents[1] / "examples" / "data" / "tokenizer.model"
"""Fits TINY."""


def shallow(layers: int = 2, **decoder: Any) -> ModelConfig:
    """TINY with fewer layers."""
    return replace(TINY, decoder=replace(TINY.decoder, num_layers=layers, **decoder))


def native(model: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Random numbers everywhere, in biases and norms too, under the native released names."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in released_shapes(model).items():
        scale = 0.1 if len(shape) > 1 or "bias" in name else 1.0
        tensors[name] = (torch.randn(shape, generator=draw) * scale).to(dtype)
    return tensors


def hugging_face(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Native tensors in the form of the released Hugging Face folders."""
    out = {}
    for name, tensor in tensors.items():
        if name.endswith("q_bias"):
            v_bias = tensors[name.replace("q_bias", "v_bias")]
            fused = torch.cat([tensor, torch.zeros(len(tensor), dtype=tensor.dtype), v_bias])
            out["model." + name.replace("q_bias", "qkv.bias")] = fused
        elif not name.endswith("v_bias"):
            out[name if name.startswith("project") else "model." + name] = tensor
        if name.endswith("self_attn.o_proj.weight"):
            out["model." + name.replace("o_proj.weight", "rotary_emb.inv_freq")] = torch.ones(4)  # wrong on purpose
    return out


def config_json(model: ModelConfig) -> dict[str, Any]:
    """Those keys of a released `config.json` that say something."""
    e, d = model.encoder, model.decoder
    return {
        "architectures": ["EmuForCausalLM"], "vocab_size": d.vocab_size, "hidden_size": d.hidden_size,
        "intermediate_size": d.ffn_hidden_size, "num_hidden_layers": d.num_layers,
        "num_attention_heads": d.num_attention_heads, "num_key_value_heads": d.num_attention_heads,
        "max_position_embeddings": d.max_position_embeddings, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "initializer_range": 0.02, "d_model": e.hidden_size,
        "vision_config": {
            "image_size": e.image_size, "patch_size": e.patch_size, "layers": e.num_layers, "width": e.hidden_size,
            "head_width": e.hidden_size // e.num_attention_heads, "intermediate_size": e.ffn_hidden_size,
            "layer_norm_eps": 1e-6, "n_query": model.image_queries, "v_query": model.frame_queries, "postnorm": True,
        },
    }  # fmt: skip


def folder(path: Path, tensors: dict[str, Tensor], kind: str, shards: int = 3, config: Any = None) -> Path:
    """A folder of shards, `bin` or `safetensors`, with an index."""
    path.mkdir(parents=True)
    names = list(tensors)
    stem, ending, index = {
        "bin": ("pytorch_model", "bin", "pytorch_model.bin.index.json"),
        "safetensors": ("model", "safetensors", "model.safetensors.index.json"),
    }[kind]
    where = {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}.{ending}"
        part = {name: tensors[name].contiguous() for name in names[i::shards]}  # parts of a layer in several shards
        if kind == "bin":
            torch.save(part, path / file)
        else:
            save_file(part, path / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    (path / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path
