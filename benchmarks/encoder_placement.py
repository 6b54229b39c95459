"""The three-phase step against an encoder on pipeline stage 0, on two ranks.

Same weights, same sequences, same micro-batches, two pipeline stages with one thread each; forward and backward until
summed gradients are in the optimizer's buffers. The baseline is what other engines do, written for this benchmark
alone: stage 0 encodes the pictures of a micro-batch within its forward pass (a trained encoder by autograd, its
activations kept by the schedule), and sends the embeddings aside, while it computes on, to the last stage, which
reads them when it computes the loss. It exchanges nothing else and is given all sequences, decoded, beforehand. It
encodes the pictures of one micro-batch at once, as it must; the three-phase step, which may choose, takes 12. Before
timing, losses and all gradients of both are compared.

The encoder is about half of the FLOPs: 3 pictures a sequence when it is trained, 9 when it is frozen. Then stage 0 of
the baseline has 3 quarters of the work, and the time ratio cannot exceed 1.5 (1.29 where the three-phase step runs the
encoder's forward pass twice). The RATIO is the baseline's time over the three-phase step's.
"""

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import _common as common
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from emu2_megatron.config.schema import (
    Config,
    DataConfig,
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    ParallelConfig,
    TrainingConfig,
)
from emu2_megatron.data.batch import targets
from emu2_megatron.data.sequence import TEXT_TARGET, VISUAL, VISUAL_TARGET, PackedSequence
from emu2_megatron.model.decoder import MicroBatch
from emu2_megatron.parallel import topology, wrap
from emu2_megatron.platform.device import device

MODEL = ModelConfig(
    preset="emu2_small",
    encoder=EncoderConfig(image_size=112, num_layers=12, hidden_size=256, num_attention_heads=4, ffn_hidden_size=1024),
    decoder=DecoderConfig(
        num_layers=4,
        hidden_size=384,
        num_attention_heads=6,
        ffn_hidden_size=1032,
        # The output layer stays small beside a stage, as it is at 37B: stages are equally long.
        vocab_size=256,
        max_position_embeddings=256,
    ),
    image_queries=16,
    frame_queries=16,
)
LENGTH, SEQUENCES = 256, 24
CHUNK = 12
PICTURES = {"frozen": 9, "kept": 3, "again": 3}
TITLES = {"frozen": "frozen encoder", "kept": "trained, activations kept", "again": "trained, forward run again"}
TARGETS = {"frozen": 1.3, "kept": 1.2, "again": 1.1}
TOLERANCE = 1e-4
"""fp32 sums in another order: 1e-6 a sum, two digits lost over 20 layers."""


def configuration(name: str) -> Config:
    return Config(
        model=MODEL,
        data=DataConfig(sequence_length=LENGTH),
        parallel=ParallelConfig(pipeline_parallel_size=2),
        training=TrainingConfig(
            global_batch_size=SEQUENCES,
            micro_batch_size=1,
            precision="fp32",
            train_encoder=name != "frozen",
            encoder_keep_activations=name == "kept",
            encoder_micro_batch_size=CHUNK,
        ),
    )


class EncoderOnStage0:
    """Forward and backward with the encoder in the first pipeline stage; weights and buffers are the engine's."""

    def __init__(self, config: Config, engine: wrap.Engine, rows: list[PackedSequence], aside: Any) -> None:
        self.config, self.engine, self.aside, self.sends = config, engine, aside, []
        self.rows = rows
        texts, visuals = (
            sum(int(((row.roles_S & bit) > 0).sum()) for row in rows) for bit in (TEXT_TARGET, VISUAL_TARGET)
        )
        elements = visuals * config.model.encoder.hidden_size
        self.denominators = torch.tensor([float(texts), float(elements)], device=device())

    def __call__(self) -> Tensor:
        """The two mean losses on the last stage, zeros on the first."""
        for part in self.engine.wrapped:
            part.zero_grad_buffer()
        losses = get_forward_backward_func()(
            forward_step_func=self.forward,
            data_iterator=[iter(self.rows)],
            model=self.engine.step.stages,
            num_microbatches=SEQUENCES,
            seq_length=LENGTH,
            micro_batch_size=1,
            decoder_seq_length=LENGTH,
            forward_only=False,
            force_all_reduce=True,
        )
        for send in self.sends:
            send.wait()
        self.sends.clear()
        return torch.stack([loss["losses"] for loss in losses]).sum(0) if losses else torch.zeros(2)

    def forward(self, rows: Iterator[PackedSequence], model: Any) -> tuple[Tensor, Any]:
        row = next(rows)
        tokens_BS, roles_BS = (torch.from_numpy(x)[None] for x in (row.tokens_S, row.roles_S))
        batch = MicroBatch(tokens_BS.to(device()), targets(tokens_BS, roles_BS), torch.empty(0))
        if self.engine.here.first_stage:
            with torch.set_grad_enabled(self.config.training.train_encoder):
                batch.features_RE = common.encode(self.engine.step.encoder, [row], self.config.training.precision)
            self.sends.append(dist.isend(batch.features_RE.detach(), 1, group=self.aside))
        return model(batch), partial(self.loss, model, batch, int(((row.roles_S & VISUAL) > 0).sum()))

    def loss(
        self, model: Any, batch: MicroBatch, count: int, hidden_SBD: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        batch.features_RE = torch.empty(count, MODEL.encoder.hidden_size, device=device())
        dist.recv(batch.features_RE, 0, group=self.aside)
        losses = model.module.losses(hidden_SBD, batch, self.denominators, torch.ones((), device=device()))
        return losses.sum(), torch.zeros((), dtype=torch.int), {"losses": losses.detach()}


def compare(engine: wrap.Engine, baseline: EncoderOnStage0, own: list[PackedSequence]) -> None:
    """Losses and gradients of both must be the same; raises if they are not."""
    output = common.forward_backward(engine, own, force_all_reduce=True)
    modules = [*engine.stages, engine.encoder]
    ours = [[p.main_grad.clone() for p in m.parameters() if p.requires_grad] for m in modules]
    losses = baseline()
    if engine.here.last_stage:
        wanted = torch.stack([output.text_loss, output.image_loss])
        check("losses", losses, wanted)
        print(f"  text loss {wanted[0]:.6f} and {losses[0]:.6f}, image loss {wanted[1]:.6f} and {losses[1]:.6f}")
    theirs = [[p.main_grad for p in m.parameters() if p.requires_grad] for m in modules]
    check("decoder gradients", *(torch.cat([g.flatten() for g in x[0]]) for x in (theirs, ours)))
    if engine.here.first_stage and ours[-1]:  # the baseline's encoder is here alone
        a, b = (torch.cat([g.flatten() for g in x[-1]]) for x in (theirs, ours))
        check("encoder gradients", a, b)
        print(f"  norm of the encoder's gradient {b.norm():.6e} and {a.norm():.6e}")


def check(what: str, baseline: Tensor, ours: Tensor) -> None:
    error = float((baseline - ours).norm() / ours.norm())
    if not error < TOLERANCE:
        raise AssertionError(f"{what}: the baseline differs by {error:.1e}, it is not the same computation")


def measure(rounds: int) -> dict[str, float]:
    """The time ratio of each case."""
    configs = {name: configuration(name) for name in PICTURES}
    here = topology.initialize(configs["frozen"])
    aside = dist.new_group([0, 1])
    engines = {name: wrap.build(config, here) for name, config in configs.items()}
    variants: dict[str, Any] = {}
    say = print if here.rank == 0 else lambda *_: None
    for name, config in configs.items():
        rows = common.sequences(config, SEQUENCES, PICTURES[name])
        own = [rows[i] for i in here.slots(SEQUENCES)]
        ours = partial(common.forward_backward, engines[name], own)
        if name != "again":
            baseline = EncoderOnStage0(config, engines[name], rows, aside)
            say(f"{TITLES[name]}: three-phase step and baseline compared")
            compare(engines[name], baseline, own)
            total = common.flops(ours)
            encoder = common.encoder_flops(engines[name], own, "fp32", config.training.train_encoder)
            say(f"  {total / 1e9:.0f} GFLOPs a step, {encoder / total:.0%} of them in the encoder")
            variants[f"{name} baseline"] = baseline
        variants[name] = ours
    seconds = common.timed(variants, rounds)
    for name in configs:
        output = variants[name]()
        say(f"{TITLES[name]}: seconds of the phases on rank 0: {common.phases(output.seconds)}")
    ratios = {}
    for name in configs:
        baseline_seconds = seconds["frozen baseline" if name == "frozen" else "kept baseline"]
        ratios[name] = common.quotient(baseline_seconds, seconds[name])
        say(f"{TITLES[name]:27} baseline {median(baseline_seconds):.2f} s, three phases {median(seconds[name]):.2f} s")
    return ratios


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def main() -> int:
    options = common.arguments(__doc__, rounds=5).parse_args()
    print(
        f"encoder on stage 0 against the three-phase step: 2 ranks, PP2, one thread each, fp32, {SEQUENCES} "
        f"micro-batches of one sequence of {LENGTH} tokens, {PICTURES['kept']} pictures each "
        f"({PICTURES['frozen']} where the encoder is frozen)"
    )
    ratios = common.on_ranks(2, 1, measure, options.rounds)
    return common.report([(f"encoder_placement_{name}", ratios[name], TARGETS[name]) for name in TARGETS])


if __name__ == "__main__":
    sys.exit(main())
