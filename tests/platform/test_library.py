"""Loading the library of compiled ops, or not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from emu2_megatron.platform import library

ROOT = Path(__file__).parents[2]


def test_no_file_is_no_reason_to_warn(tmp_path, recwarn):
    assert library.load(tmp_path / "_C.so") == "not built"
    assert not recwarn.list


def test_a_file_that_does_not_load_is_warned_of(tmp_path):
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"\x7fELF and no more")
    with pytest.warns(UserWarning, match=r"_C\.so does not load.*file too short.*setup\.py build_ext --inplace"):
        assert library.load(broken).startswith("does not load: ")


@pytest.mark.skipif(bool(library.problem), reason="the library is not built")
def test_what_is_served(monkeypatch):
    on_cpu, on_meta = torch.empty(1), torch.empty(1, device="meta")
    monkeypatch.setattr(library, "enabled", True)
    assert library.serves(on_cpu) and not library.serves(on_meta)
    monkeypatch.setattr(library, "enabled", False)
    assert not library.serves(on_cpu)


@pytest.mark.parametrize(("value", "enabled"), [("0", False), ("1", True), (None, True)])
def test_the_environment_turns_them_off(value, enabled):
    environment = {name: text for name, text in os.environ.items() if name != "EMU2_FUSED_OPS"}
    if value is not None:
        environment["EMU2_FUSED_OPS"] = value
    script = "import json; from emu2_megatron.platform import library; print(json.dumps(library.enabled))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) is enabled
