"""The compiled ops beside PyTorch's, forward and backward, in bf16 and fp32.

interleave_vs_index_put_*       time of `Tensor.index_put`, or of index_copy or of `torch.where` over gathered rows if
                                that is faster, over that of the op
interleave_vs_masked_scatter_*  time of `Tensor.masked_scatter` over that of the op
interleave_vs_copy_*            1.4 times the time of a copy that moves as many bytes as the op's forward pass must,
                                over the time of that pass; the copy writes memory that is there already
loss_vs_index_*                 time of `mse_loss(hidden[rows], target)`, in the dtype itself or in fp32, whichever is
                                faster, over that of the op
loss_vs_index_select_*          the same with `hidden.index_select(0, rows)`, whose backward pass does not sort; it
                                moves about 2.5 times the bytes that the op must move, and more than that is not to be
                                had where memory limits both
loss_memory_*                   0.85 times the peak memory of the leanest of those, over that of the op

One micro-batch of the 37 B decoder: S = 2048, B = 2, width 6656, 1024 visual rows (16 pictures of 64). The loss stands
on the whole hidden states, of which it reads 1024 rows. The allocator is warm: glibc keeps freed memory instead of
returning it to the kernel, which would clear it again page by page for every variant, longer than the ops take.
"""

import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import _common as common
import torch
from torch import Tensor
from torch.nn import functional as F

from emu2_megatron.ops.interleave import interleave, interleave_reference, visual_slots
from emu2_megatron.ops.regression_loss import regression_loss
from emu2_megatron.platform import library

S, B, D, R = 2048, 2, 6656, 1024
QUERIES = 64


def keep_freed_memory() -> None:
    """glibc: no mappings of their own for large blocks, and nothing given back at the top of the heap."""
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_max = -1, -4
    if libc.mallopt(m_mmap_max, 0) != 1 or libc.mallopt(m_trim_threshold, 2**31 - 1) != 1:
        raise SystemExit("this benchmark needs glibc's malloc")


def timed(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round, taking turns; two rounds are run first and dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 2):
        for name in list(variants)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            variants[name]()
            if number > 1:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def show(title: str, seconds: dict[str, list[float]]) -> None:
    """Medians, in milliseconds."""
    print(title, *(f"{name} {statistics.median(values) * 1e3:.2f} ms" for name, values in seconds.items()), sep="  ")


def best(seconds: dict[str, list[float]], names: list[str]) -> list[float]:
    """The times of the variant with the lowest median."""
    return min((seconds[name] for name in names), key=statistics.median)


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def peak(function: Callable[[], object]) -> int:
    """Bytes that a call needs at most beyond what is there before, in an empty heap."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor | None = None) -> object:
    """Forward and backward."""
    return torch.autograd.grad(function(*inputs), inputs, upstream)


def positions() -> Tensor:
    """Flat rows of the visual embeddings: pictures evenly spread over both sequences."""
    pictures = R // QUERIES // B
    starts = torch.arange(pictures) * (S // pictures) + 2
    s = (starts[:, None] + torch.arange(QUERIES)).flatten()
    return torch.cat([s * B + b for b in range(B)])


def interleaves(dtype: torch.dtype, name: str, rounds: int) -> list[tuple[str, float, float]]:
    """Ratios of the interleave."""
    text, visual = torch.randn(S, B, D).to(dtype).requires_grad_(), torch.randn(R, D).to(dtype).requires_grad_()
    upstream, places = torch.randn(S, B, D).to(dtype), positions()
    slots, mask = visual_slots(places, S, B), torch.zeros(S * B, 1, dtype=torch.bool)
    mask[places] = True
    rows, order = slots.flatten().clamp(min=0), places.argsort()
    forms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "op": lambda t, v: interleave(t, v, slots),
        "index_put": lambda t, v: t.view(S * B, D).index_put((places,), v).view(S, B, D),
        "index_copy": lambda t, v: t.view(S * B, D).index_copy(0, places, v).view(S, B, D),
        "where": lambda t, v: torch.where(mask, v[rows], t.view(S * B, D)).view(S, B, D),
        "masked_scatter": lambda t, v: t.view(S * B, D).masked_scatter(mask, v).view(S, B, D),
    }
    # masked_scatter takes the rows in the order of their places: let them be in that order for it.
    inputs = {n: [text, visual[order].detach().requires_grad_() if n == "masked_scatter" else visual] for n in forms}
    with torch.no_grad():
        wanted = interleave_reference(text, visual, slots)
        assert all(torch.equal(form(*inputs[n]), wanted) for n, form in forms.items()), "the forms differ"
    del wanted
    runs = {n: partial(gradients, form, inputs[n], upstream) for n, form in forms.items()}
    both = timed(runs, rounds)
    show(f"interleave {name}, forward and backward:", both)

    moved = 2 * text.nbytes + slots.nbytes  # a row read and a row written for each, and the slots
    source, destination = torch.empty(moved // 2, dtype=torch.uint8), torch.empty(moved // 2, dtype=torch.uint8)

    def forward() -> None:
        with torch.no_grad():
            interleave(text, visual, slots)

    pair = timed({"op": forward, "copy": lambda: destination.copy_(source)}, 3 * rounds)
    show(f"interleave {name}, forward, {moved / 1e6:.1f} MB read and written:", pair)
    eager = best(both, ["index_put", "index_copy", "where"])
    return [
        (f"interleave_vs_index_put_{name}", common.quotient(eager, both["op"]), 1.4),
        (f"interleave_vs_masked_scatter_{name}", common.quotient(both["masked_scatter"], both["op"]), 5.0),
        (f"interleave_vs_copy_{name}", 1.4 * common.quotient(pair["copy"], pair["op"]), 1.0),
    ]


def losses(dtype: torch.dtype, name: str, rounds: int) -> list[tuple[str, float, float]]:
    """Ratios of the regression loss."""
    hidden, target = torch.randn(S * B, D).to(dtype).requires_grad_(), torch.randn(R, D).to(dtype)
    places, one = positions(), torch.ones(())
    slots, count = visual_slots(places, S, B).flatten(), torch.tensor(float(R * D))
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "op": lambda h: regression_loss(h, target, slots, count, one),
        "index": lambda h: F.mse_loss(h[places], target),
        "index in fp32": lambda h: F.mse_loss(h[places].float(), target.float()),
        "index_select": lambda h: F.mse_loss(h.index_select(0, places), target),
    }
    runs = {n: partial(gradients, form, [hidden]) for n, form in forms.items()}
    with torch.no_grad():
        exact = float((hidden[places].double() - target.double()).square().mean())
        errors = {n: abs(float(form(hidden)) / exact - 1) for n, form in forms.items()}
    print(f"loss {name}, relative error:", *(f"{n} {error:.1e}" for n, error in errors.items()), sep="  ")
    both = timed(runs, rounds)
    show(f"loss {name}, forward and backward:", both)
    least = hidden.nbytes + target.nbytes + R * D * hidden.element_size()
    memory = {n: min(peak(run) for _ in range(3)) for n, run in runs.items()}
    print(f"loss {name}, {least / 1e6:.1f} MB to be read or written; peak memory:",
          *(f"{n} {bytes_ / 2**20:.1f} MiB" for n, bytes_ in memory.items()), sep="  ")  # fmt: skip
    eager = [n for n in forms if n != "op"]
    return [
        (f"loss_vs_index_{name}", common.quotient(best(both, ["index", "index in fp32"]), both["op"]), 5.0),
        (f"loss_vs_index_select_{name}", common.quotient(both["index_select"], both["op"]), 2.0),
        (f"loss_memory_{name}", 0.85 * min(memory[n] for n in eager) / memory["op"], 1.0),
    ]


def main() -> int:
    arguments = common.arguments(__doc__, rounds=9).parse_args()
    if library.problem or not library.enabled:
        raise SystemExit(f"the compiled ops are not in use: {library.in_use()}; {library.remedy()}")
    keep_freed_memory()
    torch.manual_seed(0)
    ratios = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        ratios += interleaves(dtype, name, arguments.rounds)
        ratios += losses(dtype, name, arguments.rounds)
    return common.report(ratios)


if __name__ == "__main__":
    sys.exit(main())
