"""One training step on two problems, told in order, with every number that goes into its loss.

    python -m experiments.walk                        the toy on a laptop CPU: seconds
    python -m experiments.walk --window 0             the same completions under EGRSD; also --gamma, --eps
    python -m experiments.walk --model Qwen/Qwen3-0.6B --data train.jsonl --lr 1e-4
    python -m experiments.walk --out results/walk.json                                      these two make
    python -m experiments.walk --from results/walk.json --markdown > docs/walk.md           the page in docs/

`record` makes train.py's own step, listens, and checks the loss by hand; `tell` puts the record
into walk.txt. Without --model the settings are the toy's, with it the paper's, which are the
defaults given below.
"""

import json
import math
import re
import textwrap
from dataclasses import asdict, fields
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tqdm import tqdm

import egrsd
import train
from support.distributed import Ranks
from support.errors import DAMAGED, InputError, reason
from support.flags import Parser, add_flags, nonempty_path
from support.report import signals, visible
from support.run import name_lack_of_memory, one_line_errors, say
from support.settings import PRESETS, Settings

PROGRAM = "python -m experiments.walk"
# of train.py
FLAGS = (
    "model",
    "data",
    "skip_ungradable",
    "seed",
    "max_new_tokens",
    "gamma",
    "window",
    "eps",
    "lr",
)
COLUMNS = ("log p_S", "log p_T", "w", "H", "least H", "omega", "A-hat", "term")
TRIES = 50  # steps, in search of one with a correct and a wrong completion


class Listener(train.EGRSD):
    """EGRSD, unchanged, but that it notes what the loss of each completion is made of."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def token_metrics(self, t: train.Trainer, batch: train.Batch) -> dict:
        signals = self.signals(t, batch)
        H = batch.by_teacher.entropy
        logp = batch.by_student.logp.detach()
        columns = {
            "log p_S": logp,
            "log p_T": batch.by_teacher.logp,
            "w": signals.magnitude,
            "H": H,
            "least H": egrsd.lookahead_min(H, batch.by_student.mask, t.s.window),
            "omega": signals.gate,
            "A-hat": signals.advantage,
            "term": -signals.advantage * logp,
        }
        for i, row in enumerate(batch.examples):
            length = len(row.token_ids)
            self.heard.append((row, {name: x[i, :length].tolist() for name, x in columns.items()}))
        return super().token_metrics(t, batch)


def record(given: dict, earlier: int) -> dict:
    """One step of train.py with these settings, on two problems, as plain numbers and texts."""
    preset = PRESETS["toy" if given.get("model", "toy") == "toy" else "paper-4b"]
    with (
        TemporaryDirectory() as out,
        name_lack_of_memory(lambda: "lower --max-new-tokens, or take a smaller --model"),
    ):
        s = Settings(**preset | given | {"prompts_per_step": 2, "eval_data": "", "out": out})
        s.check()
        t = train.Trainer(s, Ranks.alone(), listener := Listener())
        with tqdm(desc="walk: earlier steps", unit=" steps") as t.log.bar:
            while t.step < earlier + TRIES:
                # train_step will draw the same ones again
                rollouts = t.make_rollouts(t.next_problems())
                if t.step >= earlier and len({row.correct for row in rollouts}) == 2:
                    break
                t.baseline.update(torch.tensor([row.reward for row in rollouts]))
                t.step += 1
                t.log.bar.update()
        before = t.baseline.state_dict() | {
            "at_least": earlier,
            "std": t.baseline.std,
            "warm_up": t.step < t.baseline.warmup_steps or t.baseline.std == 0,
        }
        metrics = t.train_step()
        rows, decode = [row for row, _ in listener.heard], t.tokenizer.decode
        with torch.no_grad(), t.autocast():
            after = t.student(
                [r.prompt for r in rows], [r.token_ids for r in rows], s.score_temperature, False
            ).logp
        if not after.isfinite().all():
            raise InputError("after the update log-probs are not finite: lower --lr")
    terms = [term for _, columns in listener.heard for term in columns["term"]]
    assert math.isclose(
        by_hand := math.fsum(terms) / len(terms), metrics["loss"], rel_tol=1e-5, abs_tol=1e-5
    ), (
        f"the terms of the tokens make a loss of {by_hand}, but train_step returned "
        f"{metrics['loss']}"
    )
    completions = [
        row.as_json()
        | {
            "solution": row.problem.solution,
            "prompt": decode(row.prompt),
            "teacher_prompt": decode(shown),
            "reward": row.reward,
            "A": row.advantage,
            "text": [decode([token]) for token in row.token_ids],
        }
        | {
            name: [round(x, 4) + 0.0 for x in values]  # -0.0 + 0.0 is 0.0
            for name, values in (columns | {"after": logp[: len(row.token_ids)].tolist()}).items()
        }
        for (row, columns), shown, logp in zip(
            listener.heard, listener.teacher_prompts(t, rows), after, strict=True
        )
    ]
    return {
        "settings": asdict(s) | {"out": ""},
        "before": before,
        "completions": completions,
        "metrics": {name: metrics[name] for name in ("loss", "max_entropy", "grad_norm", "lr")},
    }


def fit(text: str, most: int = 10**9) -> str:
    """In lines that fit, without what would garble a terminal, and cut in the middle if they are
    too many."""
    lines = [
        part.rstrip()
        for line in visible(text).expandtabs().rstrip().split("\n")
        for part in textwrap.wrap(line, 116, drop_whitespace=False, replace_whitespace=False)
        or [""]
    ]
    return "\n".join(
        lines
        if len(lines) <= most
        else [*lines[: most // 2], "[... cut ...]", *lines[-(most // 2) :]]
    )


def derived(c: dict, s: dict, b: dict) -> dict:
    """A recorded completion, and what a reader works out from the numbers that are printed of
    it."""
    # the kinds look SOON tokens ahead, whatever the window of the gate is
    found = signals({"logp": c["log p_S"], "entropy": c["H"]}, c["A"], s | {"window": 0})
    judged = "correct" if c["correct"] else "wrong" if c["finished"] else "not finished, so wrong"
    r = (
        f"1 + {s['beta_length']} * (1 - {c['tokens']} / {s['max_new_tokens']}) = "
        if c["correct"]
        else ""
    )
    a = (
        f"{c['reward']:.6f} - 0.5"
        if b["warm_up"]
        else f"({c['reward']:.6f} - {b['mean']:.6f}) / {b['std']:.6f}"
    )
    terms, later = (
        [round(-x * y, 4) + 0.0 for x, y in zip(c["A-hat"], c[name], strict=True)]
        for name in ("log p_S", "after")
    )
    change = [round(x - y, 4) for x, y in zip(c["after"], c["log p_S"], strict=True)]
    return (
        c
        | {
            key: fit(c[key], 24)
            for key in ("prompt", "teacher_prompt", "problem", "solution", "completion")
        }
        | {
            "kind": [egrsd.KINDS[k] for k in found.kind[0]],
            "verdict": (
                f"{c['answer'] or 'none'}, gold answer {c['gold']}: {judged}; r = "
                f"{r}{c['reward']:.6f}"
            ),
            "advantage": f"{a} = {c['A']:+.4f}",
            "term": terms,
            "change": change,
            "sum": sum(terms),
            "later": sum(later),
            "rose": sum(x > 0 for x in change),
            "fell": sum(x < 0 for x in change),
        }
    )


def table(c: dict, columns: tuple, places: list[int]) -> str:
    lines = ["   t  text              " + "".join(f"{name:>9}" for name in columns) + "  kind"]
    for t in places:
        text = visible(c["text"][t]).replace("\n", "\\n").replace("\t", "\\t")[:16]
        lines.append(
            ("{:4}  {:18}" + "{:9.4f}" * len(columns) + "  {}").format(
                t + 1, f'"{text}"', *(c[name][t] for name in columns), c["kind"][t]
            )
        )
    return "\n".join(lines)


def tell(record: dict, rows: int = 60, made: str = "") -> str:
    """walk.txt with the numbers of a record; `made`: by which command, of a page, which has links
    to the files."""
    s, b = record["settings"], record["before"]
    c, o = sorted(
        (derived(c, s, b) for c in record["completions"]),
        key=lambda c: (-len({*c["kind"]}), -c["correct"]),
    )
    n, N, top = c["tokens"], c["tokens"] + o["tokens"], c["H"].index(max(c["H"]))
    order = sorted(range(n), key=c["change"].__getitem__)
    values = {
        "s": s,
        "b": b,
        "c": c,
        "o": o,
        "m": record["metrics"],
        "made": made,
        "tries": TRIES,
        "N": N,
        "t": top + 1,
        "high": egrsd.HIGH,
        "low": egrsd.LOW,
        "soon": egrsd.SOON,
        "k": {name: c[name][top] for name in COLUMNS},
        "sign": (c["A"] > 0) - (c["A"] < 0),
        "range": f"[{1 - s['eps']:.4g}, {1 + s['eps']:.4g}]",
        "now": (c["later"] + o["later"]) / N,
        "kinds": ", ".join(f"{kind}: {c['kind'].count(kind)}" for kind in egrsd.KINDS),
        "by_hand": (c["sum"] + o["sum"]) / N,
        "table": table(c, COLUMNS, [*range(n)[:rows]]),
        "rest": (
            f"{n - rows} more rows are left out, whose terms add up to {sum(c['term'][rows:]):.4f}"
        )
        * (n > rows),
        "largest": table(
            c, ("A-hat", "log p_S", "after", "change"), [*dict.fromkeys(order[:-6:-1] + order[:5])]
        ),
    }
    told = []
    for paragraph in (
        Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").strip().split("\n\n")
    ):
        text = textwrap.dedent(paragraph).format(**values)
        # without any text of the data
        linked = re.sub(r"`([\w/]+\.py)`", r"[\1](../\1)", text) if made else text
        told.append(
            textwrap.indent(fit(text), "    ")
            if paragraph.startswith(" ")
            else textwrap.fill(linked.strip(), 120, break_on_hyphens=False)
        )
    return "\n\n".join(filter(None, told))


def main() -> None:
    parser = Parser(__doc__, prog=PROGRAM)
    add_flags(parser, [f for f in fields(Settings) if f.name in FLAGS])
    add = parser.add_argument
    add(
        "--earlier",
        type=int,
        default=32,
        help="steps to sample and grade first, for eq. (9) (default: %(default)s)",
    )
    add(
        "--rows",
        type=int,
        default=60,
        help="most rows of the table of tokens (default: %(default)s)",
    )
    add(
        "--out",
        type=nonempty_path,
        default=None,
        help="write the numbers of the step to this JSON file too",
    )
    add(
        "--from",
        dest="source",
        type=nonempty_path,
        default=None,
        help="make no step, tell the one in a file of --out",
    )
    add(
        "--markdown",
        action="store_true",
        default=False,
        help="with --from: print the page for docs/, with its links",
    )
    with one_line_errors(PROGRAM, "stopped, nothing was written"):
        a = parser.parse_args()
        step = {name: value for name, value in vars(a).items() if name in FLAGS}
        if a.source and (step or a.out) or a.markdown and not a.source:
            raise InputError(
                "--from tells a step made before: leave out --out and settings; --markdown "
                "needs --from"
            )
        try:
            found = (
                json.loads(a.source.read_bytes()) if a.source else record(step, max(0, a.earlier))
            )
            text = tell(
                found,
                max(0, a.rows),
                f"Made by `{PROGRAM} --from {a.source} --markdown`." * a.markdown,
            )
        except DAMAGED as error:
            raise (
                InputError(f"{a.source}: no record of a step ({reason(error)})")
                if a.source
                else error
            ) from None
        say(text)
        if a.out:
            a.out.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
