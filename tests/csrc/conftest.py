"""The kernels on the emulator, built once."""

from pathlib import Path

import pytest
from emulation import COMPILER, KERNELS, SOURCES, Emulated, compile_emulator, compile_kernels, link


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    """The unmodified kernels, without sanitizers."""
    if COMPILER is None:
        pytest.skip("the emulator needs g++")
    folder: Path = tmp_path_factory.mktemp("plain")
    objects = compile_emulator(folder, "plain") + compile_kernels([KERNELS / name for name in SOURCES], folder, "plain")
    return Emulated(link(objects, folder / "kernels.so", "plain", library=True))
