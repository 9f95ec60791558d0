"""EGRSD and its neighbours on equal terms: same problems, same number of rollouts and updates,
several seeds.

    python -m experiments.compare                everything; after a stop the same command goes on with what is missing;
                                                 it prints the tables at its end
    python -m experiments.compare --only opsd    one row of the table, the choice of its learning rate included, into
                                                 runs/compare/only.json (its difference to CL-EGRSD: add cl-egrsd)

The learning rate of every method: train with --choose-seed at each of --rates, take the rate of the
highest accuracy on the validation split, of equals the smallest; while it is at an edge, try the
next one of LADDER too. Variants of CL-EGRSD take CL-EGRSD's rate, those of a neighbour the
neighbour's. Then --seeds are trained and measured on the test split; docs/evidence.md says more.
Every run is an ordinary `python -m family ...` in --work/<name>/lr<rate>-seed<seed>, with samples
and figures of its evaluation beside it. What was done with the same command, data and settings is
not repeated.

A run is judged by its whole curve, the mean over its updates of the rollouts' accuracy, reward and
length, beside its end. QUESTIONS are answered by differences of rows, seed by seed: their p-values
(t test) are Holm's, over all of them.
"""

import itertools
import json
import os
import platform
import shlex
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import eval as evaluation
import family
import toy
from experiments import diagnostics
from family import __main__ as lab
from family.settings import GROUP
from support import settings
from support.checkpoint import write_text
from support.data import digest, load_model, load_problems
from support.distributed import Ranks
from support.errors import DAMAGED, InputError
from support.flags import SEEDS, Parser, add_flags, check_ranges, flag
from support.run import hold, one_line_errors, say
from support.settings import EvaluationSettings

PROGRAM = "python -m experiments.compare"
BASE = "no training"
PARENT = "cl-egrsd"
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SLOTS = 128  # rows decoded together in evaluation
CURVES = ("accuracy", "length", "reward", "entropy", "gate")  # of metrics.jsonl, kept for every run
AREAS = ("mean_accuracy", "mean_reward", "mean_length")  # over the updates, of the rollouts
MEASURES = (
    "accuracy",
    "length",
    "eff",
    "markers_per_response",
    "markers_per_1000_tokens",
    "repetition",
    *AREAS,
)
# and the differences that answer them; all but `recommended` were asked before the runs were made
QUESTIONS = {
    "magnitude": (
        ("direction-aware", "grpo"),
        (PARENT, "magnitude off"),
        ("gamma 1.0 W 0", "gamma 1.0 W 0, eps 0"),
    ),
    "gate": (
        ("egrsd", "direction-aware"),
        ("gamma 1.0 W 0", "direction-aware"),
        ("gamma 3.0 W 0", "direction-aware"),
    ),
    "lookahead": (
        (PARENT, "egrsd"),
        *(
            (f"gamma {gamma} W {window}", f"gamma {gamma} W 0")
            for gamma in ("1.0", "3.0")
            for window in (3, 5)
        ),
    ),
    "gate with lookahead": (
        (PARENT, "direction-aware"),
        *(
            (f"gamma {gamma} W {window}", "direction-aware")
            for gamma in ("1.0", "3.0")
            for window in (3, 5)
        ),
    ),
    "wider clip": (
        ("no gate, eps 0.4", "direction-aware"),
        ("no gate, eps 0.8", "direction-aware"),
        ("gamma 1.0 W 0, eps 0.8", "gamma 1.0 W 0"),
    ),
    "recommended": (
        ("gamma 1.0 W 0, eps 0.8", PARENT),
        ("gamma 3.0 W 0, eps 0.8", PARENT),
        ("gamma 3.0 W 3, eps 0.8", PARENT),
        ("gamma 3.0 W 3, eps 0.8", "gamma 1.0 W 0, eps 0.8"),
    ),
    "length reward": ((PARENT, "length reward off"),),
    "whole method": (("egrsd", "grpo"), (PARENT, "grpo")),
}


@dataclass
class Settings:
    """The command line."""

    only: list = flag([], "methods and variants to run")
    seeds: list = flag(list(range(20)), "seeds of the reported runs", SEEDS)
    other_seeds: int = flag(5, "how many of them for rows that no question is about", "[1, inf)")
    rates: list = flag([3e-4, 1e-3, 3e-3], "learning rates tried", "[0, 1e30]")
    choose_seed: int = flag(100, "seed of the runs that choose the rate", SEEDS)
    steps: int = flag(40, "updates of every run", "[1, inf)")
    completions: int = flag(32, "rollouts per update, in groups or not", "[1, inf)")
    max_new_tokens: int = flag(128, "longest completion in tokens", "[1, inf)")
    samples: int = flag(1, "completions per problem in evaluation", "[1, inf)")
    validation: int = flag(480, "training problems set aside", "[1, inf)")
    workers: int = flag(2, "runs at a time, each on one core", "[1, inf)")
    model: str = flag("toy", "checkpoint directory or toy")
    data: str = flag("toy", "training problems, JSONL or toy")
    test: str = flag("toy", "test problems, JSONL or toy")
    work: Path = flag(Path("runs/compare"), "directory of the runs")
    out: Path = flag(
        None, "results (default: results/compare.json; with --only only.json in --work)"
    )


def methods() -> list[str]:
    """The methods in the order of the table: those without a teacher, the paper's own, the other
    neighbours."""
    teacherless = [name for name, method in family.METHODS.items() if not method.teacher]
    others = [name for name in family.METHODS if name not in teacherless]
    return [*teacherless, *reversed(settings.METHODS), *others]


def variants() -> dict[str, list[str]]:
    """Flags by name: the methods first, then what is derived from CL-EGRSD."""
    named = {name: ["--method", name] for name in methods()} | {
        "magnitude off": ["--eps", "0"],
        "length reward off": ["--beta-length", "0"],
        "position gate": ["--method", "egrsd", "--gate", "position"],
    }
    for gamma, window in itertools.product((0.3, 1.0, 3.0), (0, 3, 5)):
        named[f"gamma {gamma} W {window}"] = ["--gamma", str(gamma), "--window", str(window)]
    del named["gamma 0.3 W 0"], named["gamma 0.3 W 3"]  # egrsd and cl-egrsd
    for eps in ("0.4", "0.8"):
        named[f"no gate, eps {eps}"] = ["--gamma", "0", "--eps", eps]
    for gamma, window, eps in (
        ("1", "0", "0"),
        ("1", "0", "0.8"),
        ("3", "0", "0.8"),
        ("3", "3", "0.8"),
    ):
        named[f"gamma {gamma}.0 W {window}, eps {eps}"] = [
            "--gamma",
            gamma,
            "--window",
            window,
            "--eps",
            eps,
        ]
    for context, shown in ("answer", "answer only"), ("other", "other problem"):
        for method in ("direction-aware", "egrsd", "cl-egrsd"):
            named[f"{method}, {shown}"] = ["--method", method, "--teacher-context", context]
    for gate in ("two-view", "dual"):
        named[f"{gate} gate"] = ["--method", "egrsd", "--gate", gate]
    named["sft, teacher's rows"] = ["--method", "sft", "--rows", "teacher"]
    return named


def method_of(name: str) -> str:
    """The method of a row of the table."""
    given = variants()[name]
    return given[given.index("--method") + 1] if "--method" in given else PARENT


def flags(name: str, a) -> list[str]:
    """All of train.py's flags of a variant, but for rate, seed and output."""
    neighbour = family.METHODS.get(method_of(name))
    group = GROUP if neighbour and neighbour.groups else 1
    groups = ["--rollouts-per-prompt", str(group)] if not neighbour or neighbour.rollouts else []
    return [
        "--preset",
        "toy",
        "--model",
        a.model,
        "--data",
        str(a.work / "train.jsonl"),
        "--eval-data",
        "",
        "--steps",
        str(a.steps),
        "--max-new-tokens",
        str(a.max_new_tokens),
        "--prompts-per-step",
        str(a.completions // group),
        *groups,
        *variants()[name],
    ]


def make_splits(a) -> None:
    """train.jsonl and validation.jsonl in --work."""
    path = Path(toy.resolve(a.data, "train.jsonl"))
    if not path.is_file():
        raise InputError(f"{path}: no such data file: check --data")
    lines = path.read_text().splitlines(keepends=True)
    if len(lines) <= a.validation:
        raise InputError(
            f"{a.data}: {len(lines)} problems, --validation takes {a.validation}: lower it"
        )
    if path.resolve() in [(a.work / f"{name}.jsonl").resolve() for name in ("train", "validation")]:
        raise InputError(f"{path}: would be overwritten by a split: choose another --work")
    a.work.mkdir(parents=True, exist_ok=True)
    (a.work / "train.jsonl").write_text("".join(lines[: -a.validation]))
    (a.work / "validation.jsonl").write_text("".join(lines[-a.validation :]))


def run(name: str, rate: float, seed: int, split: str, a) -> dict:
    """Train and evaluate once, unless it was done before: what <split>.json says."""
    out = a.work / name.replace(" ", "-").replace(",", "") / f"lr{rate:g}-seed{seed}"
    path = (
        a.work / "validation.jsonl" if split == "validation" else toy.resolve(a.test, "test.jsonl")
    )
    problems, _ = load_problems(path, need_solution=False)
    given = [*flags(name, a), "--lr", f"{rate:g}", "--seed", str(seed)] if name != BASE else []
    origin = {
        "command": shlex.join(["python", "-m", "family", *given]) if given else "",
        "model": a.model,
        "training_data": digest(a.work / "train.jsonl")[:12],
    }
    measured = origin | {
        "split": split,
        "data": digest(Path(path))[:12],
        "problems": len(problems),
        "samples": a.samples,
        "max_new_tokens": a.max_new_tokens,
    }
    done = stored(out / f"{split}.json")
    if done | measured == done:
        return done
    start, model, steps = time.time(), toy.resolve(a.model, "model"), []
    out.mkdir(parents=True, exist_ok=True)
    if given:
        train(given, origin, out)
        model = out / "run" / "model"
        steps = [
            json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()
        ]
    torch.set_num_threads(1)
    s = EvaluationSettings(
        a.samples, a.max_new_tokens, top_p=1.0, slots=SLOTS, thinking=False, seed=seed
    )
    # no bars of workers on the screen
    with (out / "log.txt").open("a") as log, redirect_stderr(log):
        solve = partial(
            evaluation.solve, *load_model(str(model), torch.float32, torch.device("cpu")), s
        )
        rows = evaluation.evaluate(problems, a.samples, solve, Ranks(), split)
    (out / f"{split}-samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary, texts = evaluation.summarise(rows, a.samples), [row["completion"] for row in rows]
    result = measured | {
        "name": name,
        "seed": seed,
        "rate": rate,
        "accuracy": summary["avg"],
        "length": summary["length"],
        "eff": summary["eff"],
        "truncated": summary["truncated"],
        **diagnostics.markers(texts, sum(row["tokens"] for row in rows)),
        "repetition": diagnostics.repetition_rate(texts),
        "seconds": time.time() - start,
        "curves": {
            key: [round(step[key], 5) for step in steps]
            for key in CURVES
            if steps and key in steps[0]
        },
    }
    result |= {f"mean_{key}": float(np.mean(curve)) for key, curve in result["curves"].items()}
    write_text(out / f"{split}.json", json.dumps(result))
    return result


def stored(path: Path) -> dict:
    """What an earlier run left there; nothing if it was not made, or is damaged and must be made
    again."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, *DAMAGED):
        return {}


def train(given: list[str], origin: dict, out: Path) -> None:
    """Train with these flags, unless what they made from the same origin is there."""
    made, log_path = out / "run" / "origin.json", out / "log.txt"
    if stored(made) == origin:
        return
    shutil.rmtree(out / "run", ignore_errors=True)
    sys.argv, code = ["family", *given, "--out", str(out / "run")], 0
    with log_path.open("w") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            lab.main()
        except SystemExit as error:
            code = error.code
    if code:
        last = log_path.read_text().strip().splitlines()[-1:]
        raise InputError(f"{log_path}: the run ended with code {code}: {' '.join(last)}")
    write_text(made, json.dumps(origin))


def run_all(jobs: list[tuple], a, title: str) -> list[dict]:
    """The results of all jobs, in their order; each has a process of its own, whose imports are
    made already."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = get_context("forkserver")
    context.set_forkserver_preload(["experiments.diagnostics", "family.neighbour"])
    with ProcessPoolExecutor(a.workers, mp_context=context, max_tasks_per_child=1) as pool:
        results = pool.map(run, *zip(*jobs, strict=True), itertools.repeat(a))
        return list(tqdm(results, total=len(jobs), desc=title, unit=" runs"))


def choose_rates(names: list[str], a) -> tuple[dict[str, float], list[dict]]:
    """The rate of every method by the rule above, and the runs it was chosen from."""
    tried: dict[str, dict[float, dict]] = {name: {} for name in names}
    missing = [(name, rate) for name in names for rate in a.rates]
    while missing:
        for result in run_all(
            [(*pair, a.choose_seed, "validation") for pair in missing], a, "learning rates"
        ):
            tried[result["name"]][result["rate"]] = result
        best = {
            name: max(runs, key=lambda rate: (runs[rate]["accuracy"], -rate))
            for name, runs in tried.items()
        }
        missing = [(name, rate) for name in names for rate in beyond(best[name], tried[name])]
    return best, [result for runs in tried.values() for result in runs.values()]


def beyond(best: float, tried) -> list[float]:
    """The neighbours on the ladder that are left to try if `best` is at an edge of the rates
    tried."""
    lower = [rate for rate in LADDER if rate < best][-1:] if best == min(tried) else []
    higher = [rate for rate in LADDER if rate > best][:1] if best == max(tried) else []
    return lower + higher


@cache
def student_t(freedom: int) -> tuple[np.ndarray, np.ndarray]:
    """Values of Student's t from -inf to inf, and their distribution function: with t =
    sqrt(freedom) tan(angle) the density of the angle is in proportion to cos(angle)^(freedom -
    1)."""
    angle = np.pi * ((np.arange(200_000) + 0.5) / 200_000 - 0.5)
    density = np.cos(angle) ** (freedom - 1)
    return np.sqrt(freedom) * np.tan(angle), (np.cumsum(density) - density / 2) / density.sum()


def interval(values: list[float]) -> dict:
    """Mean, half width of its 95 % interval, p of a mean of 0 (t distribution; None for one value),
    and the values."""
    n, half, p = len(values), None, None
    if n > 1:
        t, below = student_t(n - 1)
        error = np.std(values, ddof=1).item() / n**0.5
        half = float(np.interp(0.975, below, t)) * error
        p = (
            2 * float(np.interp(-abs(np.mean(values)) / error, t, below))
            if error
            else float(not np.any(values))
        )
    return {
        "mean": float(np.mean(values)),
        "half_width": half,
        "p": p,
        "values": [round(v, 5) for v in values],
    }


def holm(p: list[float]) -> list[float]:
    """p-values adjusted for their number, in the order given (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p, kind="stable")
    adjusted = np.maximum.accumulate(np.sort(p) * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted[np.argsort(order)].tolist()


def difference(more: dict[int, dict], less: dict[int, dict], measures: tuple) -> dict:
    """Intervals of the difference of two rows' runs, of the seeds that both have."""
    seeds = sorted(more.keys() & less.keys())
    return {
        measure: interval([more[seed][measure] - less[seed][measure] for seed in seeds])
        for measure in measures
        if seeds and all(measure in run[seeds[0]] for run in (more, less))
    }


def answers(by_name: dict[str, dict[int, dict]]) -> list[dict]:
    """The QUESTIONS of which there are runs: differences of AREAS, with p-values adjusted for the
    number of all."""
    rows = [
        {"question": question, "difference": f"{more} - {less}"}
        | difference(by_name[more], by_name[less], AREAS)
        for question, pairs in QUESTIONS.items()
        for more, less in pairs
        if {more, less} <= by_name.keys()
    ]
    cells = [row[area] for row in rows for area in AREAS if row[area]["p"] is not None]
    for cell, p in zip(cells, holm([cell["p"] for cell in cells]), strict=True):
        cell["holm"] = p
    return rows


def summarise(by_name: dict[str, dict[int, dict]]) -> dict:
    """Per name the intervals of every measure, and of CL-EGRSD's difference to it."""
    rows = {}
    for name, runs in by_name.items():
        first = runs[min(runs)]
        rows[name] = {
            measure: interval([runs[seed][measure] for seed in sorted(runs)])
            for measure in MEASURES
            if measure in first
        }
        rows[name] |= {"rate": first["rate"], "seeds": sorted(runs), "command": first["command"]}
        if name != PARENT and PARENT in by_name:
            rows[name][f"{PARENT} minus this"] = difference(by_name[PARENT], runs, MEASURES)
    return rows


def cell(value: dict | None, digits: int, scale: float = 1.0, sign: str = "") -> str:
    """An interval as text; with a star, if its p-value was adjusted and is below 0.05."""
    if not value:
        return ""
    half = f" ± {scale * value['half_width']:.{digits}f}" if value["half_width"] is not None else ""
    return f"{scale * value['mean']:{sign}.{digits}f}{half}" + " *" * (value.get("holm", 1) < 0.05)


def table(rows: dict) -> str:
    """The rows as markdown."""
    lines = [
        "| method | rate | seeds | accuracy % | length | Eff | markers per response | mean "
        "accuracy % | mean reward | mean length | CL-EGRSD minus it, mean accuracy |",
        "|---" * 11 + "|",
    ]
    for name, row in rows.items():
        rate = f"{row['rate']:g}" if name != BASE else ""
        rival = row.get(f"{PARENT} minus this", {})
        lines.append(
            "| "
            + " | ".join(
                [
                    name,
                    rate,
                    str(len(row["seeds"])),
                    cell(row["accuracy"], 1, 100),
                    cell(row["length"], 1),
                    cell(row["eff"], 0),
                    cell(row["markers_per_response"], 2),
                    cell(row.get("mean_accuracy"), 1, 100),
                    cell(row.get("mean_reward"), 3),
                    cell(row.get("mean_length"), 1),
                    cell(rival.get("mean_accuracy"), 1, 100, "+"),
                ]
            )
            + " |"
        )
    return "\n".join(lines)


def questions_table(found: list[dict]) -> str:
    """The answers as markdown."""
    lines = [
        "| question | difference | mean accuracy, points | mean reward | mean length, tokens |",
        "|---" * 5 + "|",
    ]
    lines += [
        f"| {row['question']} | {row['difference']} | {cell(row['mean_accuracy'], 1, 100, '+')} | "
        f"{cell(row['mean_reward'], 3, 1, '+')} | {cell(row['mean_length'], 2, 1, '+')} |"
        for row in found
    ]
    return "\n".join(lines)


def parse_arguments(argv: list[str]) -> Settings:
    parser = Parser(__doc__, prog=PROGRAM)
    add_flags(parser, fields(Settings)[1:])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(variants()),
        metavar="NAME",
        help="methods and variants to run (default: all): " + "; ".join(variants()),
    )
    a = Settings(**vars(parser.parse_args(argv)))
    a.only, a.seeds = list(dict.fromkeys(a.only)), list(dict.fromkeys(a.seeds))
    check_ranges(a)
    if a.completions % GROUP:
        raise InputError(
            f"--completions must be a multiple of {GROUP}, the size of a group, got {a.completions}"
        )
    a.out = a.out or (a.work / "only.json" if a.only else Path("results/compare.json"))
    return a


def compare(a) -> None:
    """Choose the rates, make all runs, print and write the results."""
    names = a.only or list(variants())
    earlier = stored(a.out).get("rows", {})
    if a.out.exists() and (not earlier or earlier.keys() - {BASE, *names}):
        raise InputError(
            f"{a.out}: no results, or with rows that these runs do not have: choose another --out"
        )
    make_splits(a)
    compared = [name for name in names if name in methods()]
    derived = [name for name in names if name not in methods()]
    rates, chosen = choose_rates(
        compared + ([PARENT] if derived and PARENT not in compared else []), a
    )
    asked = {BASE, *(name for pairs in QUESTIONS.values() for pair in pairs for name in pair)}
    rates |= {
        name: rates[
            method_of(name) if {method_of(name)} <= rates.keys() & family.METHODS.keys() else PARENT
        ]
        for name in derived
    } | {BASE: 0.0}
    jobs = [
        (name, rates[name], seed, "test")
        for place, seed in enumerate(a.seeds)
        for name in [BASE, *names]
        if name in asked or place < a.other_seeds
    ]
    results = run_all(jobs, a, "seeds")
    by_name = {
        name: {r["seed"]: r for r in results if r["name"] == name} for name in [BASE, *names]
    }
    rows, found = summarise(by_name), answers(by_name)
    say(f"{table(rows)}\n\n{questions_table(found)}\n")
    a.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(
        a.out,
        json.dumps(
            {
                "command": PROGRAM,
                "settings": asdict(a),
                "machine": (
                    f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, torch "
                    f"{torch.__version__}"
                ),
                "run_seconds": sum(r["seconds"] for r in chosen + results),
                "methods": methods(),
                "rows": rows,
                "questions": found,
                "choice_of_rates": [
                    {key: r[key] for key in ("name", "rate", "seed", "accuracy", "length")}
                    for r in chosen
                ],
                "curves": {
                    name: [r["curves"] for r in results if r["name"] == name]
                    for name in rows
                    if name != BASE
                },
            },
            separators=(",", ":"),
            default=str,
        )
        + "\n",
    )
    say(str(a.out))


def main() -> None:
    with one_line_errors(
        PROGRAM, "stopped; the same command goes on with the runs that are missing"
    ):
        a = parse_arguments(sys.argv[1:])
        with hold(a.work, Ranks.alone(), remedy=None):
            compare(a)


if __name__ == "__main__":
    main()
