"""Sessions of nox: the tests with other versions than `make test` uses. docs/compatibility.md has the results."""

from pathlib import Path

import nox

nox.options.error_on_missing_interpreters = True  # by default a session without its Python counts as passed
nox.options.reuse_venv = "yes"  # torch takes minutes to install

MEGATRON_CORE = "0.19.2"
"""The newest release of the supported range (pyproject.toml); it needs Python 3.12."""


@nox.session(python="3.12")
def compat(session: nox.Session) -> None:
    """What `make test` runs, with the newest megatron-core. Arguments after `--` go to pytest instead."""
    pins = Path("constraints-cpu.txt").read_text().splitlines()
    torch = next(pin for pin in pins if pin.startswith("torch=="))
    # megatron-core 0.19 imports triton, which only torch's CUDA builds bring.
    session.install("--editable", ".[dev]", torch, f"megatron-core=={MEGATRON_CORE}", "triton")
    session.run("emu2", "doctor")
    session.run("pytest", "-q", *(session.posargs or ["-m", "not gpu and not faults"]))
