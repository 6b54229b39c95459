"""The compiled ops of csrc/: loads their library, once, and says whether it is there and what it runs on.

`torch.ops.emu2` has them; the functions that call them, each beside its plain PyTorch reference, are in `ops/`.
"""

import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

FILE = Path(__file__).parents[1] / "ops" / "_C.so"
BUILD = "python setup.py build_ext --inplace"
"""What builds it in a checkout (setup.py says more)."""

enabled = os.environ.get("EMU2_FUSED_OPS", "1") != "0"
"""Whether compiled ops are used at all; EMU2_FUSED_OPS=0 in the environment leaves everything to the references."""


def load(file: Path) -> str:
    """Load a library of compiled ops; returns why that was not possible, empty if it was.

    A file that does not load is warned of: somebody built it and counts on it.
    """
    if not file.exists():
        return "not built"
    try:
        torch.ops.load_library(file)
    except OSError as error:  # of another machine, or built for a newer torch than this one
        reason = error.__cause__ or error  # torch says that, the loader says why
        warnings.warn(
            f"{file} does not load, plain PyTorch takes its place: {reason}; to build it again: {BUILD}", stacklevel=2
        )
        return f"does not load: {reason}"
    return ""


problem = load(FILE)
"""Why there are no compiled ops; empty if there are."""
has_cuda = not problem and torch._C._dispatch_has_kernel_for_dispatch_key("emu2::interleave", "CUDA")
"""Whether they run on CUDA, too; on a CPU they always do."""


def serves(tensor: Tensor) -> bool:
    """Whether an op on this tensor is the compiled one."""
    place = tensor.device.type
    return enabled and not problem and (place == "cpu" or (place == "cuda" and has_cuda))


def in_use() -> str:
    """What runs the ops here, in words."""
    if not enabled:
        return "PyTorch (EMU2_FUSED_OPS=0)"
    if problem:
        return f"PyTorch (compiled ops: {problem})"
    if torch.cuda.is_available() and not has_cuda:
        return "compiled on the CPU, PyTorch on the GPU"
    return f"compiled, for {'CPU and CUDA' if has_cuda else 'CPU'}"


def remedy() -> str:
    """The command after which more of the ops are compiled; empty if all are."""
    if not enabled:
        return ""
    if torch.cuda.is_available() and not has_cuda:
        return f"EMU2_BUILD_CUDA=1 {BUILD} (needs nvcc, g++ and torch 2.13 or newer)"
    return f"{BUILD} (needs g++ and torch 2.10 or newer)" if problem else ""
