"""EGRSD and its neighbours on equal terms: same problems, same number of rollouts and updates, several seeds.

    python -m experiments.compare                everything: 238 runs took 206 core-minutes; after a stop the same
                                                 command goes on with what is missing; it prints the table at its end
    python -m experiments.compare --only opsd    one row of the table, the choice of its learning rate included, into
                                                 runs/compare/only.json (differences: add egrsd cl-egrsd)

The learning rate of every method: train with --choose-seed at each of --rates, take the rate of the highest accuracy on
the validation split, of equals the smallest; while it is at an edge, try the next one of LADDER too. Variants of
CL-EGRSD take CL-EGRSD's rate. Then --seeds are trained and measured on the test split; docs/evidence.md says more.
Every run is an ordinary `python train.py ...` in --work/<name>/lr<rate>-seed<seed>, with samples and figures of its
evaluation beside it. What was done with the same command, data and settings is not repeated.
"""

import argparse
import itertools
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
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
from family.settings import GROUP
from support import settings
from support.data import digest, load_model, load_problems
from support.distributed import Ranks
from support.errors import InputError
from support.flags import Parser, nonempty, nonempty_path
from support.run import hold, one_line_errors, say

PROGRAM = "python -m experiments.compare"
BASE = "no training"
PARENT = "cl-egrsd"
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SLOTS = 128  # rows decoded together in evaluation
CURVES = ("accuracy", "length", "reward", "entropy", "gate")  # of metrics.jsonl, kept for every run
MEASURES = ("accuracy", "length", "eff", "markers_per_response", "markers_per_1000_tokens", "repetition")
T_975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # Student's t, by degrees of freedom from 1


def methods() -> list[str]:
    """The methods in the order of the table: those without a teacher, the paper's own, the other neighbours."""
    teacherless = [name for name, method in family.METHODS.items() if not method.teacher]
    others = [name for name in family.METHODS if name not in teacherless]
    return [*teacherless, *reversed(settings.METHODS), *others]


def variants() -> dict[str, list[str]]:
    """Flags by name: the methods first, then what is derived from CL-EGRSD."""
    named = {name: ["--method", name] for name in methods()} | {
        "gate off": ["--gamma", "0"], "magnitude off": ["--eps", "0"], "length reward off": ["--beta-length", "0"],
        "gamma 3.0 W 3, floor 0": ["--gamma", "3", "--floor", "1e-9"],
        "position gate": ["--method", "egrsd", "--gate", "position"]}
    for method in ("direction-aware", "egrsd", "cl-egrsd"):
        named[f"{method}, answer only"] = ["--method", method, "--teacher-context", "answer"]
    for gamma, window in itertools.product((0.3, 1.0, 3.0), (0, 3, 5)):
        named[f"gamma {gamma} W {window}"] = ["--gamma", str(gamma), "--window", str(window)]
    del named["gamma 0.3 W 3"]  # that is cl-egrsd
    return named


def flags(name: str, a) -> list[str]:
    """All of train.py's flags of a variant, but for rate, seed and output."""
    neighbour = family.METHODS.get(name)
    group = GROUP if neighbour and neighbour.groups else 1
    groups = ["--rollouts-per-prompt", str(group)] if not neighbour or neighbour.rollouts else []
    return ["--preset", "toy", "--model", a.model, "--data", str(a.work / "train.jsonl"), "--eval-data", "",
            "--steps", str(a.steps), "--max-new-tokens", str(a.max_new_tokens),
            "--prompts-per-step", str(a.completions // group), *groups, *variants()[name]]


def make_splits(a) -> None:
    """train.jsonl and validation.jsonl in --work."""
    path = Path(toy.resolve(a.data, "train.jsonl"))
    if not path.is_file():
        raise InputError(f"{path}: no such data file: check --data")
    lines = path.read_text().splitlines(keepends=True)
    if len(lines) <= a.validation:
        raise InputError(f"{a.data}: {len(lines)} problems, --validation takes {a.validation}: lower it")
    if path.resolve() in [(a.work / f"{name}.jsonl").resolve() for name in ("train", "validation")]:
        raise InputError(f"{path}: would be overwritten by a split: choose another --work")
    a.work.mkdir(parents=True, exist_ok=True)
    (a.work / "train.jsonl").write_text("".join(lines[:-a.validation]))
    (a.work / "validation.jsonl").write_text("".join(lines[-a.validation:]))


def run(name: str, rate: float, seed: int, split: str, a) -> dict:
    """Train and evaluate once, unless it was done before: what <split>.json says."""
    out = a.work / name.replace(" ", "-").replace(",", "") / f"lr{rate:g}-seed{seed}"
    path = a.work / "validation.jsonl" if split == "validation" else toy.resolve(a.test, "test.jsonl")
    problems, _ = load_problems(path, need_solution=False)
    command = ["train.py", *flags(name, a), "--lr", f"{rate:g}", "--seed", str(seed)] if name != BASE else []
    origin = {"command": shlex.join(command), "model": a.model,
              "training_data": digest(a.work / "train.jsonl")[:12]}
    measured = origin | {"split": split, "data": digest(Path(path))[:12], "problems": len(problems),
                         "samples": a.samples, "max_new_tokens": a.max_new_tokens}
    done = json.loads((out / f"{split}.json").read_text()) if (out / f"{split}.json").exists() else {}
    if done | measured == done:
        return done
    start, model, steps = time.time(), toy.resolve(a.model, "model"), []
    out.mkdir(parents=True, exist_ok=True)
    if command:
        train(command, origin, out)
        model = out / "run" / "model"
        steps = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    torch.set_num_threads(1)
    s = evaluation.Settings(a.samples, a.max_new_tokens, top_p=1.0, slots=SLOTS, thinking=False, seed=seed)
    with (out / "log.txt").open("a") as log, redirect_stderr(log):  # no bars of workers on the screen
        solve = partial(evaluation.solve, *load_model(str(model), torch.float32, torch.device("cpu")), s)
        rows = evaluation.evaluate(problems, a.samples, solve, Ranks(), split, chunk=max(1, SLOTS // a.samples))
    (out / f"{split}-samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary, texts = evaluation.summarise(rows, a.samples), [row["completion"] for row in rows]
    result = measured | {
        "name": name, "seed": seed, "rate": rate, "accuracy": summary["avg"], "length": summary["length"],
        "eff": summary["eff"], "truncated": summary["truncated"],
        **diagnostics.markers(texts, sum(row["tokens"] for row in rows)),
        "repetition": diagnostics.repetition_rate(texts), "seconds": time.time() - start,
        "curves": {key: [round(step[key], 5) for step in steps] for key in CURVES if steps and key in steps[0]}}
    (out / f"{split}.json").write_text(json.dumps(result))
    return result


def train(command: list[str], origin: dict, out: Path) -> None:
    """Run train.py, unless what it made from the same origin is there."""
    made, log_path = out / "run" / "origin.json", out / "log.txt"
    if made.exists() and json.loads(made.read_text()) == origin:
        return
    shutil.rmtree(out / "run", ignore_errors=True)
    with log_path.open("w") as log:
        code = subprocess.run([sys.executable, *command, "--out", str(out / "run")], stdout=log, stderr=log,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    if code:
        last = log_path.read_text().strip().splitlines()[-1:]
        raise InputError(f"{log_path}: the run ended with code {code}: {' '.join(last)}")
    made.write_text(json.dumps(origin))


def run_all(jobs: list[tuple], a, title: str) -> list[dict]:
    """The results of all jobs, in their order."""
    with ProcessPoolExecutor(a.workers, mp_context=get_context("spawn")) as pool:
        results = pool.map(run, *zip(*jobs, strict=True), itertools.repeat(a))
        return list(tqdm(results, total=len(jobs), desc=title, unit=" runs"))


def choose_rates(names: list[str], a) -> tuple[dict[str, float], list[dict]]:
    """The rate of every method by the rule above, and the runs it was chosen from."""
    tried: dict[str, dict[float, dict]] = {name: {} for name in names}
    missing = [(name, rate) for name in names for rate in a.rates]
    while missing:
        for result in run_all([(*pair, a.choose_seed, "validation") for pair in missing], a, "learning rates"):
            tried[result["name"]][result["rate"]] = result
        best = {name: max(runs, key=lambda rate: (runs[rate]["accuracy"], -rate)) for name, runs in tried.items()}
        missing = [(name, rate) for name in names for rate in beyond(best[name], tried[name])]
    return best, [result for runs in tried.values() for result in runs.values()]


def beyond(best: float, tried) -> list[float]:
    """The neighbours on the ladder that are left to try if `best` is at an edge of the rates tried."""
    lower = [rate for rate in LADDER if rate < best][-1:] if best == min(tried) else []
    higher = [rate for rate in LADDER if rate > best][:1] if best == max(tried) else []
    return lower + higher


def interval(values: list[float]) -> dict:
    """Mean, half width of its 95 % interval (t distribution; None for one value), and the values."""
    n = len(values)
    half = T_975[min(n, 10) - 2] * np.std(values, ddof=1).item() / n ** 0.5 if n > 1 else None
    return {"mean": float(np.mean(values)), "half_width": half, "values": [round(v, 5) for v in values]}


def summarise(results: list[dict]) -> dict:
    """Per name the intervals of every measure, and of its difference to EGRSD and CL-EGRSD."""
    names = dict.fromkeys(result["name"] for result in results)
    by_name = {name: {result["seed"]: result for result in results if result["name"] == name} for name in names}
    rows = {}
    for name, runs in by_name.items():
        first = runs[min(runs)]
        rows[name] = {measure: interval([runs[seed][measure] for seed in sorted(runs)]) for measure in MEASURES}
        rows[name] |= {"rate": first["rate"], "seeds": sorted(runs), "command": first["command"]}
        for rival in ("egrsd", "cl-egrsd"):
            shared = sorted(set(runs) & set(by_name.get(rival, {})))
            if shared and name != rival:
                rows[name][f"{rival} minus this"] = {
                    measure: interval([by_name[rival][seed][measure] - runs[seed][measure] for seed in shared])
                    for measure in MEASURES[:3]}
    return rows


def table(rows: dict) -> str:
    """The rows as markdown."""
    def cell(value: dict, digits: int, scale: float = 1.0, sign: str = "") -> str:
        half = f" ± {scale * value['half_width']:.{digits}f}" if value["half_width"] is not None else ""
        return f"{scale * value['mean']:{sign}.{digits}f}{half}"
    lines = ["| method | rate | accuracy % | length | Eff | markers per response | "
             "EGRSD minus it | CL-EGRSD minus it |", "|---|---|---|---|---|---|---|---|"]
    for name, row in rows.items():
        differences = [cell(row[f"{rival} minus this"]["accuracy"], 1, 100, "+") if f"{rival} minus this" in row else ""
                       for rival in ("egrsd", "cl-egrsd")]
        rate = f"{row['rate']:g}" if name != BASE else ""
        lines.append(f"| {name} | {rate} | {cell(row['accuracy'], 1, 100)} | {cell(row['length'], 1)} | "
                     f"{cell(row['eff'], 0)} | {cell(row['markers_per_response'], 2)} | {' | '.join(differences)} |")
    return "\n".join(lines)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__, prog=PROGRAM)
    parser.add_argument("--only", default=[], nargs="+", choices=list(variants()), metavar="NAME",
                        help="methods and variants to run (default: all): " + "; ".join(variants()))
    for name, default, help in (
            ("--seeds", [0, 1, 2, 3, 4], "seeds of the reported runs"),
            ("--variant-seeds", 5, "how many of them for the variants"),
            ("--rates", [3e-4, 1e-3, 3e-3], "learning rates tried"),
            ("--choose-seed", 100, "seed of the runs that choose the rate"),
            ("--steps", 40, "updates of every run"),
            ("--completions", 32, "rollouts per update, in groups or not"),
            ("--max-new-tokens", 128, "longest completion in tokens"),
            ("--samples", 2, "completions per problem in evaluation"),
            ("--validation", 480, "training problems set aside"),
            ("--workers", 2, "runs at a time, each on one core"),
            ("--model", "toy", "checkpoint directory or toy"),
            ("--data", "toy", "training problems, JSONL or toy"),
            ("--test", "toy", "test problems, JSONL or toy"),
            ("--work", Path("runs/compare"), "directory of the runs")):
        kind = {"type": type(default[0]), "nargs": "+"} if isinstance(default, list) else {
            "type": {str: nonempty, type(Path()): nonempty_path}.get(type(default), type(default))}
        parser.add_argument(name, default=default, help=f"{help} (default: {default})", **kind)
    parser.add_argument("--out", default=None, type=nonempty_path,
                        help="results (default: results/compare.json; with --only only.json in --work)")
    a = parser.parse_args(argv)
    if a.completions % GROUP:
        raise InputError(f"--completions must be a multiple of {GROUP}, the size of a group, got {a.completions}")
    a.out = a.out or (a.work / "only.json" if a.only else Path("results/compare.json"))
    return a


def compare(a) -> None:
    """Choose the rates, make all runs, print and write the results."""
    make_splits(a)
    names = a.only or list(variants())
    compared = [name for name in names if name in methods()]
    derived = [name for name in names if name not in methods()]
    rates, chosen = choose_rates(compared + ([PARENT] if derived and PARENT not in compared else []), a)
    jobs = [(BASE, 0.0, seed, "test") for seed in a.seeds]
    jobs += [(name, rates[name], seed, "test") for name in compared for seed in a.seeds]
    jobs += [(name, rates[PARENT], seed, "test") for name in derived for seed in a.seeds[:a.variant_seeds]]
    results = run_all(jobs, a, "seeds")
    rows = summarise(results)
    say(table(rows) + "\n")
    if a.out.exists() and (lost := set(json.loads(a.out.read_text())["rows"]) - set(rows)):
        raise InputError(f"{a.out}: holds {len(lost)} rows that these runs do not have: choose another --out")
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps({
        "command": PROGRAM, "settings": vars(a),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "run_seconds": sum(r["seconds"] for r in chosen + results), "methods": methods(), "rows": rows,
        "choice_of_rates": [{key: r[key] for key in ("name", "rate", "seed", "accuracy", "length")} for r in chosen],
        "curves": {name: [r["curves"] for r in results if r["name"] == name] for name in rows if name != BASE},
    }, separators=(",", ":"), default=str) + "\n")
    say(str(a.out))


def main() -> None:
    with one_line_errors(PROGRAM, "stopped; the same command goes on with the runs that are missing"):
        a = parse_arguments(sys.argv[1:])
        with hold(a.work, Ranks.alone(), remedy=None):
            compare(a)


if __name__ == "__main__":
    main()
