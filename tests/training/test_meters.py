"""The mean predictor's loss against its definition."""

import pytest
import torch

from emu2_megatron.training.meters import mean_predictor_loss


def test_mean_predictor_loss() -> None:
    """Far from zero, so that the difference of two large moments has digits to lose."""
    v_RE = torch.randn(500, 7, dtype=torch.float64) * torch.arange(1, 8) + 100
    moments = torch.cat([v_RE.sum(0), v_RE.square().sum(0), torch.tensor([500.0])])
    wanted = (v_RE - v_RE.mean(0)).square().mean()
    assert mean_predictor_loss(moments) == pytest.approx(float(wanted), rel=1e-9)


def test_no_embedding_at_all() -> None:
    assert mean_predictor_loss(torch.zeros(15, dtype=torch.float64)) == 0
