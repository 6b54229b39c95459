"""The training step: load and exchange, encode, decode, and (if it is trained) the encoder's backward pass.

The encoder is not part of the pipeline. Every rank encodes an even share of its replica's pictures; the embeddings are
gathered within the replica, so that the first stage has them as inputs and the last stage as regression targets; the
pipeline runs over the decoder alone; gradients of the embeddings, collected on the first stage, return to the rank that
encoded the picture. ARCHITECTURE.md explains why.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor, nn

from emu2_megatron.config import flops
from emu2_megatron.config.schema import Config
from emu2_megatron.data.batch import Targets, cu_seqlens, share, targets
from emu2_megatron.data.decode import normalize
from emu2_megatron.data.sequence import PADDING, TEXT_TARGET, VISUAL, VISUAL_TARGET, Features, PackedSequence
from emu2_megatron.errors import FeaturesError
from emu2_megatron.model.decoder import DecoderStage, MicroBatch
from emu2_megatron.model.parameters import fingerprint
from emu2_megatron.parallel import exchange, topology
from emu2_megatron.parallel.step import Clock, StepOutput
from emu2_megatron.parallel.topology import Topology
from emu2_megatron.platform.background import background
from emu2_megatron.platform.device import device, to_device
from emu2_megatron.platform.precision import DTYPES

PHASES = ("exchange", "encode", "decode", "encoder_backward")
"""Names of the timed phases. Loading is timed by the loop."""


@dataclass
class Prepared:
    """A global batch after phase 0, its visual embeddings computed or under way. Made by `ThreePhaseStep.prepare`."""

    tokens_NS: Tensor
    """int64 [N, S] token ids of the replica's sequences, on the CPU."""
    roles_NS: Tensor
    """uint8 [N, S] their marked roles, on the CPU."""
    counts: Tensor
    """See `StepOutput.counts`."""
    placement: exchange.Placement
    """Where embeddings are."""
    chunks: list[tuple[list[Tensor], list[int]]]
    """What this rank encodes: pictures, uint8 [3, H, W] each, and the embeddings wanted of each, chunk by chunk."""
    encode: Callable[[], list[Tensor]]
    """Gives the embeddings [R, E] of each chunk, with their graph if activations are kept."""
    stored_RE: Tensor
    """[R, E] embeddings that this rank loaded instead of pictures."""
    seconds: dict[str, float]
    """Wall time so far."""
    own: list[PackedSequence]
    """The sequences that this rank loaded."""

    def bad_sequences(self, finite_R: Tensor, replica_rank: int) -> list[int]:
        """See `step.Batch`."""
        bad_R, block = ~finite_R.cpu(), max(1, self.placement.block)
        return [
            sequence
            for sequence, rows_R in enumerate(self.placement.rows)
            if bool((bad_R[rows_R] & (rows_R // block == replica_rank)).any())
        ]


class ThreePhaseStep:
    """Forward and backward of one global batch. Gradients end up where the optimizer expects them.

    `prepare` is phase 0; calling the step with its result is the rest. With training.encoder_prefetch the embeddings of
    a batch are computed in the background from `prepare` on, so that a loop that prepares a batch before it runs the
    one before has them ready. Collectives stay in the caller's thread: they happen in the same order on all ranks.

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
        self.in_background = background() if config.training.encoder_prefetch else None
        self.fingerprint: str | None = None
        self.entered: Callable[[str], None] = lambda phase: None
        self.flops_formula = flops.formula(config)

    def frozen(self) -> dict[str, str]:
        """See `step.Step`: checkpoints hold the encoder."""
        return {}

    def flops(self, sequences: int, pictures: int, encoded: int, regressed: int) -> float:
        """See `step.Step`."""
        return flops.step_flops(self.config, sequences, pictures, encoded, regressed).total

    def prepare(self, own: list[PackedSequence]) -> Prepared:
        """Phase 0: tell the replica what this rank loaded, and share out the pictures.

        Args:
            own: this rank's sequences (`Topology.slots`, in order).

        Raises:
            FeaturesError: features were computed by another encoder, or the encoder is trained.
        """
        self.entered("exchange")
        clock = Clock({})
        stored_RE = self._stored(own)
        tokens_NS, roles_NS = exchange.gather_sequences(
            own, self.sequences, self.config.data.sequence_length, self.replica, device()
        )
        counts = self._count(roles_NS)
        placement = exchange.place(roles_NS, self.here.replica_size)
        loaded = [p for sequence in own for p in sequence.pictures if not isinstance(p, Features)]
        size = self.config.model.encoder.image_size
        pictures = exchange.share_pictures(loaded, placement, size, self.replica, device())
        chunks = self._chunks(pictures, placement.queries[self.here.replica_rank])
        clock.lap("exchange")
        encode: Callable[[], list[Tensor]] = partial(self._encode, chunks)
        if self.in_background is not None:
            encode = self.in_background(encode)
        return Prepared(tokens_NS, roles_NS, counts, placement, chunks, encode, stored_RE, clock.seconds, own)

    def __call__(self, batch: Prepared, *, force_all_reduce: bool = False, flags: Sequence[bool] = ()) -> StepOutput:
        """Run all phases on a prepared batch, once.

        Args:
            batch: from `prepare`.
            force_all_reduce: leave whole summed gradients on every rank instead of the optimizer's shards.
            flags: what this rank wants all to know: they are counted where the losses are summed.
        """
        self.entered("encode")
        clock = Clock(batch.seconds)
        encoded = batch.encode()
        clock.own()
        own_RE = torch.cat([*(rows_RE.detach() for rows_RE in encoded), batch.stored_RE])
        gathered_RE = exchange.gather_rows(own_RE, batch.placement.block, self.replica)
        clock.lap("encode")
        # A nan is both the largest and the smallest. No copy is made, and it is much quicker than `isfinite` of all.
        finite_R = gathered_RE.amax(1).isfinite() & gathered_RE.amin(1).isfinite()

        self.entered("decode")
        collects = self.trains_encoder and self.here.first_stage and self._holds_own_rows
        grads_RE = torch.zeros_like(gathered_RE) if collects else None
        batches = [self._micro_batches(batch, gathered_RE, grads_RE, stage.module) for stage in self.stages]
        total, losses_M2 = self._decode(batches, batch.counts, force_all_reduce, flags)
        clock.lap("decode")

        if self.trains_encoder:
            self.entered("encoder_backward")
            home_RE = exchange.return_rows(
                torch.zeros_like(gathered_RE) if grads_RE is None else grads_RE, len(own_RE), self.replica
            )
            self._encoder_backward(batch.chunks, encoded, home_RE, force_all_reduce)
        clock.lap("encoder_backward")
        moments = self._moments(batch, gathered_RE)
        return StepOutput(
            total[0], total[1], batch.counts, moments, clock.seconds, losses_M2, finite_R, flags=total[2:]
        )

    # Phase 0 ------------------------------------------------------------------------------------------------------

    def _stored(self, own: list[PackedSequence]) -> Tensor:
        """Embeddings [R, E] that were loaded, if they are what the encoder would compute."""
        features = [picture for sequence in own for picture in sequence.pictures if isinstance(picture, Features)]
        if features and self.trains_encoder:
            raise FeaturesError(
                "training.train_encoder: true; data.shards has precomputed features, which are a frozen encoder's, "
                "legal: false, or shards with pictures"
            )
        if features and self.fingerprint is None:
            self.fingerprint = fingerprint(self.encoder, self.config)
        if others := {f.encoder for f in features} - {self.fingerprint}:
            raise FeaturesError(
                f"data.shards: precomputed features are from encoder {others.pop()}, this run's is {self.fingerprint}; "
                "run `emu2 embed` with this run's configuration"
            )
        no_rows = torch.empty(0, self.config.model.encoder.hidden_size, dtype=self.dtype)
        return to_device(torch.cat([no_rows, *(f.rows_QE for f in features)]))

    def _count(self, roles_NS: Tensor) -> Tensor:
        """What the global batch has of everything (`StepOutput.counts`), known before the forward pass."""
        # Every rank of a replica knows all its roles.
        roles = (TEXT_TARGET, VISUAL_TARGET, exchange.FIRST, exchange.STORED, PADDING)
        text, visual, pictures, stored, padding = (int((roles_NS & role).bool().sum()) for role in roles)
        encoded = pictures - stored
        by_replica = [encoded if replica == self.here.dp_rank else 0 for replica in range(self.here.dp_size)]
        mine = [text, visual, pictures, len(roles_NS), encoded, padding, *by_replica]
        counts = torch.tensor(mine, device=device()) * (self.here.replica_rank == 0)
        dist.all_reduce(counts, group=topology.world_group())
        return counts

    @property
    def _holds_own_rows(self) -> bool:
        """Whether this rank's hidden states are its own: without sequence parallelism, tensor-parallel ranks hold the
        same ones, and what all of them know must be counted once."""
        return self.here.tp_rank == 0 or self.config.parallel.sequence_parallel

    # Phase 1 ------------------------------------------------------------------------------------------------------

    def _chunks(self, pictures: list[Tensor], queries: list[int]) -> list[tuple[list[Tensor], list[int]]]:
        size = self.config.training.encoder_micro_batch_size
        starts = range(0, len(pictures), size)
        return [(pictures[start : start + size], queries[start : start + size]) for start in starts]

    def _encode(self, chunks: list[tuple[list[Tensor], list[int]]]) -> list[Tensor]:
        """Visual embeddings [R, E] of each chunk; with their graph if activations are kept."""
        with torch.set_grad_enabled(self.keeps):
            return [self._run_encoder(*chunk) for chunk in chunks]

    def _run_encoder(self, pictures: list[Tensor], queries: list[int]) -> Tensor:
        pixels_I3HW = torch.stack([to_device(picture) for picture in pictures])
        rows_RE: Tensor = self.encoder(normalize(pixels_I3HW, self.dtype), queries)
        return rows_RE

    # Phase 2 ------------------------------------------------------------------------------------------------------

    def _micro_batches(
        self,
        batch: Prepared,
        gathered_RE: Tensor,
        grads_RE: Tensor | None,
        stage: DecoderStage,
    ) -> Iterator[MicroBatch]:
        """Micro-batches of a part, each made when the schedule asks for it; if it is the first part, gradients of their
        embeddings land in `grads_RE`."""
        size = self.config.training.micro_batch_size
        tokens_NS, roles_NS, rows = batch.tokens_NS, batch.roles_NS, batch.placement.rows
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
                    torch.cat(rows[chosen]),
                    *(getattr(wanted, f.name) for f in fields(wanted)),
                ]
            )
            features_RE = gathered_RE[index_R if stage.pre_process or stage.post_process else index_R[:0]]
            if grads_RE is not None and stage.pre_process:
                features_RE.requires_grad_().register_hook(partial(_collect, grads_RE, index_R))
            samples = None if self.config.data.attend_across_samples else cu_seqlens(roles_NS[chosen])
            yield MicroBatch(tokens_BS, Targets(*indices), features_RE, None if samples is None else to_device(samples))

    def _decode(
        self, batches: list[Iterator[MicroBatch]], counts: Tensor, force_all_reduce: bool, flags: Sequence[bool]
    ) -> tuple[Tensor, Tensor]:
        """The pipeline schedule. Returns fp32 [2 + flags] losses of the global batch (text, image) and counted flags,
        and `StepOutput.losses_M2`."""
        training = self.config.training
        weights = torch.tensor([training.text_loss_weight, training.image_loss_weight], device=counts.device)
        elements = torch.tensor([1, self.config.model.encoder.hidden_size], device=counts.device)
        denominators = (counts[:2] * elements).clamp(min=1).float()
        parts = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, weights, denominators),
            data_iterator=batches,
            model=self.stages,
            num_microbatches=self.sequences // training.micro_batch_size,
            seq_length=self.config.data.sequence_length,
            micro_batch_size=training.micro_batch_size,
            decoder_seq_length=self.config.data.sequence_length,
            forward_only=False,
            force_all_reduce=force_all_reduce,
        )
        losses_M2 = torch.zeros(0, 2, device=counts.device)
        if self.here.last_stage:
            once = torch.tensor([self.here.tp_rank == 0, self._holds_own_rows], device=counts.device)
            losses_M2 = torch.stack([part["losses"] for part in parts]) * once
        total = torch.cat([losses_M2.sum(0), torch.tensor(flags, dtype=torch.float32, device=counts.device)])
        dist.all_reduce(total, group=topology.world_group())
        return total, losses_M2

    # Phase 3 ------------------------------------------------------------------------------------------------------

    def _encoder_backward(
        self,
        chunks: list[tuple[list[Tensor], list[int]]],
        encoded: list[Tensor],
        home_RE: Tensor,
        force_all_reduce: bool,
    ) -> None:
        """Push the embeddings' gradients [R, E] through the encoder, chunk by chunk."""
        start = 0
        for chunk, kept_RE in zip(chunks, encoded, strict=True):
            rows_RE = kept_RE if self.keeps else self._run_encoder(*chunk)
            rows_RE.backward(home_RE[start : start + len(rows_RE)])
            start += len(rows_RE)
        assert self.finalize_encoder is not None
        self.finalize_encoder(force_all_reduce=force_all_reduce)

    def _moments(self, batch: Prepared, gathered_RE: Tensor) -> Tensor:
        """First and second moments, per dimension, of the regressed embeddings in the sequences this rank loaded."""
        own = slice(self.here.replica_rank, None, self.here.replica_size)
        roles_NS = batch.roles_NS[own]
        regressed_R = (roles_NS[(roles_NS & VISUAL).bool()] & VISUAL_TARGET).bool()
        rows_R = torch.cat([*batch.placement.rows[own], torch.empty(0, dtype=torch.long)])[regressed_R]
        v = gathered_RE[rows_R.to(gathered_RE.device)].double()
        return torch.cat([v.sum(0), v.square().sum(0), v.new_tensor([len(v)])])


def _collect(grads_RE: Tensor, index_R: Tensor, grad_RE: Tensor) -> None:
    grads_RE[index_R] = grad_RE


def _copy_together(tensors: list[Tensor]) -> list[Tensor]:
    """CPU tensors of integers on this rank's device, by one copy."""
    flat = to_device(torch.cat([tensor.flatten() for tensor in tensors]))
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def _forward_step(
    weights: Tensor, denominators: Tensor, batches: Iterator[MicroBatch], model: Any
) -> tuple[Tensor, Callable[..., Any]]:
    """megatron-core's forward step: the stage's output, and the loss to compute from it on the last stage."""
    batch = next(batches)
    return model(batch), partial(_loss, weights, denominators, model, batch)


def _loss(
    weights: Tensor, denominators: Tensor, model: Any, batch: MicroBatch, hidden_SBD: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    stage: DecoderStage = model.module
    # What megatron-core multiplies the loss by (fp16's loss scale), times the weight: the same two factors, so that the
    # gradient of the image loss comes back as exactly this. Without a weight any other number will do.
    image_weight = torch.where(weights[1] == 0, 1.0, weights[1])
    image_gradient_scale = stage.config.grad_scale_func(image_weight)
    losses = stage.losses(hidden_SBD, batch, denominators, image_gradient_scale)
    # The loss is already divided by global counts; a count of 0 tells megatron-core to divide by nothing more.
    return (losses * weights).sum(), torch.zeros((), dtype=torch.int), {"losses": losses.detach()}
