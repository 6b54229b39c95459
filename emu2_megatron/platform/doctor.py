"""`emu2 doctor`: what this machine has, what is missing, and the command that brings it."""

import importlib
import importlib.metadata
import importlib.util
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

PYTHON = (3, 11)
MEGATRON_CORE = ((0, 16, 1), (0, 20))
"""Supported versions of megatron-core: from the first, below the second; pyproject.toml says the same."""
_MEGATRON_RANGE = "megatron-core>={},<{}".format(*(".".join(map(str, bound)) for bound in MEGATRON_CORE))

_SHARED_MEMORY_GIB = 1.0
"""NCCL and workers that load data pass buffers through /dev/shm; a container's default of 64 MiB is too small."""

_REQUIRED = "av numpy omegaconf pillow psutil pyyaml rich safetensors sentencepiece tensorboard".split()
"""Distributions without which something in the package does not import, besides torch and megatron-core."""

_EXTRAS = {
    "transformer_engine": ("te", "fused layers and FP8"),
    "nvidia.dali": ("dali", "faster decoding of pictures and clips"),
    "pyarrow": ("parquet", "shards made of Parquet files"),
    "diffusers": ("diffusion", "the decoders of pictures and clips"),
    "fastapi": ("serve", "emu2 serve"),
    "wandb": ("wandb", "logs in Weights & Biases"),
    "pytest": ("dev", "tests"),
}


class Row(NamedTuple):
    """One line of the report."""

    subject: str
    found: str
    """Version, size or implementation; empty when there is nothing."""
    fine: bool = True
    required: bool = False
    """Nothing runs unless it is fine."""
    fix: str = ""
    """The command that helps, when it is not fine."""


def report() -> list[Row]:
    """Look at the machine. Starts no process group and imports neither Transformer Engine nor apex nor DALI."""
    rows = [_python(), _torch(), _megatron_core(), *_triton(), *map(_distribution, _REQUIRED)]
    if rows[1].fine:  # what follows needs torch
        rows += [*_device(), *_kernels()]
    return [*rows, *(_extra(module, *about) for module, about in _EXTRAS.items()), *_disks()]


def print_report(rows: list[Row], console: Console | None = None) -> int:
    """Print the rows as a table; returns the exit code, 1 if something required is missing."""
    table = Table(box=None, pad_edge=False)
    for heading in ("", "found", "to fix it"):
        table.add_column(heading, overflow="fold")  # never cut a command short
    for row in rows:
        mark = "[green]ok[/]" if row.fine else "[red]missing[/]" if row.required else "[yellow]-[/]"
        table.add_row(f"{mark} {escape(row.subject)}", escape(row.found), "" if row.fine else escape(row.fix))
    # In a pipe or a file there is no width to keep to.
    (console or (Console() if sys.stdout.isatty() else Console(width=140))).print(table)
    return int(any(row.required and not row.fine for row in rows))


def _python() -> Row:
    wanted = ".".join(map(str, PYTHON))
    fix = f"make venv PYTHON=python{wanted}"
    return Row("python", platform.python_version(), sys.version_info >= PYTHON, required=True, fix=fix)


def _torch() -> Row:
    fix = "pip install -e . -c constraints-cpu.txt, or NVIDIA's PyTorch container for CUDA"
    if importlib.util.find_spec("torch") is None:
        return Row("torch", "", fine=False, required=True, fix=fix)
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:  # installed but broken: a shared library that is missing, for example
        return Row("torch", f"does not import: {error}", fine=False, required=True, fix=fix)
    return Row("torch", str(torch.__version__), required=True, fix=fix)


def _megatron_core() -> Row:
    version = _version("megatron-core")
    low, high = MEGATRON_CORE
    fine = version != "" and low <= _numbers(version) < high
    found = version if fine or not version else f"{version}, not supported"
    return Row("megatron-core", found, fine, required=True, fix=f"pip install '{_MEGATRON_RANGE}'")


def _triton() -> list[Row]:
    """megatron-core 0.19 imports triton even on a CPU, and the CPU build of torch does not bring it."""
    version = _version("megatron-core")
    if not version or _numbers(version) < (0, 19):
        return []
    return [Row("triton", _version("triton"), _version("triton") != "", required=True, fix="pip install triton")]


def _distribution(name: str) -> Row:
    return Row(name, _version(name), _version(name) != "", required=True, fix="pip install -e .")


def _device() -> list[Row]:
    # Not from platform.device: on a CPU that imports megatron-core, which may be what is missing.
    torch = importlib.import_module("torch")
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        return [
            Row("device", f"cuda, {torch.cuda.device_count()} x {', '.join(sorted(names))}"),
            _backend("nccl", torch.distributed.is_nccl_available()),
        ]
    idle = Path("/dev/nvidiactl").exists()  # a driver is loaded, so torch could use a GPU
    fix = "a GPU is there that torch does not see: install a CUDA build of torch that fits the driver"
    return [
        Row("device", f"cpu, {torch.get_num_threads()} threads", not idle, fix=fix),
        _backend("gloo", torch.distributed.is_gloo_available()),
    ]


def _backend(name: str, available: bool) -> Row:
    fix = f"install a build of torch with {name}: the official wheels have it"
    return Row("torch.distributed", name if available else "", available, required=True, fix=fix)


def _kernels() -> list[Row]:
    kernels = importlib.import_module("emu2_megatron.platform.kernels")
    fixes = {kernels.FUSED_OPS: kernels.library.remedy()}
    return [
        Row(group, implementation, not fixes.get(group), fix=fixes.get(group, ""))
        for group, implementation in kernels.in_use().items()
    ]


def _extra(module: str, extra: str, purpose: str) -> Row:
    top, _, part = module.partition(".")
    spec = importlib.util.find_spec(top)
    places = spec.submodule_search_locations if spec else None
    found = spec is not None and (not part or any((Path(place) / part).is_dir() for place in places or []))
    return Row(f"{module} ({purpose})", "installed" if found else "", found, fix=f"pip install -e .[{extra}]")


def _disks() -> list[Row]:
    rows = []
    if Path("/dev/shm").exists():
        size = shutil.disk_usage("/dev/shm").total / 2**30
        fix = "docker run --ipc=host, or --shm-size=16g"
        rows.append(Row("/dev/shm", f"{size:.1f} GiB", size >= _SHARED_MEMORY_GIB, fix=fix))
    return [*rows, Row("disk, here", f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free")]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    """`0.17.0rc1+cu13` gives (0, 17, 0)."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, release[0].split("."))) if release else ()
