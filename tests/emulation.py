"""Builds the CUDA kernels for the emulator of `tests/csrc/simt` and calls them, as `kernel_cases.Kernels`."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from kernel_cases import DTYPES, NAN, RESCALES, ROWS, WINDOWS
from torch import Tensor

REPOSITORY = Path(__file__).parents[1]
KERNELS = REPOSITORY / "csrc" / "cuda"
SIMT = REPOSITORY / "tests" / "csrc" / "simt"
SOURCES = ("interleave.cu", "pool.cu", "regression_loss.cu")
LAUNCH_FAILURE = 719  # cudaErrorLaunchFailure
COMPILER = shutil.which("g++")

# No contraction: the emulator's fp32 is the plain one. The TLS flag: dynamic shared memory has no constructor.
FLAGS = "-std=c++20 -O1 -g -fPIC -ffp-contract=off -fno-extern-tls-init -Wall -Wextra -Wno-unknown-pragmas".split()
VARIANTS = {  # -O0: these checks make optimised code slow to compile
    "plain": [],
    "address": ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}


def run(command: Sequence[str | Path]) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"


def compile_sources(sources: Sequence[Path], folder: Path, variant: str) -> list[Path]:
    """Two at a time. A `.cu` file is C++ to g++: its CUDA comes from the emulator's headers.

    The emulator itself is not instrumented against races: its own state would be reported.
    """
    assert COMPILER is not None
    folder.mkdir(parents=True, exist_ok=True)

    def one(source: Path) -> Path:
        flags = ["-DSIMT_THREAD_SANITIZER"] if variant == "thread" and source.parent == SIMT else VARIANTS[variant]
        target = folder / f"{source.name}.o"
        include: list[str | Path] = ["-I", SIMT / "include", "-I", SIMT]
        run([COMPILER, *FLAGS, *flags, *include, "-x", "c++", "-c", source, "-o", target])
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, sources))


def link(objects: Sequence[Path], target: Path, variant: str, library: bool) -> Path:
    assert COMPILER is not None
    run([COMPILER, *VARIANTS[variant], *(["-shared"] if library else []), *objects, "-o", target, "-lpthread"])
    return target


FAR = "far 65537 40000"
"""A case for the driver: the offset of its visual row does not fit into 32 bits."""


def driver_cases(*kinds: str) -> list[str]:
    """The shared cases as lines for csrc/driver.cpp; `kinds` leaves only these.

    Each of a case's matrices starts beside an aligned address, then all of them.
    """

    def lines(words: str, offset: int, matrices: int) -> list[str]:
        shifted = [*range(matrices)] if offset else []
        choices = [[offset * (i == j) for i in range(matrices)] for j in shifted] + [[offset] * matrices]
        return [f"{words} {' '.join(map(str, offsets))}" for offsets in choices]

    found = []
    for code, dtype in enumerate(DTYPES):
        if dtype is torch.float16:
            continue  # to a sanitizer the same as bfloat16
        for rows in (case for case in ROWS if case.only is None):
            found += lines(f"rows {code} {rows.rows} {rows.visual_rows} {rows.width}", rows.offset, 3)
        for elements, offset in RESCALES:
            found += lines(f"rescale {code} {elements}", offset, 2)
        for case in (case for case in WINDOWS if case.only is None):
            for out in (0, 2):
                words = f"windows {code} {out} {case.images} {case.side} {case.window} {case.width}"
                found += lines(words, case.offset, 2)
    return [line for line in found if line.split()[0] in kinds or not kinds]


def run_driver(driver: Path, cases: Sequence[str], multiprocessors: int, seed: int) -> subprocess.CompletedProcess[str]:
    return run_program([driver, str(multiprocessors), str(seed)], "\n".join(cases))


def run_program(command: Sequence[str | Path], text: str = "") -> subprocess.CompletedProcess[str]:
    """Addresses are not randomised where the system lets us choose: the race detector knows only some layouts."""
    options = {
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    fixed = subprocess.run(["setarch", "-R", "true"], capture_output=True).returncode == 0
    done = subprocess.run(
        [*(["setarch", "-R"] if fixed else []), *map(str, command)],
        input=text,
        text=True,
        capture_output=True,
        timeout=600,
        env={**os.environ, **options},
    )
    assert "unexpected memory mapping" not in done.stderr, (
        "ThreadSanitizer does not run here with randomised addresses, and `setarch -R` is not permitted: permit it "
        "(seccomp, personality), or set the sysctl vm.mmap_rnd_bits to 28"
    )
    return done


class Stopped(RuntimeError):
    """The emulator stopped a kernel: a trap, or something no device is asked to do."""


DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Emulated:
    """The C interface of csrc/cuda/kernels.h behind the signatures of torch.ops.emu2.

    Outputs start as NaN, so that what is not written is seen.
    """

    device = "cpu"

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.simt_report.restype = ctypes.c_char_p
        self.library.simt_configure.argtypes = [ctypes.c_int, ctypes.c_uint64]
        self.configure(2, 0)

    def configure(self, multiprocessors: int, seed: int) -> None:
        self.library.simt_configure(multiprocessors, seed)

    def call(self, name: str, *arguments: Tensor | int | None) -> None:
        converted: list[ctypes.c_void_p | ctypes.c_int64] = []
        for argument in arguments:
            if isinstance(argument, int):
                converted.append(ctypes.c_int64(argument))
            else:
                converted.append(ctypes.c_void_p(None if argument is None else argument.data_ptr()))
        code = getattr(self.library, name)(*converted, ctypes.c_void_p(None))
        if code == LAUNCH_FAILURE:
            raise Stopped(self.library.simt_report().decode())
        assert code == 0, f"{name} returned {code}"

    def interleave(self, text: Tensor, visual: Tensor, slot: Tensor) -> Tensor:
        out = beside(text, text.shape, text.dtype)
        row_bytes = text.shape[1] * text.element_size()
        self.call("emu2_interleave", text, visual, slot, out, len(text), len(visual), row_bytes)
        return out

    def interleave_backward(self, gradient: Tensor, slot: Tensor, visual_rows: int) -> tuple[Tensor, Tensor]:
        width = gradient.shape[1]
        text_gradient = beside(gradient, gradient.shape, gradient.dtype)
        visual_gradient = beside(gradient, (visual_rows, width), gradient.dtype).zero_()
        sizes = len(gradient), visual_rows, width * gradient.element_size()
        self.call("emu2_interleave_backward", gradient, slot, text_gradient, visual_gradient, *sizes)
        for wanted in (0, 1):  # either may be missing, and the other is the same
            pair: list[Tensor | None] = [None, None]
            pair[wanted] = alone = torch.zeros_like((text_gradient, visual_gradient)[wanted])
            self.call("emu2_interleave_backward", gradient, slot, *pair, *sizes)
            assert torch.equal(alone, (text_gradient, visual_gradient)[wanted])
        return text_gradient, visual_gradient

    def regression_loss(
        self,
        predicted: Tensor,
        target: Tensor,
        slot: Tensor,
        denominator: Tensor,
        gradient_scale: Tensor,
        needs_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        rows, width = predicted.shape
        gradient = beside(predicted, predicted.shape, predicted.dtype) if needs_gradient else None
        partial, loss = torch.full((rows,), NAN), torch.tensor(NAN)
        counter = torch.zeros(1, dtype=torch.int32)
        matrices = predicted, target, slot, denominator, gradient_scale, gradient, partial, counter, loss
        sizes = rows, len(target), width, DTYPE_CODES[predicted.dtype]
        self.call("emu2_regression_loss", *matrices, *sizes)
        assert counter.item() == 0, "the counter is not 0 again"
        return loss, torch.empty(0) if gradient is None else gradient

    def rescale(self, gradient: Tensor, upstream: Tensor, folded: Tensor) -> Tensor:
        out = beside(gradient, gradient.shape, gradient.dtype)
        self.call("emu2_rescale", gradient, upstream, folded, out, gradient.numel(), DTYPE_CODES[gradient.dtype])
        return out

    def pool(self, hidden: Tensor, queries: int, dtype: torch.dtype) -> Tensor:
        images, patches, width = hidden.shape
        side = round((patches - 1) ** 0.5)
        out = beside(hidden, (images, queries, width), dtype)
        sizes = images, side, side // round(queries**0.5), width, DTYPE_CODES[hidden.dtype], DTYPE_CODES[dtype]
        self.call("emu2_pool", hidden, out, *sizes)
        return out

    def pool_backward(self, gradient: Tensor, patches: int, dtype: torch.dtype) -> Tensor:
        images, queries, width = gradient.shape
        side = round((patches - 1) ** 0.5)
        out = beside(gradient, (images, patches, width), dtype)
        sizes = images, side, side // round(queries**0.5), width, DTYPE_CODES[dtype], DTYPE_CODES[gradient.dtype]
        self.call("emu2_pool_backward", gradient, out, *sizes)
        return out


def beside(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """NaN, as many elements beside an aligned address as `like`."""
    offset = like.storage_offset()
    count = torch.Size(shape).numel()
    return torch.full((count + offset,), NAN, dtype=dtype)[offset:].view(shape)
