"""Which configurations can run. Every refusal is a `ConfigError` of one line: key, value, and what is legal.

The checks are a table of rules, read top to bottom; the first that does not hold is reported, so a rule may rely on
those above it (sizes are positive before anything is divided by them). What depends on the number of processes comes
after the table.
"""

import glob
import math
import operator
from collections.abc import Callable
from functools import lru_cache
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple

from emu2_megatron.config.describe import yaml_value
from emu2_megatron.config.layout import part_layers
from emu2_megatron.config.schema import Config, queries_of
from emu2_megatron.errors import ConfigError

PRECISIONS = ("bf16", "fp16", "fp32")
LR_SCHEDULES = ("cosine", "linear", "constant")
OBJECTIVES = ("language", "visual_decoder", "video_decoder")
WARMUP_SHAPES = ("linear", "log")
RECOMPUTE = ("none", "attention", "full", "block")
FP8_RECIPES = ("none", "delayed", "current", "block", "mxfp8")
AMAX_COMPUTE = ("max", "most_recent")

_PICTURE_FRAME = 4
"""Tokens of a sequence with one picture besides its visual embeddings: `<s>`, `[IMG]`, `[/IMG]`, `</s>`."""


class Rule(NamedTuple):
    """One thing that must hold."""

    key: str
    """The dotted key to blame."""
    holds: Callable[[Config], bool]
    """Whether the configuration is fine."""
    legal: Callable[[Config], str]
    """What would be right."""


def validate(config: Config, world_size: int | None) -> int:
    """Refuse a configuration that cannot run.

    Args:
        config: from `loading.load`.
        world_size: processes of the run; None takes just as many as the layout needs.

    Returns:
        The data-parallel size.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    for rule in RULES:
        if not rule.holds(config):
            raise ConfigError(f"{rule.key}: {yaml_value(_value(config, rule.key))}; {rule.legal(config)}")
    data_parallel_size = _data_parallel_size(config, world_size)
    _check_batch(config, data_parallel_size)
    return data_parallel_size


def require_language(config: Config, command: str) -> None:
    """Refuse a configuration that trains something else, for a command that is about Emu2 itself."""
    if config.training.objective != "language":
        raise ConfigError(f"training.objective: {config.training.objective}; {command} is about language; legal: that")


def validate_files(config: Config) -> None:
    """Refuse shard patterns that match no file and a tokenizer that does not exist, on this machine."""
    for pattern in config.data.shards:
        if not Path(pattern).exists() and not glob.glob(pattern, recursive=True):
            raise ConfigError(f"data.shards: {pattern} matches no file; {_MAKE_SHARDS}")
    if config.training.objective == "language" and not Path(config.data.tokenizer).is_file():
        raise ConfigError(f"data.tokenizer: {config.data.tokenizer} is not a file; {_GIVE_TOKENIZER}")


def tensor_parallel_sizes(config: Config) -> list[int]:
    """The legal sizes: heads and MLP columns of the decoder are shared out evenly over the ranks."""
    return divisors(math.gcd(config.model.decoder.num_attention_heads, config.model.decoder.ffn_hidden_size))


def query_counts(config: Config) -> list[int]:
    """The legal numbers of visual embeddings of a picture: squares whose side divides the patch grid's."""
    return [side * side for side in divisors(config.model.encoder.image_size // config.model.encoder.patch_size)]


@lru_cache  # a plan asks for the same ones thousands of times
def divisors(number: int) -> list[int]:
    """All of them, 1 and the number itself included."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def _value(config: Config, key: str) -> Any:
    return operator.attrgetter(key)(config)


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values))


def _positive(key: str) -> Rule:
    return Rule(key, lambda config: 0 < _value(config, key) < math.inf, lambda _: "legal: more than 0")


def _not_negative(key: str) -> Rule:
    return Rule(key, lambda config: 0 <= _value(config, key) < math.inf, lambda _: "legal: 0 or more")


def _share(key: str) -> Rule:
    return Rule(key, lambda config: 0 <= _value(config, key) <= 1, lambda _: "legal: 0 to 1")


def _decay(key: str) -> Rule:
    return Rule(key, lambda config: 0 <= _value(config, key) < 1, lambda _: "legal: 0 or more, below 1")


def _one_of(key: str, choices: tuple[str, ...]) -> Rule:
    return Rule(key, lambda config: _value(config, key) in choices, lambda _: f"legal: {', '.join(choices)}")


def _scale(key: str) -> Rule:
    return Rule(
        key,
        lambda config: _value(config, key) >= 1,
        lambda _: "legal: 1, which leaves out the random scale, or more",
    )


def _each_positive(key: str) -> Rule:
    return Rule(
        key,
        lambda config: all(0 < value < math.inf for value in _value(config, key)),
        lambda _: "legal: numbers above 0",
    )


def _one_a_source(key: str) -> Rule:
    """What blends the entries of data.shards has a number for each of them."""
    return Rule(
        key,
        lambda config: not _value(config, key) or len(_value(config, key)) == len(config.data.shards),
        lambda config: (
            f"data.shards has {len(config.data.shards)}, legal: a number for each of them, or [] for one source"
        ),
    )


def _unless_null(rule: Rule) -> Rule:
    return rule._replace(holds=lambda config: _value(config, rule.key) is None or rule.holds(config))


def _divides(key: str, whole: str) -> Rule:
    def legal(config: Config) -> str:
        total = _value(config, whole)
        return f"must divide {whole} {total}, legal: {_listed(divisors(total))}"

    return Rule(key, lambda config: _value(config, whole) % _value(config, key) == 0, legal)


def _queries(key: str) -> Rule:
    return Rule(
        key,
        lambda config: _value(config, key) in query_counts(config),
        lambda config: f"must be a square whose side divides the patch grid's, legal: {_listed(query_counts(config))}",
    )


def replica_size(config: Config) -> int:
    """Ranks that share one decoder."""
    parallel = config.parallel
    return parallel.tensor_parallel_size * parallel.pipeline_parallel_size * parallel.context_parallel_size


def _parts(config: Config) -> int:
    return config.parallel.pipeline_parallel_size * config.parallel.virtual_pipeline_parallel_size


def _stage_layers(config: Config) -> int:
    return config.model.decoder.num_layers // config.parallel.pipeline_parallel_size


def _sequence_unit(config: Config) -> int:
    """What the sequence length must be a multiple of."""
    parallel = config.parallel
    context = 2 * parallel.context_parallel_size if parallel.context_parallel_size > 1 else 1
    return context * (parallel.tensor_parallel_size if parallel.sequence_parallel else 1)


def _layout_fits(config: Config) -> bool:
    layout = config.parallel.pipeline_layout
    return layout is None or (
        len(layout) == _parts(config) and sum(layout) == config.model.decoder.num_layers and min(layout) > 0
    )


def _recompute_fits(config: Config) -> bool:
    layers = config.training.recompute_layers
    return 0 < layers <= max(part_layers(config)) if config.training.recompute == "block" else layers == 0


def _legal_recompute(config: Config) -> str:
    if config.training.recompute != "block":
        return f"training.recompute is {config.training.recompute}, legal: 0; or training.recompute=block"
    return f"legal with training.recompute block: 1 to {max(part_layers(config))}, the layers of the largest part"


def _longest_picture(config: Config) -> int:
    return max(config.model.image_queries, config.model.frame_queries) + _PICTURE_FRAME


def _longest_shown(config: Config) -> int:
    """Tokens of a picture or a video with its markers, and `<s>` before it."""
    video = 1 + max(config.data.video_frames) * (config.model.frame_queries + 2)
    return 1 + max(config.model.image_queries + 2, video)


def _warmup_fits(config: Config) -> bool:
    return config.optimizer.warmup_steps is None or config.optimizer.warmup_steps <= config.training.steps


def _fp8_unit(config: Config) -> int:
    """What Transformer Engine wants every dimension of an FP8 operand to be a multiple of."""
    return 32 if config.fp8.recipe == "mxfp8" else 16


def _odd_fp8_sizes(config: Config) -> list[str]:
    """Dimensions of FP8 operands on one rank that Transformer Engine refuses, in words."""
    encoder, decoder, parallel = config.model.encoder, config.model.decoder, config.parallel
    tensor = parallel.tensor_parallel_size
    tokens = config.data.sequence_length * config.training.micro_batch_size // parallel.context_parallel_size
    sizes: dict[str, int] = {}
    if config.fp8.encoder:  # pictures' tokens are padded
        sizes["a model.encoder.hidden_size"] = encoder.hidden_size
        sizes["a model.encoder.ffn_hidden_size"] = encoder.ffn_hidden_size
    if config.fp8.decoder:
        sizes["a rank's share of model.decoder.hidden_size"] = decoder.hidden_size // tensor
        sizes["a rank's share of model.decoder.ffn_hidden_size"] = decoder.ffn_hidden_size // tensor
        sizes["a rank's share of a micro-batch's tokens"] = tokens // (tensor if parallel.sequence_parallel else 1)
    return [f"{name} is {size}" for name, size in sizes.items() if size % _fp8_unit(config)]


def _none_with_delayed(key: str) -> Rule:
    return Rule(
        key,
        lambda config: _value(config, key) == 0 or config.fp8.recipe != "delayed",
        lambda _: "megatron-core cannot leave layers out of delayed scaling, legal: 0, or fp8.recipe=current",
    )


def _within_a_stage(key: str) -> Rule:
    return Rule(
        key,
        lambda config: config.fp8.recipe == "none" or _value(config, key) <= _stage_layers(config),
        lambda config: (
            "megatron-core keeps no more than num_layers / pipeline_parallel_size layers at an end in bf16, legal: "
            f"0 to {_stage_layers(config)}"
        ),
    )


def _of_language_alone(key: str, otherwise: Any) -> Rule:
    return Rule(
        key,
        lambda config: config.training.objective == "language" or _value(config, key) == otherwise,
        lambda config: (
            f"training.objective {config.training.objective} is data-parallel alone, with a frozen encoder; legal: "
            f"{yaml_value(otherwise)}"
        ),
    )


_ROWS = {
    "visual_decoder": "picture a row, legal: model.image_queries",
    "video_decoder": "clip a row, legal: video_decoder.frames x model.frame_queries =",
}
_BF16_LAYERS = ("fp8.first_layers_bf16", "fp8.last_layers_bf16")
_GIVE_TOKENIZER = "give the path of a SentencePiece tokenizer.model"
_MAKE_SHARDS = "give tar shards; `emu2 shards --input FOLDER --output FOLDER` makes them"

_POSITIVE = """
    model.encoder.image_size model.encoder.patch_size model.encoder.num_layers model.encoder.hidden_size
    model.encoder.num_attention_heads model.encoder.ffn_hidden_size model.encoder.layernorm_epsilon
    model.decoder.num_layers model.decoder.hidden_size model.decoder.num_attention_heads model.decoder.ffn_hidden_size
    model.decoder.vocab_size model.decoder.max_position_embeddings model.decoder.layernorm_epsilon
    model.decoder.rotary_base model.decoder.init_method_std model.decoder.make_vocab_size_divisible_by
    model.image_queries model.frame_queries data.sequence_length data.document_pictures data.document_tokens
    data.packing_buffer
    parallel.tensor_parallel_size parallel.pipeline_parallel_size parallel.virtual_pipeline_parallel_size
    parallel.context_parallel_size
    training.steps training.global_batch_size training.micro_batch_size training.encoder_micro_batch_size
    training.initial_loss_scale training.loss_scale_window
    optimizer.decoder_lr optimizer.projection_lr optimizer.encoder_lr optimizer.adam_eps logging.every
    fp8.amax_history
    optimizer.visual_decoder_lr visual_decoder.image_size visual_decoder.unet_layers_per_block
    visual_decoder.time_embed_dim visual_decoder.vae_layers_per_block visual_decoder.latent_channels
    visual_decoder.vae_scaling_factor visual_decoder.norm_num_groups visual_decoder.min_picture_size
    visual_decoder.largest_scale
    optimizer.video_decoder_lr video_decoder.image_size video_decoder.unet_layers_per_block
    video_decoder.vae_layers_per_block video_decoder.latent_channels video_decoder.vae_scaling_factor
    video_decoder.norm_num_groups video_decoder.min_picture_size video_decoder.largest_scale video_decoder.frames
    video_decoder.temporal_kernel_size
    guards.max_skips guards.spike_window guards.hang_minutes guards.straggler_z guards.straggler_records
""".split()
_NOT_NEGATIVE = """
    training.text_loss_weight training.image_loss_weight training.seed training.recompute_layers
    optimizer.weight_decay optimizer.clip_grad
    checkpoint.every checkpoint.keep_last checkpoint.keep_every
    fp8.first_layers_bf16 fp8.last_layers_bf16 fp8.margin
    guards.spike_factor visual_decoder.noise_offset visual_decoder.paint_every
    video_decoder.noise_offset video_decoder.paint_every
""".split()

RULES: list[Rule] = [
    *map(_positive, _POSITIVE),
    *map(_not_negative, _NOT_NEGATIVE),
    *map(
        _share,
        (
            "data.image_first_probability",
            "data.phrase_first_probability",
            "data.max_bad_share",
            "optimizer.min_lr_ratio",
            "visual_decoder.condition_drop",
            "video_decoder.condition_drop",
        ),
    ),
    *map(
        _decay,
        ("optimizer.adam_beta1", "optimizer.adam_beta2", "visual_decoder.ema_decay", "video_decoder.ema_decay"),
    ),
    *map(_each_positive, ("data.weights", "data.samples_per_step", "data.video_frames")),
    Rule("data.video_frames", lambda config: bool(config.data.video_frames), lambda _: "legal: at least one number"),
    Rule(
        "data.weights",
        lambda config: not (config.data.weights and config.data.samples_per_step),
        lambda _: "given together with samples_per_step; set one of them to []",
    ),
    _unless_null(_positive("parallel.data_parallel_size")),
    _unless_null(_positive("guards.time_limit_minutes")),
    Rule(
        "guards.spike_factor",
        lambda config: config.guards.spike_factor == 0 or config.guards.spike_factor > 1,
        lambda _: "half of all losses are above their median; legal: more than 1, or 0 for no guard",
    ),
    Rule(
        "guards.steps_to_skip",
        lambda config: all(1 <= step <= config.training.steps for step in config.guards.steps_to_skip),
        lambda config: f"legal: numbers of steps, 1 to training.steps {config.training.steps}",
    ),
    _unless_null(_not_negative("optimizer.warmup_steps")),
    _unless_null(_share("optimizer.warmup_ratio")),
    _one_of("training.precision", PRECISIONS),
    _one_of("training.objective", OBJECTIVES),
    _one_of("optimizer.warmup_shape", WARMUP_SHAPES),
    Rule(
        "training.initial_loss_scale",
        lambda config: 1 <= config.training.initial_loss_scale <= 2.0**127,
        lambda _: "legal: 1, where halving ends, to 2^127, the largest power of two in fp32",
    ),
    _one_of("training.recompute", RECOMPUTE),
    _one_of("optimizer.lr_schedule", LR_SCHEDULES),
    _one_of("fp8.recipe", FP8_RECIPES),
    _one_of("fp8.amax_compute", AMAX_COMPUTE),
    Rule(
        "optimizer.warmup_steps",
        lambda config: config.optimizer.warmup_steps is None or config.optimizer.warmup_ratio is None,
        lambda config: f"given together with warmup_ratio {config.optimizer.warmup_ratio}; set one of them to null",
    ),
    Rule(
        "optimizer.warmup_steps",
        _warmup_fits,
        lambda config: f"legal: 0 to training.steps {config.training.steps}",
    ),
    Rule(
        "training.encoder_prefetch",
        lambda config: not (config.training.encoder_prefetch and config.training.train_encoder),
        lambda _: "training.train_encoder changes the encoder before the next step needs it, legal: false",
    ),
    Rule(
        "training.encoder_prefetch",
        lambda config: (
            not (
                config.training.encoder_prefetch
                and config.fp8.encoder
                and config.fp8.recipe != "none"
                and not config.fp8.emulate
            )
        ),
        lambda _: "Transformer Engine has one workspace for all streams, legal: false, or fp8.encoder=false",
    ),
    Rule(
        "training.text_loss_weight",
        lambda config: config.training.text_loss_weight + config.training.image_loss_weight > 0,
        lambda _: "image_loss_weight is 0 too, so nothing would be learnt; legal: at most one of them 0",
    ),
    _divides("model.encoder.patch_size", "model.encoder.image_size"),
    _divides("model.encoder.num_attention_heads", "model.encoder.hidden_size"),
    _divides("model.decoder.num_attention_heads", "model.decoder.hidden_size"),
    Rule(
        "model.decoder.num_attention_heads",
        lambda config: config.model.decoder.hidden_size // config.model.decoder.num_attention_heads % 2 == 0,
        lambda config: (
            "a head is hidden_size / num_attention_heads = "
            f"{config.model.decoder.hidden_size // config.model.decoder.num_attention_heads} wide; "
            "legal: an even width, which rotary embeddings need"
        ),
    ),
    *map(_queries, ("model.image_queries", "model.frame_queries")),
    Rule(
        "parallel.tensor_parallel_size",
        lambda config: config.parallel.tensor_parallel_size in tensor_parallel_sizes(config),
        lambda config: (
            f"must divide model.decoder.num_attention_heads {config.model.decoder.num_attention_heads} and "
            f"ffn_hidden_size {config.model.decoder.ffn_hidden_size}, legal: {_listed(tensor_parallel_sizes(config))}"
        ),
    ),
    Rule(
        "parallel.pipeline_parallel_size",
        lambda config: config.parallel.pipeline_parallel_size <= config.model.decoder.num_layers,
        lambda config: f"legal: up to model.decoder.num_layers {config.model.decoder.num_layers}, one for every stage",
    ),
    Rule(
        "parallel.virtual_pipeline_parallel_size",
        lambda config: (
            config.parallel.virtual_pipeline_parallel_size == 1 or config.parallel.pipeline_parallel_size > 1
        ),
        lambda _: "needs pipeline_parallel_size of at least 2, legal: 1",
    ),
    Rule(
        "parallel.virtual_pipeline_parallel_size",
        lambda config: _parts(config) <= config.model.decoder.num_layers,
        lambda config: (
            f"legal: up to {config.model.decoder.num_layers // config.parallel.pipeline_parallel_size}, for one of "
            f"model.decoder.num_layers {config.model.decoder.num_layers} in every part of every stage"
        ),
    ),
    Rule(
        "parallel.sequence_parallel",
        lambda config: not config.parallel.sequence_parallel or config.parallel.tensor_parallel_size > 1,
        lambda _: "needs tensor_parallel_size of at least 2, legal: false",
    ),
    Rule(
        "data.sequence_length",
        lambda config: config.data.sequence_length % _sequence_unit(config) == 0,
        lambda config: (
            f"legal: a multiple of {_sequence_unit(config)} (2 x context_parallel_size if that is over 1, x "
            "tensor_parallel_size if sequence_parallel)"
        ),
    ),
    Rule(
        "parallel.pipeline_layout",
        _layout_fits,
        lambda config: (
            f"legal: {_parts(config)} numbers (pipeline_parallel_size x virtual_pipeline_parallel_size), each 1 or "
            f"more, that add up to model.decoder.num_layers {config.model.decoder.num_layers}; or null"
        ),
    ),
    Rule("training.recompute_layers", _recompute_fits, _legal_recompute),
    Rule(
        "data.sequence_length",
        lambda config: (
            config.training.objective != "language"
            or config.data.sequence_length <= config.model.decoder.max_position_embeddings
        ),
        lambda config: (
            f"legal: up to model.decoder.max_position_embeddings {config.model.decoder.max_position_embeddings}"
        ),
    ),
    Rule(
        "data.sequence_length",
        lambda config: (
            config.training.objective != "language" or config.data.sequence_length >= _longest_picture(config)
        ),
        lambda config: (
            f"too short for one picture; legal: {_longest_picture(config)} or more (its visual embeddings "
            f"and {_PICTURE_FRAME} tokens around them)"
        ),
    ),
    Rule(
        "fp8.emulate",
        lambda config: not config.fp8.emulate or config.fp8.recipe != "none",
        lambda _: f"fp8.recipe is none; choose what to emulate: {', '.join(FP8_RECIPES[1:])}",
    ),
    Rule(
        "fp8.recipe",
        lambda config: config.fp8.recipe == "none" or config.training.precision == "bf16",
        lambda config: f"needs training.precision bf16 and it is {config.training.precision}, legal: none",
    ),
    Rule(
        "fp8.recipe",
        lambda config: config.fp8.recipe == "none" or config.fp8.decoder or config.fp8.encoder,
        lambda _: "neither fp8.decoder nor fp8.encoder is true, legal: none",
    ),
    Rule(
        "fp8.encoder",
        lambda config: not config.fp8.encoder or config.fp8.recipe != "delayed",
        lambda _: (
            "delayed scaling compares all ranks after every chunk of pictures, and not all have equally many, legal: "
            "false, or fp8.recipe=current"
        ),
    ),
    *map(_none_with_delayed, _BF16_LAYERS),
    *map(_within_a_stage, _BF16_LAYERS),
    Rule(
        "fp8.last_layers_bf16",
        lambda config: (
            config.fp8.first_layers_bf16 + config.fp8.last_layers_bf16 < config.model.decoder.num_layers
            or config.fp8.recipe == "none"
        ),
        lambda config: (
            f"with first_layers_bf16 {config.fp8.first_layers_bf16} leaves none of "
            f"{config.model.decoder.num_layers} layers in FP8, legal: below "
            f"{config.model.decoder.num_layers - config.fp8.first_layers_bf16}"
        ),
    ),
    Rule(
        "fp8.recipe",
        lambda config: config.fp8.recipe == "none" or config.fp8.emulate or not _odd_fp8_sizes(config),
        lambda config: (
            f"Transformer Engine needs multiples of {_fp8_unit(config)} and {_odd_fp8_sizes(config)[0]}, legal: none, "
            "or fp8.emulate=true"
        ),
    ),
    Rule("data.shards", lambda config: len(config.data.shards) > 0, lambda _: _MAKE_SHARDS),
    *map(_one_a_source, ("data.weights", "data.samples_per_step")),
    Rule(
        "data.samples_per_step",
        lambda config: (
            not config.data.samples_per_step or sum(config.data.samples_per_step) >= config.training.global_batch_size
        ),
        lambda config: (
            f"legal: together training.global_batch_size {config.training.global_batch_size} or more, or sequences "
            "would be empty"
        ),
    ),
    Rule(
        "data.document_pictures",
        lambda config: config.data.document_pictures >= max(config.data.video_frames),
        lambda config: (
            f"a video in a document has up to {max(config.data.video_frames)} frames (data.video_frames), which count "
            f"as pictures; legal: {max(config.data.video_frames)} or more"
        ),
    ),
    Rule(
        "data.document_tokens",
        lambda config: config.data.document_tokens >= _longest_shown(config),
        lambda config: (
            f"a picture or video in a document has up to {_longest_shown(config)} tokens; legal: that or more"
        ),
    ),
    Rule(
        "data.tokenizer",
        lambda config: config.training.objective != "language" or config.data.tokenizer != "",
        lambda _: _GIVE_TOKENIZER,
    ),
    *map(_scale, ("visual_decoder.largest_scale", "video_decoder.largest_scale")),
    Rule(
        "video_decoder.frames",
        lambda config: config.video_decoder.frames > 1,
        lambda _: "a clip of one frame is a picture; legal: 2 or more, or training.objective=visual_decoder",
    ),
    Rule(
        "data.sequence_length",
        lambda config: (
            config.training.objective == "language" or config.data.sequence_length == sum(queries_of(config))
        ),
        lambda config: (
            f"training.objective {config.training.objective} takes a {_ROWS[config.training.objective]} "
            f"{sum(queries_of(config))}"
        ),
    ),
    *starmap(
        _of_language_alone,
        (
            ("parallel.tensor_parallel_size", 1),
            ("parallel.pipeline_parallel_size", 1),
            ("parallel.context_parallel_size", 1),
            ("parallel.overlap_gradients", False),
            ("training.train_encoder", False),
            ("training.encoder_prefetch", False),
            ("fp8.recipe", "none"),
        ),
    ),
    Rule(
        "training.recompute",
        lambda config: config.training.objective == "language" or config.training.recompute in ("none", "full"),
        lambda config: f"training.objective {config.training.objective}; legal: none, full",
    ),
]


def _data_parallel_size(config: Config, world_size: int | None) -> int:
    tensor, pipeline = config.parallel.tensor_parallel_size, config.parallel.pipeline_parallel_size
    context, wanted = config.parallel.context_parallel_size, config.parallel.data_parallel_size
    replica = replica_size(config)
    if world_size is None:
        return wanted or 1
    product = f"tensor_parallel_size {tensor} x pipeline_parallel_size {pipeline}"
    if context > 1:
        product += f" x context_parallel_size {context}"
    if world_size < 1 or world_size % replica:
        raise ConfigError(f"parallel: {world_size} processes; {product}, legal: a multiple of {replica} processes")
    if wanted is not None and world_size != replica * wanted:
        raise ConfigError(
            f"parallel.data_parallel_size: {wanted}; {product} makes that {replica * wanted} processes and there are "
            f"{world_size}, legal: {world_size // replica} or null"
        )
    return world_size // replica


def _check_batch(config: Config, data_parallel_size: int) -> None:
    batch, micro = config.training.global_batch_size, config.training.micro_batch_size
    unit = micro * data_parallel_size
    if batch % unit:
        legal = [multiple for multiple in (batch // unit * unit, (batch // unit + 1) * unit) if multiple > 0]
        raise ConfigError(
            f"training.global_batch_size: {batch}; must be a multiple of micro_batch_size {micro} x data-parallel size "
            f"{data_parallel_size} = {unit}, nearest legal: {_listed(legal)}"
        )
    stages = config.parallel.pipeline_parallel_size
    if config.parallel.virtual_pipeline_parallel_size > 1 and batch // unit % stages:
        raise ConfigError(
            f"training.global_batch_size: {batch}; makes {batch // unit} micro-batches, which the interleaved schedule "
            f"runs in groups of pipeline_parallel_size {stages}, legal: a multiple of {unit * stages}"
        )
