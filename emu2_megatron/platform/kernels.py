"""Which implementation each group of kernels uses: NVIDIA's fused ones where they are installed, else plain PyTorch.

Packages are looked for, not imported: Transformer Engine takes seconds to load and does not load without CUDA. Nor is
megatron-core, which would import it, so that `emu2 doctor` works where either is broken.
"""

import importlib
import importlib.util
import inspect
from functools import lru_cache
from pathlib import Path

import torch

from emu2_megatron.config.schema import Fp8Config
from emu2_megatron.errors import ConfigError
from emu2_megatron.platform import library

_FP8_CHECKS = {
    "delayed": "check_fp8_support",
    "current": "check_fp8_support",
    "block": "check_fp8_block_scaling_support",
    "mxfp8": "check_mxfp8_support",
}
"""fp8.recipe to Transformer Engine's function that says whether this GPU and CUDA can."""


FUSED_OPS = "interleave, regression loss, pool"
"""The group of our own ops (csrc/)."""


def has_transformer_engine() -> bool:
    """Whether layers come from Transformer Engine: installed with its PyTorch part, and CUDA to run it on."""
    return torch.cuda.is_available() and _installed("transformer_engine", "pytorch")


def has_varlen_attention(dtype: torch.dtype, width: int) -> bool:
    """Whether torch has attention over sequences of different lengths in one kernel, for heads of this dtype and width:
    FlashAttention's. (torch 2.10 had its first form, with other arguments.)"""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return False
    return _has_varlen_attn() and dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and width <= 256


@lru_cache
def _has_varlen_attn() -> bool:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    return "window_size" in inspect.signature(function).parameters


def has_apex() -> bool:
    """Whether NVIDIA's apex can be used (PyPI's package of that name is another one, without optimizers)."""
    return torch.cuda.is_available() and _installed("apex", "optimizers")


def has_dali() -> bool:
    """Whether pictures and videos are decoded by DALI; it runs on the CPU as well."""
    return _installed("nvidia", "dali/experimental/dynamic")


def require_fp8(fp8: Fp8Config) -> None:
    """Refuse FP8 that this machine cannot run: megatron-core would train in bf16 without a word.

    Raises:
        ConfigError: neither Transformer Engine nor emulation, or a GPU or CUDA too old for the recipe.
    """
    if fp8.recipe == "none" or fp8.emulate:
        return
    if not has_transformer_engine():
        raise ConfigError(
            f"fp8.recipe: {fp8.recipe}; needs a GPU and Transformer Engine (pip install -e .[te]), which are not here; "
            "legal: none, or fp8.emulate=true, slow and for tests of convergence"
        )
    old = importlib.util.find_spec("transformer_engine.pytorch.quantization") is None  # before 2.8
    module = importlib.import_module("transformer_engine.pytorch." + ("fp8" if old else "quantization"))
    check = getattr(module, _FP8_CHECKS[fp8.recipe], None)
    supported, reason = check() if check else (False, "this version of Transformer Engine does not have it")
    if not supported:
        raise ConfigError(f"fp8.recipe: {fp8.recipe}; {reason}; legal here: another recipe, or fp8.emulate=true")


def in_use() -> dict[str, str]:
    """`{group: implementation}` for attention, norm, linear, fp8, optimizer, the fused ops and decoding."""
    engine = has_transformer_engine()
    adam = "torch.optim.AdamW"
    if has_apex():
        adam = "apex FusedAdam"
    if engine:  # megatron-core tries Transformer Engine first, then apex
        adam = "Transformer Engine FusedAdam"
    place = "GPU" if torch.cuda.is_available() else "CPU"
    return {
        "attention": "PyTorch" + (", Transformer Engine if data.attend_across_samples" if engine else ""),
        "norm": "Transformer Engine" if engine else "PyTorch",
        "linear": "Transformer Engine" if engine else "megatron-core's parallel linears",
        "fp8": "Transformer Engine, if fp8.recipe asks for it" if engine else "only emulated (fp8.emulate)",
        "optimizer": adam,
        FUSED_OPS: library.in_use(),
        "pictures and videos": f"DALI on the {place}, else Pillow and PyAV" if has_dali() else "Pillow and PyAV",
    }


def _installed(package: str, part: str) -> bool:
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec else None
    return any((Path(place) / part).is_dir() for place in places or [])
