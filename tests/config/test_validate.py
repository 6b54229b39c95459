"""One illegal configuration at least for every rule, and legal neighbours that pass."""

from dataclasses import replace

import pytest

from emu2_megatron.config import describe, validate
from emu2_megatron.config.loading import load
from emu2_megatron.config.presets import PRESETS
from emu2_megatron.config.schema import Config, DataConfig
from emu2_megatron.errors import ConfigError

DATA = DataConfig(shards=("shards/*.tar",), tokenizer="tokenizer.model")
TINY = Config(model=PRESETS["emu2_tiny"], data=DATA)
LARGE = Config(data=DATA)


def changed(config: Config, **values) -> Config:
    """The configuration with `section__field=value` changed."""
    for key, value in values.items():
        config = _set(config, key.split("__"), value)
    return config


def _set(node, path, value):
    head, *rest = path
    return replace(node, **{head: _set(getattr(node, head), rest, value) if rest else value})


def error_of(config: Config, world_size: int | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        validate.validate(config, world_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_legal(preset):
    assert validate.validate(Config(model=PRESETS[preset], data=DATA), None) == 1


def test_recipes_are_legal():
    given = ["data.shards=[a.tar]", "data.tokenizer=t.model"]
    assert validate.validate(load("tiny_interleaved"), None) == 2
    assert validate.validate(load("stage2", given), 128) == 8
    assert error_of(load("stage2")).startswith("data.shards: []")


def test_a_row_of_a_decoder_is_a_picture_or_a_clip():
    given = ["data.shards=[a.tar]"]
    for recipe, length, said in [
        ("visual_decoder", 64, "takes a picture a row, legal: model.image_queries 64"),
        ("video_decoder", 512, "takes a clip a row, legal: video_decoder.frames x model.frame_queries = 512"),
    ]:
        assert load(recipe).data.sequence_length == length
        assert validate.validate(load(recipe, given), 2) == 2
        assert error_of(load(recipe, [*given, f"data.sequence_length={length + 1}"])) == (
            f"data.sequence_length: {length + 1}; training.objective {recipe} {said}"
        )
    longer = ["video_decoder.frames=64", "data.sequence_length=4096"]  # the language model's longest does not matter
    assert validate.validate(load("video_decoder", [*given, *longer]), 2) == 2


def test_small_pictures_are_legal():
    """The first stage of pre-training is at 224 pixels: 16² patches, which 64 embeddings share in squares of 4."""
    given = ["data.shards=[a.tar]", "data.tokenizer=t.model", "model.encoder.image_size=224"]
    assert validate.validate(load("stage2", given), 128) == 8
    assert error_of(load("stage2", [*given, "model.image_queries=1024"])).endswith("legal: 1, 4, 16, 64, 256")


NUMBERS = [entry.key for entry in describe.describe() if entry.type.split()[0] in ("int", "float")]


@pytest.mark.parametrize("key", NUMBERS)
def test_no_number_may_be_negative_or_not_a_number(key):
    for value in (-1, float("nan"), float("inf"), float("-inf")):
        assert error_of(changed(TINY, **{key.replace(".", "__"): value})).startswith(f"{key}: {value}; legal: ")


MAY_BE_ZERO = {
    "data.image_first_probability",
    "data.max_bad_share",
    "data.phrase_first_probability",
    "training.text_loss_weight",
    "training.image_loss_weight",
    "training.recompute_layers",
    "training.seed",
    "visual_decoder.condition_drop",
    "visual_decoder.ema_decay",
    "visual_decoder.noise_offset",
    "visual_decoder.paint_every",
    "video_decoder.condition_drop",
    "video_decoder.ema_decay",
    "video_decoder.noise_offset",
    "video_decoder.paint_every",
    "optimizer.adam_beta1",
    "optimizer.adam_beta2",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "optimizer.min_lr_ratio",
    "optimizer.warmup_steps",
    "optimizer.warmup_ratio",
    "checkpoint.every",
    "checkpoint.keep_last",
    "checkpoint.keep_every",
    "fp8.first_layers_bf16",
    "fp8.last_layers_bf16",
    "fp8.margin",
    "guards.spike_factor",
}


@pytest.mark.parametrize("key", NUMBERS)
def test_zero(key):
    config = changed(TINY, **{key.replace(".", "__"): 0})
    if key in MAY_BE_ZERO:
        assert validate.validate(config, None) == 1
    else:
        assert error_of(config) == f"{key}: 0; legal: more than 0"


def test_two_ways_of_blending():
    config = changed(TINY, data__weights=(1.0,), data__samples_per_step=(1,))
    assert error_of(config) == "data.weights: [1.0]; given together with samples_per_step; set one of them to []"


@pytest.mark.parametrize(
    ("key", "legal", "illegal"),
    [
        ("data__image_first_probability", 1.0, 1.01),
        ("optimizer__min_lr_ratio", 1.0, 1.01),
        ("optimizer__warmup_ratio", 1.0, 1.01),
        ("optimizer__adam_beta1", 0.999, 1.0),
        ("optimizer__adam_beta2", 0.999, 1.0),
        ("training__precision", "fp16", "fp8"),
        ("optimizer__lr_schedule", "constant", "cosin"),
        ("optimizer__warmup_steps", 20350, 20351),
        ("parallel__tensor_parallel_size", 4, 3),
        ("parallel__pipeline_parallel_size", 3, 5),
        ("model__encoder__num_attention_heads", 7, 5),
        ("model__decoder__num_attention_heads", 8, 3),
        ("model__decoder__num_attention_heads", 64, 128),  # 2 and 1 wide
        ("model__image_queries", 16, 8),
        ("model__image_queries", 1, 9),  # a square, but 3 does not divide the grid's 4
        ("model__frame_queries", 16, 64),
        ("data__sequence_length", 2048, 2049),
        ("data__sequence_length", 8, 7),
        ("data__max_bad_share", 1.0, 1.01),
        ("guards__spike_factor", 1.5, 1.0),
        ("guards__steps_to_skip", (1, 20350), (0,)),
        ("guards__steps_to_skip", (), (20351,)),
        ("data__phrase_first_probability", 1.0, 1.01),
        ("data__video_frames", (4, 6, 8), (8, 0)),
        ("data__document_pictures", 8, 7),  # data.video_frames is 8
        ("data__document_tokens", 50, 49),  # <s> [VIDEO] and 8 frames of [IMG], 4 embeddings, [/IMG]
        ("data__video_frames", (1,), ()),
        ("data__weights", (0.5,), (0.0,)),
        ("data__weights", (), (1.0, 2.0)),  # of one entry of data.shards
        ("data__samples_per_step", (12800,), (-1,)),
        ("data__samples_per_step", (2048,), (2047,)),  # of training.global_batch_size 2048
        ("data__samples_per_step", (), (4, 4)),
        ("video_decoder__frames", 2, 1),
        ("video_decoder__largest_scale", 1.0, 0.99),
        ("fp8__recipe", "none", "fp8"),
        ("fp8__amax_compute", "most_recent", "mean"),
    ],
)
def test_legal_neighbours(key, legal, illegal):
    assert validate.validate(changed(TINY, **{key: legal}), None) == 1
    assert error_of(changed(TINY, **{key: illegal})).startswith(
        f"{key.replace('__', '.')}: {describe.yaml_value(illegal)}; "
    )


def test_messages_name_the_tables():
    assert error_of(changed(TINY, training__precision="fp8")) == "training.precision: fp8; legal: bf16, fp16, fp32"
    assert error_of(changed(TINY, optimizer__lr_schedule="")).endswith("legal: cosine, linear, constant")


def test_the_tables_are_those_the_engine_knows():
    from emu2_megatron.model.decoder import RECOMPUTE
    from emu2_megatron.model.fp8 import RECIPES
    from emu2_megatron.ops.fp8 import GRADIENTS
    from emu2_megatron.platform.kernels import _FP8_CHECKS
    from emu2_megatron.platform.precision import DTYPES
    from emu2_megatron.training.schedules import DECAYS

    assert set(validate.PRECISIONS) == set(DTYPES)
    assert set(validate.FP8_RECIPES) == {"none", *RECIPES} == {"none", *GRADIENTS} == {"none", *_FP8_CHECKS}
    assert set(validate.RECOMPUTE) == set(RECOMPUTE)
    assert set(validate.LR_SCHEDULES) == set(DECAYS)


def test_tensor_parallel_sizes_of_the_large_model():
    assert error_of(changed(LARGE, parallel__tensor_parallel_size=8)) == (
        "parallel.tensor_parallel_size: 8; must divide model.decoder.num_attention_heads 52 and ffn_hidden_size 17920, "
        "legal: 1, 2, 4"
    )
    # 13 divides the heads and not the MLP; with an MLP that 52 divides, all divisors of the heads are legal.
    assert "legal: 1, 2, 4" in error_of(changed(LARGE, parallel__tensor_parallel_size=13))
    wider = changed(LARGE, model__decoder__ffn_hidden_size=52 * 345)
    assert validate.tensor_parallel_sizes(wider) == [1, 2, 4, 13, 26, 52]
    assert validate.validate(changed(wider, parallel__tensor_parallel_size=13), 13) == 1


def test_pipeline_parallel_sizes_of_the_large_model():
    assert error_of(changed(LARGE, parallel__pipeline_parallel_size=61)) == (
        "parallel.pipeline_parallel_size: 61; legal: up to model.decoder.num_layers 60, one for every stage"
    )
    assert validate.validate(changed(LARGE, parallel__pipeline_parallel_size=8), 16) == 2
    uneven = (7, 7, 7, 7, 8, 8, 8, 8)
    config = changed(LARGE, parallel__pipeline_parallel_size=8, parallel__pipeline_layout=uneven)
    assert validate.validate(config, 16) == 2


@pytest.mark.parametrize("layout", [(), (4,), (1, 1, 2), (2, 1), (4, 0), (5, -1)])
def test_pipeline_layout(layout):
    config = changed(TINY, parallel__pipeline_parallel_size=2, parallel__pipeline_layout=layout)
    listed = ", ".join(map(str, layout))
    assert error_of(config) == (
        f"parallel.pipeline_layout: [{listed}]; legal: 2 numbers (pipeline_parallel_size x "
        "virtual_pipeline_parallel_size), each 1 or more, that add up to model.decoder.num_layers 4; or null"
    )
    assert validate.validate(changed(config, parallel__pipeline_layout=(1, 3)), None) == 1


def test_world_size():
    config = changed(TINY, parallel__tensor_parallel_size=2, parallel__pipeline_parallel_size=2)
    assert validate.validate(config, None) == 1
    assert [validate.validate(config, world) for world in (4, 8, 16)] == [1, 2, 4]
    for world in (0, 1, 6):
        assert error_of(config, world) == (
            f"parallel: {world} processes; tensor_parallel_size 2 x pipeline_parallel_size 2, legal: a multiple of 4 "
            "processes"
        )


def test_data_parallel_size_and_world_size():
    config = changed(TINY, parallel__tensor_parallel_size=2, parallel__data_parallel_size=2)
    assert validate.validate(config, None) == 2
    assert validate.validate(config, 4) == 2
    assert error_of(config, 8) == (
        "parallel.data_parallel_size: 2; tensor_parallel_size 2 x pipeline_parallel_size 1 makes that 4 processes and "
        "there are 8, legal: 4 or null"
    )
    assert validate.validate(changed(config, parallel__data_parallel_size=None), 8) == 4


def test_global_batch_size():
    config = changed(TINY, training__micro_batch_size=3, training__global_batch_size=12)
    assert validate.validate(config, 4) == 4
    assert error_of(config, 8) == (
        "training.global_batch_size: 12; must be a multiple of micro_batch_size 3 x data-parallel size 8 = 24, nearest "
        "legal: 24"
    )
    assert error_of(changed(config, training__global_batch_size=30), 8).endswith("nearest legal: 24, 48")


def test_warmup_is_given_one_way():
    assert validate.validate(changed(TINY, optimizer__warmup_steps=10), None) == 1
    assert validate.validate(changed(TINY, optimizer__warmup_ratio=0.1), None) == 1
    both = changed(TINY, optimizer__warmup_steps=10, optimizer__warmup_ratio=0.1)
    assert error_of(both) == (
        "optimizer.warmup_steps: 10; given together with warmup_ratio 0.1; set one of them to null"
    )


def test_one_loss_has_to_count():
    for key in ("training__text_loss_weight", "training__image_loss_weight"):
        assert validate.validate(changed(TINY, **{key: 0.0}), None) == 1
    neither = changed(TINY, training__text_loss_weight=0.0, training__image_loss_weight=0.0)
    assert error_of(neither).startswith("training.text_loss_weight: 0.0; ")


def test_messages_about_the_picture():
    assert validate.validate(changed(TINY, model__encoder__image_size=112), None) == 1
    assert error_of(changed(TINY, model__encoder__image_size=57)) == (
        "model.encoder.patch_size: 14; must divide model.encoder.image_size 57, legal: 1, 3, 19, 57"
    )
    assert error_of(changed(LARGE, model__image_queries=100)) == (
        "model.image_queries: 100; must be a square whose side divides the patch grid's, legal: 1, 4, 16, 64, 256, 1024"
    )
    assert error_of(changed(LARGE, data__sequence_length=67)) == (
        "data.sequence_length: 67; too short for one picture; legal: 68 or more (its visual embeddings and 4 tokens "
        "around them)"
    )
    assert validate.validate(changed(LARGE, data__sequence_length=68), None) == 1
    # A frame is a picture too.
    assert "legal: 260 or more" in error_of(changed(LARGE, data__sequence_length=68, model__frame_queries=256))


def test_odd_heads_cannot_be_rotated():
    config = changed(TINY, model__decoder__hidden_size=20, model__decoder__num_attention_heads=4)
    assert "num_attention_heads = 5 wide; legal: an even width" in error_of(config)
    assert validate.validate(changed(config, model__decoder__hidden_size=24), None) == 1


def test_data_has_to_be_given():
    assert error_of(changed(TINY, data__shards=())) == (
        "data.shards: []; give tar shards; `emu2 shards --input FOLDER --output FOLDER` makes them"
    )
    assert error_of(changed(TINY, data__tokenizer="")) == (
        "data.tokenizer: ''; give the path of a SentencePiece tokenizer.model"
    )


def test_files(tmp_path):
    (tmp_path / "a.tar").touch()
    (tmp_path / "[b].tar").touch()
    (tmp_path / "tokenizer.model").touch()

    def config(pattern, tokenizer="tokenizer.model"):
        return changed(TINY, data__shards=(str(tmp_path / pattern),), data__tokenizer=str(tmp_path / tokenizer))

    for pattern in ("a.tar", "*.tar", "**/*.tar", "[b].tar"):
        validate.validate_files(config(pattern))
    for bad, said in [
        (config("c*.tar"), f"data.shards: {tmp_path}/c*.tar matches no file; give tar shards; `emu2 shards --inp"),
        (config("a.tar", "nowhere"), f"data.tokenizer: {tmp_path}/nowhere is not a file; give the path of a Sentence"),
        (config("a.tar", ""), f"data.tokenizer: {tmp_path} is not a file"),
    ]:
        with pytest.raises(ConfigError) as caught:
            validate.validate_files(bad)
        assert str(caught.value).startswith(said)


def test_rules_name_real_keys():
    assert {rule.key for rule in validate.RULES} <= {entry.key for entry in describe.describe()}


def test_virtual_pipeline():
    deep = changed(TINY, model__decoder__num_layers=8, parallel__pipeline_parallel_size=2)
    validate.validate(changed(deep, parallel__virtual_pipeline_parallel_size=4), None)
    validate.validate(changed(deep, parallel__virtual_pipeline_parallel_size=3), None)
    assert error_of(changed(deep, parallel__virtual_pipeline_parallel_size=5)) == (
        "parallel.virtual_pipeline_parallel_size: 5; legal: up to 4, for one of model.decoder.num_layers 8 in every "
        "part of every stage"
    )
    layout = (1, 1, 1, 2, 2, 1)
    validate.validate(changed(deep, parallel__virtual_pipeline_parallel_size=3, parallel__pipeline_layout=layout), None)
    assert error_of(changed(TINY, parallel__virtual_pipeline_parallel_size=2)) == (
        "parallel.virtual_pipeline_parallel_size: 2; needs pipeline_parallel_size of at least 2, legal: 1"
    )
    odd = changed(
        deep, parallel__virtual_pipeline_parallel_size=2, training__global_batch_size=6, training__micro_batch_size=2
    )
    assert error_of(odd) == (
        "training.global_batch_size: 6; makes 3 micro-batches, which the interleaved schedule runs in groups of "
        "pipeline_parallel_size 2, legal: a multiple of 4"
    )


def test_sequence_is_shared_out_evenly():
    assert error_of(changed(TINY, parallel__sequence_parallel=True)) == (
        "parallel.sequence_parallel: true; needs tensor_parallel_size of at least 2, legal: false"
    )
    split = changed(
        TINY, parallel__tensor_parallel_size=2, parallel__sequence_parallel=True, parallel__context_parallel_size=2
    )
    validate.validate(changed(split, data__sequence_length=128), None)
    assert error_of(changed(split, data__sequence_length=124)) == (
        "data.sequence_length: 124; legal: a multiple of 8 (2 x context_parallel_size if that is over 1, x "
        "tensor_parallel_size if sequence_parallel)"
    )


def test_context_parallel_ranks_count_as_processes():
    config = changed(
        TINY, parallel__tensor_parallel_size=2, parallel__pipeline_parallel_size=2, parallel__context_parallel_size=2
    )
    assert validate.validate(config, 16) == 2
    assert "context_parallel_size 2, legal: a multiple of 8 processes" in error_of(config, 12)


def test_prefetch_is_for_a_frozen_encoder():
    ahead = changed(TINY, training__encoder_prefetch=True)
    assert validate.validate(ahead, None) == 1
    assert error_of(changed(ahead, training__train_encoder=True)).startswith("training.encoder_prefetch: true; ")


def test_prefetch_and_fp8_do_not_share_a_workspace():
    ahead = changed(LARGE, training__encoder_prefetch=True, fp8__recipe="current", fp8__encoder=True)
    assert error_of(ahead).startswith("training.encoder_prefetch: true; Transformer Engine")
    assert validate.validate(changed(ahead, fp8__emulate=True), None) == 1
    assert validate.validate(changed(ahead, fp8__encoder=False), None) == 1


def test_the_loss_scale_is_a_number_in_fp32():
    validate.validate(changed(TINY, training__initial_loss_scale=2.0**127), None)
    for scale in (0.5, 1e39):
        assert error_of(changed(TINY, training__initial_loss_scale=scale)).startswith("training.initial_loss_scale: ")


def test_recompute_layers():
    config = changed(TINY, parallel__pipeline_parallel_size=3)  # 1, 2 and 1 layers
    block = changed(config, training__recompute="block")
    for layers in (1, 2):
        validate.validate(changed(block, training__recompute_layers=layers), None)
    for layers in (0, 3):
        assert error_of(changed(block, training__recompute_layers=layers)) == (
            f"training.recompute_layers: {layers}; legal with training.recompute block: 1 to 2, the layers of the "
            "largest part"
        )
    for recompute in ("none", "attention", "full"):
        assert error_of(changed(config, training__recompute=recompute, training__recompute_layers=1)) == (
            f"training.recompute_layers: 1; training.recompute is {recompute}, legal: 0; or training.recompute=block"
        )


def test_fp8():
    tiny = changed(TINY, fp8__recipe="current", fp8__emulate=True)
    kept = {"fp8__first_layers_bf16": 1, "fp8__last_layers_bf16": 2}
    legal = [
        tiny,
        changed(tiny, **kept),
        changed(tiny, fp8__encoder=True, fp8__decoder=False),
        changed(tiny, fp8__recipe="delayed"),
        changed(TINY, model__decoder__ffn_hidden_size=352, fp8__recipe="mxfp8"),
    ]
    for config in legal:
        assert validate.validate(config, None) == 1
    illegal = [
        (changed(TINY, fp8__emulate=True), "fp8.emulate: true; fp8.recipe is none"),
        (changed(tiny, training__precision="fp32"), "fp8.recipe: current; needs training.precision bf16"),
        (changed(tiny, fp8__decoder=False), "fp8.recipe: current; neither fp8.decoder nor"),
        (changed(tiny, fp8__recipe="delayed", fp8__encoder=True), "fp8.encoder: true; delayed"),
        (changed(tiny, fp8__recipe="delayed", fp8__first_layers_bf16=1), "fp8.first_layers_bf16: 1; megatron-core"),
        (changed(tiny, fp8__recipe="delayed", fp8__last_layers_bf16=1), "fp8.last_layers_bf16: 1; megatron-core"),
        (changed(tiny, fp8__first_layers_bf16=3, parallel__pipeline_parallel_size=2), "fp8.first_layers_bf16: 3; "),
        (changed(tiny, fp8__last_layers_bf16=3, parallel__pipeline_parallel_size=2), "fp8.last_layers_bf16: 3; "),
        (changed(tiny, fp8__first_layers_bf16=2, fp8__last_layers_bf16=2), "fp8.last_layers_bf16: 2; with first"),
    ]
    for config, start in illegal:
        assert error_of(config).startswith(start)


def test_fp8_on_transformer_engine_needs_even_dimensions():
    """344 columns are no multiple of 16, 176 of 16 but not of 32; 8 tokens a rank are too few."""
    tiny = changed(TINY, fp8__recipe="current")
    assert "ffn_hidden_size is 344, legal: none, or fp8.emulate=true" in error_of(tiny)
    even = changed(tiny, model__decoder__ffn_hidden_size=352)
    assert validate.validate(even, None) == 1
    assert validate.validate(changed(even, parallel__tensor_parallel_size=2), None) == 1
    halved = changed(even, parallel__tensor_parallel_size=2, fp8__recipe="mxfp8")
    assert error_of(halved).startswith("fp8.recipe: mxfp8; Transformer Engine needs multiples of 32 and a rank's share")
    assert "tokens is 8" in error_of(changed(even, data__sequence_length=8))
    assert "encoder.hidden_size is 56" in error_of(changed(even, fp8__encoder=True))
    large = changed(LARGE, fp8__recipe="mxfp8", fp8__encoder=True, fp8__first_layers_bf16=1)
    assert validate.validate(changed(large, parallel__tensor_parallel_size=4), 4) == 1
