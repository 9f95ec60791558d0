"""Pictures of results/compare.json, the output of experiments.compare, and how well
experiments.gradients foretold it.

    pip install -r experiments/requirements.txt && python -m experiments.plot

    frontier.png     every row at its mean length and accuracy on the test problems, with 95 % intervals over seeds in
                     both; up and to the left is better
    curves.png       accuracy and length of a few rows' rollouts by update, mean over seeds, smoothed over five updates
    alignment.png    the rows that both experiments know, with all seeds: what gradients_start.json says of them, and
                     the mean over each half of the updates, with standard errors

Rank correlations (Spearman) are printed, with 95 % intervals by a bootstrap over these rows and
seeds. "all" is the mean of gradients_start.json, gradients_middle.json and gradients_end.json.
"""

import json
import sys
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np

from experiments.compare import import_extra, markdown
from support.flags import flag, parse
from support.run import one_line_errors

PROGRAM = "python -m experiments.plot"
CURVES = (
    "grpo",
    "direction-aware",
    "egrsd",
    "cl-egrsd",
    "gamma 3.0 W 0",
    "gamma 3.0 W 3",
    "gamma 1.0 W 0, eps 0.8",
)
TIMES = ("start", "middle", "end")
PREDICTORS = ("alignment", "sign", "shorter", "momentum", "bias")
AREAS = ("accuracy", "reward", "length")


@dataclass
class PlotSettings:
    """The command line."""

    results: Path = flag(Path("results/compare.json"), "output of experiments.compare")
    out: Path = flag(Path("results"), "directory for the pictures")


# ---- rank correlations


def shared_rows(results: dict, gradients: dict) -> tuple[list, dict, np.ndarray]:
    """Of the rows that both experiments know, if they were trained with all seeds: names; what the
    gradients say, [rows] by (time, column); what training gave, [rows, seeds, areas, updates]."""
    take = itemgetter(*AREAS)
    names = []
    trained = []
    for name in gradients["start"]["rows"]:
        row = results["rows"].get(name, {})
        if row.get("seeds") == results["settings"]["seeds"]:
            names.append(name)
            trained.append([take(curves) for curves in results["curves"][name]])
    said = {}
    for key in PREDICTORS:
        for time in TIMES:
            rows = gradients[time]["rows"]
            said[time, key] = np.array([rows[name][key][0] for name in names])
        said["all", key] = np.mean([said[time, key] for time in TIMES], axis=0)
    return names, said, np.array(trained)


def correlations(x: np.ndarray, y: np.ndarray, resamples: int) -> list[str]:
    """x [rows], y [rows, seeds, areas] -> by area Spearman's of x and the mean over seeds, with its
    95 % interval."""
    rng = np.random.default_rng(0)
    rows, seeds, _ = y.shape
    xs = [x]
    means = [y.mean(1)]
    for _ in range(resamples):
        i = rng.integers(rows, size=rows)
        j = rng.integers(seeds, size=seeds)
        xs.append(x[i])
        means.append(y[i][:, j].mean(1))
    xs = np.round(xs, 9)  # equal means must be ties
    means = np.round(means, 9)
    stats = import_extra("scipy.stats")
    rho = stats.spearmanrho(xs[:, :, None], means, axis=1).statistic  # [1 + resamples, areas]
    rho = np.nan_to_num(rho)  # 0 if all values are equal
    low, high = np.quantile(rho[1:], [0.025, 0.975], axis=0)
    cells = []
    for area in zip(rho[0], low, high, strict=True):
        cells.append("{:+.2f} [{:+.2f}, {:+.2f}]".format(*area))
    return cells


def correlation_tables(names: list, said: dict, trained: np.ndarray, resamples: int = 2000) -> str:
    """Two tables as markdown, from `shared_rows`: the start of the gradients with parts of the runs,
    and all times with whole runs."""
    with_magnitude = []
    for k, name in enumerate(names):
        if name not in ("grpo", "magnitude off") and not name.endswith("eps 0"):
            with_magnitude.append(k)
    steps = trained.shape[3]
    half = steps // 2
    parts = []
    for group, kept in ("all", slice(None)), ("with magnitude", with_magnitude):
        for start, stop in (0, half), (half, steps), (0, steps):
            mean = trained[kept, :, :, start:stop].mean(3)
            for key in PREDICTORS[:3]:
                cells = correlations(said["start", key][kept], mean, resamples)
                parts.append([group, f"{start + 1} to {stop}", key, *cells])
    whole = []
    whole_run = trained.mean(3)
    for time in (*TIMES, "all"):
        for key in PREDICTORS:
            cells = correlations(said[time, key], whole_run, resamples)
            whole.append([time, key, *cells])
    first = markdown("| rows | updates | column | accuracy | reward | length |", parts)
    second = markdown("| gradients | column | accuracy | reward | length |", whole)
    return f"{first}\n\n{second}"


# ---- pictures


def draw_methods(axes, results: dict) -> None:
    for k, (name, row) in enumerate(results["rows"].items()):
        length = row["length"]
        accuracy = row["accuracy"]
        mark = "os^D"[k % 4]
        axes.errorbar(
            length["mean"],
            accuracy["mean"],
            accuracy["half_width"],
            length["half_width"],
            mark,
            color=f"C{k % 10}",
            label=name,
        )
    axes.set_title("The toy: 95 % intervals over seeds")
    axes.set(xlabel="mean length of completions, tokens", ylabel="accuracy on held-out problems")
    axes.legend(fontsize=8, ncols=2, bbox_to_anchor=(1.01, 1), loc="upper left", frameon=False)


def draw_curves(axes, results: dict, measure: str, label: str) -> None:
    for name in CURVES:
        runs = results["curves"].get(name)
        if runs:
            mean = np.mean([curves[measure] for curves in runs], axis=0)  # over seeds
            # update t shows the mean of updates t - 4 to t
            smooth = np.convolve(mean, np.full(5, 1 / 5), "valid")
            updates = range(5, len(mean) + 1)
            axes.plot(updates, smooth, label=name)
    axes.set(xlabel="update", ylabel=label)
    axes.legend(fontsize=8, frameon=False)


def draw_foretold(axes, names: list, x: np.ndarray, y: np.ndarray) -> None:
    """x [rows], y [rows, seeds], with names beside the points."""
    mean = y.mean(1)
    error = y.std(1, ddof=1) / y.shape[1] ** 0.5
    axes.errorbar(x, mean, yerr=error, fmt="o", markersize=4)
    axes.margins(x=0.25)  # room for the names
    for k, name in enumerate(names):
        axes.annotate(name, (x[k], mean[k]), (3, 3), textcoords="offset points", fontsize=5)


def draw(s: PlotSettings) -> None:
    plt = import_extra("matplotlib.pyplot")
    results = json.loads(s.results.read_text())
    gradients = {}
    for time in TIMES:
        path = s.results.with_name(f"gradients_{time}.json")
        gradients[time] = json.loads(path.read_text())
    names, said, trained = shared_rows(results, gradients)
    print(correlation_tables(names, said, trained), flush=True)

    figure, axes = plt.subplots(figsize=(13, 6), layout="constrained")
    draw_methods(axes, results)
    figure.savefig(s.out / "frontier.png", dpi=150)

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    draw_curves(left, results, "accuracy", "accuracy of the rollouts")
    draw_curves(right, results, "length", "mean length of the rollouts, tokens")
    figure.savefig(s.out / "curves.png", dpi=150)

    figure, panels = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
    half = trained.shape[3] // 2
    for row, part in enumerate(np.split(trained, [half], axis=3)):
        accuracy, _, length = part.mean(3).transpose(2, 0, 1)  # [rows, seeds] each
        draw_foretold(panels[row, 0], names, said["start", "alignment"], accuracy)
        draw_foretold(panels[row, 1], names, said["start", "shorter"], length)
        shown = f"half {row + 1} of the updates"
        panels[row, 0].set(xlabel="alignment, at the start", ylabel=f"mean accuracy, {shown}")
        panels[row, 1].set(xlabel="shorter, at the start", ylabel=f"mean length, {shown}")
    figure.savefig(s.out / "alignment.png", dpi=150)
    print(f"frontier.png, curves.png and alignment.png are in {s.out}", flush=True)


def main() -> None:
    with one_line_errors(PROGRAM, "stopped"):
        draw(parse(PlotSettings, sys.argv[1:], __doc__))


if __name__ == "__main__":
    main()
