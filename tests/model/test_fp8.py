"""Emulated FP8 layers against products written out in float64, and who uses FP8 in the model."""

import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import harness
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emu2_megatron.config.schema import Config, Fp8Config
from emu2_megatron.model import fp8
from emu2_megatron.model.decoder import transformer_config
from emu2_megatron.model.eva_vit import EvaVisionTransformer
from emu2_megatron.ops.fp8 import STATELESS


def config(recipe: str, emulate: bool = True, **fields: Any) -> Config:
    return replace(harness.config(precision="bf16"), fp8=Fp8Config(recipe=recipe, emulate=emulate, **fields))


def values(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """float64: x as FP8 with this scale holds it. (The cast itself is tested beside `ops/fp8.py`.)"""
    largest = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}[dtype]
    return (x.double() * scale).clamp(-largest, largest).float().to(dtype).double() / scale


def test_operands_of_all_three_products() -> None:
    """Current scaling: y from E4M3 x and w, dx from E5M2 dy and w, dw from E5M2 dy and x; nothing else is rounded.

    Tolerance: fp32 sums of 24 or 12 products, relative to the largest result; a scale is off by 2^-24 at most.
    """
    torch.manual_seed(0)
    x, w = torch.randn(3, 4, 24, requires_grad=True), torch.randn(8, 24, requires_grad=True)
    bias, dy = torch.randn(8, requires_grad=True), torch.randn(3, 4, 8)
    y = fp8.linear(partial(fp8._stateless, STATELESS["current"]), x, w, bias)
    y.backward(dy)

    x64, w64, dy64 = x.detach().flatten(0, 1), w.detach(), dy.flatten(0, 1)
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    x64, w64 = (values(t, e4m3, 448 / float(t.abs().max())) for t in (x64, w64))
    dy_exact = dy64.double()
    dy64 = values(dy64, e5m2, 57344 / float(dy64.abs().max()))
    for got, wanted, exact in (
        (y.detach() - bias.detach(), x64 @ w64.t(), x.detach().flatten(0, 1).double() @ w.detach().double().t()),
        (x.grad, dy64 @ w64, dy_exact @ w.detach().double()),
        (w.grad, dy64.t() @ x64, dy_exact.t() @ x.detach().flatten(0, 1).double()),
    ):
        error = (got.double().view(wanted.shape) - wanted).abs().max() / wanted.abs().max()
        assert error < 2e-6
        assert (wanted - exact).abs().max() / exact.abs().max() > 1e-3  # FP8 is another result
    torch.testing.assert_close(bias.grad, dy.sum((0, 1)))


@pytest.mark.parametrize("recipe", ["block", "mxfp8"])
def test_blocks_lie_along_the_sum(recipe: str) -> None:
    """Each product rounds its operands in blocks along its own sum: over K forward, over N for dx, over M for dw."""
    torch.manual_seed(0)
    M, K, N = 160, 144, 136
    spread = torch.exp2(torch.randint(-9, 9, (M, K)).float())
    x, w = (torch.randn(M, K) * spread).requires_grad_(), (torch.randn(N, K) * spread[:N]).requires_grad_()
    dy = torch.randn(M, N) * torch.exp2(torch.randint(-9, 9, (M, N)).float())
    y = fp8.linear(partial(fp8._stateless, STATELESS[recipe]), x, w)
    y.backward(dy)

    def q(t: Tensor, operand: str, along: int) -> Tensor:
        size = {"block": 128, "mxfp8": 32}[recipe]
        square = operand == "w" and recipe == "block"
        t = t.detach().double() if along == 1 else t.detach().double().t()
        out = torch.zeros_like(t)
        step = 128 if square else 1
        for i in range(0, t.shape[0], step):
            for j in range(0, t.shape[1], size):
                piece = t[i : i + step, j : j + size]
                scale = 2.0 ** float((448 / piece.abs().max()).log2().floor())
                out[i : i + step, j : j + size] = values(piece, torch.float8_e4m3fn, scale)
        return out if along == 1 else out.t()

    for got, wanted in (
        (y, q(x, "x", 1) @ q(w, "w", 1).t()),
        (x.grad, q(dy, "dy", 1) @ q(w, "w", 0)),
        (w.grad, q(dy, "dy", 0).t() @ q(x, "x", 0)),
    ):
        assert (got.double() - wanted).abs().max() < 2e-6 * wanted.abs().max()  # fp32 sums


def test_bf16_operands_are_not_rounded_twice() -> None:
    """Divided by a scale, 4 bits become 24. Rounded to bf16's 8 before the product, they would change most of its bf16
    results; the order of fp32 sums changes those next to a middle of two bf16 values, one in thousands."""
    torch.manual_seed(0)
    x, w = torch.randn(64, 96).bfloat16(), torch.randn(32, 96).bfloat16()
    got = fp8.linear(partial(fp8._stateless, STATELESS["current"]), x, w)
    wanted = values(x, torch.float8_e4m3fn, 448 / float(x.abs().max())) @ values(
        w, torch.float8_e4m3fn, 448 / float(w.abs().max())
    ).t()  # fmt: skip
    assert got.dtype == torch.bfloat16
    assert (got == wanted.bfloat16()).double().mean() > 0.995


@pytest.mark.usefixtures("world_of_one")
def test_delayed_scales_of_four_micro_batches() -> None:
    """One layer, by hand. Scales are 1 at first; then 448 over the largest x or w so far, 57344 over the largest dy,
    each from earlier micro-batches only, so that the growing ones saturate."""
    scaling = fp8.DelayedScaling([0], Fp8Config(recipe="delayed", amax_history=2))
    w = torch.tensor([[0.5, -0.25]], requires_grad=True)
    seen = []
    for amax_x, amax_dy in ((2.0, 14.0), (7.0, 1.75), (1.0, 3.5), (1.0, 0.0)):
        x = torch.tensor([[amax_x, 0.3]], requires_grad=True)
        entry = x * 1
        with scaling.micro_batch(entry):
            y = fp8.linear(partial(scaling.quantizer, 0), entry, w)
        w.grad = None
        y.backward(torch.tensor([[amax_dy]]))
        forward, backward = scaling.forward_amaxes, scaling.backward_amaxes
        seen.append([*forward.scale.tolist(), backward.scale.item(), y.item(), w.grad[0, 0].item()])
    # amax of x over two: 2, 7, 7, 1; of w 0.5; of dy 14, 14, 3.5 (1.75 is forgotten last), 3.5 (0 is not recorded).
    # x0 times w0, plus x1 times w1 with 0.3 rounded as the scale has it, then dw0 = dy x0 as rounded:
    # 1: scales 1: 0.3125 for 0.3. 2: scale 224: 7 saturates at 2 (448/224), 0.3 * 224 = 67.2: 64 / 224.
    # 3 and 4: scale 64: 0.3 * 64 = 19.2: 20 / 64.
    assert seen == [
        pytest.approx([224, 896, 4096, 2 * 0.5 - 0.25 * 0.3125, 14 * 2], rel=1e-6),
        pytest.approx([64, 896, 4096, 2 * 0.5 - 0.25 * 64 / 224, 1.75 * 2], rel=1e-6),
        pytest.approx([64, 896, 16384, 1 * 0.5 - 0.25 * 20 / 64, 3.5 * 1], rel=1e-6),
        pytest.approx([448, 896, 16384, 1 * 0.5 - 0.25 * 20 / 64, 0], rel=1e-6),
    ]


@pytest.mark.usefixtures("world_of_one")
def test_evaluation_uses_scales_and_leaves_no_trace() -> None:
    scaling = fp8.DelayedScaling([0], Fp8Config(recipe="delayed", amax_history=2))
    scaling.forward_amaxes.scale = torch.tensor([64.0, 448.0])
    before = {name: tensor.clone() for name, tensor in scaling.named_buffers()}
    x, w = torch.tensor([[100.0]]), torch.tensor([[1.0]])
    with torch.no_grad(), scaling.micro_batch(x):
        y = fp8.linear(partial(scaling.quantizer, 0), x, w)
    assert y.item() == 7  # 448 / 64
    assert all(torch.equal(before[name], tensor) for name, tensor in scaling.named_buffers()) and not scaling.in_flight


@pytest.mark.parametrize("recipe", ["current", "block", "mxfp8"])
def test_the_encoder_in_fp8(recipe: str) -> None:
    """Every product of its blocks is, those of the patches are not; parameters keep their names. 6 % of the largest
    value: two operands of 3 bits of mantissa in each of eight products."""
    torch.manual_seed(0)
    encoder = EvaVisionTransformer(harness.MODEL.encoder)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, 0.0, 0.1)
    pixels = torch.randn(3, 3, 56, 56)
    names = [name for name, _ in encoder.named_parameters()]
    wanted = encoder.hidden(pixels)
    fp8.convert_encoder(encoder, config(recipe).fp8)
    assert wanted.equal(encoder.hidden(pixels))  # fp8.encoder is false
    fp8.convert_encoder(encoder, config(recipe, encoder=True).fp8)
    got = encoder.hidden(pixels)
    assert [name for name, _ in encoder.named_parameters()] == names
    error = float((got - wanted).detach().abs().max() / wanted.detach().abs().max())
    assert 1e-4 < error < 0.06
    got.sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_the_encoder_on_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the library: rows are padded to whole blocks of 32 and cut again, products run within the
    recipe, and the gradient reaches the encoder's own parameters."""
    rows, entered = [], []

    class Linear(nn.Linear):
        def __init__(self, inputs: int, outputs: int, bias: bool, params_dtype: torch.dtype, device: str) -> None:
            super().__init__(inputs, outputs, bias=bias, dtype=params_dtype, device=device)

        def forward(self, x: Tensor) -> Tensor:
            assert entered[-1] == ("in", True, "the recipe")
            rows.append(len(x))
            return F.linear(x, self.weight)

    @contextmanager
    def fp8_autocast(enabled: bool, fp8_recipe: Any) -> Any:
        entered.append(("in", enabled, fp8_recipe))
        yield
        entered.append(("out",))

    engine = {name: ModuleType(name) for name in (
        "transformer_engine", "transformer_engine.pytorch", "transformer_engine.common",
        "transformer_engine.common.recipe",
    )}  # fmt: skip
    engine["transformer_engine.pytorch"].Linear = Linear  # type: ignore[attr-defined]
    engine["transformer_engine.pytorch"].fp8_autocast = fp8_autocast  # type: ignore[attr-defined]
    engine["transformer_engine.common.recipe"].Float8CurrentScaling = lambda: "the recipe"  # type: ignore[attr-defined]
    engine["transformer_engine"].pytorch = engine["transformer_engine.pytorch"]  # type: ignore[attr-defined]
    engine["transformer_engine"].common = engine["transformer_engine.common"]  # type: ignore[attr-defined]
    engine["transformer_engine.common"].recipe = engine["transformer_engine.common.recipe"]  # type: ignore[attr-defined]
    for name, module in engine.items():
        monkeypatch.setitem(sys.modules, name, module)

    encoder = EvaVisionTransformer(harness.MODEL.encoder)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, 0.0, 0.1)
    pixels = torch.randn(3, 3, 56, 56)  # 17 tokens a picture
    encoder.hidden(pixels).sum().backward()
    wanted = {name: parameter.grad.clone() for name, parameter in encoder.named_parameters()}
    hidden = encoder.hidden(pixels)
    encoder.zero_grad()
    fp8.convert_encoder(encoder, config("current", emulate=False, encoder=True).fp8)
    got = encoder.hidden(pixels)
    torch.testing.assert_close(got, hidden)
    got.sum().backward()
    assert rows == [64] * 4 * harness.MODEL.encoder.num_layers and entered.count(("out",)) == len(rows)
    assert {name for name, _ in encoder.named_parameters()} == wanted.keys()
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], msg=name)


def test_megatron_core_is_told() -> None:
    """The names that megatron-core gives the recipes; what is emulated it must not know of."""
    wanted = {"delayed": ("hybrid", "delayed"), "current": ("hybrid", "tensorwise"), "block": ("e4m3", "blockwise"),
              "mxfp8": ("e4m3", "mxfp8")}  # fmt: skip
    for recipe, names in wanted.items():
        told = transformer_config(config(recipe, emulate=False, margin=1, amax_history=16), [4])
        assert (told.fp8, told.fp8_recipe) == names
        assert (told.fp8_margin, told.fp8_amax_history_len, told.fp8_amax_compute_algo) == (1, 16, "max")
        assert not told.first_last_layers_bf16
        assert transformer_config(config(recipe), [4]).fp8 is None
        assert transformer_config(config(recipe, emulate=False, decoder=False, encoder=True), [4]).fp8 is None
    kept = transformer_config(config("current", emulate=False, last_layers_bf16=2), [4])
    assert kept.first_last_layers_bf16
    assert (kept.num_layers_at_start_in_bf16, kept.num_layers_at_end_in_bf16) == (0, 2)
