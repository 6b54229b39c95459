"""setup.py: what it builds, and what it says where it cannot."""

import os
import runpy
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch

from emu2_megatron.platform import library

ROOT = Path(__file__).parents[2]
SETUP = runpy.run_path(str(ROOT / "setup.py"))
TORCH = Path(torch.__file__).parent
SITE = Path(setuptools.__file__).parents[1]

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def copy(to: Path) -> Path:
    """The sources, without anything that was built."""
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to)
    for name in ("csrc", "emu2_megatron"):
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return to


def build(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "--quiet", *(arguments or ("build_ext", "--inplace"))]
    environment = {**os.environ, "EMU2_BUILD_CUDA": "0", **environment}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


@needs_compiler
def test_where_there_is_a_compiler_the_tests_use_the_library() -> None:
    """Otherwise half of the tests of the ops would be skipped and nobody would know."""
    assert library.problem == "", f"to build it: {library.BUILD}"


@needs_compiler
def test_the_library_asks_for_nothing_but_torch_and_the_systems_libraries() -> None:
    """One file for every Python and torch: no symbol of either's C++ interface, which changes with every version."""
    needed = subprocess.run(["readelf", "-d", str(library.FILE)], capture_output=True, text=True, check=True).stdout
    names = {line.split("[")[1].split(".so")[0] for line in needed.splitlines() if "NEEDED" in line}
    assert names <= {"libtorch_cpu", "libc10", "libstdc++", "libm", "libgcc_s", "libc", "ld-linux-x86-64",
                     "libpthread", "libdl", "librt"}  # fmt: skip
    symbols = subprocess.run(
        ["nm", "-DC", "--undefined-only", str(library.FILE)], capture_output=True, text=True, check=True
    )
    undefined = [line.split(maxsplit=1)[1] for line in symbols.stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in undefined)
    assert [name for name in undefined if name.startswith(("c10::", "at::", "torch::", "Py"))] == []
    # The names are torch's, its wrappers and the lambdas in them stay inside.
    assert not any("_Py" in name for name in undefined)


@pytest.mark.parametrize(
    ("environment", "missing"),
    [
        ({"PATH": "/nonexistent"}, "a C++ compiler (g++; CXX names another)"),
        ({"CXX": "no-such-compiler"}, "a C++ compiler (no-such-compiler; CXX names another)"),
        ({"EMU2_BUILD_CUDA": "1", "PATH": "/usr/bin", "CUDA_HOME": "/nonexistent"},
         "nvcc, in PATH or under CUDA_HOME, for CUDA kernels"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_and_the_build_goes_on(
    tmp_path: Path, environment: dict[str, str], missing: str
) -> None:
    if "CUDA_HOME" in environment and (shutil.which("g++", path="/usr/bin") is None or Path("/usr/bin/nvcc").exists()):
        pytest.skip("not a machine on which this is what is missing")
    root = copy(tmp_path)
    done = build(root, **environment)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("emu2_megatron: ")]
    assert len(lines) == 1 and f"is needed: {missing}. Then" in lines[0] and lines[0].endswith(library.BUILD)
    assert not list(root.rglob("*.so"))


@needs_compiler
def test_a_compiler_that_fails_fails_the_build(tmp_path: Path) -> None:
    root = copy(tmp_path)
    (root / "csrc" / "cpu" / "kernels.h").write_text("#error broken\n")
    done = build(root)
    assert done.returncode != 0 and "#error broken" in done.stderr and "this failed, see above: " in done.stderr


def torch_like(folder: Path, version: str, cuda: str) -> Path:
    """A folder that looks like an installed torch."""
    (folder / "torch").mkdir()
    text = f"__version__ = '{version}'\ndebug = False\ncuda: Optional[str] = {cuda}\n"
    (folder / "torch" / "version.py").write_text(text)
    (folder / "torch" / "__init__.py").write_text("raise SystemExit('imported')")
    return folder / "torch"


@pytest.mark.parametrize(
    ("version", "cuda", "found"),
    [
        ("2.13.0+cpu", "None", ((2, 13), False)),
        ("2.14.1", "'13.0'", ((2, 14), True)),
        ("2.10.0a0+nv25.12", "'13.1'", ((2, 10), True)),
        ("2.9.1", "'12.8'", "torch 2.10 or newer (found 2.9)"),
        (None, "", "torch 2.10 or newer, installed before this package is built"),
    ],
)
def test_torch_is_found_without_importing_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str | None, cuda: str, found: Any
) -> None:
    if version:
        torch_like(tmp_path, version, cuda)
    monkeypatch.setattr(SETUP["sysconfig"], "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(sys, "path", [])
    if isinstance(found, str):
        with pytest.raises(SETUP["MissingError"]) as raised:
            SETUP["find_torch"]()
        assert str(raised.value) == found
    else:
        assert SETUP["find_torch"]() == (tmp_path / "torch", *found)


@pytest.mark.parametrize(
    ("asked", "nvcc", "version", "torch_has_cuda", "found"),
    [
        ("", True, (2, 13), True, True),
        ("", True, (2, 13), False, False),
        ("", False, (2, 13), True, False),
        ("0", True, (2, 13), True, False),
        ("1", True, (2, 13), False, True),
        ("1", False, (2, 13), True, "nvcc, in PATH or under CUDA_HOME, for CUDA kernels"),
        ("", True, (2, 12), True, False),
        ("1", True, (2, 12), True, "torch 2.13 or newer for CUDA kernels"),
    ],
)
def test_when_cuda_kernels_are_built(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    asked: str,
    nvcc: bool,
    version: Any,
    torch_has_cuda: bool,
    found: Any,
) -> None:
    monkeypatch.setenv("EMU2_BUILD_CUDA", asked)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    if nvcc:
        (tmp_path / "nvcc").write_text("")
        (tmp_path / "nvcc").chmod(0o755)
    if isinstance(found, str):
        with pytest.raises(SETUP["MissingError"], match=found):
            SETUP["find_nvcc"](version, torch_has_cuda)
    else:
        assert (SETUP["find_nvcc"](version, torch_has_cuda) is not None) is found


@needs_compiler
@pytest.mark.slow
def test_isolated_installations_bring_a_library_that_works(tmp_path: Path) -> None:
    """Wheel and editable, from the source distribution, in an environment that has torch where pip puts it and does not
    let the build import it: pip's isolation, without its downloads."""
    (tmp_path / "checkout").mkdir()
    root = copy(tmp_path / "checkout")
    done = build(root, "sdist", "--formats=gztar", "--dist-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    (sources,) = (tmp_path / "unpacked").iterdir()
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "torch").symlink_to(TORCH)
    # In the place of what pip would download for the build; torch itself is not on this path.
    backend = tmp_path / "backend"
    backend.mkdir()
    for part in [*SITE.glob("setuptools*"), *SITE.glob("wheel*")]:
        (backend / part.name).symlink_to(part)
    (backend / "sitecustomize.py").write_text(
        "import sys\nif any('_in_process' in word for word in sys.argv):\n"
        "    sys.path[:] = [p for p in sys.path if not p.endswith('site-packages')]\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(backend), "EMU2_BUILD_CUDA": "0"}
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(sources)]
    subprocess.run(wheel, env=environment, check=True)
    (file,) = tmp_path.glob("*.whl")
    assert "emu2_megatron/ops/_C.so" in zipfile.ZipFile(file).namelist()
    install = [*pip, "install", "--no-deps", "--no-build-isolation", "--editable", str(root)]
    subprocess.run(install, env=environment, check=True)
    assert (root / "emu2_megatron" / "ops" / "_C.so").exists()
    script = (
        "import torch\nfrom emu2_megatron.platform import library\none = torch.ones(())\n"
        "print(library.FILE, repr(library.problem), torch.ops.emu2.rescale(torch.ones(2), one, one).sum())"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == f"{root}/emu2_megatron/ops/_C.so '' tensor(2.)\n"
