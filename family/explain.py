"""`python -m family --method NAME --explain`: what a method is, brings and costs."""

import inspect
import re
from textwrap import indent

import egrsd
from family import methods
from family.contexts import CONTEXTS
from family.settings import FamilySettings
from support.flags import flag_name

LEGEND = """A advantage, d = log p_T(y_t) - log p_S(y_t), c coefficient of -log p_theta(y_t), H entropy of the teacher.
Grade P: read in the paper or its code, S: in second-hand notes, C: in words only; ours: no source gives it.
Means are over tokens.
"""


def explain(s: FamilySettings) -> None:
    """Print the formula, its source, the settings that the method brings, and what a step costs."""
    print(f"{s.method}: {s.methods()[s.method]}\n")
    for part in formulas(s):
        print(indent(part, "    "), end="\n\n")
    if s.gate:
        print(
            f"--gate {s.gate}: the weight of another method, see --help, in place of (5) and (6)\n"
        )
    print(LEGEND)
    for key, value in s.bring(s.method, {}, vars(s)).items():
        kind = "fixed" if key in s.entry.needs else "unless a flag says otherwise"
        print(f"it sets {flag_name(key)} {value} ({kind})")
    if s.entry.repairs:
        print(f"beside the problem the student is shown: {s.teacher_context}")
    elif s.has_teacher:
        print(f"the teacher sees: {s.teacher_context}; its weights: {s.teacher_schedule}")
    print(
        f"advantage: {s.advantage}; problems a step: {s.prompts_per_step}, rollouts of each: "
        f"{s.rollouts_per_prompt}"
    )
    usual = cost(FamilySettings(rollouts_per_prompt=s.rollouts_per_prompt))
    print(
        f"cost: {cost(s)} forward passes for each problem, {cost(s) / usual:.1f} times EGRSD's "
        f"{usual}: at most, if all texts are equally long; a backward pass counts two"
    )
    if s.entry.saliency or s.source == "interleaved":
        print("not in it: what costs besides, see above")


def formulas(s):
    """The docstring of the loss, and those of the functions that it names."""
    found = [inspect.getdoc(s.entry.loss or egrsd)]
    for name in re.findall(r"`(\w+)`", found[0]):
        if hasattr(methods, name):
            found.append(f"{name}: {inspect.getdoc(getattr(methods, name))}")
    return found


def cost(s):
    """Forward passes for each problem, at most."""
    method = s.entry
    rollouts = s.rollouts_per_prompt * method.rollouts
    passes = rollouts
    if s.has_teacher and CONTEXTS[s.teacher_context].question:
        passes += 1 if method.repairs else rollouts  # answers about them
    if s.writes:
        passes += s.teacher_rollouts if s.source == "teacher" else 1
    if method.overlap:
        passes += rollouts + 1  # read for the likeliest tokens; a solution with the answer shown
    # by the student, which counts three with the backward pass; by the teacher, and once more
    # without a text; by the student beforehand
    readings = 3 + method.teacher + s.two_views + (method.margin or bool(method.keeps))
    return passes + readings * (rollouts + bool(s.source)) + method.repairs
