"""Builds the compiled ops, `emu2_megatron/ops/_C.so`, of csrc/; everything else about the package is in pyproject.toml.

The library is not a Python module: torch loads it (`ops/library.py`), and as it uses nothing but LibTorch's stable ABI,
one file serves every version of Python and every torch from the one in `TORCH` on, with CUDA or without.

Needs a C++ compiler (g++, or what CXX names) and the headers of a torch that is installed already; without either, the
package is installed all the same and uses its plain PyTorch references. CUDA kernels are added where nvcc is there and
torch has CUDA, or where EMU2_BUILD_CUDA=1 asks for them (0 leaves them out); EMU2_CUDA_ARCHS is "80;90;100" by default.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import PathFinder
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
SOURCES = ["csrc/binding.cpp", "csrc/cpu/kernels.cpp"]

TORCH, TORCH_FOR_CUDA = (2, 10), (2, 13)
"""The first versions whose stable ABI has what is used: parallel_for; with CUDA, a stream's native handle."""


class MissingError(Exception):
    """Something the build needs is not there."""


def find_torch() -> tuple[Path, tuple[int, ...], bool]:
    """Folder, version and whether it has CUDA, of the torch beside this Python.

    In pip's isolated build environment torch cannot be imported, but the folders of the environment that the package
    goes into still have their names.
    """
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    spec = PathFinder.find_spec("torch", places)
    wanted = "torch {}.{} or newer".format(*TORCH)
    if spec is None or not spec.submodule_search_locations:
        raise MissingError(f"{wanted}, installed before this package is built")
    root = Path(next(iter(spec.submodule_search_locations)))
    text = (root / "version.py").read_text()
    number = re.search(r"__version__ = '(\d+)\.(\d+)", text)
    version = tuple(map(int, number.groups())) if number else (0,)
    if version < TORCH:
        raise MissingError(f"{wanted} (found {'.'.join(map(str, version))})")
    return root, version, re.search(r"^cuda\b[^=]*= *'", text, re.MULTILINE) is not None


def find_nvcc(torch_version: tuple[int, ...], torch_has_cuda: bool) -> str | None:
    """The CUDA compiler, if CUDA kernels are to be built."""
    asked = os.environ.get("EMU2_BUILD_CUDA", "")
    nvcc = shutil.which("nvcc") or shutil.which(os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin/nvcc")
    if asked == "0" or (asked != "1" and not (nvcc and torch_has_cuda)):
        return None
    if nvcc is None:
        raise MissingError("nvcc, in PATH or under CUDA_HOME, for CUDA kernels")
    if torch_version < TORCH_FOR_CUDA:
        wanted = "torch {}.{} or newer for CUDA kernels".format(*TORCH_FOR_CUDA)
        if asked == "1":
            raise MissingError(wanted)
        say(f"without CUDA kernels; needed is {wanted}")
        return None
    return nvcc


def say(message: str) -> None:
    """A line on stderr; pip shows it with -v."""
    print(f"emu2_megatron: {message}", file=sys.stderr, flush=True)


class BuildOps(build_ext):
    """Compiles and links by two command lines, which torch's own build helpers would have to import torch for."""

    def get_ext_filename(self, fullname: str) -> str:
        """`_C.so`, without a tag of Python's version."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Build the library, or say what is missing."""
        try:
            root, version, has_cuda = find_torch()
            compiler = shutil.which(os.environ.get("CXX", "g++"))
            if compiler is None:
                raise MissingError(f"a C++ compiler ({os.environ.get('CXX', 'g++')}; CXX names another)")
            nvcc = find_nvcc(version, has_cuda)
        except MissingError as missing:
            say(
                f"NO COMPILED OPS, plain PyTorch takes their place. To build them is needed: {missing}. Then install "
                "again, or in a checkout: python setup.py build_ext --inplace"
            )
            return
        out, objects = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp)
        for folder in (out.parent, objects):
            folder.mkdir(parents=True, exist_ok=True)
        target = TORCH_FOR_CUDA if nvcc else TORCH
        plain = [compiler, "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
        plain += [f"-DTORCH_TARGET_VERSION=0x{target[0]:02x}{target[1]:02x}{0:012x}", "-isystem", f"{root}/include"]
        jobs = [[*plain, *(["-DEMU2_WITH_CUDA"] if nvcc else []), "-c", source] for source in SOURCES]
        if nvcc:
            jobs += [[*cuda_command(nvcc), "-c", source] for source in cuda_sources()]
        for job in jobs:
            job += ["-o", str(objects / (job[-1].replace("/", "_") + ".o"))]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", len(os.sched_getaffinity(0))))) as pool:
            list(pool.map(run, jobs))
        link = [compiler, "-shared"]
        if nvcc:  # nvcc knows where its runtime is
            link = [nvcc, "-shared", "-cudart", "static", "-Xlinker", "--exclude-libs,ALL"]
        libraries = [f"-L{root}/lib", "-ltorch_cpu", "-lc10"]
        run([*link, "-Xlinker", "--no-undefined", "-o", str(out), *(job[-1] for job in jobs), *libraries])
        say(f"compiled ops for {'CPU and CUDA' if nvcc else 'CPU'}: {out}")


def cuda_sources() -> list[str]:
    """The kernels' files."""
    return sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc" / "cuda").glob("*.cu"))


def cuda_command(nvcc: str) -> list[str]:
    """nvcc with code for every architecture, and PTX of the last for those to come."""
    archs = os.environ.get("EMU2_CUDA_ARCHS", "80;90;100").split(";")
    pairs = [(arch, f"sm_{arch}") for arch in archs] + [(archs[-1], f"compute_{archs[-1]}")]
    code = [f"-gencode=arch=compute_{arch},code={code}" for arch, code in pairs]
    return [nvcc, "-std=c++17", "-O3", *code, "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def run(command: list[str]) -> None:
    """Run a compiler; its own messages say what is wrong."""
    if subprocess.run(command, cwd=HERE).returncode:
        sys.exit(f"emu2_megatron: this failed, see above: {' '.join(command)}")


if __name__ == "__main__":
    # optional: an installation without the library is one too.
    setup(
        ext_modules=[Extension("emu2_megatron.ops._C", SOURCES, optional=True)],
        cmdclass={"build_ext": BuildOps},
    )
