"""Tensors without memory: what is built under `OnMeta()` has shapes, dtypes and storages, but no data.

`with torch.device("meta")` alone does not do: it minds only calls that name no device, and megatron-core names CUDA
everywhere. Here every device that a tensor is made on, or moved to, is the meta device.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from emu2_megatron.platform.device import IS_CUDA

_META = torch.device("meta")
_LIKE = ("empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like")


class OnMeta(TorchFunctionMode):
    """Context manager that redirects factory functions and moves of tensors to the meta device.

    It sees torch's own functions, below the redirection of `cuda_on_cpu`. Generators and their states stay real.
    `Tensor.type()`, by which megatron-core's optimizers sort parameters, answers as on this machine's device.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _device_constructors() or getattr(func, "__name__", "") in _LIKE:
            kwargs["device"] = _META
            kwargs.pop("pin_memory", None)
        elif func is torch.Tensor.to:
            args = (args[0], *map(_meta, args[1:]))
            kwargs = {key: _meta(value) for key, value in kwargs.items()}
        elif func is torch.Tensor.cuda:
            return args[0].to(_META)
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            kind = func(*args).rpartition(".")[2]
            return f"torch.cuda.{kind}" if IS_CUDA else f"torch.{kind}"
        return func(*args, **kwargs)


def _meta(value: Any) -> Any:
    """`value`, unless it names a device: then the meta device."""
    return _META if isinstance(value, str | torch.device) else value
