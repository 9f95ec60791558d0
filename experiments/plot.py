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
from itertools import product
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
WITHOUT_MAGNITUDE = ("grpo", "magnitude off", "gamma 1.0 W 0, eps 0")
TIMES = ("start", "middle", "end")
PREDICTORS = ("alignment", "sign", "shorter", "momentum", "bias")


@dataclass
class PlotSettings:
    """The command line."""

    results: Path = flag(Path("results/compare.json"), "output of experiments.compare")
    out: Path = flag(Path("results"), "directory for the pictures")


# ---- rank correlations


def shared_rows(results, gradients):
    """Of the rows that both experiments know, if they were trained with all seeds: names; what the
    gradients say, [rows] by (time, column); what training gave, [rows, seeds, areas, updates]."""
    areas = itemgetter("accuracy", "reward", "length")
    names = []
    trained = []
    for name in gradients["start"]["rows"]:
        runs = results["curves"].get(name, [])
        if len(runs) == len(results["settings"]["seeds"]):
            names.append(name)
            trained.append(list(map(areas, runs)))
    said = {}
    for time, key in product(TIMES, PREDICTORS):
        said[time, key] = np.array([gradients[time]["rows"][name][key][0] for name in names])
    for key in PREDICTORS:
        said["all", key] = np.mean([said[time, key] for time in TIMES], axis=0)
    return names, said, np.array(trained)


def correlations(x, y, resamples):
    """x [rows], y [rows, seeds, areas] -> by area Spearman's of x and the mean over seeds, with its
    95 % interval, as text."""
    rng = np.random.default_rng(0)
    xs = [x]
    means = [y.mean(1)]
    for _ in range(resamples):
        rows = rng.integers(len(x), size=len(x))
        seeds = rng.integers(y.shape[1], size=y.shape[1])
        xs.append(x[rows])
        means.append(y[rows][:, seeds].mean(1))
    xs = np.expand_dims(xs, 2)
    means = np.round(means, 9)  # equal means must be ties
    rho = import_extra("scipy.stats").spearmanrho(xs, means, axis=1).statistic
    rho = np.nan_to_num(rho)  # [1 + resamples, areas], 0 if all values are equal
    low, high = np.quantile(rho[1:], [0.025, 0.975], axis=0)
    found = zip(rho[0], low, high, strict=True)
    return ["{:+.2f} [{:+.2f}, {:+.2f}]".format(*area) for area in found]


def correlation_tables(names, said, trained, resamples=2000):
    """Two tables as markdown, from `shared_rows`: the start of the gradients with parts of the runs,
    and all times with whole runs."""
    with_magnitude = [k for k, name in enumerate(names) if name not in WITHOUT_MAGNITUDE]
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
    for (time, key), values in said.items():
        whole.append([time, key, *correlations(values, trained.mean(3), resamples)])
    tables = [
        markdown("| rows | updates | column | accuracy | reward | length |", parts),
        markdown("| gradients | column | accuracy | reward | length |", whole),
    ]
    return "\n\n".join(tables)


# ---- pictures


def draw_methods(axes, results):
    for k, (name, row) in enumerate(results["rows"].items()):
        axes.errorbar(
            row["length"]["mean"],
            row["accuracy"]["mean"],
            row["accuracy"]["half_width"],
            row["length"]["half_width"],
            "os^D"[k % 4],
            label=name,
        )
    axes.set(
        title="The toy: 95 % intervals over seeds",
        xlabel="mean length of completions, tokens",
        ylabel="accuracy on held-out problems",
    )
    axes.legend(fontsize=8, ncols=2, bbox_to_anchor=(1.01, 1), loc="upper left", frameon=False)


def draw_curves(axes, results, measure, label, names=CURVES):
    for name in names:
        mean = np.mean([curves[measure] for curves in results["curves"][name]], axis=0)
        # update t shows the mean of updates t - 4 to t
        smooth = np.convolve(mean, np.full(5, 1 / 5), "valid")
        axes.plot(range(5, len(mean) + 1), smooth, label=name)
    axes.set(xlabel="update", ylabel=label)
    axes.legend(fontsize=8, frameon=False)


def draw_foretold(axes, names, said, key, trained, label):
    """said [rows] at the start against trained [rows, seeds], with names beside the points."""
    x = said["start", key]
    y = trained.mean(1)
    error = import_extra("scipy.stats").sem(trained, axis=1)
    axes.errorbar(x, y, error, fmt="o", markersize=4)
    axes.margins(x=0.25)  # room for the names
    for name, *point in zip(names, x, y, strict=True):
        axes.annotate(name, point, (3, 3), textcoords="offset points", fontsize=5)
    axes.set(xlabel=f"{key}, at the start", ylabel=label)


def draw(s):
    plt = import_extra("matplotlib.pyplot")
    results = json.loads(s.results.read_text())
    gradients = {}
    for time in TIMES:
        path = s.results.with_name(f"gradients_{time}.json")
        gradients[time] = json.loads(path.read_text())
    names, said, trained = shared_rows(results, gradients)
    print(correlation_tables(names, said, trained))

    figure, axes = plt.subplots(figsize=(13, 6), layout="constrained")
    draw_methods(axes, results)
    figure.savefig(s.out / "frontier.png", dpi=150)

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    draw_curves(left, results, "accuracy", "accuracy of the rollouts")
    draw_curves(right, results, "length", "mean length of the rollouts, tokens")
    figure.savefig(s.out / "curves.png", dpi=150)

    figure, panels = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
    halves = np.array_split(trained, 2, axis=3)
    for row, (left, right) in enumerate(panels):
        accuracy, _, length = halves[row].mean(3).transpose(2, 0, 1)  # [rows, seeds] each
        shown = f"half {row + 1} of the updates"
        draw_foretold(left, names, said, "alignment", accuracy, f"mean accuracy, {shown}")
        draw_foretold(right, names, said, "shorter", length, f"mean length, {shown}")
    figure.savefig(s.out / "alignment.png", dpi=150)
    print(f"frontier.png, curves.png and alignment.png are in {s.out}")


def main() -> None:
    with one_line_errors(PROGRAM, "stopped"):
        draw(parse(PlotSettings, sys.argv[1:], __doc__))


if __name__ == "__main__":
    main()
