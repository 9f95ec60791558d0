"""Gate strength by lookahead by snapshot: the runs of a grid, their evaluations, a table and a heat map.

    python -m experiments.sweep                                       the toy, in about an hour
    python -m experiments.sweep --gamma 0 0.3 0.5 1 --window 0 3 5 --out runs/sweep-4b \\
        --launch "torchrun --standalone --nproc-per-node=8" \\
        --train "--model Qwen/Qwen3-4B --data openthoughts.jsonl --skip-ungradable" \\
        --test "--data aime24.jsonl --data math500.jsonl --thinking --max-new-tokens 32768"

Every point of the grid is an ordinary run of train.py in a directory of --out. eval.py then evaluates
all its checkpoints: train.py writes one every --checkpoint-every steps. The same command goes on after
a stop. gamma = 0 has no gate, so no lookahead: it is run once. What arXiv 2605.13255 reports of gamma,
of W and of snapshots are parts of this grid.

The table has a line for each gamma, W and snapshot: accuracy in % and mean length in tokens, means over
data files and seeds, and the accuracy of each seed. sweep.json has the same, sweep.png the last snapshot.
"""

import json
import shlex
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from tqdm import tqdm

from experiments.compare import import_extra, markdown
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
    out: Path = flag(Path("runs/sweep"), "directory of the runs and the results")


def grid(s: SweepSettings) -> list[tuple[float, int]]:
    """(gamma, W) of the rows. Without a gate W means nothing."""
    return list(dict.fromkeys((g, w if g else 0) for g, w in product(s.gamma, s.window)))


def evaluated(s: SweepSettings, gamma: float, window: int, seed: int) -> dict[int, np.ndarray]:
    """Train and evaluate, as far as that is not done: by step accuracy (%) and length [2], means over
    the data files."""
    run = s.out / f"gamma-{gamma:g}-W-{window}-seed{seed}"
    point = ["--gamma", f"{gamma:g}", "--window", str(window), "--seed", str(seed)]
    start(s, "train.py", run, [*shlex.split(s.train), *point])
    trained = json.loads((run / "config.json").read_text())["settings"]
    named = []
    for step in [*range(0, trained["steps"], trained["checkpoint_every"])[1:], trained["steps"]]:
        adapter = run / "checkpoints" / f"step-{step:06d}" / "adapter"
        named += ["--model", trained["model"], "--adapter", str(adapter)]
    start(s, "eval.py", run / "test", [*named, *shlex.split(s.test)])
    found = defaultdict(list)
    for result in json.loads((run / "test" / "results.json").read_text())["results"]:
        step = int(Path(result["checkpoint"]).parent.name.removeprefix("step-"))
        found[step].append((100 * result["avg"], result["length"]))
    return {step: np.mean(values, axis=0) for step, values in found.items()}


def start(s, script, out, given):
    """Run a script into `out`, or go on with it; what it prints goes into a file beside `out`."""
    log = out.with_name(f"{out.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    launch = shlex.split(s.launch) or [sys.executable]
    command = [*launch, script, *given, "--out", str(out), "--resume", "auto"]
    with log.open("a") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        code = process.wait()
    if code:
        raise InputError(f"{log}: {script} ended with code {code}")


def draw(means: dict[tuple, np.ndarray], s: SweepSettings, last: int) -> None:
    """Heat maps of the snapshot `last`. The row of gamma = 0 has the same value for every W."""
    plt = import_extra("matplotlib.pyplot")
    figure, panels = plt.subplots(1, 2, figsize=(8.3, 3.4), layout="constrained")
    for k, name, colors in (0, "accuracy, %", "Blues"), (1, "mean length, tokens", "Blues_r"):
        cells = [[means[g, w if g else 0, last][k] for w in s.window] for g in s.gamma]
        panels[k].imshow(cells, colors, aspect="auto", alpha=0.7)
        for (y, x), value in np.ndenumerate(cells):
            panels[k].text(x, y, f"{value:.1f}", ha="center")
        panels[k].set_xticks(range(len(s.window)), s.window)
        panels[k].set_yticks(range(len(s.gamma)), s.gamma)
        panels[k].set(title=f"{name}, step {last}", xlabel="lookahead W", ylabel="gamma")
    figure.savefig(s.out / "sweep.png", dpi=150)


def sweep(s: SweepSettings) -> None:
    """All runs, then the table and the picture."""
    import_extra("matplotlib.pyplot")  # better missing here than after hours
    found = defaultdict(list)  # of each seed, by gamma, W and step
    for seed, point in tqdm(
        list(product(dict.fromkeys(s.seeds), grid(s))), desc="runs", unit=" runs"
    ):
        for step, values in evaluated(s, *point, seed).items():
            found[*point, step].append(values)
    lines = []
    for (gamma, window, step), seeds in found.items():
        accuracy, length = np.mean(seeds, axis=0)
        single = ", ".join(f"{values[0]:.1f}" for values in seeds)
        lines.append(
            [f"{gamma:g}", f"{window}", f"{step}", f"{accuracy:.1f}", f"{length:.1f}", single]
        )
    head = ["gamma", "W", "step", "accuracy", "length", "accuracy of the seeds"]
    print(markdown(f"| {' | '.join(head)} |", lines))
    command = f"{PROGRAM} {shlex.join(sys.argv[1:])}".strip()
    rows = [dict(zip(head, line, strict=True)) for line in lines]
    write_json(s.out / "sweep.json", {"command": command, "rows": rows})
    means = {place: np.mean(seeds, axis=0) for place, seeds in found.items()}
    draw(means, s, max(step for *_, step in found))
    print(f"\nin {s.out}: sweep.json, sweep.png")


def main() -> None:
    with one_line_errors(PROGRAM, "stopped; the same command goes on"):
        sweep(parse(SweepSettings, sys.argv[1:], __doc__))


if __name__ == "__main__":
    main()
