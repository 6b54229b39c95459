"""The 37B model has the released names, shapes and count; the numbers here are those of the published files."""

from dataclasses import replace
from math import prod

import pytest
import torch

from emu2_megatron.config.presets import PRESETS
from emu2_megatron.convert.huggingface import config_json, named
from emu2_megatron.model.parameters import hf_parameters, released_shapes, stored_parameters, stored_shapes

BLOCK = {
    "attn.qkv.weight": (5376, 1792), "attn.qkv.bias": (5376,), "attn.proj.weight": (1792, 1792),
    "attn.proj.bias": (1792,), "norm1.weight": (1792,), "norm1.bias": (1792,), "norm2.weight": (1792,),
    "norm2.bias": (1792,), "mlp.fc1.weight": (15360, 1792), "mlp.fc1.bias": (15360,), "mlp.fc2.weight": (1792, 15360),
    "mlp.fc2.bias": (1792,),
}  # fmt: skip
LAYER = {
    "input_layernorm.weight": (6656,), "post_attention_layernorm.weight": (6656,),
    **{f"self_attn.{x}_proj.weight": (6656, 6656) for x in "qkvo"}, "self_attn.rotary_emb.inv_freq": (64,),
    "mlp.gate_proj.weight": (17920, 6656), "mlp.up_proj.weight": (17920, 6656), "mlp.down_proj.weight": (6656, 17920),
}  # fmt: skip


@pytest.mark.parametrize(("preset", "rows", "numbers"), [
    ("emu2_37b", 32272, 36_906_631_680), ("emu2_chat_37b", 32274, 36_906_658_304),
])  # fmt: skip
def test_released_names(preset: str, rows: int, numbers: int) -> None:
    wanted = {
        "project_up.weight": (6656, 1792), "project_down.weight": (1792, 6656),
        "model.visual.cls_token": (1, 1, 1792), "model.visual.pos_embed": (1, 1025, 1792),
        "model.visual.patch_embed.proj.weight": (1792, 3, 14, 14), "model.visual.patch_embed.proj.bias": (1792,),
        "model.decoder.lm.model.embed_tokens.weight": (rows, 6656), "model.decoder.lm.lm_head.weight": (rows, 6656),
        "model.decoder.lm.model.norm.weight": (6656,),
        **{f"model.visual.blocks.{i}.{name}": shape for i in range(64) for name, shape in BLOCK.items()},
        **{f"model.decoder.lm.model.layers.{i}.{name}": shape for i in range(60) for name, shape in LAYER.items()},
    }  # fmt: skip
    found = {name: shape for name, (_, shape, _) in hf_parameters(PRESETS[preset]).items()}
    assert found == wanted
    assert len(found) == 1377
    # The published safetensors of the encoder of Emu2-Gen are 73.813 GB in bf16.
    assert sum(map(prod, found.values())) == numbers


def test_every_number_has_one_place() -> None:
    """The released tensors are shared out over the stored ones, without a rest."""
    model = PRESETS["emu2_37b"]
    natives = [native for _, names in stored_parameters(model).values() for native in names]
    assert sorted(natives) == sorted(released_shapes(model))
    assert sum(map(prod, stored_shapes(model).values())) == 36_906_513_152
    native_of_hf = [native for _, _, names in hf_parameters(model).values() for native in names]
    assert sorted(native_of_hf) == sorted(released_shapes(model))


def test_rotary_frequencies() -> None:
    """As LLaMA has them."""
    model = PRESETS["emu2_tiny"]
    rule, shape, _ = hf_parameters(model)["model.decoder.lm.model.layers.0.self_attn.rotary_emb.inv_freq"]
    wanted = torch.tensor([10000.0 ** -(2 * i / 32) for i in range(16)])
    assert shape == (16,)
    torch.testing.assert_close(rule.merge(model, []), wanted, rtol=1e-6, atol=0)


def test_config_json_is_the_released_one() -> None:
    content = config_json(PRESETS["emu2_chat_37b"], torch.float32, True, 32000)
    assert content["vision_config"]["mlp_ratio"] == 8.571428571428571
    assert content["vision_config"]["n_query"] == 256 and content["vision_config"]["v_query"] == 64
    assert (content["d_model"], content["hidden_size"], content["pad_token_id"]) == (1792, 6656, 32000)
    assert content["vision_config"]["head_width"] == 112 and content["vision_config"]["intermediate_size"] == 15360


def test_presets_are_known_again() -> None:
    for name, preset in PRESETS.items():
        assert named(replace(preset, preset="emu2_37b")).preset == name
