"""The encoder's gradients equal a float64 reference written from the formulas (tests/oracle.py); so does the resized
position table."""

import math

import harness
import numpy as np
import oracle
import pytest
import torch

from emu2_megatron.model import parameters
from emu2_megatron.model.eva_vit import EvaVisionTransformer, resize_positions

ENCODER = harness.MODEL.encoder
SIZES = oracle.Sizes(encoder_heads=ENCODER.num_attention_heads, patch_size=ENCODER.patch_size)


def random_weights() -> dict[str, torch.Tensor]:
    """Every parameter random, norms and biases too, so that each has a gradient worth comparing.

    Matrices are scaled to keep activations of order 1: larger ones saturate the softmax, and CLS gets no gradient.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = parameters.released_shapes(harness.MODEL)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) / torch.Size(shape[1:]).numel() ** 0.5
        for name, shape in shapes.items()
        if name.startswith("visual.")
    }


def test_gradients() -> None:
    weights = random_weights()
    pixels = torch.randn(3, 3, ENCODER.image_size, ENCODER.image_size, dtype=torch.float64)
    upstream = torch.randn(4 + 4 + 16, ENCODER.hidden_size, dtype=torch.float64)

    leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    hidden_IPE = oracle.encode(leaves, SIZES, pixels)
    rows = torch.cat([oracle.pool(hidden_IPE[:2], 4).flatten(0, 1), oracle.pool(hidden_IPE[2:], 16).flatten(0, 1)])
    rows.backward(upstream)

    encoder = EvaVisionTransformer(ENCODER)
    parameters.fill_encoder(encoder, harness.MODEL, weights.__getitem__)
    got = encoder(pixels.float(), [4, 4, 16])
    got.backward(upstream.float())
    assert (got - rows).norm() < 1e-5 * rows.norm()
    for name, parameter in encoder.named_parameters():
        wanted = leaves["visual." + name].grad
        assert wanted is not None and parameter.grad is not None and wanted.norm() > 1e-2
        # fp32 through two blocks with a LayerNorm each: about ten roundings of 6e-8 on every path.
        assert (parameter.grad - wanted).norm() < 2e-5 * wanted.norm(), name


@torch.no_grad()
@pytest.mark.parametrize("name", ["norm1", "norm2"])
def test_epsilon(name: str) -> None:
    """With outputs of order 1e-3 before a norm its variance is of the order of epsilon, and a wrong one shows."""
    weights = random_weights()
    branch = {"norm1": "attn.proj", "norm2": "mlp.fc2"}[name]
    for key in weights:
        if branch in key:
            weights[key] *= 1e-3
    pixels = torch.randn(2, 3, ENCODER.image_size, ENCODER.image_size, dtype=torch.float64)
    encoder = EvaVisionTransformer(ENCODER)
    parameters.fill_encoder(encoder, harness.MODEL, weights.__getitem__)
    wanted = oracle.encode(weights, SIZES, pixels)
    wrong = oracle.encode(weights, oracle.Sizes(encoder_heads=SIZES.encoder_heads, encoder_eps=1e-5), pixels)
    assert (encoder.hidden(pixels.float()) - wanted).norm() < 1e-4 * wanted.norm()
    assert (wrong - wanted).norm() > 1e-3 * wanted.norm()


def keys(x: float) -> float:
    """Keys' cubic convolution kernel (1981) with a = -0.75."""
    a, x = -0.75, abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def bicubic(size: int, wanted: int) -> np.ndarray:
    """float64 [wanted, size]: what each new point takes of each old one, along one side. Centres are at halves, and
    beyond the border is what lies on it."""
    weights = np.zeros((wanted, size))
    for i in range(wanted):
        centre = (i + 0.5) * size / wanted - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            weights[i, min(max(j, 0), size - 1)] += keys(centre - j)
    return weights


@pytest.mark.parametrize(("side", "wanted"), [(16, 32), (32, 16), (4, 8), (8, 4), (3, 7), (7, 5), (1, 4), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_position_table_of_another_size(side: int, wanted: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(side)
    table = (torch.randn(1, 1 + side * side, 6, generator=generator) * 0.02).to(dtype)
    resized = resize_positions(table, wanted * wanted)
    assert resized.shape == (1, 1 + wanted * wanted, 6) and resized.dtype == dtype
    assert torch.equal(resized[:, 0], table[:, 0])
    weights, grid = bicubic(side, wanted), table[0, 1:].double().view(side, side, 6).numpy()
    expected = torch.from_numpy(np.einsum("yi,xj,ije->yxe", weights, weights, grid)).flatten(0, 1)
    # A rounding of the result, and fp32's on the way: numbers below 0.1, times weights that are some 1e-7 off.
    rounding = torch.finfo(dtype).eps / 2 * expected.abs() + 5e-8
    if dtype == torch.float16:
        rounding += 2**-25  # subnormal numbers
    assert ((resized[0, 1:].double() - expected).abs() <= rounding).all()
    assert resize_positions(table, side * side) is table
