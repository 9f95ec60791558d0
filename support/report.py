"""report.html: the results of one run, or of several, on one page.

The page needs no other file. It is made from config.json, metrics.jsonl, evaluation.json, the first
completions of held_out_before.jsonl and held_out_after.jsonl, and the records of samples.jsonl that
have `by_token`. A run writes it whenever it ends or stops, and
`python -m experiments.report` writes it again. That command also makes a page of the completions
of experiments.diagnostics. All texts are escaped, so no problem and no completion can break the
page or run code in it.
"""

import html
import itertools
import json
import math
import re
import sys
from collections import ChainMap
from pathlib import Path
from statistics import fmean

import torch

import egrsd
from support import checkpoint
from support.errors import InputError, reason
from support.settings import METHODS

COLUMNS = ("entropy", "lookahead", "gate", "delta", "advantage", "kind")  # of tokens.jsonl
COLOURS = {"entropy": "teacher entropy", "gate": "gate", "advantage": "token advantage"}
MOST_TOKENS = 300  # shown of a completion
MOST_CHARACTERS = 1500  # of one before or after training
MOST_PROBLEMS = 4  # shown before and after training
CURVES = {  # names in metrics.jsonl, with a unit or a meaning
    "reward": "",
    "accuracy": "share",
    "length": "tokens",
    "entropy": "of the teacher, nats",
    "student_entropy": "nats",
    "repeated": "share of 4-grams",
    "mentions": "of a solution, share",
    "gate": "omega",
    "clipped": "share with w at a bound",
    "loss": "",
    "grad_norm": "",
}
FIGURES = (  # names in evaluation.json, with the head and the format of their column
    ("step", "step", ""),
    ("accuracy", "accuracy", ".3f"),
    ("length", "mean length", ".1f"),
    ("truncated", "truncated", ".3f"),
    ("efficiency", "Eff, % per 1,000 tokens", ".0f"),
    ("no_answer", "no answer", ".3f"),
)

# Control characters except tab and line feed, invisible characters, characters that turn the
# direction of text, and halves of surrogate pairs.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)
TEMPLATE = Path(__file__).with_suffix(".html")  # `document` fills in its {{name}}s


# ---- parts of a page


def visible(text: str) -> str:
    """The text, with a code such as [U+202E] for each character that would garble the page."""
    return HIDDEN.sub(lambda match: f"[U+{ord(match[0]):04X}]", text)


def escaped(value):
    """The value as text for HTML."""
    return html.escape(visible(str(value)))


def document(title, body, completions):
    """The whole page. `completions`: tokens and values of its articles, in their order."""
    parts = {"title": escaped(title), "body": body, "data": script_data(completions)}
    template = TEMPLATE.read_text(encoding="utf-8")
    # One pass over the template only, so {{name}} in a completion stays as it is.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def script_data(completions):
    """JSON for the script of the page; null for infinity and nan, which JSON does not have."""
    data = []
    for completion in completions:
        shown = {"tokens": [visible(token) for token in completion["tokens"]]}
        for name in (*COLUMNS, "magnitude", "logp", "student_entropy"):
            if name in completion:
                shown[name] = [x if math.isfinite(x) else None for x in completion[name]]
        data.append(shown)
    return json.dumps(data).replace("<", "\\u003c")  # "</" or "<!--" would end the script


def navigation(completions):
    """The choice between the colours that some completion has values for."""
    radios = ""
    for name, words in COLOURS.items():
        if any(name in completion for completion in completions):
            radios += f'<label><input type="radio" name="colour" value="{name}"> {words}</label>'
    return f"""<nav>{radios}<br><span class="faint" id="legend"></span>
<br><span class="faint"><span class="key">lock</span> the teacher is sure, <span class="key pivot">pivot</span> unsure
now, but sure soon, <span class="key fork">fork</span> unsure for longer</span></nav>"""


def article(completion, more=""):
    """A completion of the page, with a span for each token, which the script of the page colours.
    Line breaks are made visible; `more` is HTML for its end."""
    spans = "".join(f"<span>{escaped(token)}</span>" for token in completion["tokens"])
    spans = spans.replace("\n", "\u21b5\n")
    verdict = "correct" if completion["correct"] else "wrong"
    shown = len(completion["tokens"])
    count = completion.get("count", shown)
    return f"""<article><h2>{escaped(completion["problem"])}</h2>
<div class="faint">{verdict}, gold answer {escaped(completion["answer"])}, reward {completion["reward"]:.3f},
A = {completion["A"]:+.3f}, {shown} of {count} tokens</div><div class="completion">{spans}</div>
{more}</article>
"""


def html_table(lines):
    """A table of these cells, line by line; the first line is the head."""
    text = ""
    tag = "th"
    for line in lines:
        cells = "".join(f"<{tag}>{escaped(cell)}</{tag}>" for cell in line)
        text += f"<tr>{cells}</tr>\n"
        tag = "td"
    return f'<div class="table" tabindex="0"><table>{text}</table></div>\n'


# ---- the files of a run


class Run:
    """The files of a run's directory, except samples.jsonl, which can be large."""

    def __init__(self, directory: Path):
        config = directory / "config.json"
        results = directory / "evaluation.json"
        self.directory = directory
        self.config = parsed(config.read_text(), config)
        self.settings = self.config["settings"]
        self.metrics = read_log(directory / "metrics.jsonl")
        self.results = parsed(results.read_text(), results) if results.exists() else {}


def parsed(text: str, place: str | Path):
    """The value of a JSON text; InputError with its place if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: no valid JSON ({error}): correct it, or remove it") from None


def read_log(path: Path) -> list[dict]:
    """The records of a JSONL file; none if there is no file. Text after the last line feed is left
    out: the run may still be writing it."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [parsed(line, f"{path}: line {number}") for number, line in enumerate(lines, 1)]


# ---- the page of runs


def write(directories: list[Path], out: Path) -> None:
    """Write the page of a run, or of several runs over each other."""
    checkpoint.write_text(out, report([Run(directory) for directory in directories]))


def attempt(directory: Path) -> None:
    """Write report.html of a run that did a step. If this fails, print a warning; if the run itself
    failed, print nothing, so that its own error stands alone."""
    failing = sys.exc_info()[0] not in (None, SystemExit)
    try:
        if (directory / "metrics.jsonl").stat().st_size:
            write([directory], directory / "report.html")
    except Exception as error:
        if not failing:
            print(f"warning: no report.html ({reason(error)})", file=sys.stderr)


def report(runs):
    """The page. Completions and all settings are shown for a single run only."""
    title = f"{len(runs)} training runs"
    completions = []
    first = last = texts = ""
    if len(runs) == 1:
        title = f"Training run {runs[0].directory}"
        first = headline(runs[0])
        texts = before_and_after(runs[0])
        completions, last = chosen_completions(runs[0])
        last += all_settings(runs[0])
    curves = "".join(curve(name, runs) for name in CURVES)
    body = f"""{first}<ul class="legend">{legend(runs)}</ul><h2>Held-out problems</h2>
{figures(runs)}{texts}<h2>Training</h2>
<p class="faint">Thin: single steps. Thick: the mean over the steps around. Dots: held-out problems, before and after.
Point at a place, or go to it with the arrow keys, for its values.</p><div class="curves">{curves}</div>
{last}"""
    return document(title, body, completions)


def headline(run):
    """What the run did, in a line, and what its method is."""
    s = run.settings
    text = ""
    if is_evaluated(run):
        before = run.results["before"]
        after = run.results["after"]
        change = after["length"] / before["length"] - 1
        minutes = sum(record["step_s"] for record in run.metrics) / 60
        text = f"""<p class="headline">{before["accuracy"]:.0%} \u2192 {after["accuracy"]:.0%} right,
{abs(change):.0%} {"longer" if change > 0 else "shorter"}</p>
<p>{after["completions"]:,} held-out completions; {len(run.metrics)} steps in {minutes:.1f} minutes</p>"""
    if s["method"] in METHODS:
        text += f"""<p>{escaped(s["method"])}, gamma {s["gamma"]:g}, W {s["window"]}, magnitude within 1 \u00b1
{s["eps"]:g}</p><p class="faint">A verifier says whether a completion is right. The <b>magnitude</b> asks
whether the teacher, who sees the solution, likes a token more than the student does. The <b>gate</b> takes weight from
tokens of which the teacher is uncertain. <a href="https://arxiv.org/abs/2605.13255">arXiv 2605.13255</a></p>"""
    return text


def is_evaluated(run):
    """Whether there are evaluations before the first and after the last step: a resumed run may have
    done more steps since."""
    after = run.results.get("after", {})
    return "before" in run.results and after.get("step") == len(run.metrics)


def before_and_after(run):
    """The first completions of the first held-out problems, before and after training."""
    paths = [run.directory / f"held_out_{name}.jsonl" for name in ("before", "after")]
    if not (is_evaluated(run) and all(path.exists() for path in paths)):
        return ""
    text = ""
    # the samples of a problem stand beside each other
    records = [read_log(path)[:: run.settings["eval_samples"]] for path in paths]
    for pair in itertools.islice(zip(*records, strict=False), MOST_PROBLEMS):
        columns = ""
        for name, record in zip(("before", "after"), pair, strict=True):
            verdict = "correct" if record["correct"] else "wrong"
            shown = escaped(record["completion"][:MOST_CHARACTERS])
            columns += f"""<div><span class="faint">{name}: {verdict}, {record["tokens"]} tokens</span>
<div class="plain">{shown}</div></div>"""
        text += f"""<article><h2>{escaped(pair[0]["problem"])}</h2>
<div class="faint">gold answer {escaped(pair[0]["gold"])}</div>
<div class="columns">{columns}</div></article>
"""
    return text


def legend(runs):
    """A line for each run, with its method, model and data and with settings that differ."""
    names = ["method", "model", "data"]
    settings = [run.settings for run in runs]
    for name in ChainMap(*settings):
        differs = any(s.get(name) != settings[0].get(name) for s in settings)
        if differs and name not in (*names, "out", "steps"):
            names.append(name)
    items = ""
    for run in runs:
        told = f"{len(run.metrics)} of {run.settings['steps']} steps"
        for name in names:
            told += f", {name} {run.settings.get(name)}"
        items += f"<li><b>{escaped(run.directory)}</b> {escaped(told)}</li>\n"
    return items


def figures(runs):
    """The evaluations before and after training, one line each."""
    lines = [["", *(head for _, head, _ in FIGURES)]]
    for run in runs:
        for name, found in run.results.items():
            first = name if len(runs) == 1 else f"{run.directory}, {name}"
            lines.append([first, *(format(found.get(key, ""), form) for key, _, form in FIGURES)])
    if len(lines) == 1:
        return "<p>None yet. A run with --eval-data is evaluated before and after training.</p>\n"
    return f'<div class="figures">{html_table(lines)}</div>\n'


def curve(name, runs):
    """A metric of all runs by step, drawn from a round number above it (y = 0) to one below (y =
    100), with its values on held-out problems; empty if no run has it."""
    series = []
    for run in runs:
        found = [record for record in run.metrics if math.isfinite(record.get(name, math.nan))]
        series.append({record["step"]: record[name] for record in found})
    steps = set().union(*series)
    if not steps:
        return ""
    first = min(steps)
    last = max(steps)
    ends = []
    for run in runs:
        evaluated = [found for found in run.results.values() if name in found and "step" in found]
        ends.append([(min(max(first, found["step"]), last), found[name]) for found in evaluated])
    points = itertools.chain(*ends, *(own.items() for own in series))
    values = [value for _, value in points]
    low, high = round_bounds(min(values), max(values))

    def height(value):
        return 100 * (high - value) / (high - low)

    lines = ""
    for own, dots in zip(series, ends, strict=True):
        heights = list(map(height, own.values()))
        marks = ""
        for step, value in dots:
            marks += f'<polyline class="dot" points="{coordinates([step], [height(value)])}"/>'
        lines += f"""<g><polyline class="raw" points="{coordinates(own, heights)}"/>
<polyline points="{coordinates(own, smoothed(heights))}"/>{marks}</g>"""
    return f"""<figure><figcaption>{name} <span class="faint">{CURVES[name]}</span></figcaption>
<div class="y"><span>{high:.4g}</span><span>{low:.4g}</span></div><svg viewBox="{first} 0 {last - first or 1} 100"
preserveAspectRatio="none" role="img" tabindex="0" data-high="{high}" data-low="{low}">
<title>{name} by step, {first} to {last}</title>{lines}<path class="cursor"/></svg>
<div class="x"><span>{first}</span><span>step</span><span>{last}</span></div></figure>
"""


def round_bounds(low, high):
    """Two different round numbers around low and high.

    >>> round_bounds(0.375, 0.9688), round_bounds(36.95, 57.6), round_bounds(0.0, 0.0)
    ((0.3, 1.0), (30, 60), (0, 1))
    """
    power = math.floor(math.log10(high - low or abs(high) or 1))
    bottom = math.floor(low / 10**power)
    top = max(math.ceil(high / 10**power), bottom + 1)
    return round(bottom * 10**power, -power), round(top * 10**power, -power)


def smoothed(values):
    """Each value becomes the mean of itself and of a 20th of all values on each side, of at least 1
    and at most 25."""
    span = min(25, max(1, len(values) // 20))
    return [fmean(values[max(0, i - span) : i + span + 1]) for i in range(len(values))]


def coordinates(steps, heights):
    """The points for a polyline."""
    pairs = [f"{step},{y:.10g}" for step, y in zip(steps, heights, strict=True)]
    if len(pairs) == 1:
        pairs *= 2  # drawn as a dot
    return " ".join(pairs)


def chosen_completions(run):
    """(completions, their HTML) of the first, the middle and the last step that has values by
    token."""
    samples = [x for x in read_log(run.directory / "samples.jsonl") if "by_token" in x]
    if not samples:
        return [], ""
    steps = sorted({x["step"] for x in samples})
    completions = []
    columns = ""
    for step in sorted({steps[0], steps[len(steps) // 2], steps[-1]}):
        found = [sampled_completion(x, run) for x in samples if x["step"] == step]
        articles = "".join(map(article, found))
        columns += f"<section><h2>step {step}</h2>\n{articles}</section>\n"
        completions += found
    text = f"""<section><h2>Completions</h2>
<p class="faint">Point at a token, tap it, or go to it with the tab key, for its values. A: advantage of the completion.
<a href="#settings">Skip to the settings</a></p>
{navigation(completions)}<div class="columns">{columns}</div></section>"""
    return completions, text


def sampled_completion(sample, run):
    """A record of samples.jsonl as `article` and `document` take it, with the values that follow
    from the stored ones."""
    s = run.settings
    values = sample["by_token"]
    A = sample.pop("advantage")  # of the completion; its tokens have values of that name, too
    if "entropy" in values:
        by_step = {record["step"]: record.get("max_entropy") for record in run.metrics}
        max_entropy = by_step.get(sample["step"])
        logp = torch.tensor([values["logp"]])
        signals = egrsd.token_signals(
            torch.tensor([A]),
            logp + torch.tensor(values["delta"]),
            logp,
            torch.tensor([values["entropy"]]),
            torch.ones_like(logp, dtype=torch.bool),
            gamma=s["gamma"],
            window=s["window"],
            eps=s["eps"],
            floor=s["floor"],
            max_entropy=max_entropy,
            soon=s["window"] or egrsd.SOON,  # as far ahead as the gate, if it looks ahead
        )
        values["lookahead"] = signals.least_entropy[0].tolist()
        values["kind"] = signals.kind[0].tolist()
        # Other methods, and other gates of `python -m family`, may weight tokens in another way.
        if s["method"] in METHODS and not s.get("gate") and max_entropy is not None:
            values["advantage"] = [round(x, 4) for x in signals.advantage[0].tolist()]
    values["tokens"] = values["text"]
    shown = {name: value[:MOST_TOKENS] for name, value in values.items()}
    return {**sample, "answer": sample["gold"], "A": A, "count": sample["tokens"], **shown}


def all_settings(run):
    lines = [["", "", ""]]
    for part in ("settings", "derived", "versions"):
        for key, value in run.config[part].items():
            lines.append([part, key, value])
    return f"""<details id="settings"><summary>settings, derived numbers and versions</summary>
{html_table(lines)}</details>"""


# ---- the page of tokens.jsonl


def token_view(completions: list[dict]) -> str:
    """The page of records of tokens.jsonl, which experiments.diagnostics writes."""
    articles = ""
    for completion in completions:
        more = f"""<details><summary>student's prompt and reference solution</summary>
<pre>{escaped(completion["prompt"])}</pre>
<pre>{escaped(completion["solution"])}</pre></details>"""
        articles += article(completion, more)
    body = f"""<p class="faint">{len(completions)} sampled solutions, each read by the teacher, who also sees
the reference. A token's advantage is A x magnitude x gate. Point at a token for its values.</p>
{navigation(completions)}
{articles}"""
    return document("EGRSD, token by token", body, completions)
