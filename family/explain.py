"""`train.py --method NAME --explain`: what a method is, brings and costs."""

import inspect
from textwrap import indent

import egrsd
from family.contexts import CONTEXTS
from family.methods import METHODS
from family.settings import FamilySettings, bring, rows, without_effect
from support import settings
from support.flags import flag_name

PASSES = {"sampling": 1, "reading": 1, "backward": 2}  # of forward passes over a text; a backward pass counts two


def explain(s: FamilySettings) -> str:
    """The formula and its source, the settings that the method brings, rows and passes of a step, and their cost."""
    method, core = METHODS.get(s.method), settings.METHODS.get(s.method)
    summary, text = (method.summary, inspect.getdoc(method.loss)) if method else (core[1], inspect.getdoc(egrsd))
    fixed = method.needs if method else {}
    brought = {key: getattr(s, key) for key in (bring(s.method, {}, {}) if method else core[0])
               if key not in without_effect(s)}
    shown = {"fixed": fixed, "unless a flag says otherwise": {k: v for k, v in brought.items() if k not in fixed}}
    lines = [f"{s.method}: {summary}", "", indent(text, "    "), ""]
    lines += [f"it sets, {kind}: " + " ".join(f"{flag_name(key)} {value}" for key, value in some.items())
              for kind, some in shown.items() if some]
    counts = passes(s)
    total, usual = (sum(count * PASSES[kind] for (_, kind), count in some.items())
                    for some in (counts, passes(FamilySettings(rollouts_per_prompt=s.rollouts_per_prompt))))
    what = f"teacher: {s.teacher_context} ({s.teacher_schedule})" if uses_teacher(s) else "no teacher"
    lines += [f"{what}; {s.prompts_per_step} problems a step; texts for each problem:"]
    lines += [f"    {count:3}  {kind:8}  {text}" for (text, kind), count in counts.items()]
    return "\n".join([*lines, f"cost: {total} forward passes for each problem (a backward pass counts two), "
                              f"{total / usual:.1f} times EGRSD's {usual}, if all texts are equally long"])


def uses_teacher(s: FamilySettings) -> bool:
    return s.method not in METHODS or METHODS[s.method].teacher or rows(s) == "teacher"


def passes(s: FamilySettings) -> dict[tuple[str, str], int]:
    """How many texts of a problem go through the model, by what they are for and how, at most."""
    method, question = METHODS.get(s.method), CONTEXTS[s.teacher_context].question
    rollouts = s.rollouts_per_prompt if not method or method.rollouts else 0
    learned = rollouts + bool(rows(s))
    reads = not method or method.teacher
    views = s.gate == "two-view" or method and method.views
    counts = {("rollouts", "sampling"): rollouts,
              (question and question.name, "sampling"): rollouts * bool(question and reads),
              ("the teacher's solutions", "sampling"): s.teacher_rollouts * (rows(s) == "teacher"),
              ("one more, shown the answer", "sampling"): int(bool(method and method.overlap)),
              ("the rollouts, by the student, for its likeliest tokens", "reading"): rollouts * bool(
                  method and method.overlap),
              ("by the teacher", "reading"): learned * reads,
              ("by the teacher, shown nothing", "reading"): learned * bool(views),
              ("by the student, for the margin", "reading"): learned * bool(method and method.margin),
              ("by the student", "reading"): learned, ("what is learned from", "backward"): learned}
    return {key: count for key, count in counts.items() if count}
