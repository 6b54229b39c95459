"""What no file of the project may do, beyond the rules of test_imports.py; docs/security.md says why.

Names are followed through imports: `from os import popen as p; p(x)` is `os.popen(x)`. Each rule is tried on something
that breaks it.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from emu2_megatron.config import loading
from emu2_megatron.errors import ConfigError

ROOT = Path(__file__).parents[1]
FOLDERS = ("emu2_megatron", "tools", "examples", "benchmarks")
FILES = sorted([*(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")), *ROOT.glob("*.py")])

CALLS = {
    **dict.fromkeys(
        ("eval", "exec", "compile", "builtins.eval", "builtins.exec", "builtins.compile", "runpy.run_path",
         "runpy.run_module", "code.interact"), "runs text as code",
    ),
    **dict.fromkeys(
        ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
         "asyncio.create_subprocess_shell", "pty.spawn"), "goes through a shell",
    ),
    **dict.fromkeys(
        ("torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "torch.serialization.add_safe_globals",
         "torch.serialization.safe_globals", "torch.distributed.checkpoint.filesystem.FileSystemReader",
         "torch.distributed.checkpoint.FileSystemReader", "megatron.core.dist_checkpointing.load",
         "pandas.read_pickle"), "reads what can run code",
    ),
    **dict.fromkeys(
        ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load",
         "yaml.full_load_all", "omegaconf.OmegaConf.register_new_resolver"), "builds more than plain values",
    ),
    **dict.fromkeys(
        ("shutil.unpack_archive", "tempfile.mktemp", "ssl._create_unverified_context"), "trusts names it should not",
    ),
}  # fmt: skip
"""What may not be called, by its full name. torch.distributed.checkpoint's own reader unpickles the table of contents:
`checkpoint/metadata.py` is the one that may inherit from it."""
NOT_CONSTANT = {"shell": False, "allow_pickle": False, "weights_only": True, "verify": True}
"""Keyword arguments that must be written out, as this."""
EVERYWHERE = ("0.0.0.0", "::")
"""Addresses that a server would listen at for anyone."""
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
ALLOWED = {
    # Its unpickler knows only the classes of a table of contents (tests/checkpoint/test_metadata.py).
    "emu2_megatron/checkpoint/metadata.py": ["imports pickle"],
    # It runs code of a folder only if that is this package's own (tests/convert/test_verify.py).
    "emu2_megatron/convert/verify.py": ["trust_remote_code is the user's to give: pass on what was asked for"],
    "benchmarks/generate.py": ["trust_remote_code is the user's to give: pass on what was asked for"],  # its own export
}


def violations(source: str) -> list[str]:
    """Everything in a file that breaks a rule."""
    tree = ast.parse(source)
    names = dict(_imported(tree))
    found = [f"imports {full.split('.')[0]}" for full in names.values() if full.split(".")[0] in PICKLES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found += [f"line {node.lineno}: {problem}" for problem in _of_call(node, names)]
        elif isinstance(node, ast.Constant) and node.value in EVERYWHERE:
            found.append(f"line {node.lineno}: {node.value!r}: a server binds a loopback address")
        elif isinstance(node, ast.Attribute) and node.attr in ("UnsafeLoader", "FullLoader", "Loader", "CLoader"):
            if _full(node, names).startswith("yaml."):
                found.append(f"line {node.lineno}: yaml.{node.attr} builds any object: yaml.safe_load")
    return found


def _of_call(node: ast.Call, names: dict[str, str]) -> Iterator[str]:
    name = _full(node.func, names)
    keywords = {word.arg: word.value for word in node.keywords if word.arg}
    if name in CALLS:
        yield f"{name} {CALLS[name]}"
    if name in ("torch.load", "torch.serialization.load") and "weights_only" not in keywords:
        yield f"{name} without weights_only=True"
    if isinstance(node.func, ast.Attribute) and node.func.attr in ("extractall", "extract"):
        yield f".{node.func.attr} writes wherever an archive says: read members instead"
    for keyword, wanted in NOT_CONSTANT.items():
        value = keywords.get(keyword)
        if value is not None and not (isinstance(value, ast.Constant) and value.value is wanted):
            yield f"{keyword} must be {wanted}, and written out"
    remote = keywords.get("trust_remote_code")
    if isinstance(remote, ast.Constant) and remote.value is not False:
        yield "trust_remote_code is the user's to give: pass on what was asked for"
    # ("", port) is any address, as the argument of bind() and of servers' classes.
    for argument in [*node.args, *keywords.values()]:
        if isinstance(argument, ast.Tuple) and len(argument.elts) == 2 and _is(argument.elts[0], ""):
            if name.endswith((".bind", "Server", "create_server")):
                yield f"{name} listens at any address: a server binds a loopback address"
    if _is(keywords.get("host"), ""):
        yield f"{name} listens at any address: a server binds a loopback address"


def _imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Names in a file to what they stand for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.asname, alias.name) if alias.asname else (alias.name.split(".")[0],) * 2
                if not alias.asname and alias.name.split(".")[0] in PICKLES:
                    yield alias.name, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module", "__import__",
        ):  # fmt: skip
            if node.args and isinstance(node.args[0], ast.Constant):
                yield f"import at line {node.lineno}", str(node.args[0].value)


def _full(node: ast.expr, names: dict[str, str]) -> str:
    """The dotted name of an expression, through imports; of something else's attribute, `.` and the attribute."""
    if isinstance(node, ast.Attribute):
        return f"{_full(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def _is(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value == value


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_file(file: Path) -> None:
    found = [re.sub(r"^line \d+: ", "", problem) for problem in violations(file.read_text(encoding="utf-8"))]
    assert found == ALLOWED.get(str(file.relative_to(ROOT)), [])


def test_the_files_are_found() -> None:
    names = {str(file.relative_to(ROOT)) for file in FILES}
    assert {"emu2_megatron/cli.py", "tools/make_shards.py", "benchmarks/ops.py", "setup.py", *ALLOWED} <= names


OFFENDERS = [
    "import pickle",
    "from pickle import loads as l",
    "import marshal as m",
    "def f():\n    import shelve",
    "__import__('dill')",
    "importlib.import_module('cloudpickle')",
    "eval(text)",
    "exec('a = 1')",
    "compile(text, '', 'exec')",
    "import builtins as b\nb.eval(text)",
    "import runpy\nrunpy.run_path(file)",
    "import os\nos.system(command)",
    "from os import popen as p\np(command)",
    "import subprocess as s\ns.getoutput(command)",
    "subprocess.run(command, shell=True)",
    "subprocess.run(command, shell=flag)",
    "import asyncio\nasyncio.create_subprocess_shell(command)",
    "import torch\ntorch.load(f)",
    "import torch as t\nt.load(f)",
    "from torch import load\nload(f)",
    "torch.load(f, weights_only=False)",
    "torch.load(f, weights_only=flag)",
    "from torch import jit\njit.load(f)",
    "torch.hub.load(repository, name)",
    "torch.serialization.add_safe_globals([X])",
    "from torch.distributed.checkpoint.filesystem import FileSystemReader as R\nR(path)",
    "from megatron.core import dist_checkpointing as d\nd.load(state, path)",
    "numpy.load(f, allow_pickle=True)",
    "import yaml\nyaml.load(f, Loader=yaml.SafeLoader)",
    "from yaml import full_load\nfull_load(f)",
    "import yaml\ng(yaml.UnsafeLoader)",
    "from omegaconf import OmegaConf\nOmegaConf.register_new_resolver('sh', f)",
    "tarfile.open(f).extractall(folder)",
    "with tarfile.open(f) as tar:\n    tar.extract(member, folder)",
    "import shutil\nshutil.unpack_archive(f)",
    "import tempfile\ntempfile.mktemp()",
    "AutoModel.from_pretrained(path, trust_remote_code=True)",
    "requests.get(url, verify=False)",
    "server.bind(('', 80))",
    "HTTPServer(('', 80), Handler)",
    "server.bind(('0.0.0.0', 80))",
    "HTTPServer(('::', 80), Handler)",
    "HOST = '0.0.0.0'",
    "uvicorn.run(app, host='')",
]


@pytest.mark.parametrize("source", OFFENDERS)
def test_an_offender_is_caught(source: str) -> None:
    assert len(violations(source)) >= 1


def test_every_banned_call_is_caught() -> None:
    for name in CALLS:
        module, _, attribute = name.rpartition(".")
        source = f"import {module} as x\nx.{attribute}(1)" if module else f"{name}(1)"
        assert violations(source), name


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "re.compile('a')",
        "torch.compile(model)",
        "import torch\ntorch.load(f, weights_only=True)",
        "import yaml\nyaml.safe_load(f)",
        "subprocess.run(['ls'], shell=False)",
        "AutoModel.from_pretrained(path, trust_remote_code=asked_for)",
        "AutoModel.from_pretrained(path, trust_remote_code=False)",
        "tar.extractfile(member)",
        "HTTPServer(('127.0.0.1', 80), Handler)",
        "from json import load\nload(f)",
        "class Reader(FileSystemReader): pass",
    ],
)
def test_what_is_safe_is_left_alone(source: str) -> None:
    assert violations(source) == []


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir", "!!python/name:os"])
def test_a_configuration_runs_nothing(tag: str, tmp_path: Path) -> None:
    """OmegaConf's loader is a safe one."""
    file = tmp_path / "run.yaml"
    file.write_text(f"data:\n  tokenizer: {tag} [{tmp_path}/made]\n")
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        loading.load(str(file))
    with pytest.raises(ConfigError):
        loading.load("tiny_interleaved", [f"training.steps={tag} [{tmp_path}/made]"])
    assert not (tmp_path / "made").exists()
    # The trap itself works: a loader that is not safe would have made the folder.
    if "apply" in tag:
        yaml.unsafe_load(file.read_text())
        assert (tmp_path / "made").exists()
