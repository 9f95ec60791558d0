"""Errors that a user can put right: one line each, which says what to do."""

import os
import sys
from collections.abc import Callable
from contextlib import contextmanager


class InputError(Exception):
    """Something a user can put right; the message is one line that says how."""


class LocalError(InputError):
    """What one process met, and the others perhaps did not: whoever raises it prints it."""


@contextmanager
def one_line(program: str):
    """An InputError ends the command with its line."""
    try:
        yield
    except InputError as error:
        # else every rank says the same
        if os.environ.get("RANK", "0") == "0" or isinstance(error, LocalError):
            print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def parse_early(program: str, parse: Callable) -> None:
    """Before the imports that take seconds: parse() answers --help and mistakes, then a word says
    what goes on."""

    def hook(kind, *error):
        if kind is not KeyboardInterrupt:
            return sys.__excepthook__(kind, *error)
        print(f"\n{program}: interrupted, nothing was written", file=sys.stderr)

    sys.excepthook = hook
    with one_line(program):
        parse()
    if os.environ.get("RANK", "0") == "0":
        print("loading torch and transformers ...", file=sys.stderr)


# What reading a damaged file may raise: JSON, and what expects another content in it
DAMAGED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


def reason(error: BaseException) -> str:
    """Type and first line of a library's message, without torch's advice to load a file
    unsafely."""
    line = (str(error).strip().splitlines() or [""])[0]
    return type(error).__name__ + (f": {line}" if line and "weights_only" not in line else "")
