"""Work shared out over processes, with a progress bar."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from emu2_megatron.errors import DataError

In = TypeVar("In")
Out = TypeVar("Out")

_AHEAD = 256
"""Items handed to the processes before they have time for them: few, so that little is lost when one fails."""


def processes(workers: int) -> AbstractContextManager[ProcessPoolExecutor | None]:
    """So many processes to use in a `with` block; None of them for one worker, which is this process."""
    if workers == 1:
        return nullcontext()
    # Spawned, not forked: threads of this process (the progress bar's, pyarrow's) may hold locks.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin)


def each(
    pool: ProcessPoolExecutor | None, function: Callable[[In], Out], items: Sequence[In], label: str
) -> Iterator[tuple[In, Out]]:
    """(item, function(item)) of every item, as they come. An exception ends it; DataError if a process was killed."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn(f"[bold]{label}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        done = ((item, function(item)) for item in items) if pool is None else _each(pool, function, items)
        yield from bar.track(done, total=len(items))


def _each(pool: ProcessPoolExecutor, function: Callable[[In], Out], items: Sequence[In]) -> Iterator[tuple[In, Out]]:
    waiting: dict[Future[Out], In] = {}
    rest = iter(items)
    try:
        while True:
            for item in rest:
                waiting[pool.submit(function, item)] = item
                if len(waiting) >= _AHEAD:
                    break
            if not waiting:
                return
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(future), future.result()
    except BrokenProcessPool as error:
        raise DataError("a process was ended from outside (out of memory?); the same command continues") from error
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)  # the `with` block waits for what is being done already
        raise


def _begin() -> None:
    """Runs first in each process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # control-C ends it without a word; the main process has one
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's process waits for work forever when the main process has been killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
