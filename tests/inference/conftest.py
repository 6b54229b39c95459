"""A small chat model as a checkpoint and as an export."""

import os
from pathlib import Path

import pytest
import weights
from safetensors.torch import save_file

from emu2_megatron.config.schema import ModelConfig
from emu2_megatron.convert import from_hf
from emu2_megatron.convert.to_hf import to_hf

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def chat_model() -> ModelConfig:
    """Two layers; its vocabulary has `[USER]` and `[ASSISTANT]`."""
    return weights.shallow(2, vocab_size=1274)


@pytest.fixture(scope="session")
def exported(chat_model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `checkpoint` and `hf` of it, fp32."""
    root = tmp_path_factory.mktemp("exported")
    save_file(weights.native(chat_model), root / "native.safetensors")
    released = from_hf.whole(root / "native.safetensors", chat_model)
    from_hf.write(released, root / "checkpoint", weights.TOKENIZER)
    to_hf(root / "checkpoint", root / "hf", chat_model, weights.TOKENIZER)
    return root
