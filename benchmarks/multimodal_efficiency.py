"""What pictures cost the engine's efficiency: FLOP/s of an image-text step over those of a text-only step.

The same engine, layout and sequence length: two pipeline stages, one thread each, whole training steps (forward,
backward, clipping, AdamW). Per sequence of 512 tokens 8 pictures take 28 % of the tokens, and the encoder has about
the share of FLOPs that it has in the 37B with 8 pictures per 2048 tokens: 15 % frozen, 35 % trained.

FLOPs are those of matrix products; what the encoder's forward pass costs when it is run again for the backward pass
does not count. The RATIO is the achieved FLOP/s of the image-text step over those of the text-only step: at 1 the
encoder, the exchange of embeddings and the second loss run as efficiently as the decoder alone. It may exceed 1: the
encoder has no pipeline bubble, and the decoder's, 1 / 16 here, is in both steps. Its targets are the
frozen encoder (most of Emu2's training) and the trained one with kept activations; run again is reported only.
"""

import statistics
import sys
from functools import partial

import _common as common

from emu2_megatron.config.schema import (
    Config,
    DataConfig,
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)
from emu2_megatron.parallel import topology, wrap

MODEL = ModelConfig(
    preset="emu2_small",
    encoder=EncoderConfig(image_size=112, num_layers=6, hidden_size=256, num_attention_heads=4, ffn_hidden_size=1024),
    decoder=DecoderConfig(
        num_layers=8,
        hidden_size=256,
        num_attention_heads=4,
        ffn_hidden_size=688,
        vocab_size=1000,
        max_position_embeddings=512,
    ),
    image_queries=16,
    frame_queries=16,
)
LENGTH, SEQUENCES, PICTURES = 512, 16, 8
TITLES = {
    "text": "text only",
    "frozen": "8 pictures a sequence, encoder frozen",
    "kept": "8 pictures, trained, activations kept",
    "again": "8 pictures, trained, forward run again",
}


def configuration(name: str) -> Config:
    trained = name in ("kept", "again")
    return Config(
        model=MODEL,
        data=DataConfig(sequence_length=LENGTH),
        parallel=ParallelConfig(pipeline_parallel_size=2),
        training=TrainingConfig(
            global_batch_size=SEQUENCES,
            micro_batch_size=1,
            precision="fp32",
            train_encoder=trained,
            encoder_keep_activations=name == "kept",
        ),
        optimizer=OptimizerConfig(warmup_steps=1),
    )


def measure(rounds: int) -> dict[str, float]:
    """FLOP/s of each image-text step over those of the text-only step."""
    configs = {name: configuration(name) for name in TITLES}
    here = topology.initialize(configs["text"])
    engines = {name: wrap.build(config, here) for name, config in configs.items() if name != "text"}
    engines["text"] = engines["frozen"]
    say = print if here.rank == 0 else lambda *_: None
    variants, flops = {}, {}
    for name, config in configs.items():
        rows = common.sequences(config, SEQUENCES, 0 if name == "text" else PICTURES)
        own = [rows[i] for i in here.slots(SEQUENCES)]
        variants[name] = partial(common.whole_step, engines[name], config, own)
        if name == "again":
            flops[name] = flops["kept"]
            continue
        flops[name] = common.flops(variants[name])
        if name != "text":
            encoder = common.encoder_flops(engines[name], own, "fp32", config.training.train_encoder)
            say(f"{TITLES[name]}: {flops[name] / 1e9:.0f} GFLOPs, {encoder / flops[name]:.0%} of them in the encoder")
    seconds = common.timed(variants, rounds)
    for name, title in TITLES.items():
        report = variants[name]()
        say(f"{title:39} {flops[name] / statistics.median(seconds[name]) / 1e9:6.1f} GFLOP/s; "
            f"seconds of the phases on rank 0: {common.phases(report.output.seconds)}")  # fmt: skip
    return {n: flops[n] / flops["text"] * common.quotient(seconds["text"], seconds[n]) for n in TITLES}


def main() -> int:
    options = common.arguments(__doc__, rounds=6).parse_args()
    print(f"2 ranks, PP2, one thread each, fp32, {SEQUENCES} micro-batches of one sequence of {LENGTH} tokens")
    ratios = common.on_ranks(2, 1, measure, options.rounds)
    print(f"{TITLES['again']}: {ratios['again']:.3f} of the text-only step's FLOP/s")
    return common.report(
        [
            ("multimodal_efficiency_trained", ratios["kept"], 0.9),
            ("multimodal_efficiency_frozen", ratios["frozen"], 0.9),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
