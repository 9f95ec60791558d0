r"""What the teacher is shown in the place of the reference solution, `--teacher-context`, and what
is asked for that.

solution: the reference solution. answer: its answer. peer: a correct rollout of the same problem.
peers: two correct ones and a failed one. feedback: a correct one, else the solution, and whether
the student is right. other: another problem with its solution. restated: the problem in other
words. reflection: of a failed rollout the attempt, the verifier's word and what the student says of
its mistake; of a correct one the attempt. label: the kind of step that matters, as the student
says. none: nothing.

Peers and the other problem are drawn at random, seeded for every row. A text of None means that
there is nothing to show, and then the teacher has no say on that rollout. Questions about a rollout
go to the student itself, as in arXiv 2605.12741 (reflections) and, a variant there, 2605.10194
(marks); all wording is ours. The answers stand in samples.jsonl, `asked`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from support.data import Problem
from support.sampling import Rollout

LEAST_SEGMENT = 5  # tokens
MOST_MARKED = 0.25  # of the tokens of a rollout, 2605.10194
LABELS = ("setup", "calculation", "algebra", "case distinction", "idea", "conclusion")


@dataclass
class Example(Rollout):
    """A completion of T tokens, and what the family's methods know of it."""

    is_reference: bool = False  # no rollout: the data's solution, or the teacher's
    has_context: bool = True  # the teacher had something to be shown
    asked: dict = field(default_factory=dict)  # texts that were asked for
    label: str = ""  # kind of the marked segments; "" if there are none
    marked: Tensor | None = None  # bool [T], tokens of the marked segments
    # with which the teacher reads this row, or wrote it
    teacher_prompt: list[int] | None = None
    kept: Tensor | None = None  # bool [T], tokens that the mean of the step counts
    # log (p_S / p_T) of the teacher's solution minus that of the rollout, sums over tokens, nats
    margin: float = 0.0
    views: Tensor | None = None  # [T] KL(p_T || the teacher without a text), nats
    bare_hidden: Tensor | None = None  # [T, D] states of the teacher without a text

    def as_json(self) -> dict:
        return super().as_json() | ({"asked": self.asked} if self.asked else {})


@dataclass(frozen=True)
class Question:
    """text(row, tokenizer) is what is asked about a rollout, None for nothing; take(row, answer,
    tokenizer) keeps the answer."""

    name: str  # of the answer, also in the progress line
    text: Callable[[Example, object], str | None]
    take: Callable[[Example, str, object], None]


def verdict(row: Example) -> str:
    """What the verifier says of a failed rollout, without the gold answer."""
    if not row.finished:
        return "The attempt was cut off before its end."
    return (
        "The attempt has no boxed answer."
        if row.answer is None
        else f"The answer {row.answer[:200]} is wrong."
    )


def _said(answer: str) -> str:
    """Without the thought before it; nothing, if that has no end."""
    said = answer.rpartition("</think>")[2]
    return "" if "<think>" in said else said


def _ask_for_reflection(row: Example, tokenizer) -> str | None:
    return (
        None
        if row.correct
        else (
            f"{row.problem.problem}\n\n[Attempt]\n{row.text}\n[End of attempt]\n\n{verdict(row)} "
            "Say in a few sentences which step is wrong or missing, why, and what should be "
            "done instead. Do not solve the problem again."
        )
    )


def segments(row: Example, tokenizer) -> list[range]:
    """The lines and sentences of a rollout as ranges of its tokens: a sentence ends in . ! or ?
    before a space. One of less than LEAST_SEGMENT tokens goes with the next."""
    # a token's text is what it adds to the one before it: alone, some lose the space before them
    ids = row.token_ids
    texts = [
        tokenizer.decode(ids[max(0, i - 1) : i + 1])[
            len(tokenizer.decode(ids[max(0, i - 1) : i])) :
        ]
        for i in range(len(ids))
    ]
    ends = [
        i + 1
        for i, (text, after) in enumerate(zip(texts, [*texts[1:], ""], strict=False))
        if re.search(r"\n|[.!?]\s", text + after[:1])
    ]
    found, start = [], 0
    for end in [*ends, len(texts)]:
        if end - start >= LEAST_SEGMENT or end == len(texts) > start:
            found.append(range(start, end))
            start = end
    return found


def _ask_for_marks(row: Example, tokenizer) -> str:
    shown = "\n".join(
        f"[{number}] "
        f"{tokenizer.decode(row.token_ids[part.start : part.stop], skip_special_tokens=True)}"
        for number, part in enumerate(segments(row, tokenizer), 1)
    )
    asked = (
        "correct. Which few segments decide that it succeeds"
        if row.correct
        else "wrong. Which few segments are mistakes"
    )
    return (
        f"{row.problem.problem}\n\n[Reference solution]\n{row.problem.solution}\n[End of "
        f"reference solution]\n\n[Attempt]\n{shown}\n[End of attempt]\n\nThe attempt is {asked}, "
        f"and of which kind are they: {', '.join(LABELS)}? Answer in one line, such "
        "as\nSegments: 2, 5. Kind: calculation"
    )


def _take_marks(row: Example, answer: str, tokenizer) -> None:
    """Segments in the order named, without those that would make it more than MOST_MARKED of the
    tokens. An answer of another form, or with nothing to mark, leaves no label, and the teacher has
    no say."""
    row.asked["marks"] = answer
    form = rf"Segments?:((?:[\d,\s]|and){{,200}}\d)\s{{,9}}[.,;]?\s{{,9}}Kinds?:\s{{,9}}({'|'.join(LABELS)})s?\b"
    said = re.findall(form, re.sub(r"[*\[\]`]", "", _said(answer)), re.IGNORECASE)
    parts = segments(row, tokenizer)
    row.marked = torch.zeros(len(row.token_ids), dtype=torch.bool)
    for number in re.findall(r"(?<!\d)\d{1,6}(?!\d)", said[-1][0]) if said else ():
        part = parts[int(number) - 1] if 1 <= int(number) <= len(parts) else range(0)
        if row.marked.sum() + len(part) <= MOST_MARKED * len(row.marked):
            row.marked[part.start : part.stop] = True
    row.asked["label"] = row.label = said[-1][1].lower() if row.marked.any() else ""


REFLECTION = Question(
    "reflections",
    _ask_for_reflection,
    lambda row, answer, _: row.asked.update(reflection=_said(answer).strip()),
)
MARKS = Question("marks", _ask_for_marks, _take_marks)


@dataclass(frozen=True)
class Context:
    """text(row, peers, failed, example) is what the teacher is shown of a rollout: texts of the
    correct and of the failed other rollouts of its problem, and another problem; None if there is
    nothing."""

    text: Callable[[Example, list[str], list[str], Problem], str | None]
    needs: tuple[str, ...] = ()  # fields of the problems
    quoted: int = 0  # completions that the text, or what is asked for it, may quote
    compares: bool = False  # the text quotes other rollouts of the problem
    is_bare: bool = False  # no text, and that is meant: the teacher reads the student's prompt
    question: Question | None = None  # about a rollout, before its teacher's prompt is made


def _peers(
    row: Example | None, peers: list[str], failed: list[str], example: Problem | None
) -> str | None:
    """
    >>> _peers(None, ["b"], ["c", "d"], None)
    'Correct attempt:\\nb\\n\\nFailed attempt:\\nc'
    """
    shown = [f"Correct attempt:\n{text}" for text in peers[:2]] + [
        f"Failed attempt:\n{text}" for text in failed[:1]
    ]
    return "\n\n".join(shown) if peers else None


def _feedback(row: Example, peers: list[str], *_) -> str:
    return (
        f"{(peers or [row.problem.solution])[0]}\n\nYour answer is "
        f"{'correct' if row.correct else 'incorrect'}."
    )


def _reflection(row: Example, *_) -> str:
    if row.correct:
        return f"Correct attempt:\n{row.text}"
    return (
        f"Failed attempt:\n{row.text}\n\n{verdict(row)}\n\nWhat went "
        f"wrong:\n{row.asked.get('reflection', '')}"
    )


CONTEXTS = {
    "solution": Context(lambda row, *_: row.problem.solution, needs=("solution",)),
    "answer": Context(lambda row, *_: f"The final answer is \\boxed{{{row.problem.answer}}}."),
    "peer": Context(lambda row, peers, *_: (peers or [None])[0], quoted=1, compares=True),
    "peers": Context(_peers, quoted=3, compares=True),
    "feedback": Context(_feedback, needs=("solution",), quoted=1),
    "other": Context(
        lambda row, peers, failed, example: (
            f"Another problem:\n{example.problem}\n\nIts solution:\n{example.solution}"
        ),
        needs=("solution",),
    ),
    "restated": Context(
        lambda row, *_: f"The same problem in other words:\n{row.problem.restated}",
        needs=("restated",),
    ),
    "reflection": Context(_reflection, quoted=2, question=REFLECTION),
    "label": Context(
        lambda row, *_: f"What matters here: {row.label}." if row.label else None,
        needs=("solution",),
        quoted=3,
        question=MARKS,
    ),
    "none": Context(lambda *_: None, is_bare=True),
}
