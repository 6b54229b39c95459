"""Which implementation each piece of a decoder layer uses: Transformer Engine where it can run, else PyTorch.

megatron-core's own fallbacks do not do: its local norm refuses sequence parallelism and its local attention is unfused
and builds the whole score matrix.
"""

from functools import lru_cache
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from emu2_megatron.data.batch import share
from emu2_megatron.ops.swiglu import SwiGLU
from emu2_megatron.platform import kernels


class RMSNorm(nn.Module):
    """RMSNorm (arXiv 1910.07467), statistics in fp32, as LLaMA has it."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        # megatron-core sums the gradients of marked parameters over the tensor-parallel group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class CausalAttention(nn.Module):
    """megatron-core's core attention on `torch.nn.functional.scaled_dot_product_attention`.

    Under context parallelism every rank gathers the keys and values of the whole sequence and attends from the
    positions it holds (`data/batch.share`).
    """

    def __init__(
        self, config: TransformerConfig, softmax_scale: float | None = None, pg_collection: Any = None, **_: Any
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **unsupported: Any
    ) -> Tensor:
        """Attend to the position itself and those before it.

        Args:
            query, key, value: [S, B, N, H] of this tensor-parallel rank's heads, at the positions this rank holds.
            attention_mask: must be None, the mask is causal.

        Returns:
            [S, B, N * H].
        """
        wanted = [name for name in ("attention_bias", "packed_seq_params") if unsupported.get(name) is not None]
        if attention_mask is not None or wanted:
            raise NotImplementedError(f"causal attention takes no mask and no {', '.join(wanted) or 'bias'}")
        visible = None
        if self.cp_group is not None:
            key, value = (gather_from_sequence_parallel_region(x, group=self.cp_group) for x in (key, value))
            visible = _visible(len(key), self.cp_group.rank(), self.cp_group.size()).to(query.device)
        q_BNSH, k_BNSH, v_BNSH = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out_BNSH = F.scaled_dot_product_attention(
            q_BNSH, k_BNSH, v_BNSH, attn_mask=visible, is_causal=visible is None, scale=self.softmax_scale
        )
        return out_BNSH.permute(2, 0, 1, 3).flatten(2)


@lru_cache
def _visible(length: int, cp_rank: int, cp_size: int) -> Tensor:
    """bool [S / CP, S]: which gathered keys each of a rank's positions may see. Keys stand in order of ranks."""
    positions = [share(length, rank, cp_size).tokens for rank in range(cp_size)]
    return positions[cp_rank][:, None] >= torch.cat(positions)


def block_submodules(num_layers: int, emulate_fp8: bool = False) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage, and the final norm (built on the last stage only).

    Args:
        num_layers: how many.
        emulate_fp8: take PyTorch's even where Transformer Engine is: they are what the emulation can change.
    """
    if kernels.has_transformer_engine() and not emulate_fp8:
        from megatron.core.extensions.transformer_engine import TENorm

        spec, norm = get_gpt_layer_with_transformer_engine_spec(), TENorm
    else:
        spec, norm = _local_spec(), RMSNorm
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=norm)


def _local_spec() -> ModuleSpec:
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.self_attention.submodules.core_attention = CausalAttention
    spec.submodules.mlp.submodules.activation_func = SwiGLU
    return spec
