"""The device a run uses, chosen once, when this module is first imported: CUDA where there is one, else the CPU.

Every package that touches megatron-core imports this module in its `__init__`, so that on a CPU-only machine the
redirection of `cuda_on_cpu` is in place before megatron-core is loaded.
"""

import logging
import os
import warnings
from functools import partial

import torch

from emu2_megatron.platform import cuda_on_cpu

IS_CUDA = torch.cuda.is_available()
BACKEND = "nccl" if IS_CUDA else "gloo"
"""torch.distributed's backend for this device."""

# megatron-core tells every process at import what is not installed; `emu2 doctor` says it once, with the remedy.
warnings.filterwarnings("ignore", module=r"megatron\.")
# torch 2.13 renames collectives that megatron-core, and torch before it, know by their old names.
warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)


def _is_other(message: str, record: logging.LogRecord) -> bool:
    return message not in record.getMessage()


for _logger, _message in {
    # A CUDA build of torch on a machine without a GPU says so in every process.
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    # megatron-core 0.19 wants callers to give what it works out itself otherwise; 0.16 cannot be given it.
    "megatron.core.distributed.distributed_data_parallel": "full_param_layout not provided",
}.items():
    logging.getLogger(_logger).addFilter(partial(_is_other, _message))
if not IS_CUDA:
    cuda_on_cpu.apply()


def device() -> torch.device:
    """The device of this rank: `cuda:LOCAL_RANK`, or the CPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if IS_CUDA else torch.device("cpu")


def activate() -> torch.device:
    """Make `device()` the current one, before any process group or tensor; returns it."""
    here = device()
    if IS_CUDA:
        torch.cuda.set_device(here)
    return here


def to_device(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on this rank's device; a copy to CUDA overlaps with what the host does next."""
    return tensor.pin_memory().to(device(), non_blocking=True) if IS_CUDA and not tensor.is_cuda else tensor


def synchronize() -> None:
    """Wait for what this stream has to do, so that a clock read next tells the truth; other streams go on."""
    if IS_CUDA:
        torch.cuda.current_stream().synchronize()
