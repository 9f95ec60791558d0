"""Command lines from dataclasses: a field is a flag, with its default, its sentence in --help and
its bounds."""

import argparse
import math
import operator
import os
from collections.abc import Iterable
from dataclasses import Field, field, fields
from datetime import date
from pathlib import Path

from support.errors import InputError

BOUNDS = {  # of a number: what the message says, and what must hold
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
}
SEEDS = {"least": 0, "most": 10**18}  # torch takes 64 bits


def flag(
    default, help: str, *, choices: tuple | None = None, keywords: dict | None = None, **bounds
):
    """One setting. bounds: least, above, most and below, as in BOUNDS; such a number is finite.
    keywords: more of argparse's add_argument.

    A list takes several values at once, all of the type of its first default. A list that is empty
    by default is a flag to be repeated.
    """
    if bounds:
        bounds.setdefault("below", math.inf)
    metadata = {"help": help, "choices": choices, "keywords": keywords or {}, "bounds": bounds}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def day(value: str) -> str:
    """The kind of a flag that is a date, YYYY-MM-DD."""
    return date.fromisoformat(value).isoformat()


def nonempty(value: str) -> str:
    """The type of a flag that must say something. An empty name would mean the current directory."""
    if not value.strip():
        raise argparse.ArgumentTypeError("it is empty: is a variable of the shell not set?")
    return value


def nonempty_path(value: str) -> Path:
    return Path(nonempty(value))


def flag_name(key: str) -> str:
    """The flag of a field. `from_` is --from, which is a word of Python."""
    return "--" + key.rstrip("_").replace("_", "-")


class Parser(argparse.ArgumentParser):
    """Mistakes raise InputError. The result holds only what is on the command line."""

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
        default = f.default
        keywords = {"type": f.type, "choices": f.metadata["choices"]}
        if f.type is bool:
            keywords = {"action": argparse.BooleanOptionalAction}
        elif f.type is list:
            values = f.default_factory()
            default = " ".join(map(str, values))
            keywords = {"type": nonempty, "action": "append"}
            if values:
                keywords = {"type": type(values[0]), "nargs": "+"}
        elif f.type is Path:
            keywords["type"] = nonempty_path
        elif f.type is str and default != "":
            keywords["type"] = nonempty
        keywords |= f.metadata["keywords"]
        help = f.metadata["help"]
        if default not in (None, ""):
            help += f" (default: {default})"
        parser.add_argument(flag_name(f.name), help=help, dest=f.name, **keywords)


def parse(kind: type, argv: list[str], description: str):
    """A `kind` from the command line, its bounds checked."""
    parser = Parser(description)
    add_flags(parser, fields(kind))
    settings = kind(**vars(parser.parse_args(argv)))
    check_ranges(settings)
    return settings


def check_ranges(settings) -> None:
    """InputError for the first number that is out of its bounds."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        numbers = value if f.type is list else [value]
        for name, bound in f.metadata["bounds"].items():
            words, holds = BOUNDS[name]
            for number in numbers:
                if not holds(number, bound):
                    raise InputError(f"{flag_name(f.name)} must be {words} {bound}, got {number}")


def environment_number(name: str, default: int) -> int:
    """A variable of the environment, as torchrun sets them."""
    return int(os.environ.get(name) or default)
