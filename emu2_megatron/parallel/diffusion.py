"""Training the visual decoder: its engine and its step.

Every rank has the whole UNet and the frozen encoder and VAE, and pictures of its own: data is all that is parallel, and
the optimizer's state is shared out over the ranks. A step encodes its pictures twice, to embeddings and to latents, and
has the UNet predict the noise that was added to the latents. Losses are divided by global counts before the backward
pass, so gradients are sums, as in `parallel/three_phase.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor, nn

from emu2_megatron.config import flops
from emu2_megatron.config.schema import Config
from emu2_megatron.data.decode import normalize
from emu2_megatron.data.sequence import Crop, PackedSequence
from emu2_megatron.model import parameters, visual_decoder
from emu2_megatron.model.visual_decoder import Sizes
from emu2_megatron.parallel import average, loss_scale, topology
from emu2_megatron.parallel.step import Clock, StepOutput
from emu2_megatron.parallel.topology import Topology
from emu2_megatron.parallel.wrap import Engine, build_encoder, skip_lone_collectives, wrap_whole
from emu2_megatron.platform.device import device, to_device
from emu2_megatron.platform.precision import DTYPES

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def build(
    config: Config, here: Topology, source: parameters.Source | None, fill: Callable[[Any, Any], None] | None
) -> Engine:
    """Build a rank's UNet, and what it is trained with.

    Args:
        config: a validated configuration, of objective visual_decoder.
        here: this rank's place.
        source: the encoder's weights; None initialises them from (seed, name).
        fill: gives UNet and VAE weights; None leaves them with those of training.seed.
    """
    encoder = build_encoder(config, source).requires_grad_(False).eval()
    width, seed = config.model.encoder.hidden_size, config.training.seed
    unet = visual_decoder.build_unet(config.visual_decoder, width, seed)
    vae = visual_decoder.build_vae(config.visual_decoder, seed)
    if fill is not None:
        fill(unet, vae)
    nn.Module.to(unet, device(), DTYPES[config.training.precision])  # diffusers' own warns of what it does not do
    vae = vae.to(device()).requires_grad_(False).eval()
    if config.training.recompute == "full":
        unet.enable_gradient_checkpointing()
    for parameter in unet.parameters():
        parameter.part = "visual_decoder"
    wrapped, optimizer = wrap_whole(config, unet)
    skip_lone_collectives([wrapped])
    shared_scale = loss_scale.share(optimizer, config.training)
    step = DiffusionStep(config, here, encoder, vae, wrapped, optimizer)
    engine = Engine(here, {"unet": unet, "vae": vae}, [], [], [wrapped], optimizer, step, shared_scale)
    if config.visual_decoder.ema_decay:
        average.restart(engine)
    return engine


@dataclass
class PreparedCrops:
    """A global batch of pictures. Made by `DiffusionStep.prepare`."""

    counts: Tensor
    """See `StepOutput.counts`."""
    crops: list[Crop]
    """This rank's."""
    seconds: dict[str, float]
    """Wall time so far."""
    own: list[PackedSequence]
    """The rows that this rank loaded, of a picture each, unless it proved bad."""

    def bad_sequences(self, finite_R: Tensor, replica_rank: int) -> list[int]:
        """See `step.Batch`."""
        rows = [number for number, row in enumerate(self.own) for _ in row.crops]
        return sorted({row for row, finite in zip(rows, finite_R.tolist(), strict=True) if not finite})


class DiffusionStep:
    """Forward and backward of one global batch of pictures. Gradients end up where the optimizer expects them.

    Args:
        config: the run.
        here: this rank's place.
        encoder: frozen.
        vae: frozen.
        unet: wrapped with its gradient buffers.
        optimizer: whose loss scale is fp16's.
    """

    def __init__(
        self, config: Config, here: Topology, encoder: Any, vae: "AutoencoderKL", unet: Any, optimizer: ChainedOptimizer
    ) -> None:
        self.config, self.here = config, here
        self.encoder, self.vae, self.unet = encoder, vae, unet
        self.scale_loss = optimizer.scale_loss
        self.scheduler = visual_decoder.training_scheduler()
        self.entered: Callable[[str], None] = lambda phase: None
        self._of_unet, self._of_vae = visual_decoder.forward_flops(config)
        self._null_QE: Tensor | None = None
        self.flops_formula = (
            f"pictures x [3 x UNet + VAE's encoder + encoder] = pictures x [3 x {self._of_unet:.4g} + "
            f"{self._of_vae:.4g} + {flops.encoder_forward(config.model):.4g}]; matrix products and convolutions, "
            "backward twice forward"
        )

    def flops(self, sequences: int, pictures: int, encoded: int, regressed: int) -> float:
        """See `step.Step`."""
        return pictures * (3 * self._of_unet + self._of_vae) + encoded * flops.encoder_forward(self.config.model)

    @property
    def null_QE(self) -> Tensor:
        """What stands for missing embeddings."""
        if self._null_QE is None:
            queries = self.config.model.image_queries
            self._null_QE = visual_decoder.null_embeddings(self.config.visual_decoder, self.encoder, queries)
        return self._null_QE

    def prepare(self, own: list[PackedSequence]) -> PreparedCrops:
        """Count the pictures of all ranks.

        Args:
            own: this rank's rows (`Topology.slots`, in order).
        """
        self.entered("exchange")
        clock = Clock({})
        crops = [crop for row in own for crop in row.crops]
        empty = sum(not row.crops for row in own) * self.config.data.sequence_length
        by_rank = [len(crops) if rank == self.here.dp_rank else 0 for rank in range(self.here.dp_size)]
        counts = torch.tensor([0, len(crops), len(crops), len(own), len(crops), empty, *by_rank], device=device())
        dist.all_reduce(counts, group=topology.world_group())
        clock.lap("exchange")
        return PreparedCrops(counts, crops, clock.seconds, own)

    def __call__(
        self, batch: PreparedCrops, *, force_all_reduce: bool = False, flags: Sequence[bool] = ()
    ) -> StepOutput:
        """Forward and backward on a prepared batch, once; arguments as of `ThreePhaseStep`."""
        clock = Clock(batch.seconds)
        size, total = self.config.training.micro_batch_size, int(batch.counts[1])
        losses: list[Tensor] = []
        finite: list[Tensor] = [torch.ones(0, dtype=torch.bool)]
        moments = torch.zeros(2 * self.config.visual_decoder.latent_channels + 1, dtype=torch.float64)
        for start in range(0, len(batch.crops), size):
            self.entered("encode")
            crops = batch.crops[start : start + size]
            embeddings_BQE, latents_BCHW, draws = self._encode(crops)
            finite.append(embeddings_BQE.isfinite().flatten(1).all(1).cpu())
            moments += _moments(draws.noise_BCHW)
            clock.own()
            clock.add("encode")
            self.entered("decode")
            error, _ = visual_decoder.denoising_loss(
                self.unet, self.scheduler, latents_BCHW, embeddings_BQE, self.null_QE, self._sizes(crops), draws
            )
            loss = error / (total * latents_BCHW[0].numel())
            self.scale_loss(loss * self.config.training.image_loss_weight).backward()
            losses.append(loss.detach())
            clock.add("decode")
        self.unet.finish_grad_sync(force_all_reduce=force_all_reduce)
        losses_M2 = torch.stack([torch.zeros(len(losses), device=device()), _stacked(losses)], 1)
        sums = torch.cat([losses_M2.sum(0), torch.tensor(flags, dtype=torch.float32, device=device())])
        dist.all_reduce(sums, group=topology.world_group())
        clock.add("decode")
        clock.seconds |= {"encode": clock.seconds.get("encode", 0.0), "encoder_backward": 0.0}
        return StepOutput(
            sums[0], sums[1], batch.counts, moments, clock.seconds, losses_M2, torch.cat(finite), flags=sums[2:]
        )

    @torch.no_grad()
    def embeddings(self, crops: list[Crop]) -> Tensor:
        """[B, Q, E] of some pictures."""
        seen_B3HW = torch.stack([to_device(crop.seen_3HW) for crop in crops])
        queries = [self.config.model.image_queries] * len(crops)
        rows_RE: Tensor = self.encoder(normalize(seen_B3HW, DTYPES[self.config.training.precision]), queries)
        return rows_RE.view(len(crops), -1, rows_RE.shape[-1])

    @torch.no_grad()
    def _encode(self, crops: list[Crop]) -> tuple[Tensor, Tensor, visual_decoder.Draws]:
        """Embeddings and latents of some pictures, and what is drawn for them."""
        side = self.config.visual_decoder.image_size // visual_decoder.downsampling(self.config.visual_decoder)
        draws = visual_decoder.draw(self.config.visual_decoder, [crop.seed for crop in crops], side, side).to(device())
        painted_B3HW = torch.stack([to_device(crop.painted_3HW) for crop in crops])
        pixels_B3HW = painted_B3HW.float() / 127.5 - 1
        latents_BCHW = visual_decoder.encode_latents(self.vae, pixels_B3HW, draws.posterior_BCHW)
        return self.embeddings(crops), latents_BCHW, draws

    def _sizes(self, crops: list[Crop]) -> Sizes:
        target = [self.config.visual_decoder.image_size] * 2
        columns = [crop.original for crop in crops], [crop.corner for crop in crops], [target] * len(crops)
        return Sizes(*(torch.tensor(column, device=device()) for column in columns))


def _moments(noise_BCHW: Tensor) -> Tensor:
    """As `StepOutput.moments`, of what is predicted, by channel."""
    noise_CN = noise_BCHW.double().transpose(0, 1).flatten(1)
    count = torch.tensor([noise_CN.shape[1]], dtype=torch.float64)
    return torch.cat([noise_CN.sum(1).cpu(), noise_CN.square().sum(1).cpu(), count])


def _stacked(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses) if losses else torch.zeros(0, device=device())
