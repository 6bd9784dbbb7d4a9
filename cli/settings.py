"""One option for every field of a dataclass of settings, made from it so that the two cannot drift apart."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

import click

from gazepatch.cli.usage import bad_usage
from gazepatch.config import GazeConfig, Size

Command = Callable[..., Any]
Settings = typing.TypeVar("Settings", bound=Any)


def options_of(defaults: Any, without: Collection[str] = ()) -> Callable[[Command], Command]:
    """Options for the fields of some settings, with the values of `defaults` shown in their help.

    The command takes them as `**settings`, for `config_from`; fields `without` an option keep their value.
    """
    names = [field.name for field in dataclasses.fields(defaults) if field.name not in without]
    return _options(type(defaults), {name: _text(getattr(defaults, name)) for name in names})


def reading_options(command: Command) -> Command:
    """Options for how much a model reads, in the place of its own settings; taken as `**reading`, for `open_model`."""
    return _options(GazeConfig, dict.fromkeys(("budget", "min_visual_tokens"), "MODEL's own"))(command)


def least_option(command: Command) -> Command:
    """The option of `reading_options` that says which sequences gaze, alone."""
    return _options(GazeConfig, {"min_visual_tokens": "MODEL's own"})(command)


def _options(kind: type, shown: Mapping[str, str]) -> Callable[[Command], Command]:
    """Options for the fields of a dataclass that are named in `shown`, with what its help calls their defaults."""
    hints, helps = typing.get_type_hints(kind), _field_helps(kind)

    def add(command: Command) -> Command:
        for name in reversed(list(shown)):
            flag, text = "--" + name.replace("_", "-"), f"{helps[name]}  [default: {shown[name]}]"
            if hints[name] is bool:
                option = click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)
            else:
                metavar, parse = _PARSERS[hints[name]]
                option = click.option(flag, name, metavar=metavar, callback=_parsed_by(parse, metavar), help=text)
            command = option(command)
        return command

    return add


def config_from(settings: Mapping[str, Any], defaults: Settings) -> Settings:
    """The settings that were given, `defaults` for the others. A bad one is bad usage."""
    given = {name: value for name, value in settings.items() if value is not None}
    # `--window none` cannot be None before this point: None is an option that was not given.
    given = {name: None if value is _NONE else value for name, value in given.items()}
    with bad_usage():
        return dataclasses.replace(defaults, **given)


def _parsed_by(parse: Callable[[str], object], metavar: str) -> Callable[..., object]:
    """Text to value, by a function that raises ValueError."""

    def callback(ctx: click.Context, param: click.Parameter, value: str | None) -> object:
        try:
            return None if value is None else parse(value)
        except ValueError:
            raise click.BadParameter(f"expected {metavar}, got {value!r}", ctx, param) from None

    return callback


_NONE = object()


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.replace("x", ",").split(",")) if text else ()


def _block_or_none(text: str) -> object:
    return _NONE if text == "none" else _integers(text)


def share_or_number(text: str) -> float | int:
    """A budget: a number of regions if it is written as an integer, else a share. Raises ValueError."""
    return int(text) if text.lstrip("+-").isdigit() else float(text)


_PARSERS: dict[Any, tuple[str, Callable[[str], object]]] = {
    Size: ("H,W,T", _integers),
    Size | None: ("H,W,T|none", _block_or_none),
    float | int: ("SHARE|NUMBER", share_or_number),
    tuple[int, ...]: ("N,N,...", _integers),
    int: ("N", int),
    int | None: ("N", int),
    float: ("NUMBER", float),
    float | None: ("NUMBER", float),
    str: ("NAME", str),
}


def _field_helps(kind: type) -> dict[str, str]:
    """The texts of `Args:` in the docstring of a dataclass, by field."""
    names = [field.name for field in dataclasses.fields(kind)]
    section = (kind.__doc__ or "").partition("Args:")[2].partition("Raises:")[0]
    parts = re.split(rf"\n\s+({'|'.join(names)}): ", section)
    found = {name: " ".join(text.split()) for name, text in zip(parts[1::2], parts[2::2], strict=True)}
    return {name: found.get(name, "").replace("`", "") for name in names}


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none of them"
    return str(value)
