"""`python -m family --method NAME --explain`: what a method is, brings and costs."""

import inspect
import re
from textwrap import indent

import egrsd
from family import methods
from family.contexts import CONTEXTS
from family.settings import GROUP, FamilySettings
from support import settings
from support.flags import flag_name
from support.run import say

# of forward passes over a text; a backward pass counts two
PASSES = {"sampling": 1, "reading": 1, "backward": 2}
LEGEND = """A advantage, d = log p_T(y_t) - log p_S(y_t), c coefficient of -log p_theta(y_t), H entropy of the teacher.
Grade P: read in the paper or its code, S: in second-hand notes; ours: no source gives it. Means are over tokens."""
GATES = {
    "position": methods.position_weight,
    "two-view": methods.two_view_gate,
    "dual": methods.dual_weight,
}


def explain(s: FamilySettings) -> None:
    """Print the formula, its source, the settings that the method brings, a step's texts and
    passes, and their cost."""
    method = methods.METHODS.get(s.method)
    lines = [f"{s.method}: {s.methods()[s.method]}"]
    for part in formulas(s, method):
        lines += ["", indent(part, "    ")]
    lines += ["", LEGEND, ""] if method else [""]
    brought = method.recipe | method.needs if method else settings.METHODS[s.method][0]
    brought |= {"rollouts_per_prompt": GROUP} if method and method.groups else {}
    for key, value in brought.items():
        if key not in s.without_effect():
            kind = "fixed" if method and key in method.needs else "unless a flag says otherwise"
            here = f", here {getattr(s, key)}" if getattr(s, key) != value else ""
            lines.append(f"it sets {flag_name(key)} {value} ({kind}{here})")
    is_taught = not method or method.teacher or s.source == "teacher"
    shown = f"the teacher sees: {s.teacher_context}; its weights: {s.teacher_schedule}"
    counts = passes(s)
    lines += [
        f"{shown if is_taught else 'no teacher'}; advantage: {s.advantage}",
        f"{s.prompts_per_step} problems a step; at most so many texts for each problem:",
        *(f"    {count:3}  {kind:8}  {what}" for (what, kind), count in counts.items()),
    ]
    total = cost(counts)
    usual = cost(passes(FamilySettings(rollouts_per_prompt=s.rollouts_per_prompt)))
    lines.append(
        f"cost: {total} forward passes for each problem (a backward pass counts two), "
        f"{total / usual:.1f} times EGRSD's {usual}, if all texts are equally long"
    )
    say("\n".join(lines))


def formulas(s: FamilySettings, method: methods.Method | None) -> list[str]:
    """The docstring of the loss, and those of the functions that it names."""
    if not method:
        found = [inspect.getdoc(egrsd)]
    else:
        found = [inspect.getdoc(method.loss) or "Its loss has no docstring."]
        for name in re.findall(r"`(\w+)`", found[0]):
            if hasattr(methods, name):
                found.append(f"{name}: {inspect.getdoc(getattr(methods, name))}")
    if s.gate:
        formula = inspect.getdoc(GATES[s.gate])
        found.append(f"--gate {s.gate}, in the place of (5) and (6): {formula}")
    return found


def cost(counts: dict[tuple[str, str], int]) -> int:
    """In forward passes."""
    return sum(count * PASSES[kind] for (_, kind), count in counts.items())


def passes(s: FamilySettings) -> dict[tuple[str, str], int]:
    """How many texts of a problem go through the model, by what they are for and how, at most."""
    method = methods.METHODS.get(s.method, methods.Method(None, ""))
    question = CONTEXTS[s.teacher_context].question
    n, writes = s.rollouts_per_prompt * method.rollouts, s.source == "teacher"
    learned, asks = n + bool(s.source), bool(question and method.teacher)
    views = method.views or s.gate == "two-view"
    counts = {
        ("rollouts", "sampling"): n,
        (question and question.name, "sampling"): n * asks,
        ("the teacher's solutions", "sampling"): s.teacher_rollouts * writes,
        ("one more, shown the answer", "sampling"): int(method.overlap),
        ("rollouts, by the student, for its likeliest tokens", "reading"): n * method.overlap,
        ("by the teacher", "reading"): learned * method.teacher,
        ("by the teacher, shown nothing", "reading"): learned * views,
        ("by the student, for the margin", "reading"): learned * method.margin,
        ("by the student, for which tokens count", "reading"): learned * bool(method.keeps),
        ("by the student", "reading"): learned,
        ("what is learned from", "backward"): learned,
    }
    return {key: count for key, count in counts.items() if count}
