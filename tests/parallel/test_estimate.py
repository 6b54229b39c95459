"""FLOPs, seconds and bytes of the estimate: against numbers by hand, a FLOP counter, and what must stay the same."""

from dataclasses import replace

import harness
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from emu2_megatron.config import flops
from emu2_megatron.config.loading import load
from emu2_megatron.config.presets import PRESETS
from emu2_megatron.config.schema import Config, TrainingConfig
from emu2_megatron.config.validate import validate
from emu2_megatron.data.batch import targets
from emu2_megatron.data.sequence import VISUAL, VISUAL_TARGET
from emu2_megatron.model.decoder import DecoderStage, MicroBatch, transformer_config
from emu2_megatron.model.eva_vit import EvaVisionTransformer
from emu2_megatron.parallel import topology
from emu2_megatron.parallel.estimate import Estimate, estimate
from emu2_megatron.parallel.schedule import timeline
from emu2_megatron.platform.gpus import GPUS

BIG = PRESETS["emu2_37b"]


@pytest.fixture(scope="module")
def world_of_one():
    topology.start("gloo")
    yield topology.initialize(harness.config())
    topology.stop()


def of(gpus: int, *overrides: str, images: float = 16) -> Estimate:
    config = load("stage2", ["data.shards=[any]", "data.tokenizer=any", *overrides])
    return estimate(config, gpus, validate(config, gpus), GPUS["h100-80g"], images)


def test_flops_of_the_37b_by_hand() -> None:
    """By hand: 1025 tokens through 64 blocks of 4 * 1792^2 + 2 * 1792 * 15360 = 67,895,296 weights, two products with
    the 1025 x 1025 scores, and 1024 patches of 588 numbers. A decoder layer has 4 * 6656^2 + 3 * 6656 * 17920 =
    535,035,904 weights."""
    encoder = 64 * (2 * 1025 * 67_895_296 + 2 * 2 * 1025**2 * 1792) + 2 * 1024 * 588 * 1792
    assert flops.encoder_forward(BIG) == encoder
    assert encoder == pytest.approx(9.4e12, rel=0.01)
    layer = 2 * 2048 * 535_035_904 + 2 * 2 * 2048**2 * 6656 / 2
    assert flops.layer_forward(BIG, 2048) == layer
    # 64 tokens: 2 FLOPs a weight and token, embedding excluded.
    assert 60 * flops.layer_forward(BIG, 64) == pytest.approx(4.1e12, rel=0.01)
    # The encoder's share in a sequence with so many pictures, as docs/planning.md has it.
    for trained, pictures, share in ((False, 8, 0.156), (False, 16, 0.27), (False, 24, 0.357), (True, 16, 0.525)):
        run = Config(training=TrainingConfig(train_encoder=trained))
        total = flops.step_flops(run, 1, pictures, pictures, pictures * 64)
        assert total.encoder / total.total == pytest.approx(share, abs=0.003)


def test_only_encoded_pictures_count_for_the_encoder() -> None:
    config = Config()
    seen, loaded = flops.step_flops(config, 4, 8, 8, 512), flops.step_flops(config, 4, 8, 0, 512)
    assert loaded.encoder == 0 and loaded.decoder == seen.decoder
    assert flops.step_flops(config, 4, 8, 2, 512).encoder == 2 * flops.encoder_forward(config.model)


def counted(run: Config, pictures: int) -> tuple[int, int]:
    """FLOPs that torch sees in forward and backward of encoder and decoder; attention as plain matrix products."""
    model, length = run.model, run.data.sequence_length
    stage = DecoderStage(transformer_config(run, [model.decoder.num_layers]), model, [model.decoder.num_layers])
    encoder = EvaVisionTransformer(model.encoder)
    for parameter in [*stage.parameters(), *encoder.parameters()]:
        torch.nn.init.normal_(parameter, std=0.02)
    encoder.requires_grad_(run.training.train_encoder)
    tokens = torch.randint(0, 50, (1, length))
    roles = torch.zeros(1, length, dtype=torch.uint8)
    roles[0, 2 : 2 + pictures * model.image_queries] = VISUAL | VISUAL_TARGET
    pixels = torch.randn(pictures, 3, model.encoder.image_size, model.encoder.image_size)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as of_encoder:
            rows = encoder(pixels, [model.image_queries] * pictures)
            if run.training.train_encoder:
                rows.sum().backward()
        with FlopCounterMode(display=False) as of_decoder:
            batch = MicroBatch(tokens, targets(tokens, roles), rows.detach().requires_grad_(run.training.train_encoder))
            stage.losses(stage(batch), batch, torch.ones(2), torch.ones(())).sum().backward()
    return of_encoder.get_total_flops(), of_decoder.get_total_flops()


@pytest.mark.parametrize("trained", [False, True])
def test_flops_equal_torchs_counter(trained: bool, world_of_one: topology.Topology) -> None:
    """The counter counts every product of the real modules; it knows nothing of causality, so the masked half of the
    scores is added to ours, and it sees that no gradient of pixels (and, frozen, of embeddings) is computed."""
    run = replace(harness.config(train_encoder=trained), model=replace(harness.MODEL))
    pictures, model, length = 2, run.model, run.data.sequence_length
    rows = pictures * model.image_queries
    ours = flops.step_flops(run, 1, pictures, pictures, rows)
    d, e = model.decoder, model.encoder
    masked_half = 3 * d.num_layers * 2 * length**2 * d.hidden_size
    no_gradient_of_pixels = 2 * pictures * (flops.patches(model) - 1) * 3 * e.patch_size**2 * e.hidden_size * trained
    no_gradient_of_rows = 0 if trained else rows * flops.projection_forward(model)
    encoder, decoder = counted(run, pictures)
    assert encoder == ours.encoder - no_gradient_of_pixels
    assert decoder == ours.decoder + masked_half - no_gradient_of_rows


def test_step_seconds_by_hand() -> None:
    """One GPU, no exchange: FLOPs over 55 % of 989.4 TFLOP/s, and Adam's bytes over 80 % of 3.35 TB/s."""
    overrides = [
        "parallel.tensor_parallel_size=1", "parallel.sequence_parallel=false", "parallel.pipeline_parallel_size=1",
        "parallel.virtual_pipeline_parallel_size=1", "training.global_batch_size=4", "model.decoder.vocab_size=32256",
    ]  # fmt: skip
    one = of(1, *overrides)
    assert one.exchanged == {name: 0 for name in one.exchanged} and one.bubble == 0
    compute = one.seconds["encode"] + one.seconds["decode"]
    assert compute == pytest.approx(one.flops.total / (0.55 * 989.4e12), rel=1e-9)
    [memory] = one.memory
    moved = 2 * memory.optimizer + memory.gradients + memory.weights
    assert one.seconds["update"] == pytest.approx(moved / (0.8 * 3.35e12))
    # Recompute costs a forward pass of the layers more; FLOPs that count for MFU stay.
    again = of(1, *overrides, "training.recompute=full")
    layers = 4 * 60 * flops.layer_forward(BIG, 2048) / (0.55 * 989.4e12)
    assert again.seconds["decode"] - one.seconds["decode"] == pytest.approx(layers)
    assert again.flops == one.flops and again.mfu < one.mfu


def test_bubble_is_the_schedules() -> None:
    """(p - 1) / (v m) of the ideal time for even stages. Here the last one has the output layer and messages take
    time, some percent of it."""
    for parts in (1, 5):
        item = of(128, f"parallel.virtual_pipeline_parallel_size={parts}")
        ideal = 3 / (parts * item.micro_batches)
        assert item.bubble == pytest.approx(ideal / (1 + ideal), rel=0.1)


def test_twice_the_replicas() -> None:
    """Half the optimizer bytes and micro-batches, the same weights; a rank sends the same for tensor parallelism per
    micro-batch."""
    small, large = of(64), of(128)
    assert large.data_parallel_size == 2 * small.data_parallel_size
    for before, after in zip(small.memory, large.memory, strict=True):
        assert after.optimizer == pytest.approx(before.optimizer / 2, rel=1e-4)
        assert after.weights == pytest.approx(before.weights, rel=1e-6)
        assert after.features == pytest.approx(before.features / 2, rel=1e-3)
    assert large.exchanged["tensor"] == small.exchanged["tensor"] / 2
    assert large.flops == small.flops


def test_exchanged_bytes_by_hand() -> None:
    """TP4 · PP4 x 5 · DP8 on 128 GPUs, 256 micro-batches of 2048 tokens, bf16."""
    item = of(128)
    assert item.micro_batches == 256
    # 15 layers, each collective sends 3/4 of [2048, 6656] in 2 bytes. Forward: gather and scatter around attention and
    # MLP. Backward: gradients through these 4, and the inputs of the two column-parallel layers gathered again.
    sent = 256 * 15 * 3 / 4 * 2048 * 6656 * 2
    assert item.exchanged["tensor"] == (4 + 6) * sent
    assert of(128, "training.recompute=full").exchanged["tensor"] == (4 + 4 + 6) * sent
    # Four all-reduces, which are a scatter and a gather each; nothing is gathered again.
    assert of(128, "parallel.sequence_parallel=false").exchanged["tensor"] == 8 * sent
    # 5 parts, forward and backward, a quarter of the sequence.
    assert item.exchanged["pipeline"] == 256 * 5 * 2 * 512 * 6656 * 2
    # 256 pictures a rank, 64 embeddings of 1792 in 2 bytes, to 15 others.
    assert item.exchanged["features"] == 256 * 64 * 1792 * 2 * 15
    stage = 15 * 535_035_904 / 4
    assert item.exchanged["gradients"] == pytest.approx(7 / 8 * stage * 6, rel=0.04)  # embedding, projection, norms


def test_context_parallel_bytes_by_hand() -> None:
    """TP4 · CP2 · PP4 x 5 · DP4: 512 micro-batches of 1024 tokens a rank. Keys and values go round; backward keys and
    values and the gradients of both. With samples apart they are gathered, and backward only gradients return."""
    kv = 2 * 1024 * 6656 / 4 * 2
    for across, back in (("true", 2), ("false", 1)):
        overrides = ["parallel.context_parallel_size=2", f"data.attend_across_samples={across}"]
        assert of(128, *overrides).exchanged["context"] == 512 * 15 * (1 + back) * kv
        again = of(128, *overrides, "training.recompute=full")
        assert again.exchanged["context"] == 512 * 15 * (1 + back + 1) * kv


RATE = 0.55 * 989.4e12


@pytest.mark.parametrize("across", [False, True], ids=["samples apart", "across samples"])
@pytest.mark.parametrize(
    ("tp", "cp", "link"),
    [(4, 1, 450e9), (4, 2, 450e9), (4, 4, 50e9)],
)
def test_a_parts_seconds_by_hand(tp: int, cp: int, link: float, across: bool) -> None:
    """Part 1 of 20 has 3 layers and nothing else. A group of up to 8 ranks is within a server. Keeping samples apart
    under context parallelism costs the masked half of the scores: as many FLOPs as the other half."""
    item = of(tp * cp * 4, f"parallel.tensor_parallel_size={tp}", f"parallel.context_parallel_size={cp}",
              "parallel.sequence_parallel=false", f"data.attend_across_samples={str(across).lower()}")  # fmt: skip
    masked = 2 * 2048**2 * 6656 * (cp > 1 and not across)
    compute = (flops.layer_forward(BIG, 2048) + masked) / (tp * cp) / RATE
    tensor = 4 * (tp - 1) / tp * 2048 / cp * 6656 * 2 / (0.8 * 450e9)
    ring = 2 * (cp - 1) * 2048 / cp * 6656 / tp * 2 / (0.8 * link)
    forward, backward = item.part_seconds[1]
    assert forward == pytest.approx(3 * (compute + tensor + ring))
    assert backward == pytest.approx(3 * (2 * compute + tensor + (2 if across else 1) * ring))


@pytest.mark.parametrize("keeps", [False, True])
def test_seconds_of_the_encoders_phases_by_hand(keeps: bool) -> None:
    """256 pictures a rank; embeddings of 15 others, over the network because stages are in different servers."""
    item = of(128, "training.train_encoder=true", f"training.encoder_keep_activations={str(keeps).lower()}")
    encoder = 256 * flops.encoder_forward(BIG) / RATE
    gather = 256 * 64 * 1792 * 2 * 15 / (0.8 * 50e9)
    assert item.seconds["encode"] == pytest.approx(encoder + gather)
    assert item.seconds["encoder_backward"] == pytest.approx((2 if keeps else 3) * encoder + gather)


def test_precomputed_features_cost_the_exchange_alone() -> None:
    config = load("stage2", ["data.shards=[any]", "data.tokenizer=any"])
    loaded = estimate(config, 128, 8, GPUS["h100-80g"], 16, precomputed=True)
    assert loaded.seconds["encode"] == pytest.approx(256 * 64 * 1792 * 2 * 15 / (0.8 * 50e9))
    assert loaded.flops.encoder == 0 and loaded.flops.decoder == of(128).flops.decoder
    # The frozen encoder still lies in memory; only its activations do not.
    prefetching = replace(config, training=replace(config.training, encoder_prefetch=True))
    assert [stage.weights for stage in loaded.memory] == [stage.weights for stage in of(128).memory]
    idle = estimate(prefetching, 128, 8, GPUS["h100-80g"], 16, precomputed=True).memory[0].activations
    assert idle < estimate(prefetching, 128, 8, GPUS["h100-80g"], 16).memory[0].activations


def test_seconds_of_gradient_sums_by_hand() -> None:
    """What is sent over the link of the data-parallel group; with overlap, less the last micro-batch of the stage."""
    one_stage = ["parallel.pipeline_parallel_size=1", "parallel.virtual_pipeline_parallel_size=1"]
    for gpus, overrides, link in ((8, one_stage, 450e9), (128, [], 50e9)):
        whole = of(gpus, "parallel.overlap_gradients=false", *overrides)
        assert whole.seconds["gradients"] == pytest.approx(whole.exchanged["gradients"] / (0.8 * link))
    hidden = max(sum(map(sum, whole.part_seconds[stage::4])) for stage in range(4))
    exposed = of(128, "parallel.overlap_gradients=true").seconds["gradients"]
    assert exposed == pytest.approx(whole.seconds["gradients"] - hidden) and exposed > 0


@pytest.mark.parametrize("layers", ["[25,5,5,25]", "[5,25,25,5]", "[10,15,20,15]"])
def test_uneven_interleaved_parts_take_what_the_schedule_takes(layers: str) -> None:
    """Of all 256 micro-batches; the estimate draws 8."""
    item = of(64, "parallel.pipeline_parallel_size=2", "parallel.virtual_pipeline_parallel_size=2",
              f"parallel.pipeline_layout={layers}")  # fmt: skip
    forward, backward = zip(*item.part_seconds, strict=True)
    blocks = timeline(2, 2, item.micro_batches, forward, backward)
    messages = item.exchanged["pipeline"] / (0.8 * 50e9)
    assert item.seconds["decode"] == pytest.approx(max(row[-1].end for row in blocks) + messages, rel=1e-9)


def test_mfu_is_flops_over_peak() -> None:
    item = of(128)
    assert item.mfu == pytest.approx(item.flops.total / item.step_seconds / (128 * 989.4e12))
    assert item.days == pytest.approx(20350 * item.step_seconds / 86400)
    assert item.tokens_per_second == pytest.approx(2048 * 2048 / item.step_seconds)
