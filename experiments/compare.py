"""EGRSD and its neighbours on equal terms: the same problems, as many rollouts and updates, several
seeds.

    python -m experiments.compare                all rows, and the tables at the end;
                                                 after a stop the same command makes the missing runs
    python -m experiments.compare --only opsd    one row, into runs/compare/only.json
                                                 (its difference to CL-EGRSD: add cl-egrsd)

Every run is an ordinary `python -m family ...` in --work/<name>/lr<rate>-seed<seed>. Its samples on
the test problems and its figures stand beside it. A run that is complete is not repeated, unless
command, data or settings have changed.

Each row has the learning rate of RATES, or --lr. Nothing is trained on the last --validation
problems of the data. To choose a rate, measure on them: `--only opsd --lr 3e-4 --test
runs/compare/validation.jsonl`.

A run is judged by its end and by its whole curve, the mean over its updates of the rollouts'
accuracy, reward and length. Differences of rows answer the QUESTIONS. They are taken seed by seed.
Their p-values are of a t test, adjusted for the number of all differences (Holm).
"""

import importlib
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
from functools import partial
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
from support.checkpoint import write_text
from support.data import digest, load_model, load_problems
from support.distributed import Ranks
from support.errors import DAMAGED, InputError
from support.flags import SEEDS, Parser, add_flags, check_ranges, flag
from support.run import hold, one_line_errors
from support.settings import EvaluationSettings

PROGRAM = "python -m experiments.compare"
BASE = "no training"
PARENT = "cl-egrsd"
FIRST = ("sft", "grpo", "grpo-group", "direction-aware", "egrsd", "cl-egrsd")  # of the methods
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
# Learning rates by method. Each was the best on the toy's validation problems of 3e-4, 1e-3, 3e-3,
# and of rates beyond if the best one was the lowest or highest: docs/evidence.md.
DEFAULT_RATE = 1e-3
RATES = {
    "sft": 3e-3,
    "eopd": 3e-3,
    "stable-opd": 3e-4,
    "opsd": 3e-5,
    "pw-opsd": 3e-3,
    "sdpo": 3e-4,
    "mopd": 3e-3,
    "msd": 3e-3,
    "resd": 1e-5,
}
# Flags of the rows that are not just a method. Without --method a row is a variant of CL-EGRSD.
VARIANTS = {
    "magnitude off": "--eps 0",
    "length reward off": "--beta-length 0",
    "position gate": "--method egrsd --gate position",
    "gamma 0.3 W 5": "--gamma 0.3 --window 5",
    "gamma 1.0 W 0": "--gamma 1.0 --window 0",
    "gamma 1.0 W 3": "--gamma 1.0 --window 3",
    "gamma 1.0 W 5": "--gamma 1.0 --window 5",
    "gamma 3.0 W 0": "--gamma 3.0 --window 0",
    "gamma 3.0 W 3": "--gamma 3.0 --window 3",
    "gamma 3.0 W 5": "--gamma 3.0 --window 5",
    "no gate, eps 0.4": "--gamma 0 --eps 0.4",
    "no gate, eps 0.8": "--gamma 0 --eps 0.8",
    "gamma 1.0 W 0, eps 0": "--gamma 1 --window 0 --eps 0",
    "gamma 1.0 W 0, eps 0.8": "--gamma 1 --window 0 --eps 0.8",
    "gamma 3.0 W 0, eps 0.8": "--gamma 3 --window 0 --eps 0.8",
    "gamma 3.0 W 3, eps 0.8": "--gamma 3 --window 3 --eps 0.8",
    "direction-aware, answer only": "--method direction-aware --teacher-context answer",
    "egrsd, answer only": "--method egrsd --teacher-context answer",
    "cl-egrsd, answer only": "--method cl-egrsd --teacher-context answer",
    "direction-aware, other problem": "--method direction-aware --teacher-context other",
    "egrsd, other problem": "--method egrsd --teacher-context other",
    "cl-egrsd, other problem": "--method cl-egrsd --teacher-context other",
    "two-view gate": "--method egrsd --gate two-view",
    "dual gate": "--method egrsd --gate dual",
    "sft, teacher's rows": "--method sft --rows teacher",
}
# Questions by the difference of two rows that answers them. All but `recommended` were asked before
# the runs were made.
QUESTIONS = {
    "direction-aware - grpo": "magnitude",
    "cl-egrsd - magnitude off": "magnitude",
    "gamma 1.0 W 0 - gamma 1.0 W 0, eps 0": "magnitude",
    "egrsd - direction-aware": "gate",
    "gamma 1.0 W 0 - direction-aware": "gate",
    "gamma 3.0 W 0 - direction-aware": "gate",
    "cl-egrsd - egrsd": "lookahead",
    "gamma 1.0 W 3 - gamma 1.0 W 0": "lookahead",
    "gamma 1.0 W 5 - gamma 1.0 W 0": "lookahead",
    "gamma 3.0 W 3 - gamma 3.0 W 0": "lookahead",
    "gamma 3.0 W 5 - gamma 3.0 W 0": "lookahead",
    "cl-egrsd - direction-aware": "gate with lookahead",
    "gamma 1.0 W 3 - direction-aware": "gate with lookahead",
    "gamma 1.0 W 5 - direction-aware": "gate with lookahead",
    "gamma 3.0 W 3 - direction-aware": "gate with lookahead",
    "gamma 3.0 W 5 - direction-aware": "gate with lookahead",
    "no gate, eps 0.4 - direction-aware": "wider clip",
    "no gate, eps 0.8 - direction-aware": "wider clip",
    "gamma 1.0 W 0, eps 0.8 - gamma 1.0 W 0": "wider clip",
    "gamma 1.0 W 0, eps 0.8 - cl-egrsd": "recommended",
    "gamma 3.0 W 0, eps 0.8 - cl-egrsd": "recommended",
    "gamma 3.0 W 3, eps 0.8 - cl-egrsd": "recommended",
    "gamma 3.0 W 3, eps 0.8 - gamma 1.0 W 0, eps 0.8": "recommended",
    "cl-egrsd - length reward off": "length reward",
    "egrsd - grpo": "whole method",
    "cl-egrsd - grpo": "whole method",
}


@dataclass
class CompareSettings:
    """The command line."""

    only: list = flag([], "methods and variants to run")
    seeds: list = flag(list(range(20)), "seeds of the runs", SEEDS)
    other_seeds: int = flag(5, "how many of them for rows that no question is about", least=1)
    lr: float = flag(0.0, "learning rate of every row, 0: those of RATES", least=0)
    steps: int = flag(40, "updates of every run", least=1)
    completions: int = flag(32, "rollouts per update, in groups or not", least=1)
    max_new_tokens: int = flag(128, "longest completion in tokens", least=1)
    validation: int = flag(480, "last problems of the data, not trained on", least=1)
    workers: int = flag(2, "runs at a time, each on one core", least=1)
    model: str = flag("toy", "checkpoint directory or toy")
    data: str = flag("toy", "training problems, JSONL or toy")
    test: str = flag("toy", "test problems, JSONL or toy")
    work: Path = flag(Path("runs/compare"), "directory of the runs")
    out: Path = flag(
        None, "results (default: results/compare.json; with --only only.json in --work)"
    )


# ---- the rows of the table, and their flags


def methods() -> list[str]:
    """The methods in the order of the table: those without a teacher, the paper's own, the other
    neighbours."""
    return [*FIRST, *(name for name in family.METHODS if name not in FIRST)]


def variants() -> dict:
    """The flags of every row but `no training`, by name, in the order of the table."""
    named = {name: ["--method", name] for name in methods()}
    for name, given in VARIANTS.items():
        named[name] = given.split()
    return named


def method_of(name: str) -> str:
    """The method of a row of the table."""
    given = variants()[name]
    if "--method" not in given:
        return PARENT
    return given[given.index("--method") + 1]


def rate_of(name: str, a) -> float:
    """The learning rate of a row. A variant has the rate of its method."""
    if name == BASE:
        return 0.0
    return a.lr or RATES.get(method_of(name), DEFAULT_RATE)


def flags(name: str, a) -> list[str]:
    """All flags of a row for `python -m family`, but for rate, seed and output."""
    neighbour = family.METHODS.get(method_of(name))  # None for the paper's own methods
    group = GROUP if neighbour and neighbour.groups else 1
    given = ["--preset", "toy", "--model", a.model]
    given += ["--data", str(a.work / "train.jsonl"), "--eval-data", ""]
    given += ["--steps", str(a.steps), "--max-new-tokens", str(a.max_new_tokens)]
    given += ["--prompts-per-step", str(a.completions // group)]
    if not neighbour or neighbour.rollouts:
        given += ["--rollouts-per-prompt", str(group)]
    return given + variants()[name]


# ---- the runs


def make_splits(a) -> None:
    """Write train.jsonl and validation.jsonl into --work."""
    path = Path(toy.resolve(a.data, "train.jsonl"))
    lines = path.read_text().splitlines(keepends=True)
    if len(lines) <= a.validation:
        raise InputError(
            f"{a.data}: {len(lines)} problems, --validation takes {a.validation}: lower it"
        )
    train = a.work / "train.jsonl"
    validation = a.work / "validation.jsonl"
    if path.resolve() in (train.resolve(), validation.resolve()):
        raise InputError(f"{path}: would be overwritten by a split: choose another --work")
    a.work.mkdir(parents=True, exist_ok=True)
    train.write_text("".join(lines[: -a.validation]))
    validation.write_text("".join(lines[-a.validation :]))


def run(name: str, seed: int, a) -> dict:
    """Train and evaluate once, unless that was done before; returns what test.json holds."""
    rate = rate_of(name, a)
    out = a.work / name.replace(" ", "-").replace(",", "") / f"lr{rate:g}-seed{seed}"
    given = []
    command = ""
    if name != BASE:
        given = [*flags(name, a), "--lr", f"{rate:g}", "--seed", str(seed)]
        command = shlex.join(["python", "-m", "family", *given])
    origin = {
        "command": command,
        "model": a.model,
        "training_data": digest(a.work / "train.jsonl")[:12],
    }
    test = toy.resolve(a.test, "test.jsonl")
    measured = origin | {
        "data": digest(Path(test))[:12],
        "samples": 1,
        "max_new_tokens": a.max_new_tokens,
    }
    done = stored(out / "test.json")
    if measured.items() <= done.items():
        return done

    start = time.time()
    out.mkdir(parents=True, exist_ok=True)
    model = toy.resolve(a.model, "model")
    curves = {}
    if given:
        train(given, origin, out)
        model = str(out / "run" / "model")
        curves = read_curves(out / "run" / "metrics.jsonl")
    s = EvaluationSettings(1, a.max_new_tokens, top_p=1.0, slots=SLOTS, thinking=False, seed=seed)
    # the bars of workers go into the log
    with (out / "log.txt").open("a") as log, redirect_stderr(log):
        samples = sample(model, test, s)
    (out / "test-samples.jsonl").write_text("".join(json.dumps(x) + "\n" for x in samples))
    result = measured | {"name": name, "seed": seed, "rate": rate} | figures(samples)
    result |= {"seconds": time.time() - start, "curves": curves}
    for key, curve in curves.items():
        result[f"mean_{key}"] = float(np.mean(curve))
    write_text(out / "test.json", json.dumps(result))
    return result


def stored(path: Path) -> dict:
    """What an earlier run left there. Empty if there is nothing, or if it is damaged and must be
    made again."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, *DAMAGED):
        return {}


def train(given: list, origin: dict, out: Path) -> None:
    """Train with these flags, unless a complete run of the same origin is there."""
    made = out / "run" / "origin.json"
    if stored(made) == origin:
        return
    shutil.rmtree(out / "run", ignore_errors=True)
    sys.argv = ["family", *given, "--out", str(out / "run")]
    path = out / "log.txt"
    with path.open("w") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            lab.main()
        except SystemExit as end:
            if end.code:
                raise InputError(f"{path}: the run ended with code {end.code}") from None
    write_text(made, json.dumps(origin))


def read_curves(path: Path) -> dict:
    """The CURVES that are in a metrics.jsonl, each with a value per update."""
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    curves = {}
    for key in CURVES:
        if key in steps[0]:
            curves[key] = [round(step[key], 5) for step in steps]
    return curves


def sample(model: str, test: str, s) -> list:
    """A graded sample of every test problem, as in samples.jsonl."""
    torch.set_num_threads(1)
    problems, _ = load_problems(test, need_solution=False)
    loaded, tokenizer = load_model(model, torch.float32, torch.device("cpu"))
    solve = partial(evaluation.solve, loaded, tokenizer, s)
    return evaluation.evaluate(problems, s.samples, solve, Ranks(), "test")


def figures(samples: list) -> dict:
    """The MEASURES of a model by its samples, and the share of truncated ones."""
    summary = evaluation.summarise(samples, 1)
    texts = [sample["completion"] for sample in samples]
    tokens = sum(sample["tokens"] for sample in samples)
    return {
        "accuracy": summary["avg"],
        "length": summary["length"],
        "eff": summary["eff"],
        "truncated": summary["truncated"],
        **diagnostics.markers(texts, tokens),
        "repetition": diagnostics.repetition_rate(texts),
    }


def list_jobs(names: list, a) -> list:
    """(name, seed) of all runs. Rows that no question is about get fewer seeds."""
    asked = {BASE}
    for pair in QUESTIONS:
        asked.update(pair.split(" - "))
    jobs = []
    for place, seed in enumerate(a.seeds):
        for name in [BASE, *names]:
            if name in asked or place < a.other_seeds:
                jobs.append((name, seed))
    return jobs


def run_all(jobs: list, a) -> list:
    """The results of all jobs, in their order."""
    os.environ["OMP_NUM_THREADS"] = "1"
    # a process per job, forked from one that has made the imports
    context = get_context("forkserver")
    context.set_forkserver_preload(["experiments.diagnostics", "family.neighbour"])
    names, seeds = zip(*jobs, strict=True)
    with ProcessPoolExecutor(a.workers, mp_context=context, max_tasks_per_child=1) as pool:
        results = pool.map(partial(run, a=a), names, seeds)
        return list(tqdm(results, total=len(jobs), desc="runs", unit=" runs"))


# ---- figures


def import_extra(name: str):
    """A module of experiments/requirements.txt; InputError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{error}: pip install -r experiments/requirements.txt") from None


def interval(values: list[float]) -> dict:
    """Mean, half width of its 95 % interval, p of the hypothesis that it is 0 (t distribution; both
    None for one value), and the values."""
    n = len(values)
    mean = float(np.mean(values))
    half = None
    p = None
    if n > 1:
        stats = import_extra("scipy.stats")
        error = float(stats.sem(values))
        half = float(stats.t.ppf(0.975, n - 1)) * error
        if error:
            p = 2 * float(stats.t.sf(abs(mean) / error, n - 1))
        else:
            p = float(not np.any(values))
    return {"mean": mean, "half_width": half, "p": p, "values": [round(v, 5) for v in values]}


def holm(p: list[float]) -> list[float]:
    """p-values adjusted for their number, in the order given (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p, kind="stable")
    factors = np.arange(len(p), 0, -1)  # the smallest p counts len(p) times, the largest once
    adjusted = np.maximum.accumulate(np.sort(p) * factors).clip(max=1)
    return adjusted[np.argsort(order)].tolist()


def difference(more: dict, less: dict, measures: tuple) -> dict:
    """Intervals of the difference of two rows over the seeds that both have. A row: its runs by
    seed."""
    seeds = sorted(more.keys() & less.keys())
    found = {}
    for measure in measures:
        if measure in more[seeds[0]] and measure in less[seeds[0]]:
            values = [more[seed][measure] - less[seed][measure] for seed in seeds]
            found[measure] = interval(values)
    return found


def answers(by_name: dict) -> list:
    """The differences of AREAS that answer the QUESTIONS, of the rows that were run. `holm` is the
    p-value, adjusted for the number of all. by_name: runs by seed, by name of the row."""
    found = []
    for pair, question in QUESTIONS.items():
        more, less = pair.split(" - ")
        if more in by_name and less in by_name:
            row = {"question": question, "difference": pair}
            found.append(row | difference(by_name[more], by_name[less], AREAS))
    tested = []
    for row in found:
        tested += [row[area] for area in AREAS if row[area]["p"] is not None]
    adjusted = holm([value["p"] for value in tested])
    for value, p in zip(tested, adjusted, strict=True):
        value["holm"] = p
    return found


def summarise(by_name: dict) -> dict:
    """By name the intervals of every measure, and of CL-EGRSD's difference to it."""
    rows = {}
    for name, runs in by_name.items():
        seeds = sorted(runs)
        first = runs[seeds[0]]
        row = {}
        for measure in MEASURES:
            if measure in first:
                row[measure] = interval([runs[seed][measure] for seed in seeds])
        row |= {"rate": first["rate"], "seeds": seeds, "command": first["command"]}
        if name != PARENT and PARENT in by_name:
            row[f"{PARENT} minus this"] = difference(by_name[PARENT], runs, MEASURES)
        rows[name] = row
    return rows


# ---- tables


def cell(value: dict | None, digits: int, scale: float = 1.0, sign: str = "") -> str:
    """An interval as text; with a star, if its p-value was adjusted and is below 0.05."""
    if not value:
        return ""
    text = f"{scale * value['mean']:{sign}.{digits}f}"
    if value["half_width"] is not None:
        text += f" ± {scale * value['half_width']:.{digits}f}"
    if value.get("holm", 1) < 0.05:
        text += " *"
    return text


def markdown(head: str, rows: list) -> str:
    """A table; `head` is its first line, `rows` are cells."""
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    for cells in rows:
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def methods_table(rows: dict) -> str:
    """The rows as markdown."""
    head = (
        "| method | rate | seeds | accuracy % | length | Eff | markers per response | mean "
        "accuracy % | mean reward | mean length | CL-EGRSD minus it, mean accuracy |"
    )
    lines = []
    for name, row in rows.items():
        rate = "" if name == BASE else f"{row['rate']:g}"
        rival = row.get(f"{PARENT} minus this", {})
        cells = [
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
        lines.append(cells)
    return markdown(head, lines)


def questions_table(found: list) -> str:
    """The answers as markdown."""
    head = "| question | difference | mean accuracy, points | mean reward | mean length, tokens |"
    lines = []
    for row in found:
        cells = [
            row["question"],
            row["difference"],
            cell(row["mean_accuracy"], 1, 100, "+"),
            cell(row["mean_reward"], 3, 1, "+"),
            cell(row["mean_length"], 2, 1, "+"),
        ]
        lines.append(cells)
    return markdown(head, lines)


# ---- the command


def parse_arguments(argv: list[str]) -> CompareSettings:
    parser = Parser(__doc__, prog=PROGRAM)
    names = list(variants())
    text = "methods and variants to run (default: all): " + "; ".join(names)
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=text)
    add_flags(parser, fields(CompareSettings)[1:])
    a = CompareSettings(**vars(parser.parse_args(argv)))
    a.only = list(dict.fromkeys(a.only))  # each once
    a.seeds = list(dict.fromkeys(a.seeds))
    check_ranges(a)
    if a.completions % GROUP:
        raise InputError(
            f"--completions must be a multiple of {GROUP}, the size of a group, got {a.completions}"
        )
    if not a.out:
        a.out = a.work / "only.json" if a.only else Path("results/compare.json")
    return a


def compare(a) -> None:
    """Make all runs, print and write the results."""
    names = a.only or list(variants())
    earlier = stored(a.out).get("rows", {})
    if a.out.exists() and (not earlier or earlier.keys() - {BASE, *names}):
        raise InputError(
            f"{a.out}: no results, or with rows that these runs do not have: choose another --out"
        )
    make_splits(a)
    import_extra("scipy.stats")  # better missing here than after hours

    results = run_all(list_jobs(names, a), a)
    by_name = {name: {} for name in [BASE, *names]}
    for result in results:
        by_name[result["name"]][result["seed"]] = result
    rows = summarise(by_name)
    found = answers(by_name)
    curves = {}
    for name in names:
        curves[name] = [result["curves"] for result in by_name[name].values()]

    print(f"{methods_table(rows)}\n\n{questions_table(found)}\n", flush=True)
    written = {
        "command": PROGRAM,
        "settings": asdict(a),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "run_seconds": sum(result["seconds"] for result in results),
        "methods": methods(),
        "rows": rows,
        "questions": found,
        "curves": curves,
    }
    a.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(written, separators=(",", ":"), default=str)  # str: of the paths
    write_text(a.out, text + "\n")
    print(a.out, flush=True)


def main() -> None:
    stopped = "stopped; the same command goes on with the runs that are missing"
    with one_line_errors(PROGRAM, stopped):
        a = parse_arguments(sys.argv[1:])
        with hold(a.work, Ranks.alone(), remedy=None):
            compare(a)


if __name__ == "__main__":
    main()
