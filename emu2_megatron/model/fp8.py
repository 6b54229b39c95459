"""FP8: the recipes of Transformer Engine, and an emulation of them in PyTorch for machines without it.

A linear layer multiplies three times: y = x wᵀ forward, dx = dy w and dw = dyᵀ x backward. With FP8 every operand is
scaled, rounded to eight bits and multiplied as such; the recipe says which format and how the scale is found. Weights,
outputs and gradients stay bf16 outside the product, as do embedding, output layer, projections, norms and attention.

The emulation (`fp8.emulate`) rounds the operands (`ops/fp8.py`), divides them by their scale and multiplies in fp32,
never in bf16, whose 8 bits would round scaled operands a second time. FP8 values have 4 significant bits: products of
two are exact in fp32's 24, and dividing by a scale (exact for powers of two) adds 2^-24, as much as summing does. What
differs from a GPU is therefore the order and width of accumulation alone.

Shapes: M rows (tokens), K inputs, N outputs of a linear layer; T tensors that a history is kept for.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from emu2_megatron.config.schema import Config, Fp8Config
from emu2_megatron.model.eva_vit import EvaVisionTransformer
from emu2_megatron.model.eva_vit import Linear as EncoderLinear
from emu2_megatron.ops.fp8 import E4M3, E5M2, GRADIENTS, LARGEST, STATELESS, Quantize, amax, rounded, updated


class Recipe(NamedTuple):
    """What others call a recipe."""

    megatron: str
    """megatron-core's `fp8_recipe`."""
    engine: str
    """Transformer Engine's class."""


RECIPES = {
    "delayed": Recipe("delayed", "DelayedScaling"),
    "current": Recipe("tensorwise", "Float8CurrentScaling"),
    "block": Recipe("blockwise", "Float8BlockScaling"),
    "mxfp8": Recipe("mxfp8", "MXFP8BlockScaling"),
}

# Delayed scaling --------------------------------------------------------------------------------------------------


class Amaxes(nn.Module):
    """History and scale of T tensors."""

    history: Tensor
    scale: Tensor

    def __init__(self, tensors: int, dtype: torch.dtype, fp8: Fp8Config) -> None:
        super().__init__()
        self.dtype, self.fp8 = dtype, fp8
        self.register_buffer("history", torch.zeros(fp8.amax_history, tensors), persistent=False)
        self.register_buffer("scale", torch.ones(tensors), persistent=False)

    def record(self, index: int, x: Tensor) -> None:
        """Note the amax of tensor `index`."""
        self.history[0, index] = torch.maximum(self.history[0, index], amax(x))

    def update(self, group: dist.ProcessGroup) -> None:
        """End of a pass; called by all ranks of the group together, which agree on the largest amax."""
        dist.all_reduce(self.history[0], dist.ReduceOp.MAX, group=group)
        self.history, self.scale = updated(
            self.history, self.scale, LARGEST[self.dtype], self.fp8.amax_compute, self.fp8.margin
        )


class DelayedScaling(nn.Module):
    """Delayed scaling of the linear layers of one part of the pipeline: scales come from earlier micro-batches.

    As with Transformer Engine under megatron-core, amaxes of x and w take effect after the part's forward pass of a
    micro-batch, those of dy after its backward pass, each reduced over the tensor-, context- and data-parallel ranks.
    (It quantises weights once a step; here it is once a micro-batch, so that their scale is up to date one earlier.)
    """

    def __init__(self, layers: list[int], fp8: Fp8Config) -> None:
        """`layers` says of each linear layer which decoder layer it is in, in rising order."""
        super().__init__()
        self.layers = layers
        self.forward_amaxes = Amaxes(2 * len(layers), E4M3, fp8)
        self.backward_amaxes = Amaxes(len(layers), GRADIENTS["delayed"], fp8)
        self.recording = False
        self.in_flight: deque[Tensor] = deque()
        """Forward scales of the micro-batches whose backward pass is still to come, which recomputation must use."""

    def by_layer(self) -> Iterator[tuple[int, str, Tensor]]:
        """(decoder layer, name, view) of everything that a later step depends on."""
        for layer in sorted(set(self.layers)):
            first = self.layers.index(layer)
            stop = first + self.layers.count(layer)
            for name, amaxes, a, b in (
                ("forward", self.forward_amaxes, 2 * first, 2 * stop),
                ("backward", self.backward_amaxes, first, stop),
            ):
                yield layer, f"{name}.history", amaxes.history[:, a:b]
                yield layer, f"{name}.scale", amaxes.scale[a:b]

    @contextmanager
    def micro_batch(self, entry: Tensor) -> Iterator[None]:
        """Around the forward pass of the part's layers.

        Args:
            entry: what goes into the first layer; its gradient is the last thing the backward pass computes.
        """
        if not torch.is_grad_enabled():  # evaluation leaves no trace
            yield
            return
        group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
        self.in_flight.append(self.forward_amaxes.scale)
        entry.register_hook(partial(self._end_backward, group))
        self.recording = True
        try:
            yield
        finally:
            self.recording = False
        self.forward_amaxes.update(group)

    def _end_backward(self, group: dist.ProcessGroup, _: Tensor) -> None:
        self.in_flight.popleft()
        self.backward_amaxes.update(group)

    def quantizer(self, linear: int, x: Tensor, weight: Tensor) -> Quantize:
        """For one product of layer `linear` and its backward pass, which uses the scales of the forward pass."""
        scale = self.forward_amaxes.scale
        if self.recording:
            self.forward_amaxes.record(2 * linear, x)
            self.forward_amaxes.record(2 * linear + 1, weight)
        elif self.in_flight:  # recomputation: pipelines finish micro-batches in the order they began them
            scale = self.in_flight[0]
        return partial(self._quantize, linear, {"x": scale[2 * linear], "w": scale[2 * linear + 1]})

    def _quantize(self, linear: int, scales: dict[str, Tensor], x: Tensor, operand: str, dim: int) -> Tensor:
        if operand != "dy":
            return rounded(x, scales[operand], E4M3)
        self.backward_amaxes.record(linear, x)  # twice, for dx and dw: the same amax
        return rounded(x, self.backward_amaxes.scale[linear], self.backward_amaxes.dtype)


# The emulated layers ----------------------------------------------------------------------------------------------

Quantizer = Callable[[Tensor, Tensor], Quantize]
"""(x, weight) of a product to the `Quantize` of its forward and backward pass."""


class _Product(torch.autograd.Function):
    """x wᵀ and its gradients, with all operands rounded to FP8 and products in fp32."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor, quantize: Quantize) -> Tensor:
        # Operands are rounded again, along the other dimension, when the backward pass comes: what is kept is no more
        # than without FP8.
        ctx.save_for_backward(x_MK, weight_NK)
        ctx.quantize = quantize
        return (quantize(x_MK, "x", 1) @ quantize(weight_NK, "w", 1).t()).to(x_MK.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_MN: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_MK, weight_NK = ctx.saved_tensors
        quantize: Quantize = ctx.quantize
        dx_MK = dw_NK = None
        if ctx.needs_input_grad[0]:
            dx_MK = (quantize(dy_MN, "dy", 1) @ quantize(weight_NK, "w", 0)).to(x_MK.dtype)
        if ctx.needs_input_grad[1]:
            dw_NK = (quantize(dy_MN, "dy", 0).t() @ quantize(x_MK, "x", 0)).to(weight_NK.dtype)
        return dx_MK, dw_NK, None


def linear(quantizer: Quantizer, x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` in emulated FP8: [..., K] to [..., N]. The bias is added in the dtype of x."""
    x_MK = x.flatten(0, -2)
    y_MN: Tensor = _Product.apply(x_MK, weight_NK, quantizer(x_MK, weight_NK))  # type: ignore[no-untyped-call]
    y = y_MN.view(*x.shape[:-1], -1)
    return y if bias_N is None else y + bias_N


def _parallel_linear(
    quantizer: Quantizer,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: Any,
    **_: Any,
) -> Tensor:
    """What megatron-core's parallel linear layers call for their product, with the same communication."""
    if sequence_parallel:
        input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
    elif allreduce_dgrad:
        input = copy_to_tensor_model_parallel_region(input, group=tp_group)
    return linear(quantizer, input, weight, bias)


def _stateless(quantize: Quantize, x: Tensor, weight: Tensor) -> Quantize:
    return quantize


# Which parts of the model use it ----------------------------------------------------------------------------------


def decoder_settings(config: Config) -> dict[str, Any]:
    """megatron-core's settings for a decoder in FP8 by Transformer Engine."""
    fp8 = config.fp8
    if fp8.recipe == "none" or fp8.emulate or not fp8.decoder:
        return {}
    recipe = RECIPES[fp8.recipe]
    return {
        "fp8": "hybrid" if GRADIENTS[fp8.recipe] is E5M2 else "e4m3",
        "fp8_recipe": recipe.megatron,
        "fp8_margin": fp8.margin,
        "fp8_amax_history_len": fp8.amax_history,
        "fp8_amax_compute_algo": fp8.amax_compute,
        "first_last_layers_bf16": fp8.first_layers_bf16 + fp8.last_layers_bf16 > 0,
        "num_layers_at_start_in_bf16": fp8.first_layers_bf16,
        "num_layers_at_end_in_bf16": fp8.last_layers_bf16,
    }


def emulate_decoder(layers: nn.ModuleList, num_layers: int, fp8: Fp8Config) -> DelayedScaling | None:
    """Let the linear layers of one part of the decoder compute in emulated FP8, if that is asked for.

    Args:
        layers: megatron-core's layers of the part, which know their number in the whole decoder.
        num_layers: layers of the whole decoder.
        fp8: the section of the configuration.

    Returns:
        What keeps the scales of delayed scaling; None with other recipes.
    """
    if fp8.recipe == "none" or not (fp8.emulate and fp8.decoder):
        return None
    chosen = range(fp8.first_layers_bf16, num_layers - fp8.last_layers_bf16)
    numbered: list[tuple[int, Any]] = [(layer.layer_number - 1, layer) for layer in layers]  # type: ignore[operator, misc]
    linears = [
        (number, module)
        for number, layer in numbered
        if number in chosen
        for module in layer.modules()
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear))
    ]
    delayed = DelayedScaling([number for number, _ in linears], fp8) if fp8.recipe == "delayed" else None
    for index, (_, module) in enumerate(linears):
        quantizer: Quantizer
        quantizer = partial(delayed.quantizer, index) if delayed else partial(_stateless, STATELESS[fp8.recipe])
        module._forward_impl = partial(_parallel_linear, quantizer)
    return delayed


def convert_encoder(encoder: EvaVisionTransformer, fp8: Fp8Config) -> None:
    """Let the linear layers of the encoder's blocks compute in FP8, emulated or by Transformer Engine, if asked for.

    Parameters stay where they are. Precondition: the encoder is on its device.
    """
    if fp8.recipe == "none" or not fp8.encoder:
        return
    for module in encoder.blocks.modules():
        if isinstance(module, EncoderLinear):
            if fp8.emulate:
                module.product = partial(linear, partial(_stateless, STATELESS[fp8.recipe]))
            else:
                module.product = _engine_product(module, RECIPES[fp8.recipe])


def _engine_product(module: nn.Linear, recipe: Recipe) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The product of one layer by Transformer Engine."""
    import transformer_engine.common.recipe as recipes
    import transformer_engine.pytorch as te

    layer = te.Linear(
        module.in_features, module.out_features, bias=False, params_dtype=module.weight.dtype, device="meta"
    )
    layer.weight = module.weight  # the same parameter: names, gradient buffers and optimizer do not change
    settings = getattr(recipes, recipe.engine)()

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x_MK = x.flatten(0, -2)
        rows = len(x_MK)
        # 1025 tokens a picture; MXFP8 wants rows in blocks of 32, the others in multiples of 8 or 16. Rows of zeros
        # change no amax and no gradient.
        x_MK = F.pad(x_MK, (0, 0, 0, -rows % 32))
        with te.fp8_autocast(enabled=True, fp8_recipe=settings):
            y_MN: Tensor = layer(x_MK)
        y = y_MN[:rows].view(*x.shape[:-1], -1)
        return y if bias is None else y + bias

    return product
