r"""What the teacher is shown in the place of the reference solution: `--teacher-context`.

solution: the reference solution. answer: its answer. peer: a correct rollout of the same problem. peers: two correct
ones and a failed one. feedback: a correct one, else the solution, and whether the student is right. none: nothing.

A text is a function of the problem, the correct and the failed other rollouts of it, and whether the rollout itself is
correct. None means that there is nothing to show, and then the teacher has no say on that rollout.
"""

from collections.abc import Callable
from dataclasses import dataclass

from support.data import Problem


@dataclass(frozen=True)
class Context:
    """text(problem, peers, failed, correct) is what the teacher is shown, None if there is nothing."""

    text: Callable[[Problem, list[str], list[str], bool], str | None]
    needs_solution: bool = False
    most_peers: int = 0  # rollouts that the text may quote
    is_bare: bool = False  # no text, and that is meant: the teacher reads the student's prompt


def _peers(problem: Problem, peers: list[str], failed: list[str], correct: bool) -> str | None:
    """
    >>> _peers(None, ["b"], ["c", "d"], True)
    'Correct attempt:\\nb\\n\\nFailed attempt:\\nc'
    """
    shown = [f"Correct attempt:\n{text}" for text in peers[:2]] + [f"Failed attempt:\n{text}" for text in failed[:1]]
    return "\n\n".join(shown) if peers else None


def _feedback(problem: Problem, peers: list[str], failed: list[str], correct: bool) -> str:
    return f"{(peers or [problem.solution])[0]}\n\nYour answer is {'correct' if correct else 'incorrect'}."


CONTEXTS = {
    "solution": Context(lambda problem, *_: problem.solution, needs_solution=True),
    "answer": Context(lambda problem, *_: f"The final answer is \\boxed{{{problem.answer}}}."),
    "peer": Context(lambda problem, peers, *_: (peers or [None])[0], most_peers=1),
    "peers": Context(_peers, most_peers=3),
    "feedback": Context(_feedback, needs_solution=True, most_peers=1),
    "none": Context(lambda *_: None, is_bare=True),
}
