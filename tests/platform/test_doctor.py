"""What the doctor reports, on this machine and on broken ones, and that it imports nothing heavy to find out."""

import importlib.metadata
import io
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from rich.console import Console

from emu2_megatron.platform import doctor, kernels, library
from emu2_megatron.platform.doctor import Row

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def rows():
    return {row.subject: row for row in doctor.report()}


def printed(given) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=200)
    code = doctor.print_report(given, console)
    return code, console.file.getvalue()


def test_this_machine_is_fine():
    code, text = printed(doctor.report())
    assert code == 0
    assert importlib.metadata.version("megatron-core") in text and str(torch.__version__) in text
    found = rows()
    assert all(found[name].fine for name in ("python", "torch", "megatron-core", "torch.distributed"))
    assert found["device"].found.startswith(
        f"cuda, {torch.cuda.device_count()} x " if torch.cuda.is_available() else "cpu, "
    )


def test_backend_is_the_one_runs_use():
    from emu2_megatron.platform import device

    assert rows()["torch.distributed"].found == device.BACKEND


def test_every_row_that_can_be_wrong_says_how_to_mend_it():
    assert [row for row in doctor.report() if (row.required or not row.fine) and not row.fix] == []


def test_the_range_of_megatron_core_is_that_of_pyproject():
    assert doctor._MEGATRON_RANGE in PROJECT["dependencies"]


def test_extras_and_requirements_are_those_of_pyproject():
    assert {extra for extra, _ in doctor._EXTRAS.values()} == set(PROJECT["optional-dependencies"])
    names = {requirement.split(">")[0] for requirement in PROJECT["dependencies"]}
    assert names == {*doctor._REQUIRED, "torch", "megatron-core"}


@pytest.mark.parametrize(
    ("version", "fine"),
    [
        ("0.16.0", False),
        ("0.16.1", True),
        ("0.17.0rc1+cu13", True),
        ("0.19.2", True),
        ("0.20.0", False),
        ("1.0", False),
        ("", False),
    ],
)
def test_supported_megatron_core(monkeypatch, version, fine):
    monkeypatch.setattr(doctor, "_version", lambda name: version if name == "megatron-core" else "1.0")
    row = doctor._megatron_core()
    assert row.fine is fine and row.required
    assert row.fix == "pip install 'megatron-core>=0.16.1,<0.20'"
    assert row.found == (version if fine or not version else f"{version}, not supported")
    assert printed([row])[0] == int(not fine)


def test_triton_is_wanted_from_megatron_core_0_19_on(monkeypatch):
    versions = {"megatron-core": "0.16.1", "triton": ""}
    monkeypatch.setattr(doctor, "_version", versions.__getitem__)
    assert doctor._triton() == []
    versions["megatron-core"] = "0.19.2"
    assert [(row.fine, row.required, row.fix) for row in doctor._triton()] == [(False, True, "pip install triton")]
    versions["triton"] = "3.5"
    assert doctor._triton()[0].fine


def test_without_torch_the_rest_is_still_reported(monkeypatch):
    find_spec = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name))
    found = rows()
    assert not found["torch"].fine and "constraints-cpu.txt" in found["torch"].fix
    assert "device" not in found and "megatron-core" in found and "/dev/shm" in found
    assert printed(doctor.report())[0] == 1


def test_a_torch_that_does_not_import(monkeypatch):
    def broken(name):
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    row = doctor._torch()
    assert not row.fine and "libcudart.so.13" in row.found


def test_a_missing_distribution_and_a_missing_extra(monkeypatch):
    monkeypatch.setitem(doctor._EXTRAS, "no_such_module", ("te", "nothing"))
    found = rows()
    assert found["no_such_module (nothing)"] == Row("no_such_module (nothing)", "", False, fix="pip install -e .[te]")
    code, text = printed([doctor._distribution("no-such-distribution")])
    assert code == 1 and "missing no-such-distribution" in text and "pip install -e ." in text
    assert printed([found["no_such_module (nothing)"]])[0] == 0  # an extra is not required


def test_a_part_of_a_namespace_package_is_looked_for_without_importing(monkeypatch, tmp_path):
    (tmp_path / "nvidia_like").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not doctor._extra("nvidia_like.dali", "dali", "x").fine
    (tmp_path / "nvidia_like" / "dali").mkdir()
    (tmp_path / "nvidia_like" / "dali" / "__init__.py").write_text("raise SystemExit('imported')")
    assert doctor._extra("nvidia_like.dali", "dali", "x").fine


def test_small_shared_memory_is_pointed_out(monkeypatch):
    monkeypatch.setattr(doctor, "_SHARED_MEMORY_GIB", 1e9)
    row = doctor._disks()[0]
    assert row.subject == "/dev/shm" and not row.fine and not row.required and "--shm-size" in row.fix


def test_kernels_without_cuda_are_pytorchs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernels, "_installed", lambda package, part: True)  # installed, but nothing to run it on
    used = kernels.in_use()
    assert used["attention"] == "PyTorch" and used["optimizer"] == "torch.optim.AdamW"
    assert used["fp8"] == "only emulated (fp8.emulate)"


@pytest.mark.parametrize(
    ("installed", "norm", "adam"),
    [
        (("transformer_engine", "apex"), "Transformer Engine", "Transformer Engine FusedAdam"),
        (("apex",), "PyTorch", "apex FusedAdam"),
        ((), "PyTorch", "torch.optim.AdamW"),
    ],
)
def test_kernels_with_cuda(monkeypatch, installed, norm, adam):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "_installed", lambda package, part: package in installed)
    used = kernels.in_use()
    assert (used["norm"], used["optimizer"]) == (norm, adam)
    assert (used["linear"] == "Transformer Engine") is ("transformer_engine" in installed)
    assert ("Transformer Engine" in used["attention"]) is ("transformer_engine" in installed)
    assert used["fp8"].startswith("Transformer Engine") is ("transformer_engine" in installed)


def test_what_decodes(monkeypatch):
    from emu2_megatron.data import decode

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for installed, line, backend in (
        (("nvidia", "dali/experimental/dynamic"), "DALI on the CPU, else Pillow and PyAV", "dali"),
        ((), "Pillow and PyAV", "pillow"),
    ):
        monkeypatch.setattr(kernels, "_installed", lambda *about, installed=installed: about == installed)
        assert rows()["pictures and videos"].found == line and decode.backend() == backend
    assert rows()["nvidia.dali (faster decoding of pictures and clips)"].fix == "pip install -e .[dali]"


def test_the_apex_of_pypi_is_another_one(monkeypatch, tmp_path):
    package = tmp_path / "apex_like"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert not kernels._installed("apex_like", "optimizers")
    (package / "optimizers").mkdir()
    assert kernels._installed("apex_like", "optimizers")


BUILD = "python setup.py build_ext --inplace"


@pytest.mark.parametrize(
    ("enabled", "problem", "has_cuda", "gpu", "found", "fix"),
    [
        (True, "", False, False, "compiled, for CPU", ""),
        (True, "", True, False, "compiled, for CPU and CUDA", ""),
        (True, "", True, True, "compiled, for CPU and CUDA", ""),
        (True, "", False, True, "compiled on the CPU, PyTorch on the GPU",
         f"EMU2_BUILD_CUDA=1 {BUILD} (needs nvcc, g++ and torch 2.13 or newer)"),
        (True, "not built", False, False, "PyTorch (compiled ops: not built)",
         f"{BUILD} (needs g++ and torch 2.10 or newer)"),
        (True, "not built", False, True, "PyTorch (compiled ops: not built)",
         f"EMU2_BUILD_CUDA=1 {BUILD} (needs nvcc, g++ and torch 2.13 or newer)"),
        (False, "", False, False, "PyTorch (EMU2_FUSED_OPS=0)", ""),
    ],
)  # fmt: skip
def test_what_runs_our_ops(monkeypatch, enabled, problem, has_cuda, gpu, found, fix):
    for name, value in (("enabled", enabled), ("problem", problem), ("has_cuda", has_cuda)):
        monkeypatch.setattr(library, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    row = next(row for row in doctor._kernels() if row.subject == kernels.FUSED_OPS)
    assert row == Row(kernels.FUSED_OPS, found, fine=not fix, fix=fix)
    assert (fix in printed([row])[1]) and printed([row])[0] == 0


def test_nothing_heavy_is_imported():
    script = (
        "import json, sys; from emu2_megatron.platform import doctor; doctor.report();"
        "print(json.dumps([m for m in sys.modules if m.split('.')[0] in "
        "('megatron', 'transformer_engine', 'apex', 'wandb') or m.startswith('nvidia.dali')]))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
