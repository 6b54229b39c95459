"""Builds what a rank trains: its parts of the decoder, its encoder, gradient buffers, one optimizer over both."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import ChainedOptimizer, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from emu2_megatron.config.schema import Config, OptimizerConfig
from emu2_megatron.model import fp8, parameters
from emu2_megatron.model.decoder import DecoderStage, transformer_config
from emu2_megatron.model.eva_vit import EvaVisionTransformer
from emu2_megatron.parallel import layout, loss_scale, topology
from emu2_megatron.parallel.loss_scale import SharedLossScale
from emu2_megatron.parallel.step import Step
from emu2_megatron.parallel.three_phase import ThreePhaseStep
from emu2_megatron.parallel.topology import Topology
from emu2_megatron.platform import kernels
from emu2_megatron.platform.device import device
from emu2_megatron.platform.precision import DTYPES

PLAIN = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
"""Gradients are summed after the backward pass, in fp32."""
PARTS = ("decoder", "projection", "encoder", "visual_decoder", "video_decoder")
"""Parts of the model with a learning rate of their own: `optimizer.<part>_lr`."""


class Owned(NamedTuple):
    """A run of elements of a parameter, and what the optimizer has for them, flat."""

    start: int
    stop: int
    master: Tensor
    """fp32; of an fp32 parameter, its own memory."""
    moments: dict[str, Tensor]
    """`exp_avg` and `exp_avg_sq`, once there are any."""


@dataclass
class Engine:
    """Everything one rank needs to train."""

    here: Topology
    whole: dict[str, nn.Module]
    """What every rank has all of and checkpoints hold, by how its names begin there: the bare encoder is `visual`; the
    UNet of a decoder of pictures or clips is `unet`."""
    stages: list[DecoderStage]
    """The bare parts of the decoder on this rank, in the order data flows; one, unless the schedule is interleaved."""
    first_layers: list[int]
    """Global index of the first layer of each."""
    wrapped: list[DistributedDataParallel]
    """Whatever is trained, with its gradient buffers."""
    optimizer: ChainedOptimizer
    """megatron-core's optimizer over all of them: one norm, one clip, state sharded over data-parallel ranks."""
    step: Step
    """Forward and backward."""
    loss_scale: SharedLossScale | None
    """fp16's, shared by the optimizers of decoder and encoder."""
    average: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    """Of what `owned` has: the moving average, fp32, flat (`parallel/average.py`); empty if there is none."""

    @property
    def encoder(self) -> EvaVisionTransformer:
        """The bare encoder, of an engine that has one to store."""
        encoder = self.whole["visual"]
        assert isinstance(encoder, EvaVisionTransformer)
        return encoder

    def owned(self) -> dict[nn.Parameter, Owned]:
        """What this rank's optimizer owns of every parameter that is trained."""
        found = {}
        for optimizer in self.optimizer.chained_optimizers:
            for parameter in optimizer.model_param_group_index_map:
                span = optimizer._get_model_param_range_map(parameter)["param"]
                tensors = optimizer._get_main_param_and_optimizer_states(parameter)
                moments = {name: tensors[name].data for name in ("exp_avg", "exp_avg_sq") if name in tensors}
                found[parameter] = Owned(span.start, span.end, tensors["param"].data, moments)
        return found

    def settle(self) -> None:
        """Wait until every weight is the updated one: with overlap, that is otherwise the next forward pass's business.

        Precondition of reading weights.
        """
        for part in self.wrapped:
            if part.ddp_config.overlap_param_gather:
                part.start_param_sync(force_sync=True)


def build(config: Config, here: Topology, source: parameters.Source | None = None) -> Engine:
    """Build and fill a rank's share of the model.

    Args:
        config: a validated configuration.
        here: this rank's place.
        source: where weights come from; None initialises them from (seed, name).

    Raises:
        ConfigError: FP8 is wanted and this machine cannot.
    """
    kernels.require_fp8(config.fp8)
    source = source or _fresh(config)
    layers, parts = layout.part_layers(config), layout.parts_of(config, here.pp_rank)
    first_layers = [layout.first_layer(layers, part) for part in parts]
    core_config = transformer_config(config, layers)
    across = config.data.attend_across_samples
    stages = [DecoderStage(core_config, config.model, layers, part, config.fp8, across).to(device()) for part in parts]
    for stage, first_layer in zip(stages, first_layers, strict=True):
        parameters.fill_decoder(stage, config.model, source, first_layer, here.tp_rank, here.tp_size)
    encoder = build_encoder(config, source)
    _mark_parts(stages, encoder)

    overlap = config.parallel.overlap_gradients and here.dp_size * here.cp_size > 1
    ddp = replace(PLAIN, overlap_grad_reduce=overlap, overlap_param_gather=overlap)
    wrapped_stages = [DistributedDataParallel(core_config, ddp, stage, disable_bucketing=i > 0)
                      for i, stage in enumerate(stages)]  # fmt: skip
    core_config.finalize_model_grads_func = _finalize_decoder
    if overlap:
        # megatron-core's schedules hold the sums back until the last micro-batch.
        syncs = [stage.no_sync for stage in wrapped_stages]
        core_config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
    optimizers = list(_optimizer(config, wrapped_stages, overlap).chained_optimizers)
    wrapped = list(wrapped_stages)
    step_encoder: nn.Module = encoder
    finalize_encoder: Callable[..., None] | None = None
    if config.training.train_encoder:
        # Not overlapped: a rank without pictures has no backward pass to overlap with.
        wrapped_encoder, chained = wrap_whole(config, encoder, overlap)
        optimizers += chained.chained_optimizers
        wrapped.append(wrapped_encoder)
        step_encoder, finalize_encoder = wrapped_encoder, wrapped_encoder.finish_grad_sync
    else:
        encoder.requires_grad_(False).eval()
    optimizer = ChainedOptimizer(optimizers)
    shared_scale = loss_scale.share(optimizer, config.training)
    skip_lone_collectives(wrapped)
    core_config.grad_scale_func = optimizer.scale_loss
    step = ThreePhaseStep(config, here, step_encoder, wrapped_stages, finalize_encoder)
    return Engine(here, {"visual": encoder}, stages, first_layers, wrapped, optimizer, step, shared_scale)


def build_encoder(config: Config, source: parameters.Source | None = None) -> EvaVisionTransformer:
    """The encoder, filled, on this rank's device; arguments and errors as of `build`."""
    if config.fp8.encoder:
        kernels.require_fp8(config.fp8)
    with torch.device("meta"):  # torch's own initialisation of 4 B numbers on every rank would be thrown away
        encoder = EvaVisionTransformer(config.model.encoder).to(DTYPES[config.training.precision])
    encoder.to_empty(device=device())
    parameters.fill_encoder(encoder, config.model, source or _fresh(config))
    fp8.convert_encoder(encoder, config.fp8)
    return encoder


def _fresh(config: Config) -> parameters.Source:
    return parameters.fresh(config.model, config.training.seed, device())


def _mark_parts(stages: list[DecoderStage], encoder: nn.Module) -> None:
    for name, parameter in (item for stage in stages for item in stage.named_parameters()):
        parameter.part = "projection" if name.startswith("project_") else "decoder"
    for parameter in encoder.parameters():
        parameter.part = "encoder"  # type: ignore[attr-defined]


def wrap_whole(config: Config, module: nn.Module, overlap: bool = False) -> tuple[DistributedDataParallel, Any]:
    """A module that every rank has all of, with its gradient buffers, and its optimizer, whose state is shared out over
    the world."""
    dtype = DTYPES[config.training.precision]
    # What megatron-core's wrapper wants to know: that gradients are sums, and the precision. It ignores the sizes.
    core_config = TransformerConfig(
        num_layers=1,
        hidden_size=1,
        num_attention_heads=1,
        calculate_per_token_loss=True,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
    )
    groups = topology.encoder_groups()
    wrapped = DistributedDataParallel(core_config, PLAIN, module, pg_collection=groups)
    return wrapped, _optimizer(config, [wrapped], overlap, pg_collection=groups)


def _finalize_decoder(model: list[Any], num_tokens: Any = None, **groups: Any) -> None:
    """Sum the decoder's gradients. Losses were divided by global counts already, so the token count is dropped."""
    finalize_model_grads(model, None, **groups)


def _optimizer(
    config: Config, wrapped: list[DistributedDataParallel], overlap: bool, **groups: Any
) -> ChainedOptimizer:
    optimizer, dtype = config.optimizer, DTYPES[config.training.precision]
    chained: ChainedOptimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=optimizer.decoder_lr,
            min_lr=0.0,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.adam_beta1,
            adam_beta2=optimizer.adam_beta2,
            adam_eps=optimizer.adam_eps,
            clip_grad=optimizer.clip_grad,
            bf16=dtype is torch.bfloat16,
            fp16=dtype is torch.float16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
            overlap_param_gather=overlap,
        ),
        wrapped,
        config_overrides=_overrides(optimizer),
        use_gloo_process_groups=False,
        **groups,
    )
    for part in chained.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):  # what megatron-core takes without Transformer Engine or apex
            for group in part.optimizer.param_groups:
                group["fused"] = True  # one pass over weight, gradient and moments instead of a dozen
    return chained


def skip_lone_collectives(wrapped: list[DistributedDataParallel]) -> None:
    """A data-parallel group of one has nothing to sum or gather, but gloo would copy all gradients to find out."""
    for group in (group for part in wrapped for group in part.bucket_groups):
        if group.intra_distributed_optimizer_instance_size == 1:
            group.start_grad_sync = group.start_param_sync = lambda *_, **__: None


def _overrides(optimizer: OptimizerConfig) -> dict[ParamKey, dict[str, float]]:
    """Per-part learning rates, and no weight decay for vectors."""
    overrides = {
        ParamKey(predicate=ParamPredicate(name=part, fn=partial(_is_part, part))): {
            "max_lr": getattr(optimizer, f"{part}_lr")
        }
        for part in PARTS
    }
    vectors = ParamKey(predicate=ParamPredicate(name="vectors", fn=lambda parameter: parameter.dim() == 1))
    return {**overrides, vectors: {"wd_mult": 0.0}}


def _is_part(part: str, parameter: nn.Parameter) -> bool:
    return bool(parameter.part == part)  # type: ignore[attr-defined]
