r"""Gold answers as data sets write them: what the answer is, and whether a solution agrees with it.

What is written in a rare way has no answer here, so that its line is refused.
"""

import re

from reward import BOX, MAX_PLACEHOLDER, PLACEHOLDER, box_content
from verifier import choice, is_equal

MAX_BOXES = 20  # the last ones of a solution

# One group of these holds the answer. Marks of the same kind must not be inside: $5$ and $6$ are two.
_WRAPPED = re.compile(
    r".*####(.*)"
    r"|.*(?i:<answer>)(.*?)(?:(?i:</answer>).*)?"
    r"|(?:\$|\$\$)((?:[^$\\]|\\.)*)(?:\$|\$\$)\.?"  # but \$ may be inside
    r"|\\[(\[]((?:[^\\]|\\[^()\[\]])*)\\[)\]]\.?"  # \(5\) or \[5\]
    r"|\*\*([^*]*)\*\*"
    # **Answer:** 5, or a sentence
    r"|\**(?:(?i:(?:the |final |correct )*answer)(?: is\b|\W*:)[\s*:]*)+((?:(?!\\f?box).)*?)\**"
    r"|[\[(]'([^']*)',?[\])]"  # a list or a tuple of one, as Python prints it
    r'|[\[(]"([^"]*)",?[\])]'
    r"|[\[(](?:'.*'|\".*\")[\])]()",  # several answers: none
    re.DOTALL,
)
# Python prints each backslash as two.
_DOUBLED = re.compile(r"(?:[^\\]|\\\\(?=[A-Za-z{}]))+")
# Found before a box to which a sentence leads: the end of another sentence; before the first box
# also a word, or an equals sign at the end. Several boxes in one sentence are several answers.
_LEADS = re.compile(
    r"[.:]\s|[。：]|\n\n"
    r"|^(?!\{).*(?<![\\A-Za-z{])(?:(?:[A-Za-z]{3,}|[Ii]s|[Ss]o)\b|[一-龥])"
    r"|^(?!\{).*(?<![<>!])(?<!\\not)=[\s$]*$",
    re.DOTALL,
)
_MARK = re.compile(r"####|<answer>|\\f?box")
# In small letters, without punctuation: first what must be all of an answer, then what may be a part.
# "80 proof" is a strength.
_NO_ANSWER = re.compile(
    r"^(?:n ?a|nan|none|null|nil|inf|not[ _]?found|unknown|missing|blank|tb[ad]|todo|q ?e ?d|略)$"
    r"|^(?:see|refer)\b|证明|见解析"
    r"|(?<![0-9] )\bproofs?\b|\bprove[nd]?\b|\bomitted\b|\bto be (?:determined|added)\b"
    r"|\b(?:no|not|without) (?:\w+ ){0,3}answers?\b|\banswers? (?:may )?vary\b"
    r"|\bnot (?:found|given|provided|available|applicable|specified)\b"
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
    start = re.sub(r"\\(?:text|math)[a-z]*", "", text[:MAX_PLACEHOLDER].lower())
    words = " ".join(re.findall(r"\w+", start))
    is_placeholder = PLACEHOLDER.fullmatch(text.strip("-–—−_/|:'\"()[] "), 0, MAX_PLACEHOLDER)
    is_prose = "\n" in text and "\\begin" not in text
    return "" if is_placeholder or is_prose or _NO_ANSWER.search(words) else text


def _unwrapped(text):
    """Without the outermost wrapper, if there is one."""
    if _DOUBLED.fullmatch(text):
        text = text.replace("\\\\", "\\")
    if found := _WRAPPED.fullmatch(text):
        return found[found.lastindex]
    if not BOX.search(text):
        return text
    # The last box counts if a sentence leads to it, or if what stands around it changes nothing.
    *_, before, after = BOX.split(text)
    content = box_content(after, 0)
    is_whole = is_equal(BOX.sub("", text), "{" + content + "}")
    return content if is_whole or _LEADS.search(before) else ""


def is_worked(text: str) -> bool:
    """Whether a gold answer is a whole solution: text, and then the answer in a box or after ####."""
    before = _MARK.split(text)[0]
    return before != text and (len(before.split()) > 6 or bool(re.search("[0-9]", before)))


def agrees(solution: str, gold: str) -> bool:
    """Whether the last box of a solution, or all its boxes together, are the gold answer; also if it
    has no box. Of a choice, the text is enough."""
    found = BOX.split(solution)[1:]
    boxes = [gold_answer(box_content(after, 0)) for after in found[-MAX_BOXES:]]
    boxes = list(filter(None, boxes))
    if not boxes:
        return True
    last = boxes[-1]
    said = (last, choice(last)[1], ", ".join(boxes))
    return any(is_equal(answer, gold) for answer in said) or is_equal(last, choice(gold)[1])
