"""A small model in the engine's form and as an export."""

import os
from pathlib import Path

import pytest
import torch
import weights
from one_thread import one_thread  # noqa: F401  (a fixture)
from safetensors.torch import save_file

from emu2_megatron.convert import from_hf
from emu2_megatron.convert.to_hf import to_hf

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `native.safetensors`, `checkpoint` and `hf` of weights.shallow(), fp32, in several shards."""
    root = tmp_path_factory.mktemp("exported")
    model = weights.shallow()
    save_file(weights.native(model), root / "native.safetensors")
    released = from_hf.whole(root / "native.safetensors", model)
    from_hf.write(released, root / "checkpoint", weights.TOKENIZER, None, 300_000)
    to_hf(root / "checkpoint", root / "hf", model, weights.TOKENIZER, None, 500_000)
    assert torch.get_default_dtype() is torch.float32
    return root
