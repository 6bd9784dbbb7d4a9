"""One option for every field of a dataclass of settings, made from it so that the two cannot drift apart."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import click

from gazepatch.cli.usage import bad_usage
from gazepatch.config import GazeConfig, Size

Command = Callable[..., Any]
Settings = typing.TypeVar("Settings", bound=Any)


def options_of(defaults: Any, without: Collection[str] = ()) -> Callable[[Command], Command]:
    """Options for the fields of some settings, with the values of `defaults` shown in their help.

    The command takes them as `**settings`, for `config_from`; fields `without` an option keep their value.
    """
    fields = [field.name for field in dataclasses.fields(defaults) if field.name not in without]
    return _options(type(defaults), {name: _text(getattr(defaults, name)) for name in fields})


def reading_options(command: Command) -> Command:
    """Options for how much a model reads, in the place of its own settings; taken as `**reading`, for `open_model`."""
    return _options(GazeConfig, dict.fromkeys(("budget", "min_visual_tokens"), "MODEL's own"))(command)


def least_option(command: Command) -> Command:
    """The option of `reading_options` that says which sequences gaze, alone."""
    return _options(GazeConfig, {"min_visual_tokens": "MODEL's own"})(command)


def _options(kind: type, shown: Mapping[str, str | None]) -> Callable[[Command], Command]:
    """Options for the fields of a dataclass named in `shown`, with what its help calls their defaults.

    Where that is None, the words of the docstring for `None` stand there.
    """
    hints, helps = typing.get_type_hints(kind), _field_helps(kind)

    def add(command: Command) -> Command:
        for name in reversed(list(shown)):
            help_text, none = helps[name]
            text = f"{help_text}  [default: {none if shown[name] is None else shown[name]}]"
            flag = _flag(name)
            if hints[name] is bool:
                option = click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)
            else:
                value = _VALUES[hints[name]]
                option = click.option(flag, name, metavar=value.metavar, callback=_parsed_as(value), help=text)
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


class _Value(NamedTuple):
    """What an option takes: its name in the help, what is wanted in words, and text to value, or ValueError."""

    metavar: str
    wanted: str
    parse: Callable[[str], object]


def _parsed_as(kind: _Value) -> Callable[..., object]:
    def callback(ctx: click.Context, param: click.Parameter, value: str | None) -> object:
        try:
            return None if value is None else kind.parse(value)
        except ValueError:
            raise click.BadParameter(f"expected {kind.wanted}, got {value!r}", ctx, param) from None

    return callback


_NONE = object()


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.replace("x", ",").split(",")) if text else ()


def _size_or_none(text: str) -> object:
    return _NONE if text == "none" else _integers(text)


def share_or_number(text: str) -> float | int:
    """A budget: a number of regions if it is written as an integer, else a share. Raises ValueError."""
    return int(text) if text.lstrip("+-").isdigit() else float(text)


_WHOLE = _Value("N", "a whole number, such as 8", int)
_NUMBER = _Value("NUMBER", "a number, such as 0.5", float)
_VALUES: dict[Any, _Value] = {
    Size: _Value("H,W,T", "three whole numbers H,W,T, such as 6,6,1", _integers),
    Size | None: _Value("H,W,T|none", "three whole numbers H,W,T, such as 3,3,1, or none", _size_or_none),
    float | int: _Value("SHARE|NUMBER", "a share or a number of regions, such as 0.25 or 8", share_or_number),
    tuple[int, ...]: _Value("N,N,...", "whole numbers, such as 0,1", _integers),
    int: _WHOLE,
    int | None: _WHOLE,
    float: _NUMBER,
    float | None: _NUMBER,
    str: _Value("NAME", "a name", str),
}

# Where the words of the docstring are for Python alone.
_HELPS = {
    "budget": "Regions one query may read: a share of those it can see, such as 0.25, or their number, such as 8. "
    "1 is one region, 1.0 is all of them."
}


def _field_helps(kind: type) -> dict[str, tuple[str, str]]:
    """The texts of `Args:` in the docstring of a dataclass, by field, and what each says of None (`; None: ...`)."""
    names = [field.name for field in dataclasses.fields(kind)]
    section = (kind.__doc__ or "").partition("Args:")[2].partition("Raises:")[0]
    parts = re.split(rf"\n\s+({'|'.join(names)}): ", section)
    found = dict.fromkeys(names, ("", "none"))
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        words = re.sub("`([a-z_]+)`", lambda match: _flag(match[1]) if match[1] in names else match[1], text)
        words = " ".join(words.replace("`", "").replace("None means", "none means").split())
        none = re.search(r"; None: (.*?)\.(?= |$)", words)
        help_text = words.replace(none[0], ".") if none else words
        found[name] = (_HELPS.get(name, help_text), none[1] if none else "none")
    return found


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _text(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none of them"
    return str(value)
