"""The flags of the family, for its methods and for ablations of EGRSD, and what does not go
together with them."""

from dataclasses import dataclass, fields

from family.contexts import CONTEXTS
from family.methods import METHODS
from support.errors import InputError
from support.flags import environment_number, flag, flag_name
from support.settings import Settings

GROUP = 8  # completions per problem of the methods that compare them


@dataclass
class FamilySettings(Settings):
    """Settings, and what only neighbouring methods and ablations of EGRSD change."""

    advantage: str = flag(
        "running",
        "baseline of the advantage: the rewards of earlier steps, or the completions of "
        "the same problem",
        choices=("running", "group"),
    )
    teacher_context: str = flag(
        "solution", "what the teacher is shown, see docs/family.md", choices=tuple(CONTEXTS)
    )
    teacher_schedule: str = flag(
        "frozen",
        "the teacher's weights: the base model, an exponential moving average of "
        "the student, or a copy of it from time to time",
        choices=("frozen", "ema", "copy"),
    )
    teacher_decay: float = flag(0.99, "decay per step of --teacher-schedule ema", "[0, 1]")
    teacher_every: int = flag(20, "steps between copies of --teacher-schedule copy", "[1, inf)")
    gate: str = flag(
        "",
        "what takes the place of EGRSD's gate: position, the weight of PW-OPSD; two-view, "
        "RP-OPSD's; dual, MSD's (default: EGRSD's own)",
        choices=("position", "two-view", "dual"),
    )
    rows: str = flag(
        "",
        "what --method sft learns from: solutions of the data, or those that the teacher writes "
        "(default: of the data)",
        choices=("reference", "teacher"),
    )
    teacher_rollouts: int = flag(
        1, "solutions that the teacher writes of each problem, to choose from", "[1, 1e4]"
    )
    ask_temperature: float = flag(1.0, "sampling temperature of all texts but rollouts", "[0, inf)")
    ask_top_p: float = flag(1.0, "top-p of all texts but rollouts", "(0, 1]")


OWN = [f.name for f in fields(FamilySettings)[len(fields(Settings)) :]]


def is_used(s: Settings) -> bool:
    """Whether these settings ask for what the core does not do."""
    return s.method in METHODS or any(
        getattr(s, name) != getattr(FamilySettings, name) for name in OWN
    )


def rows(s: FamilySettings) -> str:
    """Which solutions stand beside the rollouts: reference, teacher or none."""
    return s.rows or (METHODS[s.method].rows if s.method in METHODS else "")


def bring(name: str, preset: dict, given: dict) -> dict:
    """Settings that a method stands for: its own, and for methods with groups as many completions a
    step as without, or the fewest that all processes can share."""
    method = METHODS[name]
    brought = method.recipe | method.needs
    if method.groups and "rollouts_per_prompt" not in preset | given:
        world = environment_number("WORLD_SIZE", 1)
        prompts = (preset | given).get("prompts_per_step", Settings.prompts_per_step)
        brought |= {
            "rollouts_per_prompt": GROUP,
            "prompts_per_step": max(1, round(prompts / GROUP / world)) * world,
        }
    return brought


def without_effect(s: FamilySettings) -> dict[str, str]:
    """Settings that change nothing beside the others, with the reason."""
    found, method, writes = {}, METHODS.get(s.method), rows(s) == "teacher"
    if not writes:
        found["teacher_rollouts"] = "no solution of the teacher's is asked for"
    if not writes and not CONTEXTS[s.teacher_context].question:
        found |= dict.fromkeys(
            ("ask_temperature", "ask_top_p"), "no text is asked for besides the rollouts"
        )
    if not method:
        found["rows"] = f"--method {s.method} learns from rollouts only"
    if s.teacher_schedule != "ema":
        found["teacher_decay"] = "it belongs to --teacher-schedule ema"
    if s.teacher_schedule != "copy":
        found["teacher_every"] = "it belongs to --teacher-schedule copy"
    if s.gate:
        found |= dict.fromkeys(
            ("gamma", "window", "floor"), f"--gate {s.gate} takes the place of the entropy's gate"
        )
    if method:
        unused = {"advantage", "gate", "gamma", "window", "eps", "floor", "rows"} - {
            *method.uses,
            *method.needs,
        }
        unused |= {"beta_length"} if "advantage" not in method.uses else set()
        unused |= (
            {"rollouts_per_prompt", "temperature", "top_p", "top_k"}
            if not method.rollouts
            else set()
        )
        unused |= (
            {name for name in OWN if name.startswith("teacher_")}
            if not method.teacher and not writes
            else set()
        )
        found |= dict.fromkeys(unused, f"--method {s.method} makes no use of it")
    return found


def check(s: FamilySettings) -> None:
    """InputError for what a method or a flag of the family needs and does not find."""
    method = METHODS.get(s.method)
    for key, value in (method.needs if method else {}).items():
        if getattr(s, key) != value:
            raise InputError(
                f"--method {s.method} needs {flag_name(key)} {value}, got {getattr(s, key)}: "
                "leave the flag out, or choose another method"
            )
    if s.gate and s.method != "egrsd":
        raise InputError(
            f"--gate {s.gate} takes the place of EGRSD's gate: use it with --method egrsd"
        )
    context = CONTEXTS[s.teacher_context]
    if method and not method.rollouts and context.quoted:
        raise InputError(
            f"--teacher-context {s.teacher_context} is about rollouts, which --method {s.method} "
            "has none of: choose another"
        )
    if rows(s) == "teacher" and s.teacher_context == "label":
        raise InputError(
            f"--method {s.method} needs a text for every problem, --teacher-context label has "
            "none where nothing is marked: choose another"
        )
    if (s.gate == "two-view" or method and method.views) and context.is_bare:
        raise InputError(
            f"--teacher-context {s.teacher_context} leaves no difference between the teacher's "
            "two views: choose another"
        )
    if s.rollouts_per_prompt < 2:
        compare = {
            f"--method {s.method}": method and method.groups,
            "--advantage group": s.advantage == "group",
            f"--teacher-context {s.teacher_context}": context.compares,
        }
        is_fixed = method and "rollouts_per_prompt" in method.needs
        for what in (what for what, compares in compare.items() if compares):
            raise InputError(
                f"{what} compares completions of one problem, --rollouts-per-prompt is 1: "
                f"{'choose another' if is_fixed else 'set --rollouts-per-prompt to 2 or more'}"
            )
