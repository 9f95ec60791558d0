"""The settings of a run with their help texts, the presets, and checks for settings that contradict
each other.

A preset replaces the default of a setting, the method replaces the preset, and a flag replaces all.
A resumed run takes its settings from its config.json. Another command may bring more methods and
flags, as a subclass of Settings.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path

from support.errors import DAMAGED, InputError
from support.flags import (
    SEEDS,
    Parser,
    add_flags,
    check_ranges,
    day,
    environment_number,
    flag,
    flag_name,
)

# those of lora.py, without its import of torch
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS += ["qkv_proj", "gate_up_proj", "query_key_value", "c_attn", "c_fc", "c_proj"]
FORMAT = 3  # of config.json
DATE = "YYYY-MM-DD, the date for chat templates that print one; empty: the day of the start"
# Files that a killed start may leave. A directory with only these counts as empty.
LEFT_BY_A_KILL = {"lock", "config.json.tmp", "results.json.tmp"}
REMEDY = "if a run is there, go on with --resume; else empty it, or choose another --out"
MAY_CHANGE_ON_RESUME = {"out", "steps", "checkpoint_every", "cuda_graphs"}


METHODS = {  # names for gamma and window: what each sets, and its line in --help
    "cl-egrsd": (
        {},
        "CL-EGRSD, --gamma and --window above 0: the gate looks --window tokens ahead",
    ),
    "egrsd": (
        dict(gamma=0.3, window=0),
        "EGRSD, --gamma 0.3 and --window 0: direction x magnitude x gate",
    ),
    "direction-aware": (
        dict(gamma=0.0),
        "--gamma 0, direction x magnitude: what the EGRSD paper calls RLSD",
    ),
}


def method_name(gamma: float, window: int) -> str:
    """The name in METHODS that these two numbers have."""
    if gamma == 0:
        return "direction-aware"
    return "egrsd" if window == 0 else "cl-egrsd"


@dataclass
class Settings:
    """One run. The defaults are the paper's recipe for Qwen3-4B."""

    ENTRY = "python train.py"  # the command whose settings these are
    OTHERS = "neighbouring methods and ablations: python -m family --help"

    model: str = flag(
        "Qwen/Qwen3-4B", "checkpoint directory or hub id; toy: the embedded tiny model"
    )
    data: str = flag(
        "", "training problems: a JSONL file with problem, solution, answer; toy: the embedded ones"
    )
    eval_data: str = flag(
        "", "held-out problems, evaluated before and after training; empty: no evaluation"
    )
    out: str = flag("runs/train", "directory of the run; must be new or empty, unless --resume")
    seed: int = flag(
        0,
        "seed of the adapter's initial weights, the order of the problems and all sampling",
        **SEEDS,
    )
    method: str = flag("cl-egrsd", "what is trained, see the list below")
    steps: int = flag(100, "optimizer steps of the run", least=1)
    prompts_per_step: int = flag(32, "problems per step, over all ranks", least=1)
    rollouts_per_prompt: int = flag(1, "completions sampled per problem", least=1)
    micro_batch: int = flag(
        4, "completions of full length per pass on one rank; lower it to save memory", least=1
    )
    slots: int = flag(
        0,
        "completions that one rank samples at the same time, fewer save memory; 0: all, in "
        "evaluation at most 128",
        least=0,
    )
    max_new_tokens: int = flag(
        1024, "longest completion in tokens, also L_max of the length reward", least=1
    )
    temperature: float = flag(1.1, "sampling temperature of the rollouts", least=0.01)
    top_p: float = flag(
        0.95, "rollouts are drawn from the likeliest tokens that make up this mass", above=0, most=1
    )
    top_k: int = flag(20, "rollouts are drawn from this many likeliest tokens, 0: all", least=0)
    score_temperature: float = flag(
        1.0, "temperature at which teacher and student score completions", least=0.01
    )
    thinking: bool = flag(
        False, "let the chat template open a thinking block, in training and evaluation"
    )
    teacher_thinking: bool = flag(
        None, "the same for the teacher's prompt (default: as --thinking says)"
    )
    date: str = flag("", DATE, keywords={"type": day})
    lr: float = flag(5e-6, "learning rate of AdamW", least=0)
    lr_warmup_steps: int = flag(
        0, "steps of linear warm-up; the rate is constant after them", least=0
    )
    weight_decay: float = flag(0.0, "weight decay of AdamW", least=0)
    max_grad_norm: float = flag(0.1, "the gradient is clipped to this norm", above=0)
    gamma: float = flag(0.3, "strength of the confidence gate, eq. (6); 0: no gate", least=0)
    window: int = flag(3, "lookahead of the gate in tokens, eq. (8): CL-EGRSD; 0: EGRSD", least=0)
    eps: float = flag(
        0.2,
        "the magnitude is clipped to [1 - eps, 1 + eps], eq. (2); 0: no magnitude",
        least=0,
        below=1,
    )
    floor: float = flag(0.1, "smallest value of the gate, eq. (6)", above=0, most=1)
    beta_length: float = flag(
        0.5, "largest extra reward of a correct completion for being short", least=0
    )
    lora_rank: int = flag(64, "rank of the adapter", least=1)
    lora_alpha: float = flag(128.0, "alpha of the adapter, whose scale is alpha / rank", above=0)
    lora_targets: list = flag(
        TARGETS, "layers to adapt, by the last part of their names, or all-linear"
    )
    bf16: bool = flag(
        None, "bfloat16 base weights and autocast (default: on with CUDA, off without)"
    )
    cuda_graphs: bool = flag(False, "replay decode steps as CUDA graphs; no GPU has run this yet")
    gradient_checkpointing: bool = flag(
        True, "recompute activations in the backward pass to save memory"
    )
    checkpoint_every: int = flag(25, "steps between checkpoints", least=1)
    eval_before: bool = flag(True, "evaluate before training too")
    eval_samples: int = flag(
        4, "completions per problem in the evaluations before and after", least=1
    )
    eval_max_new_tokens: int = flag(
        0, "longest completion in evaluation, 0: as in training", least=0
    )
    eval_temperature: float = flag(1.0, "sampling temperature in evaluation", least=0)
    eval_top_p: float = flag(0.95, "top-p in evaluation", above=0, most=1)
    skip_ungradable: bool = flag(
        False, "leave out problems whose gold answer the verifier cannot grade"
    )

    @classmethod
    def methods(cls) -> dict[str, str]:
        """What --method may be, with a line each."""
        return {name: line for name, (_, line) in METHODS.items()}

    @classmethod
    def bring(cls, method: str, preset: dict, given: dict) -> dict:
        """Settings that a method's name stands for; InputError if there is no such method."""
        if method not in METHODS:
            raise InputError(
                f"--method {method}: train.py knows {', '.join(METHODS)}; neighbouring methods are "
                "run with python -m family"
            )
        return METHODS[method][0] if "method" in given else {}

    def check(self) -> None:
        """Refuse what cannot work, before anything is loaded or written."""
        check_ranges(self)
        world = environment_number("WORLD_SIZE", 1)
        if self.prompts_per_step % world:
            raise InputError(
                f"--prompts-per-step {self.prompts_per_step} must be a multiple of the {world} "
                "processes"
            )
        if not self.data:
            raise InputError(
                "--data is missing: name a JSONL file with problem, solution and answer"
            )


@dataclass
class Sampling:
    """How completions are drawn, as flags of a command; the defaults are the evaluation of arXiv
    2605.13255."""

    samples: int = flag(4, "completions per problem", least=1)
    max_new_tokens: int = flag(32768, "longest completion in tokens", least=1)
    temperature: float = flag(1.0, "sampling temperature, 0: greedy", least=0)
    top_p: float = flag(0.95, "draw from the likeliest tokens of this mass", above=0, most=1)
    top_k: int = flag(0, "draw from this many likeliest tokens, 0: all", least=0)
    slots: int = flag(32, "completions sampled at the same time; fewer save memory", least=1)
    thinking: bool = flag(True, "let the chat template open a thinking block")
    date: str = flag("", DATE, keywords={"type": day})


@dataclass
class EvaluationSettings(Sampling):
    """The command line: how to sample, and what."""

    max_new_tokens: int = flag(
        0,
        f"longest completion in tokens, 0: {Sampling.max_new_tokens:,}, or what the window of the "
        "first model leaves",
        least=0,
    )
    model: list = flag([], "checkpoint directory, hub id or toy; repeat it to compare several")
    adapter: list = flag([], "LoRA adapter directory; k of them go to the last k models")
    data: list = flag([], "JSONL file with problem and answer, or toy; repeat it for several")
    out: str = flag(
        None, "directory for samples.jsonl and results.json (default: runs/eval-<time>)"
    )
    from_: list = flag(
        [], "JSONL file of completions to grade instead of sampling; repeat it to compare several"
    )
    seed: int = flag(0, "seed of the sampling", **SEEDS)
    resume: str = flag(
        False,
        "go on in --out: keep the samples that are there, and make the rest; auto: if there are "
        "any, or start",
        keywords={"nargs": "?", "const": True, "choices": ["auto"]},
    )
    cuda_graphs: bool = flag(False, "replay decode steps as CUDA graphs; no GPU has run this yet")
    skip_ungradable: bool = flag(
        False, "leave out problems whose gold answer the verifier cannot grade"
    )


PRESETS = {
    "paper-4b": {},
    "paper-8b": dict(model="Qwen/Qwen3-8B", gamma=1.0, window=5),
    "toy": dict(
        model="toy",
        data="toy",
        eval_data="toy",
        steps=64,
        prompts_per_step=64,
        micro_batch=64,
        max_new_tokens=128,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        lr=1e-3,
        lora_rank=16,
        lora_alpha=32.0,
        checkpoint_every=16,
        gradient_checkpointing=False,
        eval_samples=1,
        eval_top_p=1.0,
    ),
}


def parse(argv: list[str], description: str) -> tuple[Settings, bool]:
    """(settings, resume) of train.py's command line."""
    return resolve(vars(make_parser(description, Settings).parse_args(argv)), Settings)


def make_parser(description: str, kind: type[Settings]) -> Parser:
    """The command line of these settings."""
    listed = "\n".join(f"  {name:16} {line}" for name, line in kind.methods().items())
    parser = Parser(description, f"methods:\n{listed}\n{kind.OTHERS}", kind.ENTRY)
    parser.add_argument(
        "--preset",
        nargs="+",
        choices=PRESETS,
        help="named settings, flags replace them (default: toy if --model is toy or missing; for any "
        "other model paper-4b, that is, the defaults below)",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        choices=["auto"],
        help="go on from the last complete checkpoint in --out; auto: if there is a run, or start one",
    )
    add_flags(parser, fields(kind))
    return parser


def resolve(given: dict, kind: type[Settings]) -> tuple[Settings, bool]:
    """(settings, resume) from what is given on the command line.

    With --resume, the settings are those of the run in --out. Flags may repeat them. Only those in
    MAY_CHANGE_ON_RESUME may change.
    """
    resume = resumes(given.pop("resume", False), given.get("out", Settings.out), "config.json")
    names = given.pop("preset", None)
    if names is None:
        default = "toy" if given.get("model", "toy") == "toy" else "paper-4b"
        names = [] if resume else [default]
    preset = {}
    for name in names:
        preset |= PRESETS[name]
    if "data" in given:
        preset.pop("eval_data", None)  # a preset's held-out problems belong to its training data
    if resume:
        return _stored(preset, given, kind), True
    return _new(preset, given, kind), False


def resumes(wanted: bool | str, out: str, name: str) -> bool:
    """Whether to go on in `out`. With --resume auto: if `name` is there, the first file of a run.

    All ranks find the same. Rank 0 writes that file after collectives, and every rank calls this
    before them.
    """
    return (Path(out) / name).exists() if wanted == "auto" else wanted


def _new(preset, given, kind):
    """Settings of a new run; InputError for flags that contradict the method's name."""
    method = given.get("method", Settings.method)
    s = kind(**preset | kind.bring(method, preset, given) | given)
    if method in METHODS:
        s.method = method_name(s.gamma, s.window)
        if given.get("method", s.method) != s.method:
            raise InputError(
                f"--method {method} with --gamma {s.gamma} and --window {s.window}, which is "
                f"{s.method}: leave --method out, or these flags"
            )
    return s


def _stored(preset, given, kind):
    """Settings of the run in --out; InputError if it is another run than what is given."""
    out = given.get("out", Settings.out)
    s, world = read_config(Path(out), kind)
    s.out = out  # the directory may have been moved or copied
    brought = kind.bring(given.get("method", s.method), preset, given)
    repeated = preset | brought | given
    changed = []
    for key in preset | given:
        was = getattr(s, key)
        # A setting that may change takes its value from a flag, not from a preset.
        if key in MAY_CHANGE_ON_RESUME:
            setattr(s, key, given.get(key, was))
        elif repeated[key] != was:
            changed.append(f"{flag_name(key)} was {was}")
    if changed:
        raise InputError(
            f"{out}: --resume with changed settings ({', '.join(changed)}): leave these flags out, "
            "or start a new run with another --out"
        )
    here = environment_number("WORLD_SIZE", 1)
    if world != here:
        raise InputError(
            f"{out}: --resume with another world size: the run was started with {world} processes, "
            f"this is {here}: set --nproc-per-node to match"
        )
    return s


def parse_evaluation(argv: list[str], description: str) -> EvaluationSettings:
    """How to sample is what flags say, else what the first run did that a model or an adapter comes
    from. InputError if a needed flag is missing, if flags exclude each other, or if there are more
    adapters than models."""
    parser = Parser(description)
    add_flags(parser, fields(EvaluationSettings))
    given = vars(parser.parse_args(argv))
    names = [*given.get("model", []), *given.get("adapter", [])]
    names.sort(key="toy".__eq__)  # the toy's preset counts only if there is no run
    by_run = next(filter(None, map(evaluation_of, names)), {})
    s = EvaluationSettings(**by_run | given)
    check_ranges(s)
    if s.from_ and (len(s.data) != 1 or s.model or s.adapter or s.resume):
        raise InputError(
            "--from needs one --data, and neither --model, --adapter nor --resume; see --help"
        )
    if not s.from_ and not (s.model and s.data):
        raise InputError("--model and --data are needed; see --help")
    if s.resume and not s.out:
        raise InputError("--resume needs --out, the directory of the evaluation to go on with")
    s.resume = resumes(s.resume, s.out, "results.json")
    if len(s.adapter) > len(s.model):
        raise InputError(
            f"{len(s.adapter)} times --adapter, {len(s.model)} times --model: name a model "
            "for each one"
        )
    return s


def evaluation_of(name: str) -> dict:
    """How the run that this RUN/model or RUN/checkpoints/STEP/adapter comes from samples in its
    evaluations, as fields of `Sampling`; empty if it comes from no run. The toy has its preset."""
    values = vars(Settings(**PRESETS["toy"])) if name == "toy" else {}
    path = Path(name).resolve()
    up = {"model": 0, "adapter": 2}.get(path.name)
    if path.exists() and up is not None and (path.parents[up] / "config.json").exists():
        config = json.loads((path.parents[up] / "config.json").read_text())
        values = config["settings"] if "entry" in config else {}
    if not values:
        return {}
    return {
        "samples": values["eval_samples"],
        "max_new_tokens": values["eval_max_new_tokens"] or values["max_new_tokens"],
        "temperature": values["eval_temperature"],
        "top_p": values["eval_top_p"],
        "thinking": values["thinking"],
        "date": values["date"],
    }


def in_use(out: str | Path) -> bool:
    """Whether something of the user's is in this directory."""
    path = Path(out)
    return path.is_dir() and any(entry.name not in LEFT_BY_A_KILL for entry in path.iterdir())


def read_config(run: Path, kind: type[Settings]) -> tuple[Settings, int]:
    """Settings and world size of a run that `kind.ENTRY` started; InputError if it did not."""
    path = run / "config.json"
    try:
        config = json.loads(path.read_text())
        written = config.get("format", 1)
        if written != FORMAT:
            raise InputError(
                f"{path}: format {written!r}, this version reads {FORMAT}: go on with the version "
                f"that began the run, or start anew: {kind.ENTRY} --out another directory"
            )
        entry = config["entry"]
        if entry != kind.ENTRY:
            raise InputError(
                f"{run}: this run was started with {entry}: go on with {entry} --out {run} --resume"
            )
        values = config["settings"]
        # by name: a setting that is missing must not get its default
        s = kind(**{f.name: values[f.name] for f in fields(kind)})
        return s, config["world_size"]
    except (OSError, *DAMAGED) as error:
        raise InputError(
            f"{path}: no run that can be resumed here ({error}): check --out, or leave --resume out"
        ) from None
