"""YAML settings, read strictly: every key is known, every value has its type.

A config holds only what differs from the defaults of its pydantic model. On the command line
`key=value` and `section.key=value` override the file.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from canopy.errors import ConfigError, InputError
from canopy.runtime import bundled_dir, manifests_dir


class Settings(BaseModel):
    """Base of all settings: frozen, unknown keys refused, defaults checked too."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Named(Settings):
    """Settings that are known by the name of their file."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")


def option(default: Any, help: str, **typed: Any) -> Any:
    """A field that a command takes as an option: `canopy.cli.options.takes_groups` makes it one.

    `typed` says how it is typed: `flags` stand instead of `--name-of-the-field`, `metavar` instead of its
    type, `panel` is the heading that --help lists it under, `argument` makes it a positional one, and `shown`
    is the default as --help says it.
    """
    return Field(default=default, description=help, json_schema_extra=typed or None)


def flags_of(name: str, field: FieldInfo) -> tuple[str, ...]:
    """How an option is typed, such as ("-o", "--out")."""
    typed: Any = field.json_schema_extra or {}
    return tuple(typed.get("flags", ("--" + name.replace("_", "-"),)))


_EXPECTED = "Input should be "  # as pydantic begins
_LONGEST_VALUE = 60  # of a value that a message repeats, characters


class _NoRepeats(yaml.SafeLoader):
    """A loader that refuses a key twice in one mapping, where YAML's own takes the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                raise yaml.YAMLError(f"key {name!r} is in line {seen[name]} and in line {line}")
            seen[name] = line
        return super().construct_mapping(node, deep)


S = TypeVar("S", bound=BaseModel)
N = TypeVar("N", bound=Named)


def load_settings(schema: type[S], path: str | Path, overrides: Iterable[str] = ()) -> S:
    """Read a YAML file into `schema`, apply `key=value` overrides, validate.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown (the nearest known one is
            named), or a value has the wrong type or range.
    """
    path = Path(path)
    try:
        raw = yaml.load(path.read_text(), _NoRepeats)
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror})", where=path, expected="a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"is not valid YAML: {error}", where=path) from error
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(f"holds a {type(raw).__name__}", where=path, expected="key: value lines")
    for override in overrides:
        _apply(raw, override)
    return validate_settings(schema, raw, where=path)


def manifest_names(kind: str) -> list[str]:
    """Names of all manifests of a kind: `imagery`, `labels` or `benchmarks`, sorted."""
    return sorted(path.stem for path in (manifests_dir() / kind).glob("*.yaml"))


def shipped_configs(folder: str) -> dict[str, Path]:
    """The configs that come along, `finetune`, `pretrain` or `region`, by name."""
    return {path.stem: path for path in sorted((bundled_dir("configs") / folder).glob("*.yaml"))}


def find_config(folder: str, name: str | Path) -> Path:
    """A config file, or one that comes along, by its name alone.

    Raises:
        InputError: a name that none has.
    """
    path, known = Path(name), shipped_configs(folder)
    if path.exists() or path.suffix or path.parent != Path():
        return path
    check_known(str(name), list(known), "config", "a file or ")
    return known[str(name)]


def load_manifest(schema: type[N], kind: str, name: str, what: str, besides: str = "") -> N:
    """The manifest of a kind that has this name, which must be its file's.

    Raises:
        InputError: no such manifest, as `check_known`.
        ConfigError: as `load_settings`, or the name in it is another one.
    """
    check_known(name, manifest_names(kind), what, besides)
    path = manifests_dir() / kind / f"{name}.yaml"
    manifest = load_settings(schema, path)
    if manifest.name != name:
        raise ConfigError(f"is named {manifest.name!r}", where=path, expected=f"{name!r}, the file's name")
    return manifest


def check_known(name: str, known: Sequence[str], what: str, besides: str = "") -> None:
    """Refuse a name that is not among those known.

    Raises:
        InputError: `no such {what}`; says the nearest name, and lists all of them after `besides`.
    """
    if name not in known:
        close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        raise InputError(
            f"no such {what}" + (f": did you mean {close[0]!r}?" if close else ""),
            where=name, expected=f"{besides}one of " + ", ".join(known),
        )  # fmt: skip


def validate_settings(schema: type[S], raw: Mapping[str, Any], where: object = None) -> S:
    """Validate a mapping against `schema`; see `load_settings` for the errors.

    Args:
        schema: what is wanted.
        raw: what was given.
        where: the file, or whose settings they are; None: options as they are typed, which name themselves.
    """
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise _first_fault(schema, raw, error, where) from error


def _apply(raw: dict[str, Any], override: str) -> None:
    """Set one dotted `key=value` in the nested mapping; the value is parsed as YAML."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"cannot read the override {override!r}", expected="key=value or section.key=value")
    *sections, last = key.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"{section!r} is not a section", where=f"override {override!r}")
    try:
        raw[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot read the value {text!r}", where=f"override {override!r}") from error


def _first_fault(
    schema: type[BaseModel], raw: Mapping[str, Any], error: ValidationError, where: object
) -> ConfigError:
    """The first problem: the key, its value and what is expected there, or the nearest known key."""
    faults = error.errors(include_url=False)
    fault = faults[0]
    keys = _keys_given(raw, fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = _keys_at(schema, keys[:-1])
        near = difflib.get_close_matches(keys[-1], known, n=1)
        hint = (
            f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}" if known else ""
        )
        return ConfigError(f"unknown key {'.'.join(keys)!r}{hint}", where=where)
    if fault["type"] == "missing":
        return ConfigError(f"{'.'.join([*keys, str(fault['loc'][-1])])!r} is missing", where=where)
    said = fault["msg"].removeprefix("Value error, ")
    place, value = ".".join(keys), repr(fault["input"])
    if isinstance(fault["input"], Mapping) and not said.startswith(_EXPECTED):  # of a whole section
        return ConfigError(said if said.startswith(place) else f"{place}: {said}", where=where)
    what = value if len(value) <= _LONGEST_VALUE else value[:_LONGEST_VALUE] + "..."
    if where is None:
        where = flags_of(keys[0], schema.model_fields[keys[0]])[-1]
    else:
        what = f"{place}: {what}"
    if said.startswith(_EXPECTED):  # a value of several types has a fault for each
        all_said = [f["msg"] for f in faults if _keys_given(raw, f["loc"]) == keys]
        ways = [one.removeprefix(_EXPECTED).partition(", unable")[0] for one in all_said]
        return ConfigError(what, where=where, expected=" or ".join(dict.fromkeys(ways)))
    return ConfigError(f"{what}: {said}", where=where)


def _keys_given(raw: Any, location: Sequence[str | int]) -> list[str]:
    """A fault's place as the user knows it: pydantic also names the type of a union that it tried."""
    keys = []
    for part in location:
        inside = dict(enumerate(raw)) if isinstance(raw, list | tuple) else raw
        if isinstance(inside, Mapping) and part in inside:
            raw = inside[part]
            keys.append(str(part))
    return keys


def _keys_at(schema: Any, location: list[str]) -> list[str]:
    """Field names of the (nested) model at `location`, or nothing where it is not a plain model."""
    for part in location:
        field = getattr(schema, "model_fields", {}).get(part)
        schema = field.annotation if field is not None else None
    return sorted(getattr(schema, "model_fields", {}))
