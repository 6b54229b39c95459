"""Learning rates against values worked out by hand."""

import math

import pytest

from emu2_megatron.config.schema import OptimizerConfig
from emu2_megatron.training.schedules import lr_factor, warmup_steps


def factors(steps: int, **fields: object) -> list[float]:
    config = OptimizerConfig(**fields)  # type: ignore[arg-type]
    return [lr_factor(config, step, steps) for step in range(steps)]


def test_linear_with_warmup_and_floor() -> None:
    got = factors(6, lr_schedule="linear", warmup_steps=2, min_lr_ratio=0.2)
    assert got == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4])


def test_cosine() -> None:
    got = factors(5, lr_schedule="cosine", warmup_ratio=0.2)
    assert got == pytest.approx([1.0, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])


def test_constant_without_warmup() -> None:
    assert factors(3, lr_schedule="constant") == [1, 1, 1]


def test_warmup_longer_than_the_run_never_divides_by_zero() -> None:
    assert factors(2, warmup_steps=2) == [0.5, 1.0]


def test_ratio_is_rounded_to_steps() -> None:
    assert warmup_steps(OptimizerConfig(warmup_ratio=0.1), 20350) == 2035
    assert warmup_steps(OptimizerConfig(), 100) == 0
