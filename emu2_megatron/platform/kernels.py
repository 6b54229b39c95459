"""Which implementation each group of kernels uses: NVIDIA's fused ones where they are installed, else plain PyTorch.

Packages are looked for, not imported: Transformer Engine takes seconds to load and does not load without CUDA. Nor is
megatron-core, which would import it, so that `emu2 doctor` works where either is broken.
"""

import importlib.util
from pathlib import Path

import torch

import emu2_megatron


def has_transformer_engine() -> bool:
    """Whether layers come from Transformer Engine: installed with its PyTorch part, and CUDA to run it on."""
    return torch.cuda.is_available() and _installed("transformer_engine", "pytorch")


def has_apex() -> bool:
    """Whether NVIDIA's apex can be used (PyPI's package of that name is another one, without optimizers)."""
    return torch.cuda.is_available() and _installed("apex", "optimizers")


def in_use() -> dict[str, str]:
    """`{group: implementation}` for attention, norm, linear, fp8, optimizer and the fused ops."""
    engine = has_transformer_engine()
    libraries = list(Path(emu2_megatron.__file__).parent.rglob("*.so"))
    adam = "torch.optim.AdamW"
    if has_apex():
        adam = "apex FusedAdam"
    if engine:  # megatron-core tries Transformer Engine first, then apex
        adam = "Transformer Engine FusedAdam"
    return {
        "attention": "Transformer Engine" if engine else "PyTorch scaled_dot_product_attention",
        "norm": "Transformer Engine" if engine else "PyTorch",
        "linear": "Transformer Engine" if engine else "megatron-core's parallel linears",
        "fp8": "available, not used" if engine else "not available",
        "optimizer": adam,
        "interleave and regression loss": "compiled (csrc)" if libraries else "PyTorch",
    }


def _installed(package: str, part: str) -> bool:
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec else None
    return any((Path(place) / part).is_dir() for place in places or [])
