"""One option for every field of a dataclass of settings, made from it so that the two cannot drift apart."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Collection
from typing import Any

import click

from gazepatch.config import Block
from gazepatch.errors import ConfigError

Command = Callable[..., Any]
Settings = typing.TypeVar("Settings", bound=Any)


def options_of(defaults: Any, without: Collection[str] = ()) -> Callable[[Command], Command]:
    """Options for the fields of some settings, with the values of `defaults` shown in their help.

    The command takes them as `**settings`, for `config_from`; fields `without` an option keep their value.
    """
    hints = typing.get_type_hints(type(defaults))
    helps = _field_helps(type(defaults))

    def add(command: Command) -> Command:
        for field in reversed([field for field in dataclasses.fields(defaults) if field.name not in without]):
            flag = "--" + field.name.replace("_", "-")
            shown = f"{helps[field.name]}  [default: {_text(getattr(defaults, field.name))}]"
            if hints[field.name] is bool:
                option = click.option(f"{flag}/--no-{flag[2:]}", field.name, default=None, help=shown)
            else:
                metavar, parse = _PARSERS[hints[field.name]]
                option = click.option(
                    flag, field.name, metavar=metavar, callback=_parsed_by(parse, metavar), help=shown
                )
            command = option(command)
        return command

    return add


def config_from(settings: dict[str, Any], defaults: Settings) -> Settings:
    """The settings that were given, `defaults` for the others. A bad one is bad usage."""
    given = {name: value for name, value in settings.items() if value is not None}
    # `--window none` cannot be None before this point: None is an option that was not given.
    given = {name: None if value is _NONE else value for name, value in given.items()}
    try:
        return dataclasses.replace(defaults, **given)
    except ConfigError as error:
        raise click.UsageError(str(error), click.get_current_context()) from error


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
    Block: ("H,W,T", _integers),
    Block | None: ("H,W,T|none", _block_or_none),
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
