"""Builds what a rank trains: its decoder stage and its encoder, gradient buffers, and one optimizer over both."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

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
from torch import nn

from emu2_megatron.config.schema import Config, OptimizerConfig
from emu2_megatron.model import parameters
from emu2_megatron.model.decoder import DTYPES, DecoderStage, transformer_config
from emu2_megatron.model.eva_vit import EvaVisionTransformer
from emu2_megatron.parallel import layout, topology
from emu2_megatron.parallel.three_phase import ThreePhaseStep
from emu2_megatron.parallel.topology import Topology
from emu2_megatron.platform.device import device

PARTS = ("decoder", "projection", "encoder")
"""Parts of the model with a learning rate of their own: `optimizer.<part>_lr`."""


@dataclass
class Engine:
    """Everything one rank needs to train."""

    here: Topology
    encoder: EvaVisionTransformer
    """The bare encoder."""
    stage: DecoderStage
    """The bare decoder stage."""
    first_layer: int
    """Global index of the stage's first layer."""
    wrapped: list[DistributedDataParallel]
    """The trained ones of stage and encoder, with their gradient buffers."""
    optimizer: ChainedOptimizer
    """megatron-core's optimizer over all of them: one norm, one clip, state sharded over data-parallel ranks."""
    step: ThreePhaseStep
    """Forward and backward."""


def build(config: Config, here: Topology, source: parameters.Source | None = None) -> Engine:
    """Build and fill a rank's share of the model.

    Args:
        config: a validated configuration.
        here: this rank's place.
        source: where weights come from; None initialises them from (seed, name).
    """
    source = source or parameters.fresh(config.model, config.training.seed, device())
    stages = layout.stage_layers(config)
    first_layer = layout.first_layer(stages, here.pp_rank)
    core_config = transformer_config(config, stages)
    stage = DecoderStage(core_config, config.model, here.first_stage, here.last_stage, stages[here.pp_rank])
    stage.to(device())
    parameters.fill_decoder(stage, config.model, source, first_layer, here.tp_rank, here.tp_size)
    with torch.device("meta"):  # torch's own initialisation of 4 B numbers on every rank would be thrown away
        encoder = EvaVisionTransformer(config.model.encoder).to(DTYPES[config.training.precision])
    encoder.to_empty(device=device())
    parameters.fill_encoder(encoder, config.model, source)
    _mark_parts(stage, encoder)

    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    wrapped_stage = DistributedDataParallel(core_config, ddp, stage)
    core_config.finalize_model_grads_func = _finalize_decoder
    optimizers = list(_optimizer(config, [wrapped_stage]).chained_optimizers)
    wrapped = [wrapped_stage]
    step_encoder: nn.Module = encoder
    finalize_encoder: Callable[..., None] | None = None
    if config.training.train_encoder:
        groups = topology.encoder_groups()
        wrapped_encoder = DistributedDataParallel(_encoder_config(core_config), ddp, encoder, pg_collection=groups)
        optimizers += _optimizer(config, [wrapped_encoder], pg_collection=groups).chained_optimizers
        wrapped.append(wrapped_encoder)
        step_encoder, finalize_encoder = wrapped_encoder, wrapped_encoder.finish_grad_sync
    else:
        encoder.requires_grad_(False).eval()
    optimizer = ChainedOptimizer(optimizers)
    core_config.grad_scale_func = optimizer.scale_loss
    step = ThreePhaseStep(config, here, step_encoder, wrapped_stage, finalize_encoder)
    return Engine(here, encoder, stage, first_layer, wrapped, optimizer, step)


def _mark_parts(stage: nn.Module, encoder: nn.Module) -> None:
    for name, parameter in stage.named_parameters():
        parameter.part = "projection" if name.startswith("project_") else "decoder"  # type: ignore[attr-defined]
    for parameter in encoder.parameters():
        parameter.part = "encoder"  # type: ignore[attr-defined]


def _encoder_config(core_config: TransformerConfig) -> TransformerConfig:
    """What megatron-core's wrapper wants to know of the encoder: that gradients are sums, and its precision."""
    return TransformerConfig(
        num_layers=1,
        hidden_size=core_config.hidden_size,
        num_attention_heads=core_config.num_attention_heads,
        calculate_per_token_loss=True,
        params_dtype=core_config.params_dtype,
        bf16=core_config.bf16,
    )


def _finalize_decoder(model: list[Any], num_tokens: Any = None, **groups: Any) -> None:
    """Sum the decoder's gradients. Losses were divided by global counts already, so the token count is dropped."""
    finalize_model_grads(model, None, **groups)


def _optimizer(config: Config, wrapped: list[DistributedDataParallel], **groups: Any) -> ChainedOptimizer:
    optimizer, dtype = config.optimizer, DTYPES[config.training.precision]
    return get_megatron_optimizer(
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
            params_dtype=dtype,
            use_distributed_optimizer=True,
        ),
        wrapped,
        config_overrides=_overrides(optimizer),
        use_gloo_process_groups=False,
        **groups,
    )


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
