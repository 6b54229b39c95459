"""Seconds, bytes exchanged and memory of a training step, from a configuration and a GPU's data sheet.

A model simple enough to check by hand (docs/planning.md): matrix products at a fixed share of the peak, the pipeline's
bubble, and every exchange that no computation hides. It ranks layouts; it does not replace a measurement.
"""

from dataclasses import dataclass

from emu2_megatron.config import flops
from emu2_megatron.config.flops import Flops
from emu2_megatron.config.schema import Config
from emu2_megatron.model.decoder import padded_vocab_size
from emu2_megatron.parallel import layout, schedule
from emu2_megatron.parallel.estimate_memory import (
    SIZES,
    Memory,
    Work,
    encoder_numbers,
    memory,
    part_numbers,
    recomputed,
)
from emu2_megatron.platform.gpus import GPU

MATMUL_EFFICIENCY = 0.55
"""Share of the data sheet's FLOP/s that a layer reaches, norms and activations included. Published bf16 runs on H100
reach 41 to 48 % of the peak over all, bubble and exchanges included (Megatron-LM, 2B to 462B)."""
LINK_EFFICIENCY = 0.8
"""Share of the data sheet's bytes/s that a large collective reaches."""
MEMORY_EFFICIENCY = 0.8
"""The same for the GPU's own memory, which bounds the optimizer."""
RESERVED_BYTES = 4 * 2**30
"""Of every GPU for the CUDA context, nccl's buffers, cuBLAS' workspace and what the allocator cannot use."""
BACKWARD = 2
"""A backward pass in forward passes."""


@dataclass(frozen=True)
class Estimate:
    """One layout on one kind of GPU."""

    config: Config
    world_size: int
    data_parallel_size: int
    memory: list[Memory]
    """Of a rank of every stage."""
    part_seconds: list[tuple[float, float]]
    """Forward and backward of one micro-batch through each part of the pipeline, in the order data flows."""
    micro_batches: int
    seconds: dict[str, float]
    """Of each phase of a step."""
    exchanged: dict[str, float]
    """Bytes the busiest rank sends in a step, by purpose."""
    bubble: float
    """Share of phase 2 in which the busiest stage waits for others."""
    flops: Flops
    """Model FLOPs of a step, all ranks."""
    peak: float
    """FLOP/s of one GPU."""

    @property
    def step_seconds(self) -> float:
        """Wall time of a step."""
        return sum(self.seconds.values())

    @property
    def mfu(self) -> float:
        """Model FLOPs a second as a share of all GPUs' peak."""
        return self.flops.total / self.step_seconds / (self.peak * self.world_size)

    @property
    def tokens_per_second(self) -> float:
        """Over all replicas."""
        return self.config.training.global_batch_size * self.config.data.sequence_length / self.step_seconds

    @property
    def days(self) -> float:
        """Of the whole run, without saving, loading and failures."""
        return self.config.training.steps * self.step_seconds / 86400

    @property
    def fullest(self) -> Memory:
        """Memory of the rank that needs most."""
        return max(self.memory, key=lambda stage: stage.total)


def estimate(
    config: Config, world_size: int, data_parallel_size: int, gpu: GPU, images: float, precomputed: bool = False
) -> Estimate:
    """Estimate one layout.

    Args:
        config: validated.
        world_size: ranks.
        data_parallel_size: replicas, from `validate`.
        gpu: what each rank has.
        images: pictures in a sequence, on average.
        precomputed: whether they come as features, with nothing to encode.
    """
    work = Work(config, data_parallel_size, images, transformer_engine=True, precomputed=precomputed)
    links = _Links(config, data_parallel_size, gpu)
    peak = gpu.peak(config.training.precision)
    part_seconds, tensor_bytes, context_bytes = _parts(work, peak * MATMUL_EFFICIENCY, links)

    stages, micro_batches = config.parallel.pipeline_parallel_size, work.micro_batches
    chunks = len(part_seconds) // stages
    busy = [sum(sum(part_seconds[part]) for part in layout.parts_of(config, stage)) for stage in range(stages)]
    sent = _pipeline_bytes(work, chunks)
    bubble = _bubble(config, part_seconds, busy, micro_batches)
    decode = micro_batches * (max(busy) + sent / links.pipeline) + bubble

    encoded = 0 if precomputed else work.pictures
    encoder = encoded * flops.encoder_forward(config.model) / (peak * MATMUL_EFFICIENCY)
    keeps = config.training.encoder_keep_activations
    back = (BACKWARD + (0 if keeps else 1)) * encoder if config.training.train_encoder else 0.0
    features = work.pictures * config.model.image_queries * config.model.encoder.hidden_size
    gather = features * (work.replica_size - 1) * SIZES[config.training.precision].weight
    gradients, gradient_seconds = _gradients(work, world_size, links, max(busy) if config.parallel.overlap_gradients
                                             else 0.0)  # fmt: skip
    usage = memory(work)
    # Adam reads and writes master weight and moments, reads the gradient, writes the weight.
    update = max(2 * stage.optimizer + stage.gradients + stage.weights for stage in usage)
    trained = config.training.train_encoder
    return Estimate(
        config=config,
        world_size=world_size,
        data_parallel_size=data_parallel_size,
        memory=usage,
        part_seconds=part_seconds,
        micro_batches=micro_batches,
        seconds={
            "encode": encoder + gather / links.replica,
            "decode": decode,
            "encoder_backward": back + (gather / links.replica if trained else 0.0),
            "gradients": gradient_seconds,
            "update": update / (gpu.memory_bandwidth * MEMORY_EFFICIENCY),
        },
        exchanged={
            "tensor": micro_batches * max(tensor_bytes),
            "context": micro_batches * max(context_bytes),
            "pipeline": micro_batches * sent,
            "features": gather * (2 if trained else 1),
            "gradients": gradients,
        },
        bubble=bubble / decode,
        flops=flops.step_flops(
            config,
            config.training.global_batch_size,
            pictures := config.training.global_batch_size * images,
            0 if precomputed else pictures,
            pictures * config.model.image_queries,
        ),
        peak=peak,
    )


def _bubble(config: Config, parts: list[tuple[float, float]], busy: list[float], micro_batches: int) -> float:
    """Seconds that phase 2 takes beyond what the busiest stage works."""
    stages, layers = config.parallel.pipeline_parallel_size, layout.part_layers(config)
    chunks = len(parts) // stages
    if chunks == 1 or len(set(layers)) == 1:
        return (sum(busy) - max(busy)) / chunks
    # Uneven parts interleaved: parts wait for each other in the midst of it too. From the schedule itself; its middle
    # repeats with every group of PP micro-batches.
    forward, backward = zip(*parts, strict=True)

    def end(count: int) -> float:
        return max(row[-1].end for row in schedule.timeline(stages, chunks, count, forward, backward))

    drawn = min(micro_batches, 4 * stages)
    repeated = (micro_batches - drawn) // stages
    return end(drawn) + (repeated * (end(drawn) - end(drawn - stages)) if repeated else 0.0) - micro_batches * max(busy)


class _Links:
    """Bytes/s between the ranks of each kind of group. Ranks are numbered tensor, context, data, pipeline."""

    def __init__(self, config: Config, data_parallel_size: int, gpu: GPU) -> None:
        parallel = config.parallel
        tensor = parallel.tensor_parallel_size
        context = tensor * parallel.context_parallel_size
        data = context * data_parallel_size
        world = data * parallel.pipeline_parallel_size

        def between(ranks: int) -> float:
            return (gpu.link if ranks <= gpu.per_node else gpu.network) * LINK_EFFICIENCY

        self.tensor, self.context, self.data, self.pipeline = map(between, (tensor, context, data, world))
        self.replica = self.world = self.pipeline if world > context else self.context


def _parts(work: Work, rate: float, links: _Links) -> tuple[list[tuple[float, float]], list[float], list[float]]:
    """Of each part and micro-batch: seconds (forward, backward); and, of each stage, bytes a rank sends to its tensor-
    and context-parallel peers."""
    config, model, parallel = work.config, work.config.model, work.config.parallel
    tp, cp, batch = parallel.tensor_parallel_size, parallel.context_parallel_size, config.training.micro_batch_size
    length, D = config.data.sequence_length, model.decoder.hidden_size
    element = SIZES[config.training.precision].weight
    layers = layout.part_layers(config)

    half_scores = batch * 2 * length * length * D / (tp * cp)
    layer = batch * flops.layer_forward(model, length) / (tp * cp)
    # An all-gather and a reduce-scatter around attention and around the MLP; all-reduces without sequence parallelism
    # are the same bytes. Backward does the same again. With sequence parallelism it also gathers the inputs of both
    # column-parallel layers again, for the weights' gradients (megatron-core's and Transformer Engine's layers do):
    # that goes on beside the inputs' gradients and so costs bytes, but no seconds.
    tensor = 4 * (tp - 1) / tp * work.tokens * D * element
    gathered_again = tensor / 2 if parallel.sequence_parallel else 0.0
    # Keys and values go round the ring of Transformer Engine's context parallelism; backward again, with their
    # gradients. Where samples are kept apart they are gathered instead, with no need to come again backward, but under
    # a mask, which spares no half of the scores.
    context = 2 * (cp - 1) * work.tokens * D / tp * element
    back = 2 if work.engine_attention else 1
    if cp > 1 and not work.engine_attention:
        layer += half_scores
        half_scores *= 2
    exchange = tensor / links.tensor + context / links.context
    exchange_back = tensor / links.tensor + back * context / links.context
    scores = half_scores if config.training.recompute == "attention" else 0.0
    seconds = []
    for part, count in enumerate(layers):
        ends = 0.0
        if part == len(layers) - 1:
            ends += batch * length * flops.vocabulary_forward(model, padded_vocab_size(model, tp)) / (tp * cp)
        for _ in range((part == 0) + (part == len(layers) - 1)):
            ends += batch * work.images * model.image_queries * flops.projection_forward(model)
        forward = (count * layer + ends) / rate + count * exchange
        again = recomputed(config, count)
        recompute = (again * layer + (count - again) * scores) / rate + again * exchange
        seconds.append((forward, recompute + BACKWARD * (count * layer + ends) / rate + count * exchange_back))
    held = [[layers[part] for part in layout.parts_of(config, s)] for s in range(parallel.pipeline_parallel_size)]
    counts = [(sum(stage), sum(recomputed(config, count) for count in stage)) for stage in held]
    return (
        seconds,
        [(2 * n + again) * tensor + n * gathered_again for n, again in counts],
        [((1 + back) * n + again) * context for n, again in counts],
    )


def _pipeline_bytes(work: Work, chunks: int) -> float:
    """Bytes a middle stage sends per micro-batch: hidden states forward, their gradients backward."""
    config = work.config
    if config.parallel.pipeline_parallel_size == 1:
        return 0.0
    hidden = work.hidden_tokens * config.model.decoder.hidden_size * SIZES[config.training.precision].weight
    return 2.0 * chunks * hidden


def _gradients(work: Work, world_size: int, links: _Links, hidden: float) -> tuple[float, float]:
    """Bytes the busiest rank sends to sum gradients and to spread updated weights, and seconds of it that no
    computation hides. `hidden`: seconds of the last micro-batch, behind which the decoder's can go."""
    config, size = work.config, SIZES[work.config.training.precision]
    layers, n = layout.part_layers(config), work.data_parallel_size * config.parallel.context_parallel_size
    stages = range(config.parallel.pipeline_parallel_size)
    numbers = max(sum(sum(part_numbers(config, layers, p)) for p in layout.parts_of(config, s)) for s in stages)
    decoder = (n - 1) / n * numbers * (size.gradient + size.weight)
    encoder = 0.0
    if config.training.train_encoder:
        encoder = (world_size - 1) / world_size * sum(encoder_numbers(config.model)) * (size.gradient + size.weight)
    return decoder + encoder, max(decoder / links.data - hidden, 0.0) + encoder / links.world
