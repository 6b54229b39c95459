"""Work beside the main flow: a thread where the device is the CPU, a stream of its own on CUDA."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import torch
from torch import Tensor

from emu2_megatron.platform.device import IS_CUDA

Work: TypeAlias = Callable[[], list[Tensor]]


def background() -> Callable[[Work], Work]:
    """A function that starts work beside the caller's, and gives another that waits for it and returns its tensors or
    raises what it raised.

    What is started runs in order. On CUDA it is launched from the caller's thread, at once, behind what the caller has
    queued so far. It must not take part in collectives: their order would differ from rank to rank.
    """
    if not IS_CUDA:
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="background")
        return lambda work: thread.submit(work).result
    stream = torch.cuda.Stream()

    def start(work: Work) -> Work:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            tensors = work()
            done = stream.record_event()

        def result() -> list[Tensor]:
            here = torch.cuda.current_stream()
            here.wait_event(done)
            for tensor in tensors:
                tensor.record_stream(here)  # the allocator must not reuse its memory before this stream has read it
            return tensors

        return result

    return start
