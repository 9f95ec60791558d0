"""EGRSD and its neighbours on equal terms: the same problems, as many rollouts and updates, several
seeds.

    python -m experiments.compare                all rows, and the tables at the end;
                                                 after a stop the same command makes the missing runs
    python -m experiments.compare --only opsd    one row, into runs/compare/only.json
                                                 (its difference to CL-EGRSD: add cl-egrsd)

Every run is an ordinary `python -m family ...` and an ordinary `python eval.py ...`, in
--work/<name>/lr<rate>-seed<seed>. Its figures stand beside it. A run that is complete is not
repeated, unless command, data or settings have changed.

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
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from itertools import repeat
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
from support.data import digest
from support.distributed import Ranks
from support.errors import DAMAGED, InputError
from support.flags import SEEDS, flag, parse
from support.run import hold, one_line_errors

PROGRAM = "python -m experiments.compare"
BASE = "no training"
PARENT = "cl-egrsd"
RIVAL = "cl-egrsd minus this"
COMPLETIONS = 32  # rollouts per update, in groups or not
FIRST = ("sft", "grpo", "grpo-group", "direction-aware", "egrsd", "cl-egrsd")  # of the methods
CURVES = ("accuracy", "reward", "length")  # of metrics.jsonl, kept for every run
# The measures, with their digits in the table of methods. mean_: over the updates, of the rollouts.
MEASURES = {
    "accuracy": 1,
    "length": 1,
    "eff": 0,
    "markers_per_response": 2,
    "mean_accuracy": 1,
    "mean_reward": 3,
    "mean_length": 1,
}
# The measures that answer questions, with their digits in the table of questions.
AREAS = {"mean_accuracy": 1, "mean_reward": 3, "mean_length": 2}
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
    "sft, teacher's rows, cooler": "--method sft --rows teacher --ask-temperature 0.7 "
    "--ask-top-p 0.8 --ask-top-k 20",
    "sft, interleaved": "--method sft --rows interleaved",
    "sft, interleaved, correct": "--method sft --rows interleaved --keep correct",
    "grpo-group, pairs": "--method grpo-group --rollouts-per-prompt 2 --prompts-per-step 16",
    "sort, pairs": "--method sort --rollouts-per-prompt 2 --prompts-per-step 16",
    "sort, pairs, empty plan": "--method sort --rollouts-per-prompt 2 --prompts-per-step 16 "
    "--teacher-context none",
    "sort, pairs, solution": "--method sort --rollouts-per-prompt 2 --prompts-per-step 16 "
    "--teacher-context solution",
    "grpo-group, length reward off": "--method grpo-group --beta-length 0",
    "atmanrl, steps": "--method atmanrl --saliency steps",
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
    "sort - grpo-group": "solutions where all failed",
    "sort, pairs - grpo-group, pairs": "solutions where all failed",
    "sort, pairs - sort, pairs, empty plan": "plan",
    "atmanrl - grpo-group, length reward off": "saliency",
    "atmanrl - atmanrl, steps": "mask",
}


# ---- the rows of the table, and their flags


def methods() -> list[str]:
    """The methods in the order of the table: those without a teacher, the paper's own, the other
    neighbours."""
    return list(dict.fromkeys([*FIRST, *family.METHODS]))


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


@dataclass
class CompareSettings:
    """The command line."""

    only: list = flag(["all"], f"methods and variants to run: {'; '.join(variants())}")
    seeds: list = flag(list(range(20)), "seeds of the runs", **SEEDS)
    other_seeds: int = flag(5, "how many of them for rows that no question is about", least=1)
    lr: float = flag(0.0, "learning rate of every row, 0: those of RATES", least=0)
    steps: int = flag(40, "updates of every run", least=1)
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


def rate_of(name: str, a) -> float:
    """The learning rate of a row. A variant has the rate of its method."""
    if name == BASE:
        return 0.0
    return a.lr or RATES.get(method_of(name), DEFAULT_RATE)


def flags(name: str, a) -> list[str]:
    """All flags of a row for `python -m family`, but for seed and output."""
    neighbour = family.METHODS.get(method_of(name))  # None for the paper's own methods
    group = GROUP if neighbour and neighbour.groups else 1
    given = [
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
        str(COMPLETIONS // group),
    ]
    if not neighbour or neighbour.rollouts:
        given += ["--rollouts-per-prompt", str(group)]
    return [*given, *variants()[name], "--lr", f"{rate_of(name, a):g}"]


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
        given = [*flags(name, a), "--seed", str(seed)]
        command = shlex.join(["python", "-m", "family", *given])
    origin = {
        "command": command,
        "model": a.model,
        "training_data": digest(a.work / "train.jsonl")[:12],
    }
    test = toy.resolve(a.test, "test.jsonl")
    tested = {"data": digest(Path(test))[:12], "max_new_tokens": a.max_new_tokens}
    done = stored(out / "test.json")
    if (origin | tested).items() <= done.items():
        return done

    model = a.model
    curves = {}
    if given:
        made = out / "run" / "origin.json"
        if stored(made) != origin:
            call(lab.main, given, out / "run")
            write_text(made, json.dumps(origin))
        model = str(out / "run" / "model")
        curves = read_curves(out / "run" / "metrics.jsonl")
    sampling = (
        f"--samples 1 --top-p 1 --slots 128 --no-thinking --max-new-tokens {a.max_new_tokens} "
        f"--seed {seed}"
    )
    call(evaluation.main, ["--model", model, "--data", test, *sampling.split()], out / "test")
    result = origin | tested | {"name": name, "seed": seed, "rate": rate, "curves": curves}
    result |= figures(out / "test")
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


def call(command, given: list, out: Path) -> None:
    """Run a command with these flags into `out`, which is made anew. What it prints goes into
    log.txt beside `out`."""
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    sys.argv = [PROGRAM, *given, "--out", str(out)]
    path = out.parent / "log.txt"
    with path.open("a") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            command()
        except SystemExit as end:
            if end.code:
                raise InputError(f"{path}: the run ended with code {end.code}") from None


def read_lines(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_curves(path: Path) -> dict:
    """The CURVES that are in a metrics.jsonl, each with a value per update."""
    steps = read_lines(path)
    curves = {}
    for key in CURVES:
        if key in steps[0]:
            curves[key] = [round(step[key], 5) for step in steps]
    return curves


def figures(out: Path) -> dict:
    """Those of the MEASURES that an evaluation gives."""
    summary = json.loads((out / "results.json").read_text())["results"][0]
    samples = read_lines(out / "samples.jsonl")
    texts = [sample["completion"] for sample in samples]
    tokens = sum(sample["tokens"] for sample in samples)
    return {
        "accuracy": summary["avg"],
        "length": summary["length"],
        "eff": summary["eff"],
        **diagnostics.markers(texts, tokens),
    }


def list_jobs(names: list, a) -> list:
    """(name, seed) of all runs. Rows that no question is about get fewer seeds."""
    asked = {BASE}
    for pair in QUESTIONS:
        asked.update(pair.split(" - "))
    jobs = []
    for place, seed in enumerate(a.seeds):
        for name in names:
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
        results = pool.map(run, names, seeds, repeat(a))
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
    found = {
        "mean": float(np.mean(values)),
        "half_width": None,
        "p": None,
        "values": [round(value, 5) for value in values],
    }
    if len(values) > 1:
        test = import_extra("scipy.stats").ttest_1samp(values, 0)
        low, high = test.confidence_interval()
        found["half_width"] = float(high - low) / 2
        found["p"] = float(test.pvalue) if any(values) else 1.0
    return found


def holm(p: list[float]) -> list[float]:
    """p-values adjusted for their number, in the order given (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p, kind="stable")
    factors = np.arange(len(p), 0, -1)  # the smallest p counts len(p) times, the largest once
    adjusted = np.maximum.accumulate(np.sort(p) * factors).clip(max=1)
    return adjusted[np.argsort(order)].tolist()


def difference(more: dict, less: dict) -> dict:
    """Intervals of the difference of two rows over the seeds that both have. A row: its runs by
    seed."""
    found = {}
    for area in AREAS:
        values = [run[area] - less[seed][area] for seed, run in more.items() if seed in less]
        found[area] = interval(values)
    return found


def answers(by_name: dict) -> list:
    """The differences of AREAS that answer the QUESTIONS, of the rows that were run. `holm` is the
    p-value, adjusted for the number of all. by_name: runs by seed, by name of the row."""
    found = []
    for pair, question in QUESTIONS.items():
        more, less = pair.split(" - ")
        if more in by_name and less in by_name:
            row = difference(by_name[more], by_name[less])
            found.append({"question": question, "difference": pair, **row})
    tested = []
    for row in found:
        tested += [row[area] for area in AREAS if row[area]["p"] is not None]
    adjusted = holm([value["p"] for value in tested])
    for value, p in zip(tested, adjusted, strict=True):
        value["holm"] = p
    return found


def summarise(by_name: dict) -> dict:
    """By name the intervals of every measure. For a row with rollouts also those of CL-EGRSD's
    difference to it."""
    rows = {}
    for name, runs in by_name.items():
        seeds = list(runs)
        first = runs[seeds[0]]
        row = {}
        for measure in MEASURES:
            if measure in first:
                row[measure] = interval([run[measure] for run in runs.values()])
        row |= {"rate": first["rate"], "seeds": seeds, "command": first["command"]}
        if name != PARENT and PARENT in by_name and "mean_reward" in row:
            row[RIVAL] = difference(by_name[PARENT], runs)
        rows[name] = row
    return rows


# ---- tables


def cell(row: dict, measure: str, digits: int, sign: str = "") -> str:
    """An interval as text, accuracies in percent; with a star, if its p-value was adjusted and is
    below 0.05."""
    if measure not in row:
        return ""
    value = row[measure]
    scale = 100 if "accuracy" in measure else 1
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
        cells = [cell(row, measure, digits) for measure, digits in MEASURES.items()]
        rival = cell(row.get(RIVAL, {}), "mean_accuracy", 1, "+")
        lines.append([name, rate, str(len(row["seeds"])), *cells, rival])
    return markdown(head, lines)


def questions_table(found: list) -> str:
    """The answers as markdown."""
    head = "| question | difference | mean accuracy, points | mean reward | mean length, tokens |"
    lines = []
    for row in found:
        cells = [cell(row, area, digits, "+") for area, digits in AREAS.items()]
        lines.append([row["question"], row["difference"], *cells])
    return markdown(head, lines)


# ---- the command


def parse_arguments(argv: list[str]) -> CompareSettings:
    a = parse(CompareSettings, argv, __doc__)
    default = a.work / "only.json"
    if a.only == ["all"]:
        a.only = list(variants())
        default = Path("results/compare.json")
    a.out = a.out or default
    a.only = list(dict.fromkeys(a.only))  # each once
    a.seeds = sorted(set(a.seeds))
    unknown = set(a.only) - variants().keys()
    if unknown:
        raise InputError(f"--only: no rows {unknown}: see --help")
    return a


def compare(a) -> None:
    """Make all runs, print and write the results."""
    names = [BASE, *a.only]
    earlier = stored(a.out).get("rows")
    if a.out.exists() and (not earlier or earlier.keys() - names):
        raise InputError(
            f"{a.out}: no results, or with rows that these runs do not have: choose another --out"
        )
    make_splits(a)
    import_extra("scipy.stats")  # better missing here than after hours

    by_name = {name: {} for name in names}
    curves = {name: [] for name in names}
    for result in run_all(list_jobs(names, a), a):
        by_name[result["name"]][result["seed"]] = result
        curves[result["name"]].append(result["curves"])
    rows = summarise(by_name)
    found = answers(by_name)

    print(f"{methods_table(rows)}\n\n{questions_table(found)}\n")
    written = {
        "command": PROGRAM,
        "settings": asdict(a),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "methods": methods(),
        "rows": rows,
        "questions": found,
        "curves": curves,
    }
    a.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(written, separators=(",", ":"), default=str)  # str: of the paths
    write_text(a.out, text + "\n")
    print(a.out)


def main() -> None:
    with one_line_errors(
        PROGRAM, "stopped; the same command goes on with the runs that are missing"
    ):
        a = parse_arguments(sys.argv[1:])
        with hold(a.work, Ranks.alone(), remedy=None):
            compare(a)


if __name__ == "__main__":
    main()
