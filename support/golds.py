r"""Gold answers as data sets write them: what the answer is, and whether a solution agrees with it."""

import itertools
import re

from reward import BOX, MAX_PLACEHOLDER, PLACEHOLDER, box_content
from verifier import choice, is_equal

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
    is_none = PLACEHOLDER.fullmatch(text, 0, MAX_PLACEHOLDER) or _NO_ANSWER.search(plain)
    return "" if is_none else text


def _unwrapped(text):
    """Without the outermost wrapper, if there is one."""
    if _OVERDOUBLED.fullmatch(text):
        text = text.replace("\\\\", "\\")
    for wrapper in _WRAPPERS:
        if found := wrapper.fullmatch(text):
            return found[1]
    boxes = list(BOX.finditer(text))
    return _out_of_boxes(text, boxes[0], boxes[-1]) if boxes else text


def _out_of_boxes(text, first, last):
    """The last box; in a formula boxes say nothing, and are dropped."""
    content = box_content(text, last.end())
    before = text[: last.start()]
    after = text[last.end() :].partition(content)[2] if content else ""
    is_single = not text[first.end() : last.start()].strip("{ ")  # or a box in a box
    if not content or is_single and _AROUND.fullmatch(text[: first.start()] + after):
        return content
    if not (_PROSE.search(before) or _PROSE_AFTER.search(after)):  # 5 million is not 5
        return BOX.sub("", text)
    is_list = first is not last and _JOINED.search(before)
    return "" if is_list else content


def is_worked(text: str) -> bool:
    """Whether a gold answer is a whole solution: text, and then the answer in a box or after ####."""
    before, *marked = _MARK.split(text, maxsplit=1)
    return bool(marked) and bool(re.search(r"[0-9]|(\S+\s+){7}", before))


def agrees(solution: str, gold: str, problem: str = "") -> bool:
    """Whether a solution has a box with the gold answer, or has no box. The letter of a choice
    agrees with its text, which may stand in the problem."""
    boxes = [box_content(solution, box.end()) for box in BOX.finditer(solution)]
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
