"""Bytes a rank needs, from a configuration alone.

Weights, gradients and optimizer state follow megatron-core's buffers to the byte but for the padding between buckets.
Activations are what autograd saves in a decoder layer (`tests/parallel/test_estimate_memory.py` counts it), times the
micro-batches that the schedule keeps in flight, plus the largest thing that is alive for a moment only.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from emu2_megatron.config.flops import patches
from emu2_megatron.config.schema import Config, ModelConfig
from emu2_megatron.config.validate import replica_size
from emu2_megatron.model.decoder import padded_vocab_size
from emu2_megatron.model.parameters import released_shapes
from emu2_megatron.parallel import layout, schedule


class Sizes(NamedTuple):
    """Bytes a parameter costs."""

    weight: int
    """Also of an element of an activation."""
    gradient: int
    optimizer: int
    """Master weight, if the weight is not fp32 itself, and two moments."""


SIZES = {"bf16": Sizes(2, 4, 12), "fp16": Sizes(2, 4, 12), "fp32": Sizes(4, 4, 8)}
"""training.precision to bytes."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the fullest moment of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What is alive besides the others at the fullest moment of the three phases."""
    features: int
    """Visual embeddings of the replica's batch, and their gradients."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.features


@dataclass(frozen=True)
class Work:
    """What the estimate needs to know besides the configuration."""

    config: Config
    """A validated configuration."""
    data_parallel_size: int
    """Replicas."""
    images: float
    """Pictures in a sequence, on average."""
    transformer_engine: bool
    """Whether decoder layers are Transformer Engine's (as on a GPU) or PyTorch's (as on a CPU)."""
    precomputed: bool = False
    """Whether pictures come as features, so that the encoder only lies in memory."""

    @property
    def engine_attention(self) -> bool:
        """Whether attention is Transformer Engine's: it is where no samples are to be kept apart."""
        return self.transformer_engine and self.config.data.attend_across_samples

    @property
    def sequences(self) -> int:
        """Of a replica in a step."""
        return self.config.training.global_batch_size // self.data_parallel_size

    @property
    def micro_batches(self) -> int:
        """Of a replica in a step."""
        return self.sequences // self.config.training.micro_batch_size

    @property
    def replica_size(self) -> int:
        """Ranks of a replica."""
        return replica_size(self.config)

    @property
    def shards(self) -> int:
        """Ranks that sum the decoder's gradients and share its optimizer's state; all of them do for the encoder's."""
        return self.data_parallel_size * self.config.parallel.context_parallel_size

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.data_parallel_size * self.replica_size

    @property
    def pictures(self) -> int:
        """That the fullest rank encodes in a step."""
        return math.ceil(self.images * self.sequences / self.replica_size)

    @property
    def tokens(self) -> int:
        """Of a micro-batch on a rank: the context-parallel share."""
        config = self.config
        length = config.data.sequence_length // config.parallel.context_parallel_size
        return length * config.training.micro_batch_size

    @property
    def hidden_tokens(self) -> int:
        """Of a micro-batch between layers on a rank: the sequence-parallel share."""
        parallel = self.config.parallel
        return self.tokens // (parallel.tensor_parallel_size if parallel.sequence_parallel else 1)


def default_images(config: Config) -> float:
    """Pictures of a sequence if half of its tokens are visual: captions and interleaved pages packed to the brim."""
    return config.data.sequence_length / (2 * config.model.image_queries)


def memory(work: Work) -> list[Memory]:
    """Of a rank of every pipeline stage; the ranks of a stage are alike."""
    stages = work.config.parallel.pipeline_parallel_size
    return [_stage_memory(work, stage) for stage in range(stages)]


def parameters(config: Config, stage: int) -> int:
    """Numbers that a rank of a stage holds, encoder included, padded vocabulary too."""
    layers = layout.part_layers(config)
    decoder = sum(sum(part_numbers(config, layers, part)) for part in layout.parts_of(config, stage))
    return decoder + sum(encoder_numbers(config.model))


@lru_cache
def encoder_numbers(model: ModelConfig) -> tuple[int, ...]:
    """Size of every parameter of the encoder."""
    return tuple(math.prod(shape) for name, shape in released_shapes(model).items() if name.startswith("visual."))


def part_numbers(config: Config, layers: list[int], part: int) -> list[int]:
    """Size of every parameter that a rank has of one part of the pipeline."""
    model, tp = config.model, config.parallel.tensor_parallel_size
    D, F, E = model.decoder.hidden_size, model.decoder.ffn_hidden_size, model.encoder.hidden_size
    vocabulary = padded_vocab_size(model, tp) // tp * D
    first = [vocabulary, D * E] if part == 0 else []
    last = [D, vocabulary, D * E] if part == len(layers) - 1 else []
    return first + [D, 3 * D * D // tp, D * D // tp, D, 2 * F * D // tp, F * D // tp] * layers[part] + last


def _stage_memory(work: Work, stage: int) -> Memory:
    config, size = work.config, SIZES[work.config.training.precision]
    layers = layout.part_layers(config)
    buffers = [(numbers, work.shards) for numbers in _part_buffers(work, layers, stage)]
    encoder = encoder_numbers(config.model)
    frozen = 0 if config.training.train_encoder else sum(encoder)
    if not frozen:
        buffers.append((_buffer(encoder, work.world_size), work.world_size))
    trained = sum(numbers for numbers, _ in buffers)
    return Memory(
        weights=(trained + frozen) * size.weight,
        gradients=trained * size.gradient,
        optimizer=sum(numbers // n for numbers, n in buffers) * size.optimizer,
        activations=_activations(work, layers, stage),
        features=_features(work),
    )


@lru_cache
def _buffer(numbers: tuple[int, ...], shards: int) -> int:
    """Elements of megatron-core's flat buffer: each parameter starts at a multiple of 64, the end is padded so that
    shards are equal (`_ParamAndGradBuffer`)."""
    end = 0
    for n in reversed(numbers):
        end = -(-end // 64) * 64 + n
    unit = math.lcm(shards, 128)
    return -(-end // unit) * unit


def _part_buffers(work: Work, layers: list[int], stage: int) -> list[int]:
    """Elements of the buffer of each part of the decoder on a stage."""
    parts = layout.parts_of(work.config, stage)
    return [_buffer(tuple(part_numbers(work.config, layers, part)), work.shards) for part in parts]


def _summing(work: Work, buffer: int, ranks: int) -> int:
    """Alive while the gradients of a buffer are summed over ranks: gloo, which is what a CPU has, makes a copy of the
    whole buffer (and so it does to gather the weights), nccl works in place."""
    return 0 if work.transformer_engine or ranks == 1 else buffer * SIZES[work.config.training.precision].gradient


def _activations(work: Work, layers: list[int], stage: int) -> int:
    encode, decode = _encode(work), _decode(work, layers, stage)
    if work.config.training.encoder_prefetch:  # phase 1 of the next step goes on beside phase 2
        return encode + decode
    return max(encode, decode, _encoder_backward(work))


def _features(work: Work) -> int:
    model, element = work.config.model, SIZES[work.config.training.precision].weight
    own = math.ceil(work.pictures * model.image_queries * model.encoder.hidden_size) * element
    gathered = own * work.replica_size
    if work.config.training.encoder_prefetch:
        return 2 * own + gathered
    # A trained encoder's gradients: gathered as the embeddings are, and this rank's own after they came home.
    return (own + gathered) * (2 if work.config.training.train_encoder else 1)


# Phases 1 and 3: the encoder ------------------------------------------------------------------------------------------


def _encode(work: Work) -> int:
    """Phase 1 without gradients: the widest moment of a block, beside a chunk of pictures."""
    if work.precomputed:
        return 0
    e = work.config.model.encoder
    widest = patches(work.config.model) * (2 * e.hidden_size + 2 * e.ffn_hidden_size)
    return _chunk(work) * (_picture(work) + widest * SIZES[work.config.training.precision].weight)


def _chunk(work: Work) -> int:
    return min(work.config.training.encoder_micro_batch_size, work.pictures)


def _picture(work: Work) -> int:
    """Bytes of a picture while it is normalised: two copies in fp32 and one in the model's precision."""
    return 3 * work.config.model.encoder.image_size**2 * (8 + SIZES[work.config.training.precision].weight)


def encoder_saved(config: Config) -> int:
    """Bytes that one picture's way through the encoder leaves for its backward pass.

    A block saves, in widths: its input 1, q k v 3, what attention returns 1, the two LayerNorms' inputs 2, the MLP's
    input 1 and twice its inner width; and fp32 statistics of softmax and norms.
    """
    e, P, element = config.model.encoder, patches(config.model), SIZES[config.training.precision].weight
    block = P * ((8 * e.hidden_size + 2 * e.ffn_hidden_size) * element + 4 * e.num_attention_heads + 16)
    return e.num_layers * block + 3 * e.image_size**2 * element


def _kept(work: Work) -> int:
    training = work.config.training
    keeps = training.train_encoder and training.encoder_keep_activations
    return work.pictures * encoder_saved(work.config) if keeps else 0


def _encoder_backward(work: Work) -> int:
    if not work.config.training.train_encoder:
        return 0
    e, element = work.config.model.encoder, SIZES[work.config.training.precision].weight
    chunk = _chunk(work)
    widest = chunk * patches(work.config.model) * (2 * e.ffn_hidden_size + e.hidden_size) * element
    gradient = e.ffn_hidden_size * e.hidden_size * element
    backward = (_kept(work) or chunk * (encoder_saved(work.config) + _picture(work))) + widest + gradient
    return max(backward, _summing(work, _buffer(encoder_numbers(work.config.model), work.world_size), work.world_size))


# Phase 2: the decoder -------------------------------------------------------------------------------------------------


def _decode(work: Work, layers: list[int], stage: int) -> int:
    """Micro-batches in flight, and the widest moment of a backward pass; or the sum of their gradients."""
    parallel = work.config.parallel
    parts = layout.parts_of(work.config, stage)
    saved = [part_saved(work, layers, part) for part in parts]
    moments = schedule.in_flight(parallel.pipeline_parallel_size, len(parts), work.micro_batches, stage)
    alive = max(sum(n * bytes_ for n, bytes_ in zip(moment, saved, strict=True)) for moment in moments)
    last = parts[-1] == len(layers) - 1
    backward = alive + max(_layer_backward(work), _logits(work) if last else 0)
    summing = max(_summing(work, buffer, work.shards) for buffer in _part_buffers(work, layers, stage))
    return _kept(work) + max(backward, summing)


def recomputed(config: Config, layers: int) -> int:
    """How many of a part's layers the backward pass computes again as a whole."""
    again = {"full": layers, "block": min(config.training.recompute_layers, layers)}
    return again.get(config.training.recompute, 0)


def layer_saved(work: Work) -> int:
    """Bytes that one micro-batch leaves in one decoder layer for its backward pass."""
    recompute = work.config.training.recompute
    return _input(work) if recompute == "full" else _all_saved(work, recompute == "attention")


def _input(work: Work) -> int:
    config = work.config
    return work.hidden_tokens * config.model.decoder.hidden_size * SIZES[config.training.precision].weight


def _all_saved(work: Work, attention_again: bool) -> int:
    config, d = work.config, work.config.model.decoder
    element, tp = SIZES[config.training.precision].weight, config.parallel.tensor_parallel_size
    cp = config.parallel.context_parallel_size
    D, N = d.hidden_size, d.num_attention_heads
    length = config.data.sequence_length // cp
    # Two norms, each with the linear layer's input behind it. PyTorch's keeps the fp32 copy it computes with.
    norm = 2 * element if work.transformer_engine else 4 + 2 * element
    norms = 2 * norm * work.hidden_tokens * D + 2 * 4 * work.hidden_tokens
    attention = _attention_widths(work, attention_again) * work.tokens * D // tp * element
    softmax = 0 if attention_again else 4 * work.tokens * N // tp
    mask = 0
    if cp > 1 and not attention_again and not work.engine_attention:
        # As numbers of the model's precision; of every sequence its own if samples are apart.
        masks = 1 if config.data.attend_across_samples else config.training.micro_batch_size
        mask = masks * length * config.data.sequence_length * element
    rotary = 4 * element * (D // N) * length
    # Both halves of the first linear layer and the input of the second.
    mlp = 3 * work.tokens * d.ffn_hidden_size // tp * element
    return int(norms + attention + softmax + mask + rotary + mlp)


def _attention_widths(work: Work, again: bool) -> float:
    """What attention and what is around it save, in widths of a token: q and k after the rotary embedding, v, the
    output. v is a view of the fused q k v, which then stays whole, unless it is copied. That is so on a GPU, under
    context parallelism, where keys and values are gathered, and if samples are apart."""
    config = work.config
    cp, apart = config.parallel.context_parallel_size, not config.data.attend_across_samples
    if again:
        return 6.0
    # PyTorch's attention returns sequence after sequence, while Transformer Engine's linear layer reads, and saves,
    # position after position.
    copied = apart and work.transformer_engine and config.training.micro_batch_size > 1
    if cp > 1 and not work.engine_attention:
        return 2.0 + 2 * cp + copied
    if work.transformer_engine:
        return 4.0 + copied
    return 5.0 if apart else 6.0  # apart: the outputs of samples, and these joined


def part_saved(work: Work, layers: list[int], part: int) -> int:
    """Bytes that one micro-batch leaves in a part of the pipeline, logits left out."""
    config = work.config
    element = SIZES[config.training.precision].weight
    first, last = part == 0, part == len(layers) - 1
    again = recomputed(config, layers[part])
    saved = again * _input(work) + (layers[part] - again) * layer_saved(work)
    saved += 24 * work.tokens  # ids, labels and mask
    rows = config.training.micro_batch_size * work.images * config.model.image_queries
    if first or last:
        saved += int(2 * rows * config.model.encoder.hidden_size * element)
    if last:
        norm = 2 * element if work.transformer_engine else 4 + 2 * element
        saved += norm * work.hidden_tokens * config.model.decoder.hidden_size
    if len(layers) > 1:
        # The schedule keeps what it received, which the first norm has anyway if it makes no fp32 copy; and what it
        # sent.
        received = not first and element < 4 and not work.transformer_engine and again == 0
        saved += _input(work) * (received + (not last))
    return saved


def _layer_backward(work: Work) -> int:
    """Alive for a moment in a layer's backward pass: gradients of the MLP's inside, of the gathered hidden state, and
    of the largest matrix before it is added to the buffer; and the layer itself if it is computed again."""
    config, d = work.config, work.config.model.decoder
    element, tp = SIZES[config.training.precision].weight, config.parallel.tensor_parallel_size
    inside = work.tokens * (2 * d.ffn_hidden_size // tp + 2 * d.hidden_size)
    matrix = 2 * d.ffn_hidden_size * d.hidden_size // tp
    again = _all_saved(work, False) if recomputed(config, 1) else 0
    return (inside + matrix) * element + again


def _logits(work: Work) -> int:
    """The last part's losses: the softmax in fp32, gradients in the model's precision, and the weight's gradient."""
    config, model = work.config, work.config.model
    element, tp = SIZES[config.training.precision].weight, config.parallel.tensor_parallel_size
    columns = padded_vocab_size(model, tp) // tp
    copies = (element if element < 4 else 0) + (element if columns * tp > model.decoder.vocab_size else 0)
    return columns * (work.tokens * (4 + copies) + model.decoder.hidden_size * element)
