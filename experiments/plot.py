"""Pictures of results/compare.json, the output of experiments.compare, and how well
experiments.gradients foretold it.

    pip install -r experiments/requirements.txt && python -m experiments.plot

    frontier.png     every row at its mean length and accuracy on the test problems, with 95 % intervals over seeds in
                     both; up and to the left is better; rows with less than half of the accuracy without training
                     are only named
    curves.png       accuracy and length of a few rows' rollouts by update, mean over seeds with 95 % intervals,
                     smoothed over five updates; names in the order of the lines' ends
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

from experiments.compare import import_extra, interval, markdown
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
COLORS = {name: f"C{k}" for k, name in enumerate(CURVES)}
PLACES = {  # of names in frontier.png, in points to the right of their row and above it
    "no training": (-14, 11),
    "sft": (8, 4),
    "topk-opd": (40, -18),
    "grpo": (10, 8),
    "direction-aware": (-62, 46),
    "egrsd": (8, 60),
    "cl-egrsd": (-70, -22),
    "gamma 3.0 W 0": (20, 42),
    "gamma 3.0 W 3": (-24, 14),
    "gamma 1.0 W 0, eps 0.8": (38, 24),
    "rlrt": (8, 4),
    "sdpo": (8, 4),
    "stable-opd": (8, 4),
    "opsd": (-38, -4),
}
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


def draw_methods(axes, rows):
    failed = []
    for name, row in rows.items():
        x, y = row["length"], row["accuracy"]
        if y["mean"] < rows["no training"]["accuracy"]["mean"] / 2:
            failed.append(name)
            continue
        point = x["mean"], y["mean"]
        color = COLORS.get(name, "black" if name in PLACES else "0.75")
        style = {"color": color, "elinewidth": 1, "zorder": 2 + (name in PLACES)}
        axes.errorbar(*point, y["half_width"], x["half_width"], "o", **style)
        if name in PLACES:
            line = {"arrowstyle": "-", "color": color}
            axes.annotate(name, point, PLACES[name], "data", "offset points", line, color=color)
    axes.set(
        title=f"Not shown, less than half as accurate as no training: {', '.join(failed)}",
        xlabel="mean length of completions, tokens",
        ylabel="accuracy on held-out problems",
    )


def draw_curves(curves, path, names=CURVES):
    """Accuracy and length of the rollouts by update. Of a row with several runs: their mean, with a
    95 % interval."""
    plt = import_extra("matplotlib.pyplot")
    figure, panels = plt.subplots(2, 1, figsize=(8.3, 7), layout="constrained")
    for axes, measure, unit in zip(panels, ("accuracy", "length"), ("", ", tokens"), strict=True):
        for name in names:
            # update t shows the mean of updates t - 4 to t
            runs = [run[measure] for run in curves[name]]
            runs = np.lib.stride_tricks.sliding_window_view(runs, 5, axis=1).mean(2)
            mean = runs.mean(0)
            half = [interval(values)["half_width"] or 0 for values in runs.T]
            updates = range(5, len(mean) + 5)
            axes.plot(updates, mean, label=name)
            axes.fill_between(updates, mean - half, mean + half, alpha=0.15, linewidth=0)
        axes.set(xlabel="update", ylabel=f"{measure} of the rollouts{unit}")
        lines = sorted(axes.lines, key=lambda line: -line.get_ydata()[-1])
        place = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "frameon": False}
        axes.legend(handles=lines, labelcolor="linecolor", handlelength=1, **place)
    figure.savefig(path, dpi=200)


def draw(s):
    plt = import_extra("matplotlib.pyplot")
    results = json.loads(s.results.read_text())
    gradients = {}
    for time in TIMES:
        path = s.results.with_name(f"gradients_{time}.json")
        gradients[time] = json.loads(path.read_text())
    names, said, trained = shared_rows(results, gradients)
    print(correlation_tables(names, said, trained))

    figure, axes = plt.subplots(figsize=(8.3, 6), layout="constrained")
    draw_methods(axes, results["rows"])
    figure.savefig(s.out / "frontier.png", dpi=200)

    draw_curves(results["curves"], s.out / "curves.png")

    figure, panels = plt.subplots(2, 2, figsize=(8.3, 8), layout="constrained")
    halves = np.array_split(trained, 2, axis=3)
    foretold = ("alignment", 0, "accuracy"), ("shorter", 2, "length")
    for axes, (half, (key, area, measure)) in zip(
        panels.flat, product((0, 1), foretold), strict=True
    ):
        runs = halves[half][:, :, area].mean(2)  # [rows, seeds]
        error = import_extra("scipy.stats").sem(runs, axis=1)
        x = said["start", key]
        for name, *point in zip(names, x, runs.mean(1), error, strict=True):
            named = name in COLORS
            style = {"color": COLORS.get(name, "0.7"), "zorder": 2 + named}
            axes.errorbar(*point, fmt="o", label=name if named else None, **style)
        axes.set(
            xlabel=f"{key}, at the start", ylabel=f"mean {measure}, half {half + 1} of the updates"
        )
    figure.legend(*axes.get_legend_handles_labels(), ncols=4, loc="outside upper center")
    figure.savefig(s.out / "alignment.png", dpi=200)
    print(f"frontier.png, curves.png and alignment.png are in {s.out}")


def main() -> None:
    with one_line_errors(PROGRAM, "stopped"):
        draw(parse(PlotSettings, sys.argv[1:], __doc__))


if __name__ == "__main__":
    main()
