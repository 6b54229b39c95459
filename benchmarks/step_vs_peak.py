"""How much of the machine's arithmetic a training step uses, beside transformers' LLaMA of the same size.

One process takes whole training steps (forward, backward, clipping, AdamW) of `emu2_small`, everything trained, and of
transformers' LlamaForCausalLM with the decoder's size, vocabulary, sequences and micro-batches (SDPA attention, fused
AdamW, clipping). Both are divided by the speed of a large torch.matmul of the same dtype on the same threads.

The encoder takes all pictures of a step at once: they are small here, and few.

FLOPs are those of matrix products; FLOP/s is FLOPs over wall time, so everything else a step does lowers it. The
RATIO is ours over theirs: at 1 or more, the engine costs a single process nothing over a plain training loop.
"""

import os
import statistics
import sys
import time
from typing import Any

import _common as common
import torch

from emu2_megatron.config.presets import PRESETS
from emu2_megatron.config.schema import Config, DataConfig, OptimizerConfig, TrainingConfig
from emu2_megatron.parallel import topology, wrap
from emu2_megatron.platform.device import device, synchronize
from emu2_megatron.platform.precision import DTYPES

LENGTH, SEQUENCES, MICRO_BATCH, PICTURES = 1024, 2, 1, 16
MATMUL = 2048


def configuration(precision: str, train_encoder: bool) -> Config:
    return Config(
        model=PRESETS["emu2_small"],
        data=DataConfig(sequence_length=LENGTH),
        training=TrainingConfig(
            global_batch_size=SEQUENCES,
            micro_batch_size=MICRO_BATCH,
            precision=precision,
            train_encoder=train_encoder,
            encoder_keep_activations=train_encoder,
            encoder_micro_batch_size=SEQUENCES * PICTURES,
        ),
        optimizer=OptimizerConfig(warmup_steps=1),
    )


def llama_step(config: Config) -> Any:
    """A training step of transformers' LLaMA of the decoder's size, as a function without arguments."""
    from transformers import LlamaConfig, LlamaForCausalLM

    decoder, optimizer = config.model.decoder, config.optimizer
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=decoder.vocab_size,
            hidden_size=decoder.hidden_size,
            intermediate_size=decoder.ffn_hidden_size,
            num_hidden_layers=decoder.num_layers,
            num_attention_heads=decoder.num_attention_heads,
            max_position_embeddings=decoder.max_position_embeddings,
            rms_norm_eps=decoder.layernorm_epsilon,
            use_cache=False,
            attn_implementation="sdpa",
        )
    ).to(device(), DTYPES[config.training.precision])
    adam = torch.optim.AdamW(
        model.parameters(),
        optimizer.decoder_lr,
        (optimizer.adam_beta1, optimizer.adam_beta2),
        optimizer.adam_eps,
        optimizer.weight_decay,
        fused=True,
    )
    tokens_BS = torch.randint(decoder.vocab_size, (SEQUENCES, LENGTH), device=device())

    def step() -> None:
        adam.zero_grad()
        for part_BS in tokens_BS.split(MICRO_BATCH):
            (model(input_ids=part_BS, labels=part_BS).loss * MICRO_BATCH / SEQUENCES).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.clip_grad)
        adam.step()

    return step


def measure(precision: str, rounds: int) -> dict[str, tuple[float, list[float]]]:
    """(FLOPs, seconds of each round) of every variant."""
    configs = {"trained": configuration(precision, True), "frozen": configuration(precision, False)}
    here = topology.initialize(configs["trained"])
    engines = {name: wrap.build(config, here) for name, config in configs.items()}
    own = common.sequences(configs["trained"], SEQUENCES, PICTURES)
    a, b = torch.rand(2, MATMUL, MATMUL, device=device(), dtype=DTYPES[precision])
    products: list[float] = []

    def matmul() -> None:
        for _ in range(8):
            start = time.perf_counter()
            torch.matmul(a, b)
            synchronize()
            products.append(time.perf_counter() - start)

    variants = {
        "trained": lambda: common.whole_step(engines["trained"], configs["trained"], own),
        "frozen": lambda: common.whole_step(engines["frozen"], configs["frozen"], own),
        "llama": llama_step(configs["trained"]),
        "matmul": matmul,
    }
    flops = {name: common.flops(variants[name]) for name in ("trained", "frozen", "llama")}
    encoder = common.encoder_flops(engines["trained"], own, precision, trained=True)
    print(f"FLOPs of a step: trained {flops['trained'] / 1e9:.0f} G ({encoder / flops['trained']:.0%} in the encoder), "
          f"frozen {flops['frozen'] / 1e9:.0f} G, LLaMA {flops['llama'] / 1e9:.0f} G")  # fmt: skip
    seconds = common.timed(variants, rounds)
    phases = common.whole_step(engines["trained"], configs["trained"], own).output.seconds
    print(f"seconds of the phases, trained: {common.phases(phases)}")
    return {**{name: (flops[name], seconds[name]) for name in flops}, "matmul": (2.0 * MATMUL**3, [min(products)])}


def main() -> int:
    parser = common.arguments(__doc__, rounds=5)
    parser.add_argument(
        "--precision",
        choices=sorted(DTYPES),
        default="fp32",
        help="of both models and the matmul; in bf16 ours keeps fp32 master weights and gradient sums, transformers "
        "does not (default fp32)",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: one for every core")
    options = parser.parse_args()
    print(
        f"emu2_small and transformers' LLaMA of its decoder's size, {options.precision}, one process, "
        f"{options.threads} threads: {SEQUENCES} sequences of {LENGTH} tokens a step, {PICTURES} pictures in each of "
        "ours"
    )
    measured = common.on_ranks(1, options.threads, measure, options.precision, options.rounds)
    speed = {name: flops / statistics.median(seconds) for name, (flops, seconds) in measured.items()}
    names = {
        "trained": "emu2_small, everything trained",
        "frozen": "emu2_small, encoder frozen",
        "llama": "transformers' LLaMA",
        "matmul": f"torch.matmul of {MATMUL} x {MATMUL}, the best of all",
    }
    for name, title in names.items():
        print(f"{title:48} {speed[name] / 1e9:8.1f} GFLOP/s, {speed[name] / speed['matmul']:5.1%} of matmul")
    flops, seconds = measured["llama"]
    over = {
        name: measured[name][0] / flops * common.quotient(seconds, measured[name][1]) for name in ("trained", "frozen")
    }
    print(f"FLOP/s over those of transformers' LLaMA: encoder frozen {over['frozen']:.3f}; everything trained:")
    return common.report([("step_vs_llama", over["trained"], 1.0)])


if __name__ == "__main__":
    sys.exit(main())
