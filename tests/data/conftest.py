"""A tokenizer, a tiny model's configuration and pictures made on the spot."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from emu2_megatron.config.presets import PRESETS
from emu2_megatron.config.schema import Config, DataConfig, TrainingConfig
from emu2_megatron.data.tokenizer import Tokenizer

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def example_data() -> Path:
    return REPOSITORY / "examples" / "data"


@pytest.fixture(scope="session")
def tokenizer(example_data: Path) -> Tokenizer:
    return Tokenizer(example_data / "tokenizer.model")


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Config]:
    """Configuration of emu2_tiny (Q = 4, 56 pixels, vocabulary 1272); arguments go to DataConfig."""

    def make(global_batch_size: int = 4, seed: int = 7, **data: object) -> Config:
        model = PRESETS["emu2_tiny"]
        return Config(
            model=replace(model),
            data=replace(DataConfig(sequence_length=64), **data),  # type: ignore[arg-type]
            training=TrainingConfig(global_batch_size=global_batch_size, seed=seed),
        )

    return make


@pytest.fixture(scope="session")
def make_png() -> Callable[..., bytes]:
    """A PNG of one colour."""

    def make(color: tuple[int, ...] = (10, 20, 30), size: tuple[int, int] = (8, 6), mode: str = "RGB") -> bytes:
        buffer = io.BytesIO()
        Image.new(mode, size, color).save(buffer, "PNG")
        return buffer.getvalue()

    return make
