"""The flags of the family, for its methods and for ablations of EGRSD, and which contradictions are
refused."""

from dataclasses import dataclass

from family.contexts import CONTEXTS
from family.methods import EGRSD, METHODS, Method
from support.errors import InputError
from support.flags import environment_number, flag, flag_name
from support.settings import METHODS as CORE
from support.settings import Settings

GROUP = 8  # completions per problem of the methods that compare them
# by flag, the method that has a use for it
OWNERS = {"gate": "egrsd", "rows": "sft", "keep": "sft", "saliency": "atmanrl"}
# sampling of TESSY, 2604.14164
INTERLEAVED = {"ask_temperature": 0.7, "ask_top_p": 0.8, "ask_top_k": 20}


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
    teacher_decay: float = flag(0.99, "decay per step of --teacher-schedule ema", least=0, most=1)
    teacher_every: int = flag(20, "steps between copies of --teacher-schedule copy", least=1)
    gate: str = flag(
        "",
        "what takes the place of EGRSD's gate: position, the weight of PW-OPSD; two-view, "
        "RP-OPSD's; dual, MSD's (default: EGRSD's own)",
        choices=("position", "two-view", "dual"),
    )
    rows: str = flag(
        "",
        "what --method sft learns from: solutions of the data, those that the teacher writes, or "
        "those that student and teacher write in turns, as in TESSY, reconstructed (default: of the "
        "data)",
        choices=("reference", "teacher", "interleaved"),
    )
    keep: str = flag(
        "",
        "which written solutions --method sft learns from: all, or those that the verifier accepts "
        "(default: all)",
        choices=("all", "correct"),
    )
    saliency: str = flag(
        "",
        "how --method atmanrl finds the tokens that an answer rests on: with an attention mask, or "
        "by leaving out a sentence at a time, which is ours and cheaper (default: mask)",
        choices=("mask", "steps"),
    )
    teacher_rollouts: int = flag(
        1, "solutions that the teacher writes of each problem, to choose from", least=1
    )
    ask_temperature: float = flag(1.0, "sampling temperature of all texts but rollouts", least=0)
    ask_top_p: float = flag(1.0, "top-p of all texts but rollouts", above=0, most=1)
    ask_top_k: int = flag(0, "top-k of all texts but rollouts, 0: all", least=0)

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
        method = METHODS[name]
        brought = method.recipe | method.needs
        chosen = preset | given
        if chosen.get("rows") == "interleaved":
            brought |= INTERLEAVED
        if method.groups and "rollouts_per_prompt" not in chosen:
            world = environment_number("WORLD_SIZE", 1)
            completions = chosen.get("prompts_per_step", cls.prompts_per_step)
            brought["rollouts_per_prompt"] = GROUP
            brought["prompts_per_step"] = max(1, round(completions / GROUP / world)) * world
        return brought

    @property
    def entry(self) -> Method:
        """The entry of --method in METHODS, or `EGRSD`."""
        return METHODS.get(self.method, EGRSD)

    @property
    def source(self) -> str:
        """Which solutions stand beside the rollouts: reference, teacher, interleaved or none."""
        return self.rows or self.entry.rows

    @property
    def writes(self) -> bool:
        """Whether the teacher writes these solutions, or parts of them."""
        return self.source in ("teacher", "interleaved")

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher reads or writes, or a plan is shown."""
        return self.entry.teacher or self.writes or self.entry.repairs

    @property
    def two_views(self) -> bool:
        """Whether the teacher reads again without a text."""
        return self.entry.views or self.gate == "two-view"

    def check(self) -> None:
        """Also refuse what would silently give another method than the one named."""
        super().check()
        for key, value in self.entry.needs.items():
            if getattr(self, key) != value:
                raise InputError(
                    f"--method {self.method} needs {flag_name(key)} {value}: leave the flag out, "
                    "or choose another method"
                )
        for key, owner in OWNERS.items():
            if getattr(self, key) and self.method != owner:
                raise InputError(f"--{key}: use it with --method {owner}")
        self.check_context()

    def check_context(self):
        """Refuse a --teacher-context that finds nothing to show."""
        context = CONTEXTS[self.teacher_context]
        shown = f"--teacher-context {self.teacher_context}"
        repairs = self.entry.repairs and self.teacher_context != "plan"
        if context.quoted and (repairs or not self.entry.rollouts):
            raise InputError(f"{shown} is about rollouts: --method {self.method} shows none")
        if self.writes and self.teacher_context == "label":
            raise InputError(
                f"--method {self.method} needs a text for every problem, {shown} has none where "
                "nothing is marked: choose another"
            )
        if self.two_views and context.is_bare:
            raise InputError(
                f"{shown} leaves no difference between the teacher's two views: choose another"
            )
        compares = self.entry.groups or self.advantage == "group" or context.compares
        if compares and self.rollouts_per_prompt < 2:
            raise InputError(
                f"--method {self.method} with --advantage {self.advantage} and {shown} compares "
                "completions of one problem, --rollouts-per-prompt is 1: set --rollouts-per-prompt "
                "to 2 or more, or choose another"
            )
