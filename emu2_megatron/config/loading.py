"""From a recipe and overrides to a `Config`: preset <- YAML <- `a.b=c`, later ones win.

OmegaConf checks types, converts (`1e-5` to a float) and resolves `${...}`, so `${oc.env:SCRATCH}/shards/*.tar` works in
a recipe. Values are set one at a time: an error then belongs to exactly one key. Every mistake is a `ConfigError` of
one line.
"""

import dataclasses
import difflib
import importlib.resources
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from emu2_megatron.config import describe
from emu2_megatron.config.presets import PRESETS, VIDEO_DECODERS, VISUAL_DECODERS
from emu2_megatron.config.schema import Config
from emu2_megatron.errors import ConfigError

_RECIPES = importlib.resources.files("emu2_megatron.config") / "recipes"

Section = TypeVar("Section")

_Setting = tuple[str, Any, str]
"""Dotted key, value, and where it was given, for the error."""


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(file.name.removesuffix(".yaml") for file in _RECIPES.iterdir() if file.name.endswith(".yaml"))


def load(name_or_file: str, overrides: Sequence[str] = ()) -> Config:
    """Read a run's configuration.

    Args:
        name_or_file: a recipe of the package (`tiny_interleaved`) or the path of a YAML file.
        overrides: `a.b=c`; the text of a string field is taken as it is, any other as YAML (`[1, 2]`, `null`).

    Raises:
        ConfigError: a key, type, file, recipe, preset or override that is wrong. Combinations are not looked at:
            `validate` does that.
    """
    settings = [*_read_yaml(name_or_file), *(_parse_override(text) for text in overrides)]
    model = _preset("model.preset", PRESETS, settings)
    visual_decoder = _preset("visual_decoder.preset", VISUAL_DECODERS, settings)
    video_decoder = _preset("video_decoder.preset", VIDEO_DECODERS, settings)
    config = OmegaConf.structured(Config(model=model, visual_decoder=visual_decoder, video_decoder=video_decoder))
    for section in describe.sections():  # OmegaConf locks each node that comes from a frozen dataclass
        OmegaConf.set_readonly(OmegaConf.select(config, section) if section else config, False)
    for key, value, source in settings:
        _set(config, key, value, source)
    try:
        return cast(Config, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere or to another type
        raise ConfigError(f"{error.full_key}: {_first_line(error)}") from error


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load` reads back equal."""
    return OmegaConf.to_yaml(OmegaConf.create(_plain(dataclasses.asdict(config))))


def _read_yaml(name_or_file: str) -> list[_Setting]:
    if "/" in name_or_file or name_or_file.endswith((".yaml", ".yml")):
        source, file = name_or_file, Path(name_or_file)
    elif name_or_file in recipes():
        source, file = f"recipe {name_or_file}", cast(Path, _RECIPES / f"{name_or_file}.yaml")
    else:
        raise ConfigError(
            f"unknown recipe '{name_or_file}'{_nearest(name_or_file, recipes())}; recipes: {', '.join(recipes())}; "
            "or give the path of a .yaml file"
        )
    try:
        # To a plain container, so that what OmegaConf makes of it cannot differ from what the file says.
        content = OmegaConf.to_container(OmegaConf.load(io.StringIO(file.read_text(encoding="utf-8"))))
    except OSError as error:  # OmegaConf's own, for a file that is a single number, has no strerror
        problem = error.strerror or str(error)
        raise ConfigError(f"{source}: {problem}; give a YAML file or one of: {', '.join(recipes())}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}{_yaml_problem(error)}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {_first_line(error)} (in {source})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{source}: a list at the top level; sections wanted: {', '.join(describe.keys_of(''))}")
    return list(_flatten(content, "", f" (in {source})"))


def _flatten(content: dict[Any, Any], prefix: str, source: str) -> Iterator[_Setting]:
    for name, value in content.items():
        key = describe.join(prefix, str(name))
        if key not in describe.sections():
            yield key, value, source
        elif isinstance(value, dict):
            yield from _flatten(value, key, source)
        elif value is not None:  # a section whose lines are all commented out is null, and sets nothing
            raise ConfigError(f"{key}: {_show(value)} given, a section wanted; {_legal_keys(key)}{source}")


def _parse_override(text: str) -> _Setting:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"override '{text}': no '='; write KEY=VALUE, for example training.steps=100")
    if _type_of(key, "") == "str":
        return key, value, ""
    try:
        parsed = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"])))
        return key, parsed["value"], ""
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: {_show(value)} is not YAML{_yaml_problem(error)}; quote what is special") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key}: {_show(value)}: {_first_line(error)}") from error


def _preset(key: str, presets: dict[str, Section], settings: Sequence[_Setting]) -> Section:
    """The last one given; the first of `presets` if none is."""
    name = [next(iter(presets)), *(value for setting, value, _ in settings if setting == key)][-1]
    if not isinstance(name, str) or name not in presets:
        legal = ", ".join(presets)
        raise ConfigError(f"{key}: unknown preset {_show(name)}{_nearest(name, presets)}; legal: {legal}")
    return presets[name]


def _set(config: DictConfig, key: str, value: Any, source: str) -> None:
    wanted = _type_of(key, source)
    problem = f"{key}: {_show(value)} given, {wanted} wanted{_hint(value, wanted)}{source}"
    if not _strict(value, wanted):
        raise ConfigError(problem)
    try:
        OmegaConf.update(config, key, value, merge=False)
    except ValidationError as error:
        raise ConfigError(problem) from error
    except OmegaConfBaseException as error:  # a broken `${...}`
        raise ConfigError(f"{key}: {_show(value)}: {_first_line(error)}{source}") from error


def _strict(value: Any, wanted: str) -> bool:
    """Refuse what OmegaConf converts too readily: 007 to '7', 5 to true, [[a]] to ['a'], `???` to the default."""
    kind = wanted.removesuffix(" or null")
    if value is None:
        return kind != wanted
    if kind.startswith("list of "):
        return isinstance(value, list) and all(_strict(item, kind.removeprefix("list of ")) for item in value)
    if isinstance(value, str):
        return value != "???"
    return isinstance(value, {"str": str, "bool": bool}.get(kind, (int, float)))


def _type_of(key: str, source: str) -> str:
    for entry in describe.describe():
        if entry.key == key:
            return entry.type
    if key in describe.sections():
        raise ConfigError(f"{key or repr(key)}: a section, not a value; {_legal_keys(key)}{source}")
    section = key.rpartition(".")[0]
    while section not in describe.sections():
        section = section.rpartition(".")[0]
    raise ConfigError(f"{key}: unknown key{_nearest_key(key, section)}; {_legal_keys(section)}{source}")


def _legal_keys(section: str) -> str:
    return f"keys of {section or 'the configuration'}: {', '.join(describe.keys_of(section))}"


def _nearest_key(key: str, section: str) -> str:
    """Names are compared, not whole keys: a long common prefix makes everything look alike. The same section first."""
    every_key = [entry.key for entry in describe.describe()]
    for pool in ([describe.join(section, name) for name in describe.keys_of(section)], every_key):
        by_name = {legal.rpartition(".")[2]: legal for legal in reversed(pool)}
        if names := difflib.get_close_matches(key.rpartition(".")[2], by_name, n=1):
            return f" (did you mean {by_name[names[0]]}?)"
    return ""


def _nearest(given: object, legal: Iterable[str]) -> str:
    matches = difflib.get_close_matches(str(given), list(legal), n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""


def _hint(value: Any, wanted: str) -> str:
    if value == "???":
        return "; '???' stands for a value that you have to give"
    if wanted.startswith("list of ") and not isinstance(value, (list, dict)):
        return "; write [A, B]"
    return "; quote it" if wanted == "str" and value is not None and not isinstance(value, (list, dict)) else ""


def _show(value: Any) -> str:
    """On one line, whatever it is."""
    return repr(value) if isinstance(value, str) else describe.yaml_value(value)


def _yaml_problem(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return f": {_first_line(error)}"
    mark = error.problem_mark or error.context_mark
    return f"{f', line {mark.line + 1}' if mark else ''}: {error.problem or error.context}"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _plain(value: Any) -> Any:
    """Tuples as lists, and `${` escaped, since the value is already resolved."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
