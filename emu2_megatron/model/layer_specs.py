"""Which implementation each piece of a decoder layer uses: Transformer Engine where it can run, else PyTorch.

megatron-core's own fallbacks do not do: its local norm refuses sequence parallelism and its local attention is unfused
and builds the whole score matrix. Attention that keeps samples apart is PyTorch's also beside Transformer Engine, whose
packed layout would take another shape through all layers, and under context parallelism another split of sequences.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple

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
    positions it holds (`data/batch.share`). Otherwise samples that share a sequence are computed one by one, or by one
    kernel that does so: less work than the whole sequence, and no mask.
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
        """Attend to the position itself and those before it in its sample.

        Args:
            query, key, value: [S, B, N, H] of this tensor-parallel rank's heads, at the positions this rank holds.
            attention_mask: no mask, but `cu_seqlens` of whole sequences (`data/batch.cu_seqlens`), int32 [samples + 1]
                on the device of the others, in the place that megatron-core has for one; None if each sequence is a
                single sample.

        Returns:
            [S, B, N * H].
        """
        cu_seqlens = attention_mask
        wanted = [name for name in ("attention_bias", "packed_seq_params") if unsupported.get(name) is not None]
        if wanted or (cu_seqlens is not None and cu_seqlens.dim() != 1):
            raise NotImplementedError(f"causal attention takes no mask and no {', '.join(wanted) or 'bias'}")
        if value.is_cuda:
            value = value.contiguous()  # lets go of the fused q k v that it is a view of
        if self.cp_group is not None:
            key, value = (gather_from_sequence_parallel_region(x, group=self.cp_group) for x in (key, value))
            order = _order(len(key), self.cp_group.rank(), self.cp_group.size(), key.device)
            out_SBNH = _attend(query, key, value, _visible(order, key.shape[1], cu_seqlens), self.softmax_scale)
        elif cu_seqlens is None:
            out_SBNH = _attend(query, key, value, None, self.softmax_scale)
        else:
            out_SBNH = _attend_within_samples(query, key, value, cu_seqlens, self.softmax_scale)
        out = out_SBNH.flatten(2)
        return out.contiguous() if out.is_cuda else out  # Transformer Engine's linear layers insist


def _attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scale: float | None) -> Tensor:
    """Softmax attention of [S, B, N, H] over the keys that `visible` allows (bool, broadcast to [B, N, S, keys]); if it
    is None, over those up to the position itself."""
    q_BNSH, k_BNSH, v_BNSH = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    out_BNSH = F.scaled_dot_product_attention(
        q_BNSH, k_BNSH, v_BNSH, attn_mask=visible, is_causal=visible is None, scale=scale
    )
    return out_BNSH.permute(2, 0, 1, 3)


def _attend_within_samples(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float | None
) -> Tensor:
    """Causal attention of [S, B, N, H], sample by sample."""
    S, B, N, H = query.shape
    # T = B * S tokens, sequence after sequence. v is copied for the same reason as above.
    q_TNH, k_TNH, v_TNH = (x.transpose(0, 1).flatten(0, 1).contiguous() for x in (query, key, value))
    if kernels.has_varlen_attention(query.dtype, H):
        from torch.nn.attention.varlen import varlen_attn

        # S bounds the length of a sample; the longest one's would have to be fetched from the device.
        out_TNH: Tensor = varlen_attn(  # type: ignore[assignment]  # one tensor, as nothing else is asked for
            q_TNH, k_TNH, v_TNH, cu_seqlens, cu_seqlens, S, S, scale=scale, window_size=(-1, 0)
        )
    else:
        lengths = cu_seqlens.diff().tolist()
        # split's backward pass is one concatenation; a slice's would be a whole gradient of zeros.
        samples = zip(*(x.split(lengths) for x in (q_TNH, k_TNH, v_TNH)), strict=True)
        out_TNH = torch.cat([_attend(q[:, None], k[:, None], v[:, None], None, scale)[:, 0] for q, k, v in samples])
    return out_TNH.view(B, S, N, H).transpose(0, 1)


class _Order(NamedTuple):
    """Where context parallelism puts the positions of a sequence."""

    held: Tensor
    """int64 [S / CP] positions this rank holds."""
    gathered: Tensor
    """int64 [S] positions of all ranks, one rank after another."""
    causal: Tensor
    """bool [S / CP, S] which gathered keys come no later than each position held."""


@lru_cache
def _order(length: int, cp_rank: int, cp_size: int, device: torch.device) -> _Order:
    positions = [share(length, rank, cp_size).tokens.to(device) for rank in range(cp_size)]
    held, gathered = positions[cp_rank], torch.cat(positions)
    return _Order(held, gathered, held[:, None] >= gathered)


def _visible(order: _Order, sequences: int, cu_seqlens: Tensor | None) -> Tensor:
    """Which gathered keys each position held may see: bool [S / CP, S], or [B, 1, S / CP, S] if there are samples to
    keep apart."""
    if cu_seqlens is None:
        return order.causal
    tokens = torch.arange(sequences * len(order.gathered), dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    sample_BS = torch.bucketize(tokens, cu_seqlens, right=True).view(sequences, -1)
    same = sample_BS[:, order.held, None] == sample_BS[:, None, order.gathered]
    return (order.causal & same)[:, None]


def block_submodules(
    num_layers: int, emulate_fp8: bool = False, attend_across_samples: bool = False
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage, and the final norm (built on the last stage only).

    Args:
        num_layers: how many.
        emulate_fp8: take PyTorch's even where Transformer Engine is: they are what the emulation can change.
        attend_across_samples: no samples to keep apart: take Transformer Engine's attention where it is.
    """
    if kernels.has_transformer_engine() and not emulate_fp8:
        from megatron.core.extensions.transformer_engine import TENorm

        spec, norm = get_gpt_layer_with_transformer_engine_spec(), TENorm
        if not attend_across_samples:
            spec.submodules.self_attention.submodules.core_attention = CausalAttention
    else:
        spec, norm = _local_spec(), RMSNorm
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=norm)


def _local_spec() -> ModuleSpec:
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.self_attention.submodules.core_attention = CausalAttention
    mlp = spec.submodules.mlp  # a ModuleSpec; from megatron-core 0.17 on a partial
    (mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules).activation_func = SwiGLU
    return spec
