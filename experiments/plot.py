"""Pictures of results/compare.json, the output of experiments.compare, and how well
experiments.gradients foretold it.

    pip install matplotlib && python -m experiments.plot

frontier.png: every row at its mean length and accuracy on the test problems, with 95 % intervals
over seeds in both; up and to the left is better. curves.png: accuracy and length of a few rows'
rollouts by update, mean over seeds, smoothed over five updates. alignment.png: the rows that both
experiments know, with all seeds, by what gradients_start.json says of them and by the mean over
each half of the updates, with standard errors. The rank correlations (Spearman) are printed, with
95 % intervals by a bootstrap over these rows and seeds; "all" is the mean of gradients_start.json,
gradients_middle.json and gradients_end.json.
"""

import json
from pathlib import Path

import numpy as np

from support.errors import DAMAGED, InputError, reason
from support.flags import Parser, nonempty_path
from support.run import one_line_errors, say

PROGRAM = "python -m experiments.plot"
RESULTS = Path("results")
CURVES = (
    "grpo",
    "direction-aware",
    "egrsd",
    "cl-egrsd",
    "gamma 3.0 W 0",
    "gamma 3.0 W 3",
    "gamma 1.0 W 0, eps 0.8",
)
TIMES, PREDICTORS = ("start", "middle", "end"), ("alignment", "sign", "shorter", "momentum", "bias")
AREAS = ("accuracy", "reward", "length")


def draw_methods(axes, results: dict) -> None:
    for k, (name, row) in enumerate(results["rows"].items()):
        x, y = row["length"], row["accuracy"]
        axes.errorbar(
            x["mean"],
            100 * y["mean"],
            xerr=x["half_width"],
            yerr=100 * (y["half_width"] or 0),
            label=name,
            fmt="os^D"[k % 4],
            color=f"C{k % 10}",
            capsize=2,
            markersize=6,
            linewidth=1,
        )
    axes.set(xlabel="mean length of completions, tokens", ylabel="accuracy on held-out problems, %")
    axes.set_title(
        "The toy: {steps} updates of {completions} rollouts, 95 % intervals over seeds".format(
            **results["settings"]
        ),
        fontsize=10,
    )
    axes.legend(
        fontsize=8,
        ncols=1 + len(results["rows"]) // 25,
        bbox_to_anchor=(1.01, 1),
        loc="upper left",
        frameon=False,
    )


def draw_curves(axes, results: dict, measure: str, label: str, scale: float) -> None:
    for name in CURVES:
        curves = [curve[measure] for curve in results["curves"].get(name, []) if measure in curve]
        if curves:
            mean = scale * np.mean(curves, axis=0)  # over seeds
            smooth = [mean[max(0, t - 4) : t + 1].mean() for t in range(len(mean))]
            axes.plot(range(1, len(mean) + 1), smooth, label=name, linewidth=1.4)
    axes.set(xlabel="update", ylabel=label)


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation, ties with their mean rank.

    >>> round(spearman(np.array([1, 2, 3, 4]), np.array([10, 30, 20, 40])), 3)
    0.8
    """
    # ranks, times two
    x, y = ((v[:, None] > v).sum(1) + (v[:, None] >= v).sum(1) for v in (x.round(9), y.round(9)))
    return float(np.corrcoef(x, y)[0, 1]) if len({*x}) > 1 < len({*y}) else 0.0


def correlation(x: np.ndarray, y: np.ndarray, resamples: int) -> str:
    """x [rows], y [rows, seeds] -> Spearman's of x and the mean over seeds, with its 95 %
    interval."""
    rng, (rows, seeds) = np.random.default_rng(0), y.shape
    draws = [
        (rng.integers(rows, size=rows), rng.integers(seeds, size=seeds)) for _ in range(resamples)
    ]
    low, high = np.quantile([spearman(x[i], y[i][:, j].mean(1)) for i, j in draws], [0.025, 0.975])
    return f"{spearman(x, y.mean(1)):+.2f} [{low:+.2f}, {high:+.2f}]"


def foretold(results: dict, gradients: dict[str, dict], resamples: int = 2000) -> tuple[dict, str]:
    """What gradients say and training gave, [rows] and [rows, seeds, updates], and their rank
    correlations as markdown: of the start with parts of the runs, and of all times with whole
    runs."""
    names = [
        name
        for name in gradients["start"]["rows"]
        if results["rows"].get(name, {}).get("seeds") == results["settings"]["seeds"]
    ]
    values = {"names": names} | {
        area: np.array([[curve[area] for curve in results["curves"][name]] for name in names])
        for area in AREAS
    }
    values |= {
        (time, key): np.array([file["rows"][name][key][0] for name in names], dtype=float)
        for time, file in gradients.items()
        for key in PREDICTORS
    }
    values |= {
        ("all", key): np.mean([values[time, key] for time in gradients], axis=0)
        for key in PREDICTORS
    }

    def line(*head: str, x: np.ndarray, kept: list[int], updates: slice) -> str:
        cells = [
            correlation(x[kept], values[area][kept][:, :, updates].mean(2), resamples)
            for area in AREAS
        ]
        return f"| {' | '.join([*head, *cells])} |"

    every, last = [*range(len(names))], values["reward"].shape[2]
    clipped = [
        k
        for k in every
        if names[k] not in ("grpo", "magnitude off") and not names[k].endswith("eps 0")
    ]
    lines = ["| rows | updates | column | accuracy | reward | length |", "|---" * 6 + "|"]
    lines += [
        line(
            rows,
            f"{part.start + 1} to {part.stop}",
            key,
            x=values["start", key],
            kept=kept,
            updates=part,
        )
        for rows, kept in (("all", every), ("with magnitude", clipped))
        for part in (slice(0, last // 2), slice(last // 2, last), slice(0, last))
        for key in PREDICTORS[:3]
    ]
    lines += ["", "| gradients | column | accuracy | reward | length |", "|---" * 5 + "|"]
    lines += [
        line(time, key, x=values[time, key], kept=every, updates=slice(None))
        for time in (*gradients, "all")
        for key in PREDICTORS
    ]
    return values, "\n".join(lines)


def draw_foretold(axes, values: dict, key: str, area: str, updates: slice) -> None:
    x, y = values["start", key], values[area][:, :, updates].mean(2)
    axes.errorbar(
        x, y.mean(1), yerr=y.std(1, ddof=1) / y.shape[1] ** 0.5, fmt="o", markersize=4, linewidth=1
    )
    for name, *place in zip(values["names"], x, y.mean(1), strict=True):
        offset, side = (-3, "right") if place[0] > (x.min() + x.max()) / 2 else (3, "left")
        axes.annotate(
            name,
            place,
            (offset, 3),
            fontsize=5,
            textcoords="offset points",
            horizontalalignment=side,
        )
    axes.set(
        xlabel=f"{key}, at the start",
        ylabel=f"mean {area}, updates {updates.start + 1} to {updates.stop}",
    )


def load(path: Path, maker: str) -> dict:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, *DAMAGED) as error:
        raise InputError(
            f"{path}: cannot be read ({reason(error)}): make it with experiments.{maker}"
        ) from None


def draw(a) -> None:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise InputError(
            "matplotlib is missing: pip install matplotlib (nothing else here needs it)"
        ) from None
    results = load(a.results, "compare")
    gradients = {
        time: load(a.results.with_name(f"gradients_{time}.json"), "gradients") for time in TIMES
    }
    values, table = foretold(results, gradients)
    plt.rcParams |= {
        "axes.grid": True,
        "grid.alpha": 0.25,
        "savefig.dpi": 150,
        "savefig.bbox": "tight",
    }
    figure, axes = plt.subplots(figsize=(8.5, 5.5))
    draw_methods(axes, results)
    figure.savefig(a.out / "frontier.png")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    draw_curves(left, results, "accuracy", "accuracy of the rollouts, %", 100)
    draw_curves(right, results, "length", "mean length of the rollouts, tokens", 1)
    right.legend(fontsize=8, frameon=False)
    figure.savefig(a.out / "curves.png")
    figure, grid = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
    steps = results["settings"]["steps"]
    for row, updates in zip(grid, (slice(0, steps // 2), slice(steps // 2, steps)), strict=True):
        draw_foretold(row[0], values, "alignment", "accuracy", updates)
        draw_foretold(row[1], values, "shorter", "length", updates)
    figure.savefig(a.out / "alignment.png")
    say(
        f"{table}\n\n"
        + "\n".join(str(a.out / f"{name}.png") for name in ("frontier", "curves", "alignment"))
    )


def main() -> None:
    parser = Parser(__doc__, prog=PROGRAM)
    add, results = parser.add_argument, RESULTS / "compare.json"
    add("--results", type=nonempty_path, default=results, help="output of experiments.compare")
    add("--out", type=nonempty_path, default=RESULTS, help="directory for the pictures")
    with one_line_errors(PROGRAM, "stopped"):
        a = parser.parse_args()
        try:
            draw(a)
        except DAMAGED as error:
            raise InputError(
                f"{a.results}: its rows do not go together with those of the gradients beside it "
                f"({reason(error)}): make all of them with the code as it is"
            ) from None


if __name__ == "__main__":
    main()
