"""The kernels under the sanitizers, with buffers of exactly the size they ask for."""

from pathlib import Path

import pytest
from emulation import COMPILER, KERNELS, SIMT, SOURCES, compile_emulator, compile_kernels, driver_cases, link, run_driver

FAR = "far 65537 40000"  # the offset of the row does not fit into 32 bits


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++")
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizer_is_silent(sanitizer: str, tmp_path: Path) -> None:
    objects = compile_emulator(tmp_path, sanitizer)
    sources = [*(KERNELS / name for name in SOURCES), SIMT.parent / "driver.cpp"]
    objects += compile_kernels(sources, tmp_path, sanitizer)
    driver = link(objects, tmp_path / "driver", sanitizer, library=False)
    for multiprocessors, seed in ((1, 1), (2, 0), (3, 5)):
        done = run_driver(driver, [*driver_cases(), FAR], multiprocessors, seed)
        assert done.returncode == 0, f"{multiprocessors} blocks, seed {seed}\n{done.stdout}{done.stderr[-4000:]}"
