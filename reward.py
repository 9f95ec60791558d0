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

from verifier import choice, is_equal

__all__ = [
    "after_thought",
    "agrees",
    "extract_answer",
    "gold_answer",
    "grade",
    "is_equal",
    "outside_thoughts",
    "shaped_reward",
]

MAX_BRACES = 2_000  # a box with more braces counts as unclosed
MAX_PLACEHOLDER = 200  # a box that begins with so many characters of placeholders holds no answer

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*")
_BARE_BOX = re.compile(r"[-+−]?[0-9]+(?:[.,/][0-9]+)*|[A-Za-z]|")  # as in \boxed 5; or nothing
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # not \{ and \}
# Marks that open or close a thought. A channel's name follows its mark: <|channel|>analysis
_MARK = re.compile(
    r"<\|?/?(?:[a-z]+:)?(?:begin_of_|end_of_)?(?:think|thinking|thought)\|?>"
    r"|<\|(?:START|END)_THINKING\|>|\[/?THINK\]|◁/?think▷|<\|inner_(?:prefix|suffix)\|>"
    r"|<\|?channel\|?>\s*(?:analysis|commentary|thought|)"
)
_CLOSES = re.compile(r"/|end_of|END|suffix|channel\|?>\s*$")  # found in a mark that closes
_PLACEHOLDER = re.compile(
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
    marks = list(_MARK.finditer(text))
    if marks:
        text = text[: marks[0].start()] + text[marks[-1].end() :]
    return text.rstrip()


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
    boxes = list(_BOX.finditer(said))
    if not boxes:
        return None
    answer = _content(said, boxes[-1].end())
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


# Gold answers as data sets write them

_WRAPPERS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r".*<answer>(.*?)</answer>.*",
        r".*####\s*([^\n]*)",
        r"\$\$([^$]+)\$\$\.?",
        r"\$((?:[^$\\]|\\.)+)\$\.?",
        r"\\\(((?:(?!\\[()]).)*)\\\)\.?",
        r"\\\[((?:(?!\\[\[\]]).)*)\\\]\.?",
        r"\*{1,3}([^*]+)\*{1,3}\.?",
        r"`+([^`]+)`+",
        r"\**(?i:(?:the |my |final |correct )*answer)(?: is\s*:?|\s*:\**|\**\s*:)\s(.+)",
        r"[\[(]\s*'([^']*)'\s*,?\s*[\])]",
        r'[\[(]\s*"([^"]*)"\s*,?\s*[\])]',
        r"\[\s*(?:'.*'|\".*\")\s*\]()",  # several answers: none
    )
]
_OVERDOUBLED = re.compile(r"(?:[^\\]|\\\\(?=[A-Za-z{}]))+")  # each backslash is two, as repr does
_AROUND = re.compile(r"(?:.*=)?[\s$*.,:\\()\[\]}]*")  # around a box these say nothing
_PROSE = re.compile(r"(?<![\\A-Za-z])(?:(?!and\b)[A-Za-z]{3,}|is\b|[Ss]o\b)|[.:]\s|\n")
_PROSE_AFTER = re.compile(r"\b(?:is|are|was|as|so|since|because|which)\b|[.:]\s|\n")
_JOINED = re.compile(r"\}[\s$\\)]*(?:,|;|and|or)[\s$\\(]*$")
_MARK = re.compile(r"####|<answer>|\\f?box")
_NO_ANSWER = re.compile(
    r"^[-–—−_/|'\"()<>\[\]#*:;,.?\s]*"
    r"(?:none|null|nil|nan|n[/.]?a|inf|not\W?found|unknown|missing|blank|tb[da]|todo|q\.?e\.?d)?"
    r"[-–—−_/|'\"()<>\[\]#*:;,.?\s]*$"
    r"|(?<![0-9] )\bproofs?\b|\bprove[nd]?\b|\bomitted\b|^(?:see|refer)\b|\bto be (?:determined|added)\b"
    r"|(?:\b(?:no|not|without)|n't)\b[a-z ]*\banswers?\b"
    r"|\banswers?\b[a-z ]*\b(?:vary|varies|missing|unknown|unavailable)\b"
    r"|\bnot (?:[a-z]+ly )?(?:found|given|provided|available|applicable|specified)\b",
    re.IGNORECASE,
)


def gold_answer(text: str) -> str:
    r"""The answer in what a data set writes: out of boxes, $ $, <answer> tags, bold, a list of one;
    after ####. "" if there is none, as in "proof", N/A and an empty box, or several.

    >>> gold_answer("Half of 10 is 5.\n#### 5"), gold_answer(r"**$\boxed{\frac12}$**"), gold_answer("N/A")
    ('5', '\\frac12', '')
    """
    before = None
    while text != before:
        before = text
        text = _unwrapped(text.strip())
    plain = re.sub(r"\\(?:text|math)[a-z]*|[{}]", "", text).replace("_", " ")
    is_none = _PLACEHOLDER.fullmatch(text, 0, MAX_PLACEHOLDER) or _NO_ANSWER.search(plain)
    return "" if is_none else text


def _unwrapped(text):
    """Without the outermost wrapper, if there is one."""
    if _OVERDOUBLED.fullmatch(text):
        text = text.replace("\\\\", "\\")
    for wrapper in _WRAPPERS:
        if found := wrapper.fullmatch(text):
            return found[1]
    boxes = list(_BOX.finditer(text))
    return _out_of_boxes(text, boxes[0], boxes[-1]) if boxes else text


def _out_of_boxes(text, first, last):
    """The last box; in a formula boxes say nothing, and are dropped."""
    content = _content(text, last.end())
    before = text[: last.start()]
    after = text[last.end() :].partition(content)[2] if content else ""
    is_single = not text[first.end() : last.start()].strip("{ ")  # or a box in a box
    if not content or is_single and _AROUND.fullmatch(text[: first.start()] + after):
        return content
    if not (_PROSE.search(before) or _PROSE_AFTER.search(after)):  # 5 million is not 5
        return _BOX.sub("", text)
    is_list = first is not last and _JOINED.search(before)
    return "" if is_list else content


def is_worked(text: str) -> bool:
    """Whether a gold answer is a whole solution: text, and then the answer in a box or after ####."""
    before, *marked = _MARK.split(text, maxsplit=1)
    return bool(marked) and bool(re.search(r"[0-9]|(\S+\s+){7}", before))


def agrees(solution: str, gold: str, problem: str = "") -> bool:
    """Whether a solution has a box with the gold answer, or has no box. The letter of a choice
    agrees with its text, which may stand in the problem."""
    boxes = [_content(solution, box.end()) for box in _BOX.finditer(solution)]
    boxes = [gold_answer(box) for box in boxes if box]
    flat = re.sub(r"\\(?:text|math)[a-z]*\s*\{([^{}]*)\}|\\q?quad", r" \1 ", problem)
    options = dict(map(choice, re.split(r"(?<!\S)(?=\(?[A-Z][).:])", flat)))
    golds = _names(gold, options)
    for box in [*reversed(boxes), ", ".join(boxes)]:
        for name, other in itertools.product(_names(box, options), golds):
            if is_equal(name, other) or is_equal(other, name):
                return True
    return not boxes


def _names(answer, options):
    """The answer; where it is a choice, also the text of the choice."""
    letter, words = choice(answer)
    return {answer, words, options.get(letter, "")} - {""}
