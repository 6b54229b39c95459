"""The visual encoder: image tower of EVA-02-CLIP-E-plus (arXiv 2303.15389), as Emu2 uses it (arXiv 2312.13286).

Every rank holds it whole and encodes its own pictures (ARCHITECTURE.md), so it is plain PyTorch. Parameter names are
the released ones. It differs from a usual ViT: the LayerNorm comes *after* attention and MLP, inside the residual
branch; keys have no bias; there is no final norm.

Shapes: I images, P = 1 + patches tokens (CLS first), E width, N heads, H head width, Q embeddings of a picture,
R = rows of all pictures together.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from math import isqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emu2_megatron.config.schema import EncoderConfig
from emu2_megatron.ops.pool import pool


class Linear(nn.Linear):
    """`nn.Linear` whose bias may be given, and whose product may be replaced by one in FP8 (`model/fp8.py`)."""

    product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = staticmethod(F.linear)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.product(x, self.weight, self.bias if bias is None else bias)


class Attention(nn.Module):
    """Full bidirectional self-attention over the patches, one fused qkv matrix with rows q | k | v."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.qkv = Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = Linear(width, width)

    def forward(self, x_IPE: Tensor) -> Tensor:
        I, P, E = x_IPE.shape  # noqa: E741
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        q_INPH, k_INPH, v_INPH = self.qkv(x_IPE, bias).view(I, P, 3, self.heads, E // self.heads).permute(2, 0, 3, 1, 4)
        attended_INPH = F.scaled_dot_product_attention(q_INPH, k_INPH, v_INPH)
        out: Tensor = self.proj(attended_INPH.transpose(1, 2).reshape(I, P, E))
        return out


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.ffn_hidden_size)
        self.fc2 = Linear(config.ffn_hidden_size, config.hidden_size)

    def forward(self, x_IPE: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x_IPE)))
        return out


class Block(nn.Module):
    """`x + LN(attention(x))`, then `x + LN(mlp(x))`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = Mlp(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, x_IPE: Tensor) -> Tensor:
        x_IPE = x_IPE + self.norm1(self.attn(x_IPE))
        out: Tensor = x_IPE + self.norm2(self.mlp(x_IPE))
        return out


class PatchEmbed(nn.Module):
    """Non-overlapping patches, projected; row-major."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size)

    def forward(self, pixels_ICHW: Tensor) -> Tensor:
        out: Tensor = self.proj(pixels_ICHW).flatten(2).transpose(1, 2)
        return out


class EvaVisionTransformer(nn.Module):
    """Pictures to visual embeddings."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        patches = (config.image_size // config.patch_size) ** 2
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))

    def hidden(self, pixels_ICHW: Tensor) -> Tensor:
        """The residual stream after the last block, [I, P, E], CLS first, not normalised.

        Args:
            pixels_ICHW: [I, 3, H, W] normalised pictures, H = W = image_size, in the dtype of the weights.
        """
        x_IPE: Tensor = self.patch_embed(pixels_ICHW)
        x_IPE = torch.cat([self.cls_token.expand(len(x_IPE), -1, -1), x_IPE], dim=1) + self.pos_embed
        for block in self.blocks:
            x_IPE = block(x_IPE)
        return x_IPE

    def forward(self, pixels_ICHW: Tensor, queries: Sequence[int]) -> Tensor:
        """Visual embeddings of all pictures, one after the other, each picture's in raster order.

        Args:
            pixels_ICHW: [I, 3, H, W] normalised pictures.
            queries: embeddings Q wanted of each of the I pictures: a square whose side divides the patch grid's.

        Returns:
            [R, E] with R = sum(queries).
        """
        rows: list[Tensor] = []
        start = 0
        hidden_IPE = self.hidden(pixels_ICHW)
        for q, run in groupby(queries):
            stop = start + len(list(run))
            rows.append(pool(hidden_IPE[start:stop], q).flatten(0, 1))
            start = stop
        return torch.cat(rows)


def resize_positions(table_1PE: Tensor, patches: int) -> Tensor:
    """The position table for pictures of another size, as EVA-CLIP makes it: [1, 1 + n², E] to [1, 1 + patches, E].

    The row of CLS is kept. The others are n x n points of a picture with E channels, resized to sqrt(patches) a side:
    bicubic, half-pixel centres, not anti-aliased, computed in fp32 and returned in the dtype of the table. A table that
    has this size already is returned as it is.

    Args:
        table_1PE: the table; n² must be a square.
        patches: a square.
    """
    _, P, E = table_1PE.shape
    if P == 1 + patches:
        return table_1PE
    side, wanted = isqrt(P - 1), isqrt(patches)
    grid_1EHW = table_1PE[:, 1:].float().transpose(1, 2).reshape(1, E, side, side)
    resized_1EHW = F.interpolate(grid_1EHW, size=(wanted, wanted), mode="bicubic", align_corners=False)
    rows_1PE = resized_1EHW.flatten(2).transpose(1, 2).to(table_1PE.dtype)
    return torch.cat([table_1PE[:, :1], rows_1PE], dim=1)
