"""Work beside the main flow: a thread, which on CUDA has a stream of its own."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import torch
from torch import Tensor

from emu2_megatron.platform.device import IS_CUDA, device

Work: TypeAlias = Callable[[], list[Tensor]]


def background() -> Callable[[Work], Work]:
    """A function that starts work beside the caller's, and gives another that waits for it and returns its tensors or
    raises what it raised.

    What is started runs in order, on CUDA behind what the caller has queued so far. A thread launches it there too: the
    thousands of kernels of an encoder fill the launch queue, and would hold the caller up. The work must not take part
    in collectives: their order would differ from rank to rank.
    """
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="background")
    if not IS_CUDA:
        return lambda work: thread.submit(work).result
    stream = torch.cuda.Stream()

    def run(work: Work, ready: torch.cuda.Event) -> tuple[list[Tensor], torch.cuda.Event]:
        with torch.cuda.device(device()), torch.cuda.stream(stream):
            stream.wait_event(ready)
            return work(), stream.record_event()

    def start(work: Work) -> Work:
        future = thread.submit(run, work, torch.cuda.current_stream().record_event())

        def result() -> list[Tensor]:
            tensors, done = future.result()
            here = torch.cuda.current_stream()
            here.wait_event(done)
            for tensor in tensors:
                tensor.record_stream(here)  # the allocator must not reuse its memory before this stream has read it
            return tensors

        return result

    return start
