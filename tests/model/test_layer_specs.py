"""The pieces of a decoder layer against float64, in bf16 too."""

import pytest
import torch
from torch import Tensor

from emu2_megatron.model.layer_specs import CausalAttention, RMSNorm
from emu2_megatron.platform import kernels


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


def attend(q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
    """One position with query [H] attends to keys and values [S, H] up to its own, from `first` on."""
    weights = torch.softmax(k[first:] @ q / len(q) ** 0.5, 0)
    return weights @ v[first:]


SAMPLES = {
    "sequences": [[0], [0]],
    "samples": [[0, 3, 4], [0, 1, 6]],
    "one of two sequences": [[0, 5], [0]],
    "tokens": [list(range(7)), [0]],
}
"""Where samples start, of two sequences of 7 positions."""


def ends(starts: list[list[int]], length: int = 7) -> Tensor:
    return torch.tensor([b * length + s for b, row in enumerate(starts) for s in row] + [len(starts) * length]).int()


@pytest.mark.parametrize("starts", SAMPLES.values(), ids=SAMPLES.keys())
def test_attention_is_causal_softmax(starts: list[list[int]]) -> None:
    """Values and gradients, position by position; q, k and v are views, as v is in megatron-core."""
    S, B, N, H = 7, 2, 3, 4
    fused = torch.randn(S, B, N, 3 * H, dtype=torch.float64, requires_grad=True)
    q, k, v = fused.split(H, dim=-1)
    attention = CausalAttention(_Config())  # type: ignore[arg-type]
    got: Tensor = attention(q, k, v, None if starts == SAMPLES["sequences"] else ends(starts))
    wanted = torch.zeros_like(got)
    for s in range(S):
        for b in range(B):
            first = max(start for start in starts[b] if start <= s)
            for n in range(N):
                wanted[s, b, n * H : (n + 1) * H] = attend(q[s, b, n], k[: s + 1, b, n], v[: s + 1, b, n], first)
    torch.testing.assert_close(got, wanted)
    weight = torch.randn_like(got)
    gradients = [torch.autograd.grad((out * weight).sum(), fused, retain_graph=True)[0] for out in (got, wanted)]
    torch.testing.assert_close(*gradients)


def test_a_mask_is_refused() -> None:
    """megatron-core would hand any over."""
    q, k, v = torch.randn(3, 5, 1, 2, 4)
    with pytest.raises(NotImplementedError, match="no mask"):
        CausalAttention(_Config())(q, k, v, torch.ones(1, 1, 5, 5, dtype=torch.bool))  # type: ignore[arg-type]


def varlen_attn(
    q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    *, scale: float, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """As torch documents its own, which needs a GPU: sample by sample, over `window_size` positions left and right."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and window_size[0] == -1
    assert all(x.is_contiguous() for x in (q_TNH, k_TNH, v_TNH))
    out = torch.zeros_like(q_TNH)
    for start, end in zip(cu_seq_q[:-1], cu_seq_q[1:], strict=True):
        assert end - start <= min(max_q, max_k)
        scores_NSS = torch.einsum("snh,tnh->nst", q_TNH[start:end], k_TNH[start:end]) * scale
        if window_size[1] >= 0:
            right = torch.ones_like(scores_NSS, dtype=torch.bool).triu(window_size[1] + 1)
            scores_NSS = scores_NSS.masked_fill(right, float("-inf"))
        out[start:end] = torch.einsum("nst,tnh->snh", scores_NSS.softmax(-1), v_TNH[start:end])
    return out


@pytest.mark.parametrize("sequences", [1, 2])
def test_what_the_varlen_kernel_is_given(sequences: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch for GPUs, with a stand-in for the kernel, equals the loop over samples."""
    q, k, v = torch.randn(7, sequences, 3, 12, dtype=torch.float64).split(4, dim=-1)
    cu_seqlens = ends(SAMPLES["samples"][:sequences])
    attention = CausalAttention(_Config(), softmax_scale=0.3)  # type: ignore[arg-type]
    wanted = attention(q, k, v, cu_seqlens)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(kernels, "has_varlen_attention", lambda dtype, width: True)
    torch.testing.assert_close(attention(q, k, v, cu_seqlens), wanted)


def test_where_the_varlen_kernel_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed torch has it, with the arguments that are used: for GPUs and heads that FlashAttention takes."""
    assert not kernels.has_varlen_attention(torch.bfloat16, 128) or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert kernels.has_varlen_attention(torch.bfloat16, 128)
    assert not kernels.has_varlen_attention(torch.float32, 128) and not kernels.has_varlen_attention(torch.float16, 12)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert not kernels.has_varlen_attention(torch.float16, 128)
