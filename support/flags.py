"""Command lines from dataclasses: a field is a flag, with its default, its sentence in --help and
its range."""

import argparse
import os
from collections.abc import Iterable
from dataclasses import Field, field, fields
from pathlib import Path

from support.errors import InputError, LocalError

SEEDS = "[0, 1e18]"  # torch takes 64 bits


def flag(default, help: str, interval: str = "", choices: tuple | None = None):
    """One setting; interval: the numbers that it may be, such as "[0, 1)". A list takes several
    values at once, all of the type of its first default; one that is empty by default is a flag to
    be repeated."""
    keywords = (
        {"default_factory": lambda: list(default)}
        if isinstance(default, list)
        else {"default": default}
    )
    return field(**keywords, metadata={"help": help, "interval": interval, "choices": choices})


def nonempty(value: str) -> str:
    """The type of a flag that must say something: an empty name would mean the current
    directory."""
    if not value.strip():
        raise argparse.ArgumentTypeError("it is empty: is a variable of the shell not set?")
    return value


def nonempty_path(value: str) -> Path:
    return Path(nonempty(value))


def flag_name(key: str) -> str:
    """The flag of a field."""
    return "--" + key.rstrip("_").replace("_", "-")  # from_, for a word of Python


class Parser(argparse.ArgumentParser):
    """Mistakes raise InputError; what is not on the command line is not in the result."""

    def __init__(self, description: str, epilog: str | None = None, prog: str | None = None):
        super().__init__(
            prog,
            description=description,
            epilog=epilog,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str):
        raise InputError(f"{message}; see --help")


def add_flags(parser, settings: Iterable[Field]) -> None:
    """A flag per field."""
    for f in settings:
        kind = (
            nonempty
            if f.type is str and f.default != ""
            else nonempty_path
            if f.type is Path
            else f.type
        )
        many = f.default_factory() if f.type is list else []
        keywords = {"type": kind, "choices": f.metadata["choices"]}
        if f.type is bool:
            keywords = {"action": argparse.BooleanOptionalAction}
        elif f.type is list:
            keywords = (
                {"type": type(many[0]), "nargs": "+"}
                if many
                else {"type": nonempty, "action": "append"}
            )
        default = " ".join(map(str, many)) if f.type is list else f.default
        shown = f" (default: {default})" if default not in (None, "") else ""
        parser.add_argument(
            flag_name(f.name), help=f.metadata["help"] + shown, dest=f.name, **keywords
        )


def parse(kind: type, argv: list[str], description: str):
    """A `kind` from the command line, its ranges checked."""
    parser = Parser(description)
    add_flags(parser, fields(kind))
    settings = kind(**vars(parser.parse_args(argv)))
    check_ranges(settings)
    return settings


def check_ranges(settings) -> None:
    """InputError for the first number that is out of its range."""
    for f in fields(settings):
        value, interval = getattr(settings, f.name), f.metadata["interval"]
        for number in (value if f.type is list else [value]) if interval else ():
            if not is_inside(number, interval):
                raise InputError(f"{flag_name(f.name)} must be in {interval}, got {number}")


def environment_number(name: str, default: int) -> int:
    """Of a variable of the environment, as torchrun sets them."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise LocalError(
            f"{name}={text} in the environment is no number: start with torchrun, or unset it"
        )
    return int(text)


def is_inside(value: float, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    return (
        low < value < high
        or (value == low and interval[0] == "[")
        or (value == high and interval[-1] == "]")
    )
