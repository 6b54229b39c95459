"""The CPU kernels alone, compiled for each level of x86-64: all give the same bits."""

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
COMMAND = ["g++", "-std=c++20", "-O3", "-fPIC", "-shared", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
# As setup.py compiles it; for one level; and with everything undefined ending the process.
LEVELS = {
    "chosen when loaded": [],
    "x86-64": ["-march=x86-64", "-DEMU2_ONE_LEVEL"],
    "x86-64-v3": ["-march=x86-64-v3", "-DEMU2_ONE_LEVEL"],
    "x86-64-v4": ["-march=x86-64-v4", "-DEMU2_ONE_LEVEL"],
    "undefined behaviour": ["-fsanitize=undefined", "-fno-sanitize-recover=all", "-DEMU2_ONE_LEVEL"],
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
"""In the order of csrc/cpu/kernels.h."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="not x86-64"),
]


def runs_here(level: str) -> bool:
    flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    needed = {"x86-64-v3": {"avx2", "fma", "bmi2"}, "x86-64-v4": {"avx512f", "avx512bw", "avx512vl", "avx512dq"}}
    return needed.get(level, set()) <= flags


def results(library: Any) -> list[Tensor]:
    """What the kernels that compute give for random numbers, special ones among them, of odd widths."""
    generator = torch.Generator().manual_seed(0)
    rows, width, side, window = 5, 1100 + 37, 4, 2
    slot = torch.tensor([2, -1, 0, 4, 2], dtype=torch.int32)
    out = []

    def pointer(tensor: Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(tensor.data_ptr())

    def integers(*values: int) -> list[ctypes.c_int64]:
        return [ctypes.c_int64(value) for value in values]

    for code, dtype in enumerate(DTYPES):
        numbers = torch.randn(2, rows, width, generator=generator) * 10 ** torch.randn(
            2, rows, width, generator=generator
        ).mul(3)
        predicted, target = numbers.to(dtype)
        predicted[0, :4] = torch.tensor([float("inf"), -0.0, 1e-7, 3e-8])
        squares, gradient = torch.zeros(rows, dtype=torch.float64), torch.zeros_like(predicted)
        library.emu2_cpu_regression_loss(
            pointer(predicted), pointer(target), pointer(slot), ctypes.c_double(1 / 3), pointer(gradient),
            pointer(squares), *integers(0, rows, width), code,
        )  # fmt: skip
        scaled = torch.zeros_like(predicted)
        library.emu2_cpu_rescale(
            pointer(predicted), ctypes.c_double(0.7), pointer(scaled), *integers(0, rows * width), code
        )
        hidden = torch.randn(2, 1 + side**2, 37, generator=generator).to(dtype)
        for out_code, out_dtype in enumerate(DTYPES):
            if (dtype is torch.float64) == (out_dtype is torch.float64):
                pooled, back = torch.zeros(2, 4, 37, dtype=out_dtype), torch.zeros_like(hidden)
                shape = integers(0, 8, side, window, 37)
                library.emu2_cpu_pool(pointer(hidden), pointer(pooled), *shape, code, out_code)
                library.emu2_cpu_pool_backward(pointer(pooled), pointer(back), *shape, code, out_code)
                out += [pooled, back]
        out += [squares, gradient, scaled]
    return out


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    return results(built(tmp_path_factory.mktemp("lowest"), ["-O0", "-DEMU2_ONE_LEVEL"]))


def built(folder: Path, flags: list[str]) -> Any:
    file = folder / "kernels.so"
    subprocess.run([*COMMAND, *flags, str(ROOT / "csrc/cpu/kernels.cpp"), "-o", str(file)], check=True)
    return ctypes.CDLL(str(file))


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_gives_the_bits_of_plain_code(level: str, wanted: list[Tensor], tmp_path: Path) -> None:
    """Plain: not optimised. Not a number is one number among many; which one is no matter."""
    if not runs_here(level):
        pytest.skip(f"this CPU is not {level}")
    for number, (got, want) in enumerate(zip(results(built(tmp_path, LEVELS[level])), wanted, strict=True)):
        same = torch.equal(got.view(torch.uint8), want.view(torch.uint8))
        assert same or torch.equal(got.nan_to_num(nan=12345.0), want.nan_to_num(nan=12345.0)), number


def test_contraction_would_show(wanted: list[Tensor], tmp_path: Path) -> None:
    """The comparison can fail: with multiplications fused into additions the bits are others."""
    if not runs_here("x86-64-v3"):
        pytest.skip("no fused multiply-add")
    got = results(built(tmp_path, [*LEVELS["x86-64-v3"], "-ffp-contract=fast"]))
    assert not all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))
