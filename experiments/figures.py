"""Two pictures that arXiv 2605.13255 has, of any files of ours.

python -m experiments.figures runs/eval-4b/results.json runs/eval-8b/results.json --out frontier.png
    Evaluations of eval.py. Every checkpoint at its mean length and accuracy, each the mean over its data files,
    with 95 % intervals over problems (Fig. 1). A line joins the checkpoints that no other one beats. The same is
    printed as a table.
python -m experiments.figures runs/look/diagnostics.json --out deciles.png
    What experiments.diagnostics wrote: |log p_T - log p_S| and both gates in ten parts of the tokens by H, and
    what the lookahead changes in the four regimes (Fig. 4).
"""

from collections import defaultdict
from pathlib import Path

import numpy as np

from experiments.compare import import_extra, markdown
from support.errors import InputError
from support.flags import Parser, nonempty_path
from support.report import parsed
from support.run import one_line_errors

PROGRAM = "python -m experiments.figures"


def checkpoints(files: list[dict]) -> dict[str, tuple]:
    """By checkpoint: mean length, accuracy in % and half of its interval, means over data files."""
    found = defaultdict(list)
    for file in files:
        for result in file["results"]:
            found[result["checkpoint"]].append(result)
    points = {}
    sets = {tuple(sorted(result["data"] for result in results)) for results in found.values()}
    if len(sets) != 1 or len(set(*sets)) < len(*sets):
        raise InputError("the checkpoints were not all evaluated once on each data file")
    for name, results in found.items():
        if any(result["length"] is None for result in results):
            raise InputError(f"{name}: an evaluation without lengths (--from without tokens)")
        half_widths = [(result["high"] - result["low"]) / 2 for result in results]
        points[name] = (
            float(np.mean([result["length"] for result in results])),
            100 * float(np.mean([result["avg"] for result in results])),
            100 * float(np.linalg.norm(half_widths)) / len(results),  # the files are independent
        )
    return points


def unbeaten(points: dict[str, tuple]) -> list[str]:
    """The checkpoints such that no other one is shorter and as accurate, or as short and more
    accurate; the shortest first."""

    def beats(a, b):
        return a[0] <= b[0] and a[1] >= b[1] and a[:2] != b[:2]

    found = [n for n, own in points.items() if not any(beats(p, own) for p in points.values())]
    return sorted(found, key=points.get)


def draw_frontier(figure, points):
    axes = figure.subplots()
    front = unbeaten(points)
    axes.plot(*np.transpose([points[name][:2] for name in front]), color="0.8", zorder=0)
    for number, (name, (length, accuracy, half_width)) in enumerate(points.items()):
        label = "/".join(Path(name).parts[-4:])
        axes.errorbar(length, accuracy, half_width, fmt="os^Dv"[number % 5], label=label)
    axes.set(xlabel="mean length, tokens", ylabel="accuracy, %")
    figure.legend(loc="outside right center", frameon=False)


def frontier_table(points):
    front = unbeaten(points)
    lines = []
    for name, (length, accuracy, half_width) in points.items():
        efficiency = 1000 * accuracy / length
        cells = [f"{accuracy:.1f} ± {half_width:.1f}", f"{length:.1f}", f"{efficiency:.2f}"]
        lines.append([name, *cells, "yes" if name in front else ""])
    return markdown("| checkpoint | accuracy % | mean length | Eff | on the frontier |", lines)


def draw_deciles(figure, found):
    left, right = figure.subplots(1, 2)
    tenths = np.arange(1, 11)
    for key, label in (("gate", "gate, EGRSD"), ("cl_gate", "gate, CL-EGRSD"), ("|d|", "|d|")):
        left.plot(tenths, [part[key] for part in found["deciles"]], "o-", label=label)
    left.set(xlabel="tenth of the tokens by H", ylabel="mean", ylim=(0, None), xticks=tenths)
    left.legend(frameon=False)
    regimes = found["regimes"]
    changes = [regime["change"] or 0 for regime in regimes.values()]
    names = [name.replace(", ", ",\n") for name in regimes]
    bars = right.barh(names, changes)
    shares = [f"{regime['share']:.0%} of tokens" for regime in regimes.values()]
    right.bar_label(bars, shares, padding=4)
    right.margins(x=0.5)
    right.invert_yaxis()
    right.set(xlabel="gate, CL-EGRSD minus EGRSD")


def main() -> None:
    parser = Parser(__doc__, prog=PROGRAM)
    parser.add_argument(
        "files", nargs="+", type=nonempty_path, help="results.json files, or one diagnostics.json"
    )
    parser.add_argument("--out", type=nonempty_path, default=Path("figure.png"), help="the picture")
    with one_line_errors(PROGRAM, "stopped"):
        a = parser.parse_args()
        plt = import_extra("matplotlib.pyplot")
        files = [parsed(path.read_text(), path) for path in a.files]
        figure = plt.figure(figsize=(8.3, 4), layout="constrained")
        if all("results" in file for file in files):
            points = checkpoints(files)
            draw_frontier(figure, points)
            print(frontier_table(points))
        elif len(files) == 1 and "regimes" in files[0]:
            draw_deciles(figure, files[0])
        else:
            raise InputError(f"{a.files[0]}: neither results.json files nor one diagnostics.json")
        figure.savefig(a.out, dpi=200)
        print(f"\n{a.out}")


if __name__ == "__main__":
    main()
