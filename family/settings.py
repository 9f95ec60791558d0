"""The flags of the family, for its methods and for ablations of EGRSD, and what does not go
together with them."""

from dataclasses import dataclass, fields

from family.contexts import CONTEXTS, Context
from family.methods import METHODS, Method
from support.errors import InputError
from support.flags import environment_number, flag, flag_name
from support.settings import METHODS as CORE
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

    ENTRY = "python -m family"
    OTHERS = "docs/family.md has a table of them; --explain says what one is"

    @classmethod
    def methods(cls) -> dict[str, str]:
        return super().methods() | {name: method.summary for name, method in METHODS.items()}

    @classmethod
    def bring(cls, name: str, preset: dict, given: dict) -> dict:
        """For methods with groups also as many completions a step as without, or the fewest that
        all processes can share."""
        if name in CORE:
            return super().bring(name, preset, given)
        if name not in METHODS:
            raise InputError(f"--method {name}: not known; --help lists the methods")
        method, brought = METHODS[name], METHODS[name].recipe | METHODS[name].needs
        if method.groups and "rollouts_per_prompt" not in preset | given:
            world = environment_number("WORLD_SIZE", 1)
            prompts = (preset | given).get("prompts_per_step", cls.prompts_per_step)
            brought["rollouts_per_prompt"] = GROUP
            brought["prompts_per_step"] = max(1, round(prompts / GROUP / world)) * world
        return brought

    @property
    def source(self) -> str:
        """Which solutions stand beside the rollouts: reference, teacher or none."""
        return self.rows or (METHODS[self.method].rows if self.method in METHODS else "")

    def is_core(self) -> bool:
        """Whether train.py does all that these settings ask for."""
        own = fields(FamilySettings)[len(fields(Settings)) :]
        return self.method in CORE and all(getattr(self, f.name) == f.default for f in own)

    def without_effect(self) -> dict[str, str]:
        found, method = super().without_effect(), METHODS.get(self.method)
        writes = self.source == "teacher"
        if not writes:
            found["teacher_rollouts"] = "no solution of the teacher's is asked for"
        if not writes and not CONTEXTS[self.teacher_context].question:
            reason = "no text is asked for besides the rollouts"
            found |= dict.fromkeys(("ask_temperature", "ask_top_p"), reason)
        if self.teacher_schedule != "ema":
            found["teacher_decay"] = "it belongs to --teacher-schedule ema"
        if self.teacher_schedule != "copy":
            found["teacher_every"] = "it belongs to --teacher-schedule copy"
        if self.gate:
            reason = f"--gate {self.gate} takes the place of the entropy's gate"
            found |= dict.fromkeys(("gamma", "window", "floor"), reason)
        if not method:
            return found | {"rows": f"--method {self.method} learns from rollouts only"}
        reason = f"--method {self.method} makes no use of it"
        return found | dict.fromkeys(self._unused(method), reason)

    def _unused(self, method: Method) -> set[str]:
        """Settings of which the method makes no use."""
        unused = {"advantage", "gate", "gamma", "window", "eps", "floor", "rows"}
        unused -= {*method.uses, *method.needs}
        if "advantage" not in method.uses:
            unused.add("beta_length")
        if not method.rollouts:
            unused |= {"rollouts_per_prompt", "temperature", "top_p", "top_k"}
        if not method.teacher and self.source != "teacher":
            unused |= {f.name for f in fields(self) if f.name.startswith("teacher_")}
        return unused

    def check(self) -> None:
        """Also what a method or a flag of the family needs and does not find."""
        super().check()
        method = METHODS.get(self.method)
        for key, value in (method.needs if method else {}).items():
            if getattr(self, key) != value:
                raise InputError(
                    f"--method {self.method} needs {flag_name(key)} {value}, got "
                    f"{getattr(self, key)}: leave the flag out, or choose another method"
                )
        if self.gate and self.method != "egrsd":
            raise InputError(
                f"--gate {self.gate} takes the place of EGRSD's gate: use it with --method egrsd"
            )
        self._check_context(method, CONTEXTS[self.teacher_context])

    def _check_context(self, method: Method | None, context: Context) -> None:
        shown = f"--teacher-context {self.teacher_context}"
        if method and not method.rollouts and context.quoted:
            raise InputError(
                f"{shown} is about rollouts, which --method {self.method} has none of: choose another"
            )
        if self.source == "teacher" and self.teacher_context == "label":
            raise InputError(
                f"--method {self.method} needs a text for every problem, {shown} has none where "
                "nothing is marked: choose another"
            )
        if (self.gate == "two-view" or method and method.views) and context.is_bare:
            raise InputError(
                f"{shown} leaves no difference between the teacher's two views: choose another"
            )
        compare = {
            f"--method {self.method}": method and method.groups,
            "--advantage group": self.advantage == "group",
            shown: context.compares,
        }
        is_fixed = method and "rollouts_per_prompt" in method.needs
        for what, compares in compare.items():
            if compares and self.rollouts_per_prompt < 2:
                remedy = "choose another" if is_fixed else "set --rollouts-per-prompt to 2 or more"
                raise InputError(
                    f"{what} compares completions of one problem, --rollouts-per-prompt is 1: {remedy}"
                )
