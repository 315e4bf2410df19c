"""YAML plus ``key=value`` overrides become a typed, frozen config. Knows nothing of CT.

A config is a frozen dataclass that stands beside the code it configures. A YAML file lists only
what differs from the defaults; a misspelt key or a wrong type stops the run before it starts.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
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
        if not OmegaConf.is_dict(base):
            raise ConfigError(f"{source}: expected a mapping of keys to values at the top level")
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
        config = pydantic.TypeAdapter(schema).validate_python(_plain(data))
        _refuse_truth_as_number(data, to_dict(config), source)
        return config
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"]]
        if first["type"] == "value_error":  # raised by a __post_init__, which says all of it
            complaint = str(first["ctx"]["error"])
            if path and complaint.startswith(f"{path[-1]}."):  # the key as the user typed it
                raise ConfigError(f"{source}: {'.'.join([*path[:-1], complaint])}") from None
        else:
            complaint = f"{first['msg']}, got {first['input']!r}"
            if first["type"] == "string_type" and not isinstance(first["input"], Mapping | list):
                complaint += f"; in quotes it is text: '\"{first['input']}\"'"
        key = f"{'.'.join(path)}: " if path else ""
        raise ConfigError(f"{source}: {key}{complaint}") from None


def _refuse_truth_as_number(given: Any, taken: Any, source: str, key: str = "") -> None:
    """Refuse ``lr: yes``: what reads a config would take it for 1."""
    if isinstance(given, bool) and not isinstance(taken, bool):
        raise ConfigError(f"{source}: {key}: expected a number, got {given}")
    if isinstance(given, Mapping) and isinstance(taken, Mapping):
        for name in given:
            where = f"{key}.{name}" if key else str(name)
            _refuse_truth_as_number(given[name], taken[name], source, where)
    elif isinstance(given, list | tuple) and isinstance(taken, list | tuple):
        for item, value in zip(given, taken, strict=True):
            _refuse_truth_as_number(item, value, source, key)


def require_at_least(config: Any, prefix: str, least: int, *names: str) -> None:
    """Refuse numbers, and tuples of them, below a bound; None stands for a default that isn't.

    Args:
        config: A dataclass, from its ``__post_init__``.
        prefix: What stands before its fields in YAML, for example ``optim.``.
        least: The bound.
        names: Of the fields.

    Raises:
        ValueError: Naming the field as YAML does; nan and infinity are refused too.
    """
    _require(config, prefix, names, f"at least {least}", lambda number: number >= least)


def require_positive(config: Any, prefix: str, *names: str) -> None:
    """As :func:`require_at_least`, with 0 refused."""
    _require(config, prefix, names, "positive", lambda number: number > 0)


def require_in(
    config: Any, prefix: str, low: float, high: float, *names: str, ends: str = "[]"
) -> None:
    """As :func:`require_at_least`, for an interval; a round bracket leaves that end out."""

    def holds(number: float) -> bool:
        return low <= number <= high and not (
            (ends[0] == "(" and number == low) or (ends[1] == ")" and number == high)
        )

    _require(config, prefix, names, f"in {ends[0]}{low}, {high}{ends[1]}", holds)


def require_finite(config: Any, prefix: str, *names: str) -> None:
    """As :func:`require_at_least`, without a bound."""
    _require(config, prefix, names, "finite", math.isfinite)


def _require(
    config: Any,
    prefix: str,
    names: Sequence[str],
    expected: str,
    holds: Callable[[float], bool],
) -> None:
    for name in names:
        value = getattr(config, name)
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            if number is None:
                continue
            if not math.isfinite(number):
                raise ValueError(f"{prefix}{name} must be finite, got {value}")
            if not holds(number):
                raise ValueError(f"{prefix}{name} must be {expected}, got {value}")


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
