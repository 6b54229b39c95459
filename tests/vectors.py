"""The authors' own outputs (tests/golden), and the small models they are of."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from emu2_megatron.config.schema import DecoderConfig, EncoderConfig, ModelConfig


def read(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the file of `base` or `chat` says about its model, and its tensors: `in.*`, `out.*` and the weights."""
    path = Path(__file__).parent / "golden" / f"emu2_{name}_tiny.safetensors"
    with safe_open(str(path), "pt") as file:
        meta = {key: json.loads(value) for key, value in file.metadata().items()}
        return meta, {key: file.get_tensor(key) for key in file.keys()}


def weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the tensors that are weights, under their native names."""
    return {key.removeprefix("w."): value for key, value in tensors.items() if key.startswith("w.")}


def model(meta: dict[str, Any]) -> ModelConfig:
    """The model of a file."""
    encoder = EncoderConfig(
        image_size=meta["image_size"], patch_size=meta["patch_size"], num_layers=meta["vision_layers"],
        hidden_size=meta["vision_width"], num_attention_heads=meta["vision_heads"],
        ffn_hidden_size=int(meta["vision_width"] * meta["mlp_ratio"]),
    )  # fmt: skip
    decoder = DecoderConfig(
        num_layers=meta["layers"], hidden_size=meta["hidden_size"], num_attention_heads=meta["heads"],
        ffn_hidden_size=meta["intermediate_size"], vocab_size=meta["vocab_size"],
        layernorm_epsilon=meta["rms_norm_eps"], rotary_base=meta["rope_theta"],
    )  # fmt: skip
    return ModelConfig(encoder=encoder, decoder=decoder, image_queries=meta["n_query"], frame_queries=meta["v_query"])
