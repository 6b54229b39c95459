"""Whether FP8 can run here, asked before any weight is made."""

import sys
from pathlib import Path

import pytest

from emu2_megatron.config.schema import Fp8Config
from emu2_megatron.errors import ConfigError
from emu2_megatron.platform import kernels

CHECKS = "def check_fp8_support(): return True, ''\ndef check_mxfp8_support(): return False, 'capability 10.0 wanted'\n"


def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """A Transformer Engine with the check functions alone, in the module where a version has them."""
    package = tmp_path / "transformer_engine" / "pytorch"
    package.mkdir(parents=True)
    for file, text in ((package.parent / "__init__.py", ""), (package / "__init__.py", ""), (package / module, CHECKS)):
        file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(kernels, "has_transformer_engine", lambda: True)


def test_without_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_transformer_engine", lambda: False)
    kernels.require_fp8(Fp8Config())
    kernels.require_fp8(Fp8Config(recipe="mxfp8", emulate=True))
    with pytest.raises(ConfigError, match="^fp8.recipe: current; needs a GPU and Transformer Engine.*fp8.emulate=true"):
        kernels.require_fp8(Fp8Config(recipe="current"))


@pytest.mark.parametrize("module", ["quantization.py", "fp8.py"])
def test_transformer_engine_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    engine(tmp_path, monkeypatch, module)
    kernels.require_fp8(Fp8Config(recipe="delayed"))
    kernels.require_fp8(Fp8Config(recipe="current"))
    with pytest.raises(ConfigError, match="^fp8.recipe: mxfp8; capability 10.0 wanted; "):
        kernels.require_fp8(Fp8Config(recipe="mxfp8"))
    with pytest.raises(ConfigError, match="^fp8.recipe: block; this version of Transformer Engine does not have it"):
        kernels.require_fp8(Fp8Config(recipe="block"))
