"""report.html: what came of a run, or of several, on one page that needs nothing from elsewhere.

Made of config.json, metrics.jsonl, evaluation.json and those rows of samples.jsonl that have
`by_token`, as far as they are there: whenever a run ends or stops, and by `python -m
experiments.report`, which also makes a page of the completions of experiments.diagnostics. Every
text is escaped, so that no problem or completion can end the page, or run in it.
"""

import html
import json
import math
import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean

import torch

import egrsd
from support import checkpoint
from support.errors import DAMAGED, InputError, reason
from support.settings import METHODS

COLUMNS = ("entropy", "lookahead", "gate", "delta", "advantage", "kind")  # of tokens.jsonl
COLOURS = {"entropy": "teacher entropy", "gate": "gate", "advantage": "token advantage"}
MOST_TOKENS, MOST_POINTS = 300, 400  # shown of a completion, drawn of a curve
BY_TOKEN = '"by_token": {'  # marks the rows of samples.jsonl that have values by token
CURVES = {  # of metrics.jsonl, and what it is
    "reward": "",
    "accuracy": "share",
    "length": "tokens",
    "entropy": "of the teacher, nats",
    "gate": "omega",
    "clipped": "share with w at a bound",
    "loss": "",
    "grad_norm": "",
}
FIGURES = {
    "accuracy": ("accuracy", ".3f"),
    "length": ("mean length", ".1f"),
    "truncated": ("truncated", ".3f"),
    "efficiency": ("% per 1,000 tokens", ".0f"),
    "no_answer": ("no answer", ".3f"),
}

# Control characters but tab and line feed, invisible ones, those that turn the direction of text,
# halves of characters
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)
TEMPLATE = Path(__file__).with_suffix(".html")  # with {{name}} where `document` puts something in


def visible(text: str) -> str:
    """Characters that would garble the page, or break it, become their code, such as [U+202E]."""
    return HIDDEN.sub(lambda match: f"[U+{ord(match[0]):04X}]", text)


def escaped(text) -> str:
    return html.escape(visible(str(text)))


def is_number(x) -> bool:
    return isinstance(x, (int, float)) and math.isfinite(x)


def document(title: str, body: str, rows: list[dict], wide: bool = False) -> str:
    """The page; rows: tokens and values of the articles in it."""
    data = json.dumps(
        [
            {"tokens": [*map(visible, row["tokens"])]}
            | {
                name: [x if is_number(x) else None for x in row[name]]
                for name in (*COLUMNS, "magnitude", "logp")
                if name in row
            }
            for row in rows
        ],
        separators=(",", ":"),
    )
    # inside a script element only "</" and "<!--" could end the data
    data = data.replace("<", "\\u003c")
    parts = {"title": escaped(title), "wide": ' class="wide"' * wide, "body": body, "data": data}
    # In one pass over the template, so that braces in a completion are not taken for a name.
    return re.sub(
        r"\{\{(\w+)\}\}", lambda match: parts[match[1]], TEMPLATE.read_text(encoding="utf-8")
    )


def navigation(rows: list[dict], colour: str = "entropy") -> str:
    """The choice of colours, of those that any row has values for."""
    there = [name for name in COLOURS if any(name in row for row in rows)]
    radios = "".join(
        f'<label><input type="radio" name="colour" value="{name}"{" checked" * (name == colour)}> '
        f"{COLOURS[name]}</label>"
        for name in there
    )
    return (
        f"""<nav>{radios}<br><span class="faint" id="legend"></span>
<br><span class="faint"><span class="key">lock</span> the teacher is sure, <span class="key pivot">pivot</span> unsure
now, but sure soon, <span class="key fork">fork</span> unsure for longer</span></nav>"""
        if there
        else ""
    )


def signals(values: dict, A: float, s: dict, max_entropy: float | None = None) -> egrsd.Signals:
    """What follows from the values of a completion's tokens and the settings of the run: [1, T]
    each. `lookahead` and `kind` look as far as the gate does, and without a window SOON tokens."""
    logp = torch.tensor([values["logp"]])
    # of a teacher with nothing to be shown there is neither
    delta, H = (
        torch.tensor([values.get(name, [0.0] * logp.numel())]) for name in ("delta", "entropy")
    )
    weights = {name: s[name] for name in ("gamma", "window", "eps", "floor")}
    everywhere = torch.ones_like(logp, dtype=torch.bool)
    soon = s["window"] or egrsd.SOON
    return egrsd.token_signals(
        torch.tensor([A]),
        logp + delta,
        logp,
        H,
        everywhere,
        max_entropy=max_entropy,
        soon=soon,
        **weights,
    )


def article(i: int, row: dict, more: str = "") -> str:
    """One completion, its line breaks made visible."""
    shown = [escaped(token).replace("\n", "\u21b5\n") for token in row["tokens"]]
    names = [egrsd.KINDS[kind] for kind in row["kind"]] if "kind" in row else [""] * len(shown)
    tokens = "".join(
        f'<span class="t {kind}" data-i="{i}" data-t="{t}" tabindex="0">{text}</span>'
        for t, (text, kind) in enumerate(zip(shown, names, strict=True))
    )
    verdict, count = "correct" if row["correct"] else "wrong", row.get("count", len(shown))
    return f"""<article><h2>{escaped(row["problem"])}</h2>
<div class="faint">{verdict}, gold answer {escaped(row["answer"])}, reward {row["reward"]:.3f}, A = {row["A"]:+.3f},
{count} tokens{f", the first {len(shown)} shown" * (count > len(shown))}</div><div class="completion">{tokens}</div>
{more}</article>
"""


def table(rows: list[list], kind: str = "") -> str:
    """The first row is the head."""
    lines = "".join(
        "<tr>" + "".join(f"<{tag}>{escaped(cell)}</{tag}>" for cell in row) + "</tr>\n"
        for tag, row in zip(["th"] + ["td"] * len(rows), rows, strict=False)
    )
    return f'<div class="table" tabindex="0"><table class="{kind}">{lines}</table></div>\n'


class Run:
    """What the files of a run directory say; of samples.jsonl the steps whose rows have values by
    token."""

    def __init__(self, directory: Path):
        self.name, self.samples = str(directory), directory / "samples.jsonl"
        self.config = parsed((directory / "config.json").read_text(), directory / "config.json")
        self.settings = self.config["settings"]
        self.metrics = list(read_log(directory / "metrics.jsonl"))
        self.steps = sorted({row["step"] for row in read_log(self.samples, BY_TOKEN)})
        results = directory / "evaluation.json"
        self.results = parsed(results.read_text(), results) if results.exists() else {}


def parsed(text: str, place: str | Path):
    """InputError with the place if it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{place}: no valid JSON ({reason(error)}): correct it, or remove it"
        ) from None


def read_log(path: Path, mark: str = "") -> Iterator[dict]:
    """The lines with `mark`; what follows the last line feed is still being written, or was cut
    off."""
    with path.open() if path.exists() else nullcontext(()) as lines:
        for number, line in enumerate(lines, 1):
            if mark in line and line.endswith("\n"):
                yield parsed(line, f"{path}: line {number}")


def write(directories: list[Path], out: Path) -> None:
    """The page of a run, or of several over each other. InputError if one of them cannot be
    read."""
    runs = []
    for directory in directories:
        try:
            runs.append(Run(directory))
            page = report(runs)
        except (OSError, *DAMAGED) as error:
            raise InputError(
                f"{directory}: no report can be made of this run ({reason(error)}): name the "
                "directory of a run, and correct the file that is damaged"
            ) from None
    checkpoint.write_text(out, page)


def attempt(directory: Path) -> None:
    """report.html of a run that did a step. If it cannot be made, that is a warning, but none
    beside an error."""
    failing = sys.exc_info()[0] not in (None, SystemExit)
    try:
        if (directory / "metrics.jsonl").stat().st_size:
            write([directory], directory / "report.html")
    except Exception as error:
        if not failing:
            print(f"warning: no report.html ({reason(error)})", file=sys.stderr)


def report(runs: list[Run]) -> str:
    """The page; of several runs it has the settings in which they differ, and no completions."""
    keys = dict.fromkeys(
        key
        for run in runs
        for key in run.settings
        if key in ("method", "model", "data")
        or (
            key not in ("out", "steps")
            and len({json.dumps(other.settings.get(key)) for other in runs}) > 1
        )
    )
    title = f"Training run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} training runs"
    rows, last = completions(runs[0]) if len(runs) == 1 else ([], "")
    said = ["".join(f", {key} {run.settings.get(key)}" for key in keys) for run in runs]
    items = "".join(
        f'<li class="{colour(k)}"><b>{escaped(run.name)}</b> {len(run.metrics)} of '
        f"{escaped(run.settings['steps'])} steps{escaped(said[k])}</li>\n"
        for k, run in enumerate(runs)
    )
    return document(
        title,
        f"""<ul class="legend">{items}</ul><h2>Held-out problems</h2>
{figures(runs)}<h2>Training</h2>
<p class="faint">Thin: single steps. Thick: the mean over the steps around. Point at a place, or go to it with the arrow
keys, for its values.</p><div class="curves">{"".join(curve(*named, runs) for named in CURVES.items())}</div>
{last}""",
        rows,
        wide=True,
    )


def figures(runs: list[Run]) -> str:
    """Before and after training, a row each."""
    rows = [
        [
            name if len(runs) == 1 else f"{run.name}, {name}",
            *(
                format(found[key], form) if key in found else "-"
                for key, (_, form) in FIGURES.items()
            ),
        ]
        for run in runs
        for name, found in run.results.items()
    ]
    if rows:
        return table([["", *(head for head, _ in FIGURES.values())], *rows], "figures")
    return f"<p>{'None yet' if any(run.settings['eval_data'] for run in runs) else 'There are none'}.</p>\n"


def curve(name: str, unit: str, runs: list[Run]) -> str:
    """A metric of all runs by step, from its highest value at 0 to its lowest at 100; empty if no
    run has it."""
    series = [
        [(int(row["step"]), row[name]) for row in run.metrics if is_number(row.get(name))]
        for run in runs
    ]
    if not any(series):
        return ""
    (first, last), (low, high) = (
        (min(axis), max(axis)) for axis in zip(*sum(series, []), strict=True)
    )
    lines, steps = "", max(map(len, series))
    span = min(25, max(1, steps // 20))
    for k, points in enumerate(series):
        means = [
            (x, fmean(y for _, y in points[max(0, i - span) : i + span + 1]))
            for i, (x, _) in enumerate(points)
        ]
        raw, smooth = (
            " ".join(f"{x},{100 * (high - y) / (high - low or 1):.10g}" for x, y in thinned(some))
            for some in (points, means)
        )
        lines += f'<g class="{colour(k)}"><polyline class="raw" points="{raw}"/><polyline points="{smooth}"/></g>'
    return f"""<figure><figcaption>{name} <span class="faint">{unit}</span></figcaption>
<div class="y"><span>{high:.4g}</span><span>{low:.4g}</span></div><svg viewBox="{first} 0 {last - first or 1} 100"
preserveAspectRatio="none" role="img" tabindex="0" data-high="{high}" data-low="{low}">
<title>{name} by step, {first} to {last}: {low:.4g} to {high:.4g}</title>{lines}<path class="cursor"/></svg>
<div class="x"><span>{first}</span><span>step</span><span>{last}</span></div></figure>
"""


def thinned(points: list[tuple]) -> list[tuple]:
    """Of each stretch of a long curve the lowest and the highest point, so that no peak is lost; a
    single point, twice, is a dot."""
    size = max(1, -(-2 * len(points) // MOST_POINTS))
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    kept = [
        point
        for part in parts
        for point in sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    ]
    return kept * 2 if len(kept) == 1 else kept


def colour(k: int) -> str:
    """The class of the k-th run: six colours, then the same with dashes."""
    return f"s{k % 6}" + " dashed" * (k // 6 % 2)


def completions(run: Run) -> tuple[list[dict], str]:
    """(rows with their tokens, HTML) of the first, middle and last step that has values; behind
    them the settings."""
    steps, rows, columns = run.steps, [], ""
    chosen = (
        {steps[0], min(steps, key=lambda step: abs(2 * step - steps[0] - steps[-1])), steps[-1]}
        if steps
        else ()
    )
    shown = [row for row in read_log(run.samples, BY_TOKEN) if row["step"] in chosen]
    for step in sorted(chosen):
        found = [token_row(row, run) for row in shown if row["step"] == step]
        articles = "".join(article(len(rows) + i, row) for i, row in enumerate(found))
        rows = rows + found
        columns = columns + f"<section><h2>step {escaped(step)}</h2>\n{articles}</section>\n"
    settings = [
        [part, key, value if isinstance(value, str) else json.dumps(value)]
        for part in ("settings", "derived", "versions")
        for key, value in run.config.get(part, {}).items()
    ]
    page = (
        f"""<section><h2>Completions</h2>
<p class="faint">Point at a token, or go to it with the tab key, for its values.
<a href="#settings">On to the settings</a></p>
{navigation(rows)}<div class="columns">{columns}</div></section>"""
        if rows
        else ""
    )
    return (
        rows,
        f"""{page}<details id="settings"><summary>settings, derived numbers and versions</summary>
{table([["", "", ""], *settings])}</details>""",
    )


def token_row(sample: dict, run: Run) -> dict:
    """A row of samples.jsonl as `article` and `document` take it, with what follows from its
    values."""
    values, s, A = dict(sample["by_token"]), run.settings, sample["advantage"]
    most = {row["step"]: row.get("max_entropy") for row in run.metrics}.get(sample["step"])
    found = signals(values, A, s, most)
    if "entropy" in values:
        values["lookahead"] = found.least_entropy[0].tolist()
        values["kind"] = found.kind[0].tolist()
    # other methods, and other gates of `python -m family`, may give credit in another way
    if s["method"] in METHODS and not s.get("gate") and most is not None:
        values["advantage"] = [round(x, 4) for x in found.advantage[0].tolist()]
    values = {name: found[:MOST_TOKENS] for name, found in values.items()}
    about = {name: sample[name] for name in ("problem", "correct", "reward")}
    return (
        about
        | values
        | {"tokens": values["text"], "count": sample["tokens"], "answer": sample["gold"], "A": A}
    )


def token_view(rows: list[dict], title: str, colour: str = "entropy") -> str:
    """The page of lines of tokens.jsonl, which experiments.diagnostics writes: colours show teacher
    entropy, gate or token advantage, one at a time."""
    articles = "".join(
        article(
            i,
            row,
            f"""<details><summary>student's prompt and reference solution</summary>
<pre>{escaped(row["prompt"])}</pre>
<pre>{escaped(row["solution"])}</pre></details>""",
        )
        for i, row in enumerate(rows)
    )
    return document(
        title,
        f"""<p class="faint">{len(rows)} sampled solutions, each read by the teacher, who also sees
the reference. A token's advantage is A x magnitude x gate. Point at a token for its values.</p>
{navigation(rows, colour)}
{articles}""",
        rows,
    )
