"""Threads for work that releases the GIL: decoding and resizing do."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def count() -> int:
    """Cores for each of the ranks on this machine, at least 1."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // max(1, ranks))


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`[function(item) for item in items]`, on as many threads as `count` says.

    The threads end with the call: none is left to be missing in a process that is forked later.
    """
    items = list(items)
    workers = min(count(), len(items))
    if workers < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        return list(pool.map(function, items))
