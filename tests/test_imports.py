"""Rules that hold for every file: imports go one way, nothing unsafe is called, and the command starts quickly."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "emu2_megatron"
ORDER = "errors config platform ops data model parallel checkpoint convert training inference evaluation cli".split()
"""A module imports from its own entry and those before it."""

PACKAGE_FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
ALL_FILES = sorted([*PACKAGE_FILES, *(ROOT / "tools").rglob("*.py"), *(ROOT / "examples").rglob("*.py")])

PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
BANNED_CALLS = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "yaml.load": "builds any object: yaml.safe_load, or OmegaConf",
    "yaml.unsafe_load": "builds any object",
    "yaml.full_load": "builds many objects",
    "os.system": "goes through a shell",
    "os.popen": "goes through a shell",
}


def module_of(file: Path) -> list[str]:
    """`emu2_megatron/config/loading.py` gives ['emu2_megatron', 'config', 'loading'], an `__init__` its package."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported(tree: ast.Module, module: list[str], is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, at any depth; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module[: len(module) - node.level + is_package] if node.level else []
            start = [*base, *([node.module] if node.module else [])]
            yield from ((node.lineno, ".".join([*start, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func) in (
            "importlib.import_module",
            "import_module",
            "__import__",
        ):
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant):
                yield node.lineno, str(argument.value)


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an expression that is a dotted name, else empty."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def backward_imports(source: str, module: list[str], is_package: bool = False) -> list[str]:
    """Imports of a module of the package from an entry that comes later in the order."""
    if len(module) < 2:  # the package itself: must import nothing of its own, or everything would load everything
        allowed: list[str] = []
    else:
        allowed = ORDER[: ORDER.index(module[1]) + 1]
    found = []
    for line, name in imported(ast.parse(source), module, is_package):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if top == PACKAGE and target and target not in (*allowed, "__version__"):
            found.append(f"line {line}: {'.'.join(module)} imports {name}")
    return found


def unsafe(source: str) -> list[str]:
    """Pickle, and calls that run text or a shell."""
    tree = ast.parse(source)
    found = [f"line {n}: imports {name}" for n, name in imported(tree, [], False) if name.split(".")[0] in PICKLES]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        keywords = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
        if name in BANNED_CALLS:
            found.append(f"line {node.lineno}: {name} {BANNED_CALLS[name]}")
        if name == "torch.load" and keywords.get("weights_only") is not True:
            found.append(f"line {node.lineno}: torch.load without weights_only=True")
        for keyword, value in (("shell", True), ("allow_pickle", True), ("weights_only", False)):
            if keywords.get(keyword) is value:
                found.append(f"line {node.lineno}: {keyword}={value}")
    return found


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", PACKAGE_FILES, ids=name_of)
def test_imports_go_one_way(file):
    module = module_of(file)
    assert len(module) == 1 or module[1] in ORDER, f"where does {module[1]} stand in the order of imports?"
    assert backward_imports(file.read_text(encoding="utf-8"), module, file.name == "__init__.py") == []


# Its unpickler refuses everything but the classes of a table of contents (tests/checkpoint/test_metadata.py).
RESTRICTED = ROOT / "emu2_megatron" / "checkpoint" / "metadata.py"


@pytest.mark.parametrize("file", ALL_FILES, ids=name_of)
def test_nothing_unsafe_is_called(file):
    found = unsafe(file.read_text(encoding="utf-8"))
    if file == RESTRICTED:
        assert len(found) == 1 and found[0].endswith("imports pickle")
    else:
        assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "from emu2_megatron.model import emu2",
        "import emu2_megatron.model.emu2",
        "from emu2_megatron import model",
        "from ..model import emu2",
        "from .. import model",
        "def f():\n    from emu2_megatron.model.emu2 import Emu2",
        "import importlib\nimportlib.import_module('emu2_megatron.model')",
        "if TYPE_CHECKING:\n    from emu2_megatron.model import emu2",
    ],
)
def test_a_backward_import_is_caught(source):
    assert len(backward_imports(source, ["emu2_megatron", "data", "loader"])) == 1
    assert backward_imports(source, ["emu2_megatron", "parallel", "wrap"]) == []  # model stands before parallel


def test_relative_imports_of_a_package_start_at_itself():
    assert backward_imports("from . import loader", ["emu2_megatron", "data"], is_package=True) == []
    assert len(backward_imports("from .. import model", ["emu2_megatron", "data"], is_package=True)) == 1


def test_the_package_itself_loads_nothing():
    assert len(backward_imports("from emu2_megatron.errors import Emu2Error", ["emu2_megatron"], is_package=True)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "def f():\n    import dill",
        "__import__('pickle')",
        "eval('1')",
        "exec(text)",
        "yaml.load(f)",
        "yaml.load(f, Loader=yaml.SafeLoader)",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=flag)",
        "load(f, weights_only=False)",
        "numpy.load(f, allow_pickle=True)",
    ],
)
def test_an_unsafe_call_is_caught(source):
    assert unsafe(source) != []


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "torch.load(f, weights_only=True)",
        "yaml.safe_load(f)",
        "subprocess.run(['ls'])",
        "numpy.load(f)",
        "subprocess.run(['ls'], shell=False)",
    ],
)
def test_a_safe_call_is_left_alone(source):
    assert unsafe(source) == []


def test_the_files_are_found():
    names = set(map(name_of, ALL_FILES))
    assert {"emu2_megatron/cli.py", "emu2_megatron/config/loading.py", "tools/make_shards.py"} <= names


def test_the_command_starts_without_the_heavy_packages():
    heavy = ("torch", "megatron", "transformer_engine", "apex", "wandb", "omegaconf", "rich")
    script = (
        "import contextlib, io, json, sys; from emu2_megatron import cli\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):\n"
        "    cli.main(['train', '--help'])\n"
        "assert 'training.steps=' in out.getvalue()\n"
        f"print(json.dumps([m for m in sys.modules if m.split('.')[0] in {heavy} or m.startswith('nvidia.dali')]))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
