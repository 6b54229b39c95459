"""What nvcc makes of the kernels: that they compile for every GPU they are meant for, and what they cost there."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from emulation import KERNELS, SOURCES

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin")
ARCHITECTURES = (80, 90, 100)
MOST_REGISTERS = 64
"""Of 65,536 that an SM of each of these has: 1024 threads fit, half of its most. Each has 16 to 64 bytes on their way,
so the SM has 16 KiB at least. To keep its memory busy an H100 needs 17 (3.35 TB/s, 0.7 µs, 132 SMs), and the kernels
with 16 bytes have fewer registers and more threads."""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="nvcc is not installed: nothing is checked")]


def nvcc(*arguments: str | Path) -> str:
    assert NVCC is not None
    done = subprocess.run([NVCC, "-std=c++17", "-O3", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def resources(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], str]:
    """ptxas' report by (file, architecture)."""
    folder = tmp_path_factory.mktemp("nvcc")

    def compiled(job: tuple[str, int]) -> str:
        name, architecture = job
        code = f"arch=compute_{architecture},code=sm_{architecture}"
        target = folder / f"{name}.{architecture}.o"
        return nvcc("-Werror", "all-warnings", "-Xptxas", "-v", "-gencode", code, "-c", KERNELS / name, "-o", target)

    jobs = [(name, architecture) for name in SOURCES for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(jobs, pool.map(compiled, jobs), strict=True))


def numbers(pattern: str, text: str) -> list[int]:
    return [int(number) for number in re.findall(pattern, text)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", SOURCES)
def test_resources(resources: dict[tuple[str, int], str], name: str, architecture: int) -> None:
    report = resources[name, architecture]
    registers = numbers(r"Used (\d+) registers", report)
    print(f"{name} sm_{architecture}: {len(registers)} kernels, {min(registers)} to {max(registers)} registers")
    assert max(registers) <= MOST_REGISTERS
    for what in ("spill stores", "spill loads", "stack frame"):
        amounts = numbers(rf"(\d+) bytes {what}", report)
        assert len(amounts) == len(registers) and not any(amounts), what


def stores(entry: str) -> list[str]:
    """Types of the stores to global memory in a kernel's PTX."""
    return re.findall(r"\bst\.global(?:\.wb)?\.((?:v\d\.)?\w\d+)", entry)


@pytest.mark.parametrize("name", SOURCES)
def test_vectors_are_stored_whole(name: str, tmp_path: Path) -> None:
    """A kernel for 16-byte accesses stores nothing element by element but a partial sum and the loss."""
    target = tmp_path / "kernels.ptx"
    nvcc("-arch=sm_90", "-ptx", KERNELS / name, "-o", target)
    entries = target.read_text().split(".entry ")[1:]
    vector = [entry for entry in entries if is_vector(entry.split("(")[0])]
    assert vector
    for entry in vector:
        kernel = entry.split("(")[0]
        single = [kind for kind in stores(entry) if not kind.startswith("v")]
        allowed = ["f32", "f32"] if "regression_loss" in kernel else []
        assert sorted(single) == allowed, f"{kernel}: {single}"


def is_vector(mangled: str) -> bool:
    """Of a template over chunks (uint4) or over the elements of an access (4 or 8)."""
    return "uint4" in mangled or re.search(r"Li[48]E", mangled) is not None


def test_reports_are_read() -> None:
    assert numbers(r"Used (\d+) registers", "ptxas info : Used 40 registers\nptxas info : Used 31 registers") == [
        40,
        31,
    ]
    assert stores("st.global.f32 [%rd1], %f1;\n st.global.wb.v4.u32 [%rd2], {%r1};") == ["f32", "v4.u32"]
