"""The training step: load and exchange, encode, decode, and (if it is trained) the encoder's backward pass.

The encoder is not part of the pipeline. Every rank encodes the pictures of the sequences it loaded; the embeddings are
gathered within the replica, so that the first stage has them as inputs and the last stage as regression targets; the
pipeline runs over the decoder alone; gradients of the embeddings, collected on the first stage, return to the rank that
encoded the picture. ARCHITECTURE.md explains why.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor, nn

from emu2_megatron.config.schema import Config
from emu2_megatron.data.batch import Targets, share, targets
from emu2_megatron.data.decode import normalize
from emu2_megatron.data.sequence import TEXT_TARGET, VISUAL, VISUAL_TARGET, PackedSequence
from emu2_megatron.model.decoder import DTYPES, DecoderStage, MicroBatch
from emu2_megatron.parallel import exchange, topology
from emu2_megatron.parallel.topology import Topology
from emu2_megatron.platform.device import device, synchronize, to_device

PHASES = ("exchange", "encode", "decode", "encoder_backward")
"""Names of the timed phases. Loading is timed by the loop."""


@dataclass
class StepOutput:
    """What a forward and backward pass found out; the same on every rank except `moments` and `seconds`."""

    text_loss: Tensor
    """fp32 scalar: mean cross-entropy over all text targets of the global batch, 0 if there are none."""
    image_loss: Tensor
    """fp32 scalar: mean squared error over all regressed elements of the global batch, 0 if there are none."""
    counts: Tensor
    """int64 [4]: text targets, regressed embeddings, pictures and sequences of the global batch."""
    moments: Tensor
    """fp64 [2 E + 1]: over this rank's regressed embeddings v, sum v | sum v² | count."""
    seconds: dict[str, float]
    """Wall time of each phase on this rank."""


class ThreePhaseStep:
    """Forward and backward of one global batch. Gradients end up where the optimizer expects them.

    Args:
        config: the run.
        here: this rank's place.
        encoder: the encoder wrapped by `parallel/wrap.py` if it is trained, bare if it is frozen.
        stages: the wrapped parts of the decoder on this rank, in the order data flows.
        finalize_encoder: sums the encoder's gradients over the world; None if it is frozen.
    """

    def __init__(
        self,
        config: Config,
        here: Topology,
        encoder: nn.Module,
        stages: list[Any],
        finalize_encoder: Callable[..., None] | None,
    ) -> None:
        self.config, self.here = config, here
        self.encoder, self.stages, self.finalize_encoder = encoder, stages, finalize_encoder
        assert here.replica is not None
        self.replica = here.replica
        self.sequences = config.training.global_batch_size // here.dp_size
        self.dtype = DTYPES[config.training.precision]
        self.trains_encoder = config.training.train_encoder
        self.keeps = self.trains_encoder and config.training.encoder_keep_activations

    def __call__(self, own: list[PackedSequence], force_all_reduce: bool = False) -> StepOutput:
        """Run all phases on this rank's sequences (`Topology.slots`, in order).

        Args:
            own: the sequences.
            force_all_reduce: leave whole summed gradients on every rank instead of the optimizer's shards.
        """
        clock = _Clock()
        tokens_NS, roles_NS = exchange.gather_sequences(
            own, self.sequences, self.config.data.sequence_length, self.replica, device()
        )
        counts = self._count(roles_NS, own)
        rows = exchange.row_map(roles_NS, self.here.replica_size)
        clock.lap("exchange")

        encoded = self._encode(own)
        own_RE = torch.cat([rows_RE.detach() for rows_RE in encoded]) if encoded else self._no_rows()
        gathered_RE = exchange.gather_rows(own_RE, rows.block, self.replica)
        clock.lap("encode")

        collects = self.trains_encoder and self.here.first_stage and self._holds_own_rows
        grads_RE = torch.zeros_like(gathered_RE) if collects else None
        batches = [
            self._micro_batches(tokens_NS, roles_NS, rows, gathered_RE, grads_RE, stage.module) for stage in self.stages
        ]
        sums = self._decode(batches, counts, force_all_reduce)
        clock.lap("decode")

        if self.trains_encoder:
            home_RE = exchange.return_rows(
                torch.zeros_like(gathered_RE) if grads_RE is None else grads_RE, len(own_RE), self.replica
            )
            self._encoder_backward(own, encoded, home_RE, force_all_reduce)
        clock.lap("encoder_backward")
        text_loss, image_loss = (sums / self._denominators(counts)).float()
        return StepOutput(text_loss, image_loss, counts, _moments(own_RE, own), clock.seconds)

    # Phase 0 ------------------------------------------------------------------------------------------------------

    def _count(self, roles_NS: Tensor, own: list[PackedSequence]) -> Tensor:
        """Targets, pictures and sequences of the global batch, known before the forward pass."""
        text, visual = ((roles_NS & role).bool().sum() for role in (TEXT_TARGET, VISUAL_TARGET))
        # Every rank of a replica knows all its targets, but each picture is known to one rank: sum over the world.
        one = self.here.replica_rank == 0
        mine = [int(text) * one, int(visual) * one, sum(len(s.pixels) for s in own), len(own)]
        counts = torch.tensor(mine, device=device())
        dist.all_reduce(counts, group=topology.world_group())
        return counts

    @property
    def _holds_own_rows(self) -> bool:
        """Whether this rank's hidden states are its own: without sequence parallelism, tensor-parallel ranks hold the
        same ones, and what all of them know must be counted once."""
        return self.here.tp_rank == 0 or self.config.parallel.sequence_parallel

    def _denominators(self, counts: Tensor) -> Tensor:
        elements = torch.tensor([1, self.config.model.encoder.hidden_size], device=counts.device)
        return (counts[:2] * elements).clamp(min=1)

    # Phase 1 ------------------------------------------------------------------------------------------------------

    def _chunks(self, own: list[PackedSequence]) -> Iterator[tuple[Tensor, list[int]]]:
        """This rank's pictures, uint8 [I, 3, H, W] on the CPU, and the embeddings wanted of each, chunk by chunk."""
        pixels = [torch.from_numpy(picture) for sequence in own for picture in sequence.pixels]
        queries = [q for sequence in own for q in sequence.queries]
        size = self.config.training.encoder_micro_batch_size
        for start in range(0, len(pixels), size):
            yield torch.stack(pixels[start : start + size]), queries[start : start + size]

    def _encode(self, own: list[PackedSequence]) -> list[Tensor]:
        """Visual embeddings [R, E] of each chunk; with their graph if activations are kept."""
        with torch.set_grad_enabled(self.keeps):
            return [self._run_encoder(*chunk) for chunk in self._chunks(own)]

    def _run_encoder(self, pixels: Tensor, queries: list[int]) -> Tensor:
        rows_RE: Tensor = self.encoder(normalize(to_device(pixels), self.dtype), queries)
        return rows_RE

    def _no_rows(self) -> Tensor:
        return torch.empty(0, self.config.model.encoder.hidden_size, dtype=self.dtype, device=device())

    # Phase 2 ------------------------------------------------------------------------------------------------------

    def _micro_batches(
        self,
        tokens_NS: Tensor,
        roles_NS: Tensor,
        rows: exchange.RowMap,
        gathered_RE: Tensor,
        grads_RE: Tensor | None,
        stage: DecoderStage,
    ) -> Iterator[MicroBatch]:
        """Micro-batches of a part, each made when the schedule asks for it; if it is the first part, gradients of their
        embeddings land in `grads_RE`."""
        size = self.config.training.micro_batch_size
        here, sequence_parallel = self.here, self.config.parallel.sequence_parallel
        held = share(
            tokens_NS.shape[1],
            here.cp_rank,
            here.cp_size,
            here.tp_rank if sequence_parallel else 0,
            here.tp_size if sequence_parallel else 1,
        )
        for start in range(0, self.sequences, size):
            chosen = slice(start, start + size)
            wanted = targets(tokens_NS[chosen], roles_NS[chosen], held)
            tokens_BS, index_R, *indices = _copy_together(
                [
                    tokens_NS[chosen][:, held.tokens],
                    torch.cat(rows.rows[chosen]),
                    *(getattr(wanted, f.name) for f in fields(wanted)),
                ]
            )
            features_RE = gathered_RE[index_R if stage.pre_process or stage.post_process else index_R[:0]]
            if grads_RE is not None and stage.pre_process:
                features_RE.requires_grad_().register_hook(partial(_collect, grads_RE, index_R))
            yield MicroBatch(tokens_BS, Targets(*indices), features_RE)

    def _decode(self, batches: list[Iterator[MicroBatch]], counts: Tensor, force_all_reduce: bool) -> Tensor:
        """The pipeline schedule. Returns fp32 [2] loss sums of the global batch: text, image."""
        training = self.config.training
        weights = torch.tensor([training.text_loss_weight, training.image_loss_weight], device=counts.device)
        scale = weights / self._denominators(counts)
        losses = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, scale),
            data_iterator=batches,
            model=self.stages,
            num_microbatches=self.sequences // training.micro_batch_size,
            seq_length=self.config.data.sequence_length,
            micro_batch_size=training.micro_batch_size,
            decoder_seq_length=self.config.data.sequence_length,
            forward_only=False,
            force_all_reduce=force_all_reduce,
        )
        sums = torch.zeros(2, device=counts.device)
        if self.here.last_stage:
            once = torch.tensor([self.here.tp_rank == 0, self._holds_own_rows], device=sums.device)
            sums += torch.stack([loss["sums"] for loss in losses]).sum(0) * once
        dist.all_reduce(sums, group=topology.world_group())
        return sums

    # Phase 3 ------------------------------------------------------------------------------------------------------

    def _encoder_backward(
        self, own: list[PackedSequence], encoded: list[Tensor], home_RE: Tensor, force_all_reduce: bool
    ) -> None:
        """Push the embeddings' gradients [R, E] through the encoder, chunk by chunk."""
        start = 0
        for chunk, kept_RE in zip(self._chunks(own), encoded, strict=True):
            rows_RE = kept_RE if self.keeps else self._run_encoder(*chunk)
            rows_RE.backward(home_RE[start : start + len(rows_RE)])
            start += len(rows_RE)
        assert self.finalize_encoder is not None
        self.finalize_encoder(force_all_reduce=force_all_reduce)


def _collect(grads_RE: Tensor, index_R: Tensor, grad_RE: Tensor) -> None:
    grads_RE[index_R] = grad_RE


def _copy_together(tensors: list[Tensor]) -> list[Tensor]:
    """int64 CPU tensors on this rank's device, by one copy."""
    flat = to_device(torch.cat([tensor.flatten() for tensor in tensors]))
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _forward_step(scale: Tensor, batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Callable[..., Any]]:
    """megatron-core's forward step: the stage's output, and the loss to compute from it on the last stage."""
    batch = next(batches)
    return model(batch), partial(_loss, scale, model, batch)


def _loss(scale: Tensor, model: Any, batch: MicroBatch, hidden_SBD: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    stage: DecoderStage = model.module
    sums = torch.stack(stage.loss_sums(hidden_SBD, batch))
    # The loss is already divided by global counts; a count of 0 tells megatron-core to divide by nothing more.
    return (sums * scale).sum(), torch.zeros((), dtype=torch.int), {"sums": sums.detach()}


def _moments(own_RE: Tensor, own: list[PackedSequence]) -> Tensor:
    """First and second moments of this rank's regressed embeddings, per dimension."""
    roles = [torch.from_numpy(s.roles_S) for s in own]
    regressed_R = torch.cat(
        [(r[(r & VISUAL).bool()] & VISUAL_TARGET).bool() for r in roles] or [torch.empty(0, dtype=torch.bool)]
    )
    v = own_RE[regressed_R.to(own_RE.device)].double()
    return torch.cat([v.sum(0), v.square().sum(0), v.new_tensor([len(v)])])


class _Clock:
    """Splits a step's wall time into phases."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        synchronize()
        now = time.perf_counter()
        self.seconds[phase], self._last = now - self._last, now
