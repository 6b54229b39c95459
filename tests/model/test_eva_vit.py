"""The encoder's gradients equal a float64 reference written from the formulas (tests/oracle.py)."""

import harness
import oracle
import pytest
import torch

from emu2_megatron.model import parameters
from emu2_megatron.model.eva_vit import EvaVisionTransformer

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
