"""Training the decoders of pictures and of clips: their engine and their step.

Every rank has the whole UNet and the frozen encoder and VAE, and samples of its own: data is all that is parallel, and
the optimizer's state is shared out over the ranks. A step encodes its pictures twice, to embeddings and to latents, and
has the UNet predict the noise that was added to the latents. Losses are divided by global counts before the backward
pass, so gradients are sums, as in `parallel/three_phase.py`.

A sample is a `Crop`: a picture, or the T frames of a clip. What the two differ in is `KINDS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor, nn

from emu2_megatron.config import flops
from emu2_megatron.config.schema import Config, queries_of, trained_decoder
from emu2_megatron.data.decode import normalize
from emu2_megatron.data.sequence import Crop, PackedSequence
from emu2_megatron.model import parameters, video_decoder, video_loss, visual_decoder
from emu2_megatron.model.visual_decoder import Draws, Sizes
from emu2_megatron.parallel import average, loss_scale, topology
from emu2_megatron.parallel.step import Clock, StepOutput
from emu2_megatron.parallel.topology import Topology
from emu2_megatron.parallel.wrap import Engine, build_encoder, skip_lone_collectives, wrap_whole
from emu2_megatron.platform.device import device, to_device
from emu2_megatron.platform.precision import DTYPES

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDPMScheduler


class Kind(NamedTuple):
    """What a decoder of pictures and one of clips differ in."""

    build: Callable[[Config], Any]
    """The network, with weights of training.seed, on the CPU or the meta device."""
    unet: Callable[[Any], Any]
    """The part of it that is stored."""
    scheduler: Callable[[Config], "DDPMScheduler"]
    """By which noise is added."""
    frames: Callable[[Config], tuple[int, ...]]
    """What stands between B and the rest in the shapes of latents and embeddings: nothing, or T."""
    forward_flops: Callable[[Config], int]
    """FLOPs of the network for a sample."""
    loss: Callable[..., tuple[Tensor, int]]
    """Of (network, scheduler, latents, embeddings, null_QE, *told, draws): the sum of squared errors, and their
    count."""
    told: Callable[[list[Crop]], tuple[Sizes, ...]]
    """What the network is told of samples besides."""


def _sizes(crops: list[Crop]) -> tuple[Sizes]:
    """The micro-conditions of pictures."""
    target = list(crops[0].painted_T3HW.shape[-2:])
    columns = [crop.original for crop in crops], [crop.corner for crop in crops], [target] * len(crops)
    return (Sizes(*(torch.tensor(column, device=device()) for column in columns)),)


KINDS = {
    "visual_decoder": Kind(
        build=lambda config: visual_decoder.build_unet(
            config.visual_decoder, config.model.encoder.hidden_size, config.training.seed
        ),
        unet=lambda network: network,
        scheduler=lambda _: visual_decoder.training_scheduler(),
        frames=lambda _: (),
        forward_flops=visual_decoder.forward_flops,
        loss=visual_decoder.denoising_loss,
        told=_sizes,
    ),
    "video_decoder": Kind(
        build=lambda config: video_decoder.build(
            config.video_decoder, config.model.encoder.hidden_size, config.training.seed
        ),
        unet=lambda network: network.unet,
        scheduler=lambda config: video_loss.training_scheduler(config.video_decoder),
        frames=lambda config: (config.video_decoder.frames,),
        forward_flops=video_decoder.forward_flops,
        loss=video_loss.denoising_loss,
        told=lambda _: (),
    ),
}
"""By training.objective, which is also the name of the decoder's section and the end of its learning rate's."""


def build(
    config: Config, here: Topology, source: parameters.Source | None, fill: Callable[[Any, Any], None] | None
) -> Engine:
    """Build a rank's UNet, and what it is trained with.

    Args:
        config: a validated configuration, of one of the objectives in `KINDS`.
        here: this rank's place.
        source: the encoder's weights; None initialises them from (seed, name).
        fill: gives the network (of `Kind.build`) and the VAE weights; None leaves them with those of training.seed.
    """
    kind, decoder = KINDS[config.training.objective], trained_decoder(config)
    encoder = build_encoder(config, source).requires_grad_(False).eval()
    network = kind.build(config)
    vae = visual_decoder.build_vae(decoder, config.training.seed)
    if fill is not None:
        fill(network, vae)
    nn.Module.to(network, device(), DTYPES[config.training.precision])  # diffusers' own warns of what it does not do
    vae = vae.to(device()).requires_grad_(False).eval()
    if config.training.recompute == "full":
        network.enable_gradient_checkpointing()
    for parameter in network.parameters():
        parameter.part = config.training.objective
    wrapped, optimizer = wrap_whole(config, network)
    skip_lone_collectives([wrapped])
    shared_scale = loss_scale.share(optimizer, config.training)
    step = DiffusionStep(config, here, encoder, vae, wrapped, optimizer)
    whole = {"unet": kind.unet(network), "vae": vae}
    engine = Engine(here, whole, [], [], [wrapped], optimizer, step, shared_scale)
    if decoder.ema_decay:
        average.restart(engine)
    return engine


@dataclass
class PreparedCrops:
    """A global batch of pictures or clips. Made by `DiffusionStep.prepare`."""

    counts: Tensor
    """See `StepOutput.counts`."""
    crops: list[Crop]
    """This rank's."""
    seconds: dict[str, float]
    """Wall time so far."""
    own: list[PackedSequence]
    """The rows that this rank loaded, of a crop each, unless it proved bad."""

    def bad_sequences(self, finite_R: Tensor, replica_rank: int) -> list[int]:
        """See `step.Batch`."""
        rows = [number for number, row in enumerate(self.own) for _ in row.crops]
        return sorted({row for row, finite in zip(rows, finite_R.tolist(), strict=True) if not finite})


class DiffusionStep:
    """Forward and backward of one global batch of pictures or clips. Gradients end up where the optimizer expects them.

    Args:
        config: the run.
        here: this rank's place.
        encoder: frozen.
        vae: frozen.
        network: wrapped with its gradient buffers.
        optimizer: whose loss scale is fp16's.
    """

    def __init__(
        self,
        config: Config,
        here: Topology,
        encoder: Any,
        vae: "AutoencoderKL",
        network: Any,
        optimizer: ChainedOptimizer,
    ) -> None:
        self.config, self.here = config, here
        self.encoder, self.vae, self.network = encoder, vae, network
        self.kind, self.decoder = KINDS[config.training.objective], trained_decoder(config)
        self.queries = queries_of(config)
        self.scale_loss = optimizer.scale_loss
        self.scheduler = self.kind.scheduler(config)
        self.entered: Callable[[str], None] = lambda phase: None
        self._of_unet, self._of_vae = self.kind.forward_flops(config), visual_decoder.vae_flops(self.decoder)
        self._null_QE: Tensor | None = None
        self.flops_formula = (
            f"samples x [3 x UNet + {len(self.queries)} x (VAE's encoder + encoder)] = samples x [3 x "
            f"{self._of_unet:.4g} + {len(self.queries)} x ({self._of_vae:.4g} + "
            f"{flops.encoder_forward(config.model):.4g})]; matrix products and convolutions, backward twice forward"
        )

    def frozen(self) -> dict[str, str]:
        """See `step.Step`."""
        return {"encoder": parameters.fingerprint(self.encoder, self.config)}

    def flops(self, sequences: int, pictures: int, encoded: int, regressed: int) -> float:
        """See `step.Step`."""
        of_encoder = flops.encoder_forward(self.config.model)
        return regressed * 3 * self._of_unet + pictures * self._of_vae + encoded * of_encoder

    @property
    def null_QE(self) -> Tensor:
        """What stands for missing embeddings."""
        if self._null_QE is None:
            self._null_QE = visual_decoder.null_embeddings(self.decoder, self.encoder, self.queries[0])
        return self._null_QE

    def prepare(self, own: list[PackedSequence]) -> PreparedCrops:
        """Count the samples of all ranks.

        Args:
            own: this rank's rows (`Topology.slots`, in order).
        """
        self.entered("exchange")
        clock = Clock({})
        crops = [crop for row in own for crop in row.crops]
        empty = sum(not row.crops for row in own) * self.config.data.sequence_length
        by_rank = [
            len(crops) * len(self.queries) if rank == self.here.dp_rank else 0 for rank in range(self.here.dp_size)
        ]
        pictures = len(crops) * len(self.queries)
        counts = torch.tensor([0, len(crops), pictures, len(own), pictures, empty, *by_rank], device=device())
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
        moments = torch.zeros(2 * self.decoder.latent_channels + 1, dtype=torch.float64)
        for start in range(0, len(batch.own), size):
            self.entered("encode")
            crops = [crop for row in batch.own[start : start + size] for crop in row.crops]
            if not crops:
                losses.append(torch.zeros((), device=device()))
                continue
            embeddings, latents, draws = self._encode(crops)
            finite.append(embeddings.isfinite().flatten(1).all(1).cpu())
            moments += _moments(visual_decoder.target(self.scheduler, latents, draws))
            clock.own()
            clock.add("encode")
            self.entered("decode")
            error, _ = self.kind.loss(
                self.network, self.scheduler, latents, embeddings, self.null_QE, *self.kind.told(crops), draws
            )
            loss = error / (total * latents[0].numel())
            self.scale_loss(loss * self.config.training.image_loss_weight).backward()
            losses.append(loss.detach())
            clock.add("decode")
        self.network.finish_grad_sync(force_all_reduce=force_all_reduce)
        losses_M2 = torch.stack([torch.zeros(len(losses), device=device()), _stacked(losses)], 1)
        sums = torch.cat([losses_M2.sum(0), torch.tensor(flags, dtype=torch.float32, device=device())])
        dist.all_reduce(sums, group=topology.world_group())
        clock.add("decode")
        clock.seconds |= {"encode": clock.seconds.get("encode", 0.0), "encoder_backward": 0.0}
        return StepOutput(
            sums[0], sums[1], batch.counts, moments, clock.seconds, losses_M2, torch.cat(finite), flags=sums[2:]
        )

    @torch.no_grad()
    def embeddings(self, seen_B3HW: Tensor) -> Tensor:
        """[B, Q, E] of some pictures, uint8, at the encoder's image size."""
        pixels_B3HW = normalize(to_device(seen_B3HW), DTYPES[self.config.training.precision])
        rows_RE: Tensor = self.encoder(pixels_B3HW, self.queries[:1] * len(pixels_B3HW))
        return rows_RE.view(len(pixels_B3HW), -1, rows_RE.shape[-1])

    @torch.no_grad()
    def _encode(self, crops: list[Crop]) -> tuple[Tensor, Tensor, Draws]:
        """Embeddings [B, Q, E] and latents [B, C, H, W] of some pictures, of clips with T behind B, and what is drawn
        for them."""
        side = self.decoder.image_size // visual_decoder.downsampling(self.decoder)
        size = (*self.kind.frames(self.config), side, side)
        draws = visual_decoder.draw(self.decoder, [crop.seed for crop in crops], *size).to(device())
        pixels_I3HW = to_device(torch.cat([crop.painted_T3HW for crop in crops])).float() / 127.5 - 1
        posterior_ICHW = draws.posterior.view(-1, *draws.posterior.shape[-3:])
        latents_ICHW = visual_decoder.encode_latents(self.vae, pixels_I3HW, posterior_ICHW)
        embeddings_IQE = self.embeddings(torch.cat([crop.seen_T3HW for crop in crops]))
        embeddings = embeddings_IQE.view(len(crops), *size[:-2], *embeddings_IQE.shape[1:])
        return embeddings, latents_ICHW.view(draws.noise.shape), draws


def _moments(target: Tensor) -> Tensor:
    """As `StepOutput.moments`, of what is predicted, by channel; they stand before height and width."""
    target_CN = target.double().transpose(0, -3).flatten(1)
    count = torch.tensor([target_CN.shape[1]], dtype=torch.float64)
    return torch.cat([target_CN.sum(1).cpu(), target_CN.square().sum(1).cpu(), count])


def _stacked(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses) if losses else torch.zeros(0, device=device())
