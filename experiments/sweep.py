"""Gate strength by lookahead by snapshot: the runs of a grid, their evaluations, a table and a heat map.

    python -m experiments.sweep                                       the toy, on two cores in about an hour
    python -m experiments.sweep --gamma 0 0.3 0.5 1 --window 0 3 5 --workers 1 --out runs/sweep-4b \\
        --launch "torchrun --standalone --nproc-per-node=8" \\
        --train "--model Qwen/Qwen3-4B --data openthoughts.jsonl --skip-ungradable" \\
        --test "--data aime24.jsonl --data math500.jsonl --thinking --max-new-tokens 32768"

Every point of the grid is an ordinary run of train.py in a directory of --out. eval.py then evaluates
all its checkpoints: train.py writes one every --checkpoint-every steps. The same command goes on after
a stop. gamma = 0 has no gate, so no lookahead: it is run once. What arXiv 2605.13255 reports of gamma,
of W and of snapshots are parts of this grid.

The table has a line for each gamma and W and a column for each snapshot: accuracy in %, and (mean
length in tokens), means over data files and seeds, with +- half a 95 % interval over seeds. sweep.json
has all values, sweep.png the accuracy and length of the last snapshot.
"""

import json
import shlex
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from tqdm import tqdm

from experiments.compare import import_extra, interval, markdown
from support.checkpoint import write_json
from support.errors import InputError
from support.flags import SEEDS, flag, parse
from support.run import one_line_errors

PROGRAM = "python -m experiments.sweep"


@dataclass
class SweepSettings:
    """The command line."""

    gamma: list = flag([0.0, 0.3, 1.0, 3.0], "strengths of the gate", least=0)
    window: list = flag([0, 3, 5], "lookaheads of the gate in tokens", least=0)
    seeds: list = flag([0, 1, 2], "seeds of the runs", **SEEDS)
    train: str = flag(
        "--model toy --eval-data= --steps 40 --checkpoint-every 10", "more flags of train.py"
    )
    test: str = flag("--data toy", "more flags of eval.py, such as --data")
    launch: str = flag(
        "", "what starts a script, such as torchrun with its flags (default: this Python)"
    )
    workers: int = flag(2, "runs at a time", least=1)
    out: Path = flag(Path("runs/sweep"), "directory of the runs and the results")


def grid(s: SweepSettings) -> list[tuple[float, int]]:
    """(gamma, W) of the rows. Without a gate W means nothing."""
    return list(dict.fromkeys((g, w if g else 0) for g, w in product(s.gamma, s.window)))


def make(point: tuple, s: SweepSettings) -> dict[int, list[dict]]:
    """Train and evaluate one point (gamma, W, seed), as far as that is not done. Returns the results
    of eval.py by step."""
    gamma, window, seed = point
    run = s.out / f"gamma-{gamma:g}-W-{window}-seed{seed}"
    values = ["--gamma", f"{gamma:g}", "--window", f"{window}", "--seed", f"{seed}"]
    if not (run / "model").exists():
        start(s, "train.py", run, [*shlex.split(s.train), *values])
    model = json.loads((run / "config.json").read_text())["settings"]["model"]
    adapters = sorted(run.glob("checkpoints/step-*/adapter"))
    named = []
    for adapter in adapters:
        named += ["--model", model, "--adapter", str(adapter)]
    start(s, "eval.py", run / "test", [*named, *shlex.split(s.test)])
    found = defaultdict(list)
    for result in json.loads((run / "test" / "results.json").read_text())["results"]:
        _, _, adapter = result["checkpoint"].partition(" + ")
        found[int(Path(adapter).parent.name.removeprefix("step-"))].append(result)
    return found


def start(s, script, out, given):
    """Run a script into `out`, or go on with it; what it prints goes into a file beside `out`."""
    log = out.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    launch = shlex.split(s.launch) or [sys.executable]
    command = [*launch, script, *given, "--out", str(out), "--resume", "auto"]
    with log.open("a") as file:
        code = subprocess.run(command, stdout=file, stderr=file).returncode
    if code:
        raise InputError(f"{log}: {script} ended with code {code}")


def make_all(points: list[tuple], s: SweepSettings) -> list[dict]:
    """`make` of all points, in their order. After a failure no more runs are started."""
    with ThreadPoolExecutor(s.workers) as pool:
        made = pool.map(make, points, [s] * len(points))
        try:
            return list(tqdm(made, total=len(points), desc="runs", unit=" runs"))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def summarise(points: list[tuple], found: list[dict]) -> list[dict]:
    """A row for each gamma, W and step: intervals over seeds of accuracy (%) and length, each the mean
    over the data files."""
    seeds = defaultdict(list)
    for (gamma, window, _), by_step in zip(points, found, strict=True):
        for step, results in by_step.items():
            means = [np.mean([result[name] for result in results]) for name in ("avg", "length")]
            seeds[gamma, window, step].append(means)
    rows = []
    for (gamma, window, step), values in seeds.items():
        accuracy, length = np.transpose(values).tolist()
        row = {"gamma": gamma, "window": window, "step": step, "length": interval(length)}
        rows.append(row | {"accuracy": interval([100 * share for share in accuracy])})
    return rows


def table(rows: list[dict]) -> str:
    """The rows as markdown, a column for each snapshot."""
    steps = sorted({row["step"] for row in rows})
    cells = defaultdict(dict)
    for row in rows:
        accuracy = row["accuracy"]
        text = f"{accuracy['mean']:.1f}"
        if accuracy["half_width"] is not None:
            text += f" ± {accuracy['half_width']:.1f}"
        text += f" ({row['length']['mean']:.1f})"
        cells[row["gamma"], row["window"]][step_name(row["step"])] = text
    head = ["gamma", "W", *map(step_name, steps)]
    lines = [
        [f"{gamma:g}", str(window) if gamma else "", *(by_step.get(name, "") for name in head[2:])]
        for (gamma, window), by_step in cells.items()
    ]
    return markdown(f"| {' | '.join(head)} |", lines)


def step_name(step):
    return f"step {step}"


def draw(rows: list[dict], path: Path) -> None:
    """Heat maps of the last snapshot. The row of gamma = 0 has the same value for every W."""
    plt = import_extra("matplotlib.pyplot")
    last = max(row["step"] for row in rows)
    rows = [row for row in rows if row["step"] == last]
    gammas = sorted({row["gamma"] for row in rows})
    windows = sorted({row["window"] for row in rows})
    figure, panels = plt.subplots(1, 2, figsize=(8.3, 3.4), layout="constrained")
    titles = {"accuracy": "accuracy, %", "length": "mean length, tokens"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        cells = np.full((len(gammas), len(windows)), np.nan)
        for row in rows:
            places = windows.index(row["window"]) if row["gamma"] else slice(None)
            cells[gammas.index(row["gamma"]), places] = row[name]["mean"]
        better = "Blues" if name == "accuracy" else "Blues_r"
        axes.imshow(cells, cmap=better, aspect="auto", alpha=0.7)
        for (y, x), value in np.ndenumerate(cells):
            axes.text(x, y, f"{value:.1f}", ha="center", va="center")
        axes.set_xticks(range(len(windows)), windows)
        axes.set_yticks(range(len(gammas)), [f"{gamma:g}" for gamma in gammas])
        axes.set(title=f"{title}, step {last}", xlabel="lookahead W", ylabel="gamma")
    figure.savefig(path, dpi=150)


def sweep(s: SweepSettings) -> None:
    import_extra("scipy.stats")  # better missing here than after hours
    points = [(*point, seed) for seed in s.seeds for point in grid(s)]
    rows = summarise(points, make_all(points, s))
    print(f"{table(rows)}\n")
    write_json(
        s.out / "sweep.json",
        {"command": f"{PROGRAM} {shlex.join(sys.argv[1:])}".strip(), "rows": rows},
    )
    draw(rows, s.out / "sweep.png")
    print(f"in {s.out}: sweep.json, sweep.png")


def main() -> None:
    with one_line_errors(PROGRAM, "stopped; the same command goes on"):
        sweep(parse(SweepSettings, sys.argv[1:], __doc__))


if __name__ == "__main__":
    main()
