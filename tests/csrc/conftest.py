"""What the tests of the kernels share: objects for the emulator, each compiled once."""

from collections.abc import Callable
from pathlib import Path

import pytest
from emulation import COMPILER, KERNELS, SIMT, SOURCES, Emulated, compile_sources, link

Objects = dict[str, Path]
"""By name of the source: the unmodified kernels, the emulator, and but for `plain` the driver."""


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Objects]:
    """Of a variant: plain, address or thread."""
    if COMPILER is None:
        pytest.skip("the emulator needs g++")
    made: dict[str, Objects] = {}

    def of(variant: str) -> Objects:
        if variant not in made:
            sources = [KERNELS / name for name in SOURCES] + sorted(SIMT.glob("*.cpp"))
            if variant != "plain":
                sources.append(SIMT.parent / "driver.cpp")
            compiled = compile_sources(sources, tmp_path_factory.mktemp(variant), variant)
            made[variant] = {source.name: path for source, path in zip(sources, compiled, strict=True)}
        return made[variant]

    return of


@pytest.fixture(scope="session")
def emulated(objects: Callable[[str], Objects], tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    """The unmodified kernels, without sanitizers."""
    target = tmp_path_factory.mktemp("emulated") / "kernels.so"
    return Emulated(link(list(objects("plain").values()), target, "plain", library=True))
