"""The pieces of a decoder layer against float64, in bf16 too."""

import torch
from torch import Tensor

from emu2_megatron.model.layer_specs import CausalAttention, RMSNorm


class _Config:
    params_dtype = torch.bfloat16
    sequence_parallel = False
    context_parallel_size = 1


def test_rms_norm_keeps_its_statistics_in_fp32() -> None:
    """One large element among 4096 small ones: in bf16, whose sums stop growing at 256 times a term, the small ones'
    squares would be lost. What may remain is one rounding of the output to bf16 and one of the product, 2^-8 together.
    """
    norm = RMSNorm(_Config(), 4096)  # type: ignore[arg-type]
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = torch.full((3, 4096), 0.5).bfloat16()
    x[:, 0] = 64
    x64 = x.double()
    wanted = norm.weight.double() * x64 / (x64.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert ((norm(x).double() - wanted).abs() <= 2**-8 * wanted.abs()).all()


def test_attention_is_causal_softmax() -> None:
    S, B, N, H = 7, 2, 3, 4
    q, k, v = (torch.randn(S, B, N, H, dtype=torch.float64) for _ in range(3))
    got: Tensor = CausalAttention(_Config())(q, k, v, None)  # type: ignore[arg-type]
    for s in range(S):
        for b in range(B):
            for n in range(N):
                weights = torch.softmax(k[: s + 1, b, n] @ q[s, b, n] / H**0.5, 0)
                torch.testing.assert_close(got[s, b, n * H : (n + 1) * H], weights @ v[: s + 1, b, n])
