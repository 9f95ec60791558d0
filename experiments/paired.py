"""What runs changed, problem by problem: their evaluations on the same problems, and their curves.

    python eval.py --model runs/seed0/model --data test.jsonl --out runs/seed0/test      do this for every run
    python -m experiments.paired start=runs/sft ours=runs/seed0 ours=runs/seed1 --out runs/paired

A row is a name and the directory of a run, which has an evaluation in its directory `test`. Rows of the same name are
taken together, such as the seeds of a method. A figure is a mean over problems and runs, [with a 95 % interval of a
bootstrap over problems]. Differences are taken problem by problem, to the first row or to that of --to. The intervals
do not say how runs of other seeds would differ: see the means of single runs.

--out gets paired.json and paired.png, accuracy and length of the rollouts of the rows whose runs sample
(mean over runs, with a 95 % interval if there are several).
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from eval import bootstrap_interval
from experiments.compare import import_extra, markdown, read_curves, read_lines
from experiments.plot import draw_curves
from support.checkpoint import write_json
from support.errors import InputError
from support.flags import Parser, nonempty_path
from support.run import one_line_errors

PROGRAM = "python -m experiments.paired"
MEASURES = ("accuracy", "length")


def by_problem(run: Path) -> dict[str, np.ndarray]:
    """Accuracy (%) and mean length of every problem of a run's evaluation, [2] each, in the order of
    the file. InputError unless it is a complete one, of one model on one file."""
    results = json.loads((run / "test" / "results.json").read_text())["results"]
    if len(results) != 1:
        raise InputError(f"{run}/test: {len(results)} results, one is needed: go on with eval.py")
    found = defaultdict(list)
    for record in read_lines(run / "test" / "samples.jsonl"):
        place = f"line {record['line']}: {record['problem']}"
        found[place].append((100 * record["correct"], record["tokens"]))
    return {place: np.mean(values, axis=0) for place, values in found.items()}


def figures(rows: dict[str, list[Path]], to: str) -> dict[str, dict]:
    """By row, for both measures: [mean, low, high], the same for the difference to the row `to`, and
    the means of single runs."""
    tested = {name: [by_problem(run) for run in runs] for name, runs in rows.items()}
    problems = list(tested[to][0])
    means = {}
    for name, runs in tested.items():
        if any(run.keys() != set(problems) for run in runs):
            raise InputError(f"{name}: an evaluation on other problems than those of {to}")
        means[name] = np.array([[run[p] for p in problems] for run in runs])  # [runs, problems, 2]
    base = means[to].mean(0)
    found = {}
    for name, values in means.items():
        mean = values.mean(0)
        found[name] = {}
        for k, measure in enumerate(MEASURES):
            difference = mean[:, k] - base[:, k]
            found[name] |= {
                measure: [mean[:, k].mean(), *bootstrap_interval(mean[:, k])],
                f"{measure} - {to}": [difference.mean(), *bootstrap_interval(difference)],
                f"{measure}, single runs": values[:, :, k].mean(1).tolist(),
            }
    return found


def table(found: dict[str, dict]) -> str:
    """The figures as markdown."""
    lines = []
    for name, row in found.items():
        cells = []
        for key, values in row.items():
            shown = [f"{value:.1f}" for value in values]
            if "runs" not in key:
                shown[1:] = [f"[{', '.join(shown[1:])}]"]
            cells.append(" ".join(shown))
        lines.append([name, *cells])
    return markdown(f"| row | {' | '.join(row)} |", lines)


def main() -> None:
    parser = Parser(__doc__, prog=PROGRAM)
    parser.add_argument("rows", nargs="+", help="name=directory of a run")
    parser.add_argument("--to", help="the row that others are compared to (default: the first)")
    parser.add_argument("--out", type=nonempty_path, default=Path("runs/paired"), help="directory")
    with one_line_errors(PROGRAM, "stopped"):
        a = parser.parse_args()
        for module in "matplotlib.pyplot", "scipy.stats":
            import_extra(module)  # better missing here than after minutes
        rows = defaultdict(list)
        curves = defaultdict(list)
        for row in a.rows:
            name, _, run = row.partition("=")
            rows[name].append(Path(run))
            curves[name].append(read_curves(Path(run) / "metrics.jsonl"))
        to = getattr(a, "to", next(iter(rows)))
        if to not in rows:
            raise InputError(f"--to {to}: no row has this name")
        found = figures(rows, to)
        print(table(found))
        a.out.mkdir(parents=True, exist_ok=True)
        write_json(a.out / "paired.json", {"rows": found, "curves": curves})
        sampled = [name for name, runs in curves.items() if all(runs)]
        draw_curves(curves, a.out / "paired.png", sampled)


if __name__ == "__main__":
    main()
