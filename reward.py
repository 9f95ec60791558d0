r"""What is a completion worth? Find its boxed answer, compare it with the gold answer, reward short
correct ones more.

    >>> grade(r"so \boxed{\frac{1}{2}}, no: \boxed{0.75}.", r"\dfrac34")
    True
    >>> shaped_reward(True, length=512, max_length=1024)
    1.25

The docstring of verifier.py says which answers are equal.

Copy this file with verifier.py: together they need only the standard library.
"""

import itertools
import math
import re

from verifier import is_equal

__all__ = ["extract_answer", "grade", "is_equal", "shaped_reward"]

MAX_BRACES = 2_000  # a box with more braces counts as unclosed
MAX_PLACEHOLDER = 200  # a box that begins with so many characters of placeholders holds no answer

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*")
_BARE_BOX = re.compile(r"[-+−]?[0-9]+(?:[.,/][0-9]+)*|[A-Za-z]|")  # as in \boxed 5; or nothing
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # not \{ and \}
_PLACEHOLDER = re.compile(
    r"(?:\\text|\\[a-z]*dots|\\[ ,;:!]|[{}$~\s.?…]|your|final|<?answer>?|here)*", re.IGNORECASE
)


def extract_answer(text: str) -> str | None:
    r"""Content of the last box after the last </think>; None if there is none or it holds no
    answer.

    An unfinished <think> gives None. So does a last box that is unclosed (truncated), empty or a
    placeholder: an earlier box was not the final answer.

    >>> extract_answer(r"\boxed{1}, or rather \fbox{\{\frac{1}{2}\}}")
    '\\{\\frac{1}{2}\\}'
    >>> extract_answer(r"<think>\boxed{1}") is None
    True
    """
    if not isinstance(text, str):
        return None
    thought_end = text.rfind("</think>")
    boxes = list(_BOX.finditer(text, max(0, thought_end)))
    if not boxes or text.rfind("<think>") > thought_end:
        return None
    answer = _content(text, boxes[-1].end())
    return None if _PLACEHOLDER.fullmatch(answer, 0, MAX_PLACEHOLDER) else answer


def _content(text, start):
    """What stands in the box whose content begins at `start`; "" if the box is unclosed."""
    if not text.startswith("{", start):
        return _BARE_BOX.match(text, start)[0]
    depth = 0
    for brace in itertools.islice(_BRACE.finditer(text, start), MAX_BRACES):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1 : brace.start()].strip()
    return ""


def grade(text: str, gold: str) -> bool:
    """Whether the boxed answer of a completion equals the gold answer; False if there is none."""
    answer = extract_answer(text)
    return answer is not None and is_equal(answer, gold)


def shaped_reward(correct: bool, length: int, max_length: int, beta: float = 0.5) -> float:
    """r = correct * (1 + beta * (1 - length / max_length)), lengths in tokens (arXiv 2605.13255).

    >>> shaped_reward(False, 10, 1024), shaped_reward(True, 1024, 1024)
    (0.0, 1.0)
    """
    lengths_fit = 0 <= length <= max_length and max_length > 0
    if correct not in (0, 1) or not lengths_fit or not 0 <= beta < math.inf:
        raise ValueError(f"out of range: {correct=}, {length=}, {max_length=}, {beta=}")
    return 1.0 + beta * (1.0 - length / max_length) if correct else 0.0
