"""The documentation of every field of the schema, read from the string literal under it.

A string under a field is invisible to Python at run time, so the source of `schema.py` is parsed, once.
"""

import ast
import dataclasses
import functools
import importlib.resources
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from emu2_megatron.config.schema import Config


class Entry(NamedTuple):
    """One field that holds a value."""

    key: str
    """Dotted, from the root: `model.decoder.num_layers`."""
    type: str
    """In words: `int`, `list of str`, `float or null`."""
    default: Any
    """A plain value; a list is a tuple."""
    doc: str
    """The string under the field, on one line."""


@functools.cache
def documentation() -> dict[tuple[str, str], str]:
    """`{(class, field): doc}` for every field of every class in `schema.py`, those of its base included; a field
    without one is an empty string."""
    source = importlib.resources.files("emu2_megatron.config").joinpath("schema.py").read_text(encoding="utf-8")
    docs: dict[tuple[str, str], str] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
        docs |= {(node.name, field): doc for (owner, field), doc in docs.items() if owner in bases}
        for statement, below in zip(node.body, [*node.body[1:], ast.Pass()], strict=True):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                match below:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        docs[node.name, statement.target.id] = " ".join(text.split())
                    case _:
                        docs[node.name, statement.target.id] = ""
    return docs


@functools.cache
def sections() -> dict[str, type]:
    """`{dotted key: dataclass}` of every section, parents first; the root is the empty key."""

    def walk(prefix: str, section: type) -> Iterator[tuple[str, type]]:
        yield prefix, section
        for name, hint in typing.get_type_hints(section).items():
            if dataclasses.is_dataclass(hint):
                yield from walk(join(prefix, name), typing.cast(type, hint))

    return dict(walk("", Config))


@functools.cache
def describe() -> list[Entry]:
    """Every field that holds a value, in the order of the schema."""
    entries = []
    for prefix, section in sections().items():
        hints = typing.get_type_hints(section)
        for field in dataclasses.fields(section):
            if join(prefix, field.name) not in sections():
                doc = documentation()[section.__name__, field.name]
                entries.append(Entry(join(prefix, field.name), _in_words(hints[field.name]), field.default, doc))
    return entries


def keys_of(section: str) -> list[str]:
    """Names of the fields and sections directly under a section."""
    return [field.name for field in dataclasses.fields(sections()[section])]


def join(prefix: str, name: str) -> str:
    """`a.b` and `c` give `a.b.c`; the empty prefix is the root."""
    return f"{prefix}.{name}" if prefix else name


def yaml_value(value: Any) -> str:
    """A value as a recipe or an override writes it."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case list() | tuple():
            return f"[{', '.join(map(yaml_value, value))}]"
        case "":
            return "''"
        case _:
            return str(value)


def help_text() -> str:
    """Every field with its type, default and documentation, for `emu2 train --help`."""
    lines: list[str] = []
    for prefix, section in sections().items():
        entries = [entry for entry in describe() if entry.key.rpartition(".")[0] == prefix]
        if entries:
            lines += ["", f"{prefix}: {inspect.getdoc(section)}"]
        for entry in entries:
            lines.append(f"  {entry.key}={yaml_value(entry.default)}  ({entry.type})")
            lines += textwrap.wrap(entry.doc, width=100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines).lstrip("\n")


def _in_words(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_in_words(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"list of {_in_words(typing.get_args(hint)[0])}"
    return "null" if hint is type(None) else str(hint.__name__)
