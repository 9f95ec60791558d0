r"""What the teacher is shown in place of the reference solution, `--teacher-context`, and what the
student is asked for that.

    solution     the reference solution
    answer       its answer
    peer         a correct rollout of the same problem
    peers        two correct rollouts and a failed one
    feedback     a correct rollout, or else the solution, and whether the student is right
    other        another problem with its solution
    restated     the problem in other words
    reflection   a correct rollout itself; of a failed one also the verifier's word and what the
                 student says of its mistake
    label        the kind of step that matters, as the student says
    plan         a plan of the solution, as the base model says
    none         nothing

Peers and the other problem are drawn at random, with a seed for every rollout. A text of None means
that there is nothing to show: the teacher has no say on that rollout. Questions about a rollout go
to the student itself, as in arXiv 2605.12741 (reflections) and in a variant of 2605.10194 (marks).
For a plan (2605.11505) the base model is asked. All wording is ours. samples.jsonl has the answers,
`asked`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import reward
from support.sampling import Rollout

LEAST_SEGMENT = 5  # tokens
MOST_MARKED = 0.25  # of the tokens of a rollout, 2605.10194
PLAN_LINES = 5
LABELS = ("setup", "calculation", "algebra", "case distinction", "idea", "conclusion")


@dataclass
class Example(Rollout):
    """A completion of T tokens that a step learns from, and what the family's methods know of it."""

    is_reference: bool = False  # not a rollout: the data's solution, or a written one
    counts: bool = True  # something is learned from it
    has_context: bool = True  # the teacher had something to be shown
    asked: dict = field(default_factory=dict)  # texts that were asked for
    label: str = ""  # kind of the marked segments; "" if there are none
    marked: Tensor = field(init=False)  # bool [T], tokens of the marked segments
    planned: Tensor = field(init=False)  # [T] log p_S after problem and plan, nats
    # with which the teacher reads this example, or wrote it
    teacher_prompt: list[int] | None = None
    likeness: float = 0.0  # of a teacher's solution to the student's next tokens, see BRTS
    place: int = 0  # among the examples that this rank reads in the step

    def __post_init__(self):
        self.marked = torch.zeros(len(self.token_ids), dtype=torch.bool)
        self.planned = torch.zeros(len(self.token_ids))

    def as_json(self) -> dict:
        found = super().as_json()
        if self.is_reference:
            found["is_reference"] = True
        if self.asked:
            found["asked"] = self.asked
        return found


# ---- questions about a rollout


@dataclass
class Question:
    """text(example, tokenizer) -> str is what is asked about an example, None for nothing.
    take(example, answer, tokenizer) keeps the answer."""

    name: str  # of the answers, also in the progress line
    text: Callable
    take: Callable
    # (metric, key in `asked`): the share of answers that gave nothing
    missing: tuple[str, str] | None = None
    frozen: bool = False  # the base model is asked, not the student


def verdict(example):
    """What the verifier says of a failed rollout, without the gold answer."""
    if not example.finished:
        return "The attempt was cut off before its end."
    if example.answer is None:
        return "The attempt has no boxed answer."
    return f"The answer {example.answer[:200]} is wrong."


def thoughtless(example, answer):
    """What follows the thought in an answer about `example`; "" if the thought has no end."""
    return reward.after_thought(answer, example.prompt_end) or ""


def reflection_question(example, tokenizer):
    if example.correct:
        return None
    return (
        f"{example.problem.problem}\n\n[Attempt]\n{example.text}\n[End of attempt]\n\n"
        f"{verdict(example)} Say in a few sentences which step is wrong or missing, why, and what "
        "should be done instead. Do not solve the problem again."
    )


def take_reflection(example, answer, tokenizer):
    example.asked["reflection"] = thoughtless(example, answer).strip()


def segments(example, tokenizer):
    """The lines and sentences of a rollout as ranges of its tokens. A sentence ends in . ! or ?
    before a space. One of fewer than LEAST_SEGMENT tokens goes with the next."""
    texts = token_texts(tokenizer, example.token_ids)
    found = []
    start = 0
    for end, text in enumerate(texts, 1):
        is_last = end == len(texts)
        after = "" if is_last else texts[end][:1]
        is_end = re.search(r"\n|[.!?]\s", text + after)
        if is_last or (is_end and end - start >= LEAST_SEGMENT):
            found.append(range(start, end))
            start = end
    return found


def token_texts(tokenizer, token_ids):
    """What each token adds to the text of the one before it. Decoded alone, some lose the space before
    them."""
    texts = []
    before = []
    for token in token_ids:
        texts.append(tokenizer.decode([*before, token])[len(tokenizer.decode(before)) :])
        before = [token]
    return texts


def marks_question(example, tokenizer):
    shown = []
    for number, part in enumerate(segments(example, tokenizer), 1):
        ids = example.token_ids[part.start : part.stop]
        shown.append(f"[{number}] {tokenizer.decode(ids, skip_special_tokens=True)}")
    asked = "wrong. Which few segments are mistakes"
    if example.correct:
        asked = "correct. Which few segments decide that it succeeds"
    attempt = "\n".join(shown)
    return (
        f"{example.problem.problem}\n\n[Reference solution]\n{example.problem.solution}\n[End of "
        f"reference solution]\n\n[Attempt]\n{attempt}\n[End of attempt]\n\nThe attempt is {asked}, "
        f"and of which kind are they: {', '.join(LABELS)}? Answer in one line, such "
        "as\nSegments: 2, 5. Kind: calculation"
    )


# such as "Segments: 2, 5. Kind: calculation"
NUMBERS = r"Segments?:((?:[\d,\s]|and){,200}\d)\s{,9}[.,;]?"
MARKS_FORM = rf"{NUMBERS}\s{{,9}}Kinds?:\s{{,9}}({'|'.join(LABELS)})s?\b"


def take_marks(example, answer, tokenizer):
    """Mark the segments in the order named, but leave out those that would make it more than
    MOST_MARKED of the tokens. An answer of another form, or with nothing to mark, leaves no label:
    the teacher has no say."""
    example.asked["marks"] = answer
    plain = re.sub(r"[*\[\]`]", "", thoughtless(example, answer))
    said = re.findall(MARKS_FORM, plain, re.IGNORECASE)
    if said:
        numbers, label = said[-1]
        parts = dict(enumerate(segments(example, tokenizer), 1))
        for number in re.findall(r"(?<!\d)\d{1,6}(?!\d)", numbers):
            part = parts.get(int(number), range(0))
            if example.marked.sum() + len(part) <= MOST_MARKED * len(example.marked):
                example.marked[part.start : part.stop] = True
        if example.marked.any():
            example.label = label.lower()
    example.asked["label"] = example.label


def plan_question(example, tokenizer):
    return (
        f"{example.problem.problem}\n\n[Reference solution]\n{example.problem.solution}\n[End of "
        f"reference solution]\n\nWrite a plan of this solution in at most {PLAN_LINES} lines: what to "
        "do, step by step. Do not carry it out, and do not give the answer."
    )


def take_plan(example, answer, tokenizer):
    """The first PLAN_LINES lines that are not empty, without those that have a box."""
    lines = thoughtless(example, answer).splitlines()
    lines = [line.strip() for line in lines if line.strip() and not reward.BOX.search(line)]
    example.asked["plan"] = "\n".join(lines[:PLAN_LINES])


REFLECTION = Question("reflections", reflection_question, take_reflection)
MARKS = Question("marks", marks_question, take_marks, ("unmarked", "label"))
PLAN = Question("plans", plan_question, take_plan, ("unplanned", "plan"), frozen=True)


# ---- what the teacher is shown


@dataclass
class Context:
    """text(example, peers, failed, other) -> str is what the teacher is shown of a rollout, None for
    nothing. peers and failed are the texts of the correct and of the failed other rollouts of its
    problem, other is another problem."""

    text: Callable
    needs: str = ""  # a field that every problem must have: solution or restated
    quoted: int = 0  # completions that the text, or the question for it, may quote
    compares: bool = False  # the text quotes other rollouts of the problem
    is_bare: bool = False  # no text on purpose: the teacher reads the problem alone
    question: Question | None = None  # about a rollout, before its teacher's prompt is made


def show_solution(example, *_):
    return example.problem.solution


def show_answer(example, *_):
    return f"The final answer is \\boxed{{{example.problem.answer}}}."


def show_peer(example, peers, *_):
    return peers[0] if peers else None


def show_peers(example, peers, failed, *_):
    """
    >>> show_peers(None, ["b"], ["c", "d"])
    'Correct attempt:\\nb\\n\\nFailed attempt:\\nc'
    """
    shown = [f"Correct attempt:\n{text}" for text in peers[:2]]
    shown += [f"Failed attempt:\n{text}" for text in failed[:1]]
    return "\n\n".join(shown) if peers else None


def show_feedback(example, peers, *_):
    solution = peers[0] if peers else example.problem.solution
    return f"{solution}\n\nYour answer is {'correct' if example.correct else 'incorrect'}."


def show_other(example, peers, failed, other):
    return f"Another problem:\n{other.problem}\n\nIts solution:\n{other.solution}"


def show_restated(example, *_):
    return f"The same problem in other words:\n{example.problem.restated}"


def show_reflection(example, *_):
    if example.correct:
        return f"Correct attempt:\n{example.text}"
    return (
        f"Failed attempt:\n{example.text}\n\n{verdict(example)}\n\nWhat went wrong:\n"
        + example.asked.get("reflection", "")
    )


def show_label(example, *_):
    return f"What matters here: {example.label}." if example.label else None


def show_plan(example, *_):
    plan = example.asked.get("plan")
    return f"A plan of the solution:\n{plan}" if plan else None


def show_nothing(*_):
    return None


CONTEXTS = {
    "solution": Context(show_solution, "solution"),
    "answer": Context(show_answer),
    "peer": Context(show_peer, quoted=1, compares=True),
    "peers": Context(show_peers, quoted=3, compares=True),
    "feedback": Context(show_feedback, "solution", quoted=1),
    "other": Context(show_other, "solution"),
    "restated": Context(show_restated, "restated"),
    "reflection": Context(show_reflection, quoted=2, question=REFLECTION),
    "label": Context(show_label, "solution", quoted=3, question=MARKS),
    "plan": Context(show_plan, "solution", quoted=1, question=PLAN),
    "none": Context(show_nothing, is_bare=True),
}
