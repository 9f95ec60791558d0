"""Errors that a user can put right: one line each, which says what to do."""

import os
import sys
from collections.abc import Callable
from contextlib import contextmanager


class InputError(Exception):
    """Something a user can put right. The message is one line that says how."""


class LocalError(InputError):
    """An InputError that only one process may have met. Every process that raises it prints it."""


@contextmanager
def one_line(program: str):
    """An InputError ends the command with its line. If all processes raise it, rank 0 prints it."""
    try:
        yield
    except InputError as error:
        is_first = os.environ.get("RANK", "0") == "0"
        if is_first or isinstance(error, LocalError):
            print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def parse_early(program: str, parse: Callable) -> None:
    """Answer --help and mistakes in the flags before the imports that take seconds."""
    with one_line(program):
        parse()
    if os.environ.get("RANK", "0") == "0":
        print("loading torch and transformers ...", file=sys.stderr)


# What reading a damaged file may raise: it is no JSON, or it holds something else than expected.
DAMAGED = (ValueError, TypeError, LookupError, AttributeError)


def reason(error: BaseException) -> str:
    """Type and first line of a library's message."""
    first, _, _ = str(error).strip().partition("\n")
    return f"{type(error).__name__}: {first}"
