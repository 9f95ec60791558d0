"""Errors that a user can put right: one line each, which says what to do."""


class InputError(Exception):
    """Something a user can put right; the message is one line that says how."""


class LocalError(InputError):
    """What one process met, and the others perhaps did not: whoever raises it prints it."""


# What reading a damaged file may raise: JSON, and what expects another content in it
DAMAGED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


def reason(error: BaseException) -> str:
    """Type and first line of a library's message, without torch's advice to load a file unsafely."""
    line = (str(error).strip().splitlines() or [""])[0]
    return type(error).__name__ + (f": {line}" if line and "weights_only" not in line else "")
