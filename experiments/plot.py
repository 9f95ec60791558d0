"""Pictures of results/compare.json, the output of experiments.compare: all methods, and training curves.

    pip install matplotlib && python -m experiments.plot

frontier.png: every method at its mean length and accuracy on the test problems, with 95 % intervals over seeds in
both; up and to the left is better.
curves.png: accuracy and length of a few methods' rollouts by update, mean over seeds, smoothed over five updates.
"""

import json
from pathlib import Path

import numpy as np

from support.errors import DAMAGED, InputError, reason
from support.flags import Parser, nonempty_path
from support.run import one_line_errors, say

PROGRAM = "python -m experiments.plot"
RESULTS = Path("results")
CURVES = ("egrsd", "cl-egrsd", "direction-aware", "grpo", "rlsd", "vopd", "topk-opd", "sdpo")


def draw_methods(axes, results: dict) -> None:
    rows = {name: row for name, row in results["rows"].items() if name in ("no training", *results["methods"])}
    for k, (name, row) in enumerate(rows.items()):
        x, y = row["length"], row["accuracy"]
        axes.errorbar(x["mean"], 100 * y["mean"], xerr=x["half_width"], yerr=100 * (y["half_width"] or 0), label=name,
                      fmt="os^D"[k % 4], color=f"C{k % 10}", capsize=2, markersize=6, linewidth=1)
    axes.set(xlabel="mean length of completions, tokens", ylabel="accuracy on held-out problems, %")
    axes.set_title("The toy: {steps} updates of {completions} rollouts, {} seeds, 95 % intervals".format(
        len(results["settings"]["seeds"]), **results["settings"]), fontsize=10)
    axes.legend(fontsize=8, bbox_to_anchor=(1.01, 1), loc="upper left", frameon=False)


def draw_curves(axes, results: dict, measure: str, label: str, scale: float) -> None:
    for name in CURVES:
        curves = [curve[measure] for curve in results["curves"].get(name, []) if measure in curve]
        if curves:
            mean = scale * np.mean(curves, axis=0)  # over seeds
            smooth = [mean[max(0, t - 4):t + 1].mean() for t in range(len(mean))]
            axes.plot(range(1, len(mean) + 1), smooth, label=name, linewidth=1.4)
    axes.set(xlabel="update", ylabel=label)


def draw(a) -> None:
    try:
        import matplotlib.pyplot as plt
        results = json.loads(a.results.read_text())
    except ImportError:
        raise InputError("matplotlib is missing: pip install matplotlib (nothing else here needs it)") from None
    except OSError as error:
        raise InputError(f"{a.results}: cannot be read ({reason(error)}): run experiments.compare first") from None
    plt.rcParams |= {"axes.grid": True, "grid.alpha": 0.25, "savefig.dpi": 150, "savefig.bbox": "tight"}
    figure, axes = plt.subplots(figsize=(8.5, 5.5))
    draw_methods(axes, results)
    figure.savefig(a.out / "frontier.png")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    draw_curves(left, results, "accuracy", "accuracy of the rollouts, %", 100)
    draw_curves(right, results, "length", "mean length of the rollouts, tokens", 1)
    right.legend(fontsize=8, frameon=False)
    figure.savefig(a.out / "curves.png")
    say(f"{a.out / 'frontier.png'}\n{a.out / 'curves.png'}")


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
            raise InputError(f"{a.results}: no results of experiments.compare ({reason(error)})") from None


if __name__ == "__main__":
    main()
