"""Lets megatron-core run on a machine without CUDA, over gloo, with the model code unchanged.

megatron-core asks for CUDA by name: it allocates on `device="cuda"`, records streams and events, keeps CUDA generator
states and compares `Tensor.type()` with `torch.cuda.FloatTensor`. `apply()` redirects exactly these:

- `torch.cuda.current_device`, `synchronize`, `empty_cache`, asked for everywhere: the CPU device, nothing, nothing;
- `torch.cuda.Stream`, `Event`, `current_stream`, `default_stream`, `stream`: objects that do nothing. Work on a CPU is
  done when the call returns, so every wait is already satisfied;
- `torch.cuda.manual_seed`, `get_rng_state`, `set_rng_state` and two helpers of `megatron.core.tensor_parallel.random`,
  whose tracker forks generator states for dropout and recompute: the CPU generator;
- factory functions (`torch.zeros(..., device="cuda")`), `Tensor.to`, `Tensor.cuda`, `Module.cuda`, `pin_memory=True`,
  by which buffers and counters are made: the CPU;
- `Tensor.type()`, by which the optimizers sort parameters: answers `torch.cuda.FloatTensor` for `torch.FloatTensor`.

Nothing else changes: arithmetic, autograd, collectives and schedules are megatron-core's own. With CUDA present
`apply()` refuses, so that a GPU run can never be on the CPU by mistake.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

from emu2_megatron.errors import ConfigError

_CPU = torch.device("cpu")
_FACTORIES = (
    "tensor as_tensor zeros ones empty full arange linspace rand randn randint eye "
    "zeros_like ones_like empty_like full_like rand_like randn_like"
).split()
_applied = False


class _Done:
    """A stream or an event whose work has always finished."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record_event(self, *_: Any) -> "_Done":
        return _Done()

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


def _on_cpu(value: Any) -> Any:
    """`value`, unless it names a CUDA device: then the CPU."""
    names_cuda = (isinstance(value, str) and value.startswith("cuda")) or (
        isinstance(value, torch.device) and value.type == "cuda"
    )
    return _CPU if names_cuda else value


def _factory(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return on_cpu


def apply() -> None:
    """Redirect the calls listed above, once. Call before megatron-core is imported.

    Raises:
        ConfigError: a CUDA device is present.
    """
    global _applied
    if torch.cuda.is_available():
        raise ConfigError("cuda_on_cpu is for machines without CUDA, and this one has it: nothing was redirected")
    if _applied:
        return
    _applied = True

    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    for name in ("synchronize", "empty_cache"):
        setattr(cuda, name, lambda *_, **__: None)
    cuda.Stream = cuda.Event = _Done
    cuda.current_stream = cuda.default_stream = _Done
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)

    # `with torch.device("meta")` looks the factory functions up once: it has to find torch's own, not ours.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _factory(getattr(torch, name)))
    tensor: Any = torch.Tensor
    plain_to, plain_type = tensor.to, tensor.type
    tensor.to = lambda self, *args, **kwargs: plain_to(
        self, *map(_on_cpu, args), **{key: _on_cpu(value) for key, value in kwargs.items()}
    )
    tensor.type = lambda self, *args, **kwargs: (
        plain_type(self).replace("torch.", "torch.cuda.", 1)
        if not args and not kwargs
        else plain_type(self, *args, **kwargs)
    )
    tensor.cuda = torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]

    # Imported last: it reads torch.cuda while it is being imported.
    from megatron.core.tensor_parallel import random as megatron_random

    rng: Any = megatron_random
    rng._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    rng._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
