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

__all__ = [
    "after_thought",
    "extract_answer",
    "grade",
    "is_equal",
    "outside_thoughts",
    "shaped_reward",
]

MAX_BRACES = 2_000  # a box with more braces counts as unclosed
MAX_PLACEHOLDER = 200  # a box that begins with so many characters of placeholders holds no answer

BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*")
_BARE_BOX = re.compile(r"[-+−]?[0-9]+(?:[.,/][0-9]+)*|[A-Za-z]|")  # as in \boxed 5; or nothing
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # not \{ and \}
# Marks that open or close a thought. A channel's name follows its mark: <|channel|>analysis
_MARK = re.compile(
    r"(?i:<\|?/?(?:(?!no_)\w{1,20}[:_])?(?:think|thinking|thoughts?|reasoning)"
    r"(?::\w{1,20}|_start|_begin|_end)?\|?>)"
    r"|\[/?THINK\]|◁/?think▷|<\|inner_(?:prefix|suffix)\|>|<\|(?:open|close)\|>think"
    r"|<\|?channel\|?>\s*(?:analysis|commentary|thought|)|<\|content\|>|to=(?:self|user)<\|message\|>"
    r"|<\|begin_assistant\|>\s*Here are my reasoning steps:|\[BEGIN FINAL RESPONSE\]"
)
# found in a mark that closes
_CLOSES = re.compile(r"(?i)/|end_|_end|suffix|close|channel\|?>\s*$|content|to=user|response")
PLACEHOLDER = re.compile(
    r"(?:\\text|\\[a-z]*dots|\\[ ,;:!]|[{}$~\s.?…]|your|final|<?answer>?|here)*", re.IGNORECASE
)


def after_thought(text: str, prompt_end: str = "") -> str | None:
    """What a completion says after its last thought; None if that thought has no end.

    `prompt_end` is what the prompt ends in, after the question. Some chat templates open the
    thought there.

    >>> after_thought("<think>7?</think>It is 8."), after_thought("7?", "assistant\\n<think>\\n")
    ('It is 8.', None)
    """
    whole = prompt_end + text
    marks = list(_MARK.finditer(whole))
    if not marks:
        return text
    if not _CLOSES.search(marks[-1][0]):
        return None
    return whole[max(len(prompt_end), marks[-1].end()) :]


def outside_thoughts(text: str) -> str:
    """`text` up to its first mark of a thought and from its last one on, without space at the end.

    >>> outside_thoughts("assistant\\n<think>\\n\\n</think>\\n\\n")
    'assistant'
    """
    first, *others = _MARK.split(text)
    return (first + "".join(others[-1:])).rstrip()


def extract_answer(text: str, prompt_end: str = "") -> str | None:
    r"""Content of the last box after the last thought (`after_thought`); None if there is none or it
    holds no answer.

    An unfinished thought gives None. So does a last box that is unclosed (truncated), empty or a
    placeholder: an earlier box was not the final answer.

    >>> extract_answer(r"\boxed{1}, or rather \fbox{\{\frac{1}{2}\}}")
    '\\{\\frac{1}{2}\\}'
    >>> extract_answer(r"<think>\boxed{1}") is None
    True
    """
    if not isinstance(text, str):
        return None
    said = after_thought(text, prompt_end) or ""
    boxes = list(BOX.finditer(said))
    if not boxes:
        return None
    answer = box_content(said, boxes[-1].end())
    return None if PLACEHOLDER.fullmatch(answer, 0, MAX_PLACEHOLDER) else answer


def box_content(text, start):
    """What stands in the box whose content begins at `start`; "" if the box is unclosed."""
    if not text.startswith("{", start):
        return _BARE_BOX.match(text, start)[0]
    depth = 0
    for brace in itertools.islice(_BRACE.finditer(text, start), MAX_BRACES):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1 : brace.start()].strip()
    return ""


def grade(text: str, gold: str, prompt_end: str = "") -> bool:
    """Whether the boxed answer of a completion equals the gold answer; False if there is none.
    `prompt_end` as in `after_thought`."""
    answer = extract_answer(text, prompt_end)
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
