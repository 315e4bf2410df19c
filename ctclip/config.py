"""YAML plus ``key=value`` overrides become a typed, frozen config. Knows nothing of CT.

A config is a frozen dataclass that stands beside the code it configures. A YAML file lists only
what differs from the defaults; a misspelt key or a wrong type stops the run before it starts.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")


class ConfigError(ValueError):
    """A config file or override that can't be used."""


def load(
    schema: type[T],
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> T:
    """Read a YAML file, apply ``key=value`` overrides and flags, validate against a dataclass.

    Args:
        schema: The frozen dataclass of the command.
        path: YAML file; ``None`` starts from the defaults.
        overrides: For example ``["optim.lr=1e-4", "model.vision.depth=6"]``.
        values: Top-level values that win over both and are taken as they are, never parsed as
            YAML: what a command's own flags gave (a path or a text may hold any character).

    Returns:
        An instance of ``schema``.

    Raises:
        ConfigError: If the file can't be read, a key is unknown or a value has the wrong type.
    """
    merged = read(path, overrides) | dict(values or {})
    return from_dict(schema, merged, source=_source(path))


def read(path: str | Path | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file and apply ``key=value`` overrides; what they mean is left to a dataclass.

    Raises:
        ConfigError: If the file can't be read.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    source = _source(path)
    try:
        base = OmegaConf.load(path) if path is not None else OmegaConf.create({})
        data = OmegaConf.to_container(
            OmegaConf.merge(base, OmegaConf.from_dotlist(list(overrides))), resolve=True
        )
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist; see the folder configs/") from None
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{source}: not a readable config: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: expected a mapping of keys to values at the top level")
    return {str(key): value for key, value in data.items()}


def _source(path: str | Path | None) -> str:
    return str(path) if path is not None else "command line"


def from_dict(schema: type[T], data: Mapping[str, Any], source: str = "config") -> T:
    """Validate a plain mapping against a dataclass; the inverse of :func:`to_dict`.

    Raises:
        ConfigError: If a key is unknown or a value has the wrong type or is refused.
    """
    import pydantic

    for where, known in _unknown_keys(schema, data, ""):
        close = difflib.get_close_matches(where, known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(known))}"
        raise ConfigError(f"{source}: unknown config key {where}{hint}")
    try:
        return pydantic.TypeAdapter(schema).validate_python(_plain(data))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}." for part in first["loc"]).removesuffix(".")
        prefix = f"{source}: {where}: " if where else f"{source}: "
        if first["type"] == "value_error":  # raised by a __post_init__, which says all of it
            raise ConfigError(prefix + str(first["ctx"]["error"])) from None
        raise ConfigError(f"{prefix}{first['msg']}, got {first['input']!r}") from None


def require_at_least(config: Any, prefix: str, least: int, *names: str) -> None:
    """Refuse numbers, and tuples of them, below a bound; None stands for a default that isn't.

    Raises:
        ValueError: Naming the field as YAML does.
    """
    for name in names:
        value = getattr(config, name)
        numbers = value if isinstance(value, tuple) else (value,)
        if any(number is not None and not number >= least for number in numbers):
            raise ValueError(f"{prefix}{name} must be at least {least}, got {value}")


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a config into plain YAML- and JSON-able values (tuples become lists)."""
    return _plain(dataclasses.asdict(config))


def save(config: Any, path: str | Path) -> None:
    """Write the resolved config as YAML, so that a run can be repeated from its folder."""
    Path(path).write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _dataclass_of(annotation: Any) -> type | None:
    """The dataclass inside ``X``, ``X | None`` or ``Optional[X]``; None where there is none."""
    if dataclasses.is_dataclass(annotation):
        return typing.cast(type, annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = [arg for arg in typing.get_args(annotation) if dataclasses.is_dataclass(arg)]
        return typing.cast(type, inner[0]) if len(inner) == 1 else None
    return None


def _unknown_keys(
    schema: Any, data: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, list[str]]]:
    hints = typing.get_type_hints(schema)
    for key, value in data.items():
        if key not in hints:
            yield f"{prefix}{key}", [f"{prefix}{known}" for known in hints]
            continue
        nested = _dataclass_of(hints[key])
        if nested is not None and isinstance(value, Mapping):
            yield from _unknown_keys(nested, value, f"{prefix}{key}.")
