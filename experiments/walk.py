"""One training step on two problems, told in order, with every number that goes into its loss.

    python -m experiments.walk                        the toy on a laptop CPU: seconds
    python -m experiments.walk --window 0             the same completions under EGRSD; also --gamma, --eps
    python -m experiments.walk --model Qwen/Qwen3-0.6B --data train.jsonl --lr 1e-4
    python -m experiments.walk --out results/walk.json                          these two make
    python -m experiments.walk --from results/walk.json > docs/walk.md          the page in docs/

`record` makes a step with the code of train.py, notes its numbers, and checks the loss by hand.
`tell` puts the numbers into walk.txt. Without --model the settings are those of the toy. With it
they are those of the paper, which are the defaults shown below.
"""

import json
import math
import textwrap
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tqdm import tqdm

import egrsd
import train
from support.distributed import Ranks
from support.errors import InputError
from support.flags import Parser, add_flags, nonempty_path
from support.report import parsed, visible
from support.run import one_line_errors
from support.settings import Settings, resolve

PROGRAM = "python -m experiments.walk"
# the flags of train.py that this command has too
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
MOST_TOKENS = 60  # in the table of tokens
MOST_LINES = 64  # in a text of the data, or in a table
MOST_CHANGES = 3  # in the table of changes: so many highest ones, and as many lowest ones


# ---- make a step and note its numbers


def rounded(values):
    """The numbers of a tensor to four decimals, with 0.0 for -0.0."""
    return [round(x, 4) + 0.0 for x in values.tolist()]


class Listener(train.EGRSD):
    """EGRSD that also notes what the loss of each completion is made of."""

    def __init__(self):
        super().__init__()
        self.heard = []  # (rollout, values of its tokens by name)
        self.loss_by_hand = 0.0

    def token_metrics(self, t, batch):
        signals = self.signals(t, batch)
        mask = batch.by_student.mask
        logp = batch.by_student.logp.detach()
        H = batch.by_teacher.entropy
        terms = -signals.advantage * logp
        self.loss_by_hand += terms[mask].sum().item() / batch.num_tokens
        columns = {
            "log p_S": logp,
            "log p_T": batch.by_teacher.logp,
            "w": signals.magnitude,
            "H": H,
            "least H": egrsd.lookahead_min(H, mask, t.s.window),
            "omega": signals.gate,
            "A-hat": signals.advantage,
            "term": terms,
        }
        for i, rollout in enumerate(batch.examples):
            length = len(rollout.token_ids)
            found = {name: rounded(values[i, :length]) for name, values in columns.items()}
            found["kind"] = [egrsd.KINDS[kind] for kind in signals.kind[i, :length]]
            self.heard.append((rollout, found))
        return super().token_metrics(t, batch)


def record(given: dict, earlier: int) -> dict:
    """One step of train.py with these settings, on two problems, as plain numbers and texts.
    AssertionError if the loss by hand is not the loss that the step returned."""
    with TemporaryDirectory() as out:
        fixed = {"prompts_per_step": 2, "eval_data": "", "out": out}
        s, _ = resolve(given | fixed, Settings)
        s.check()
        listener = Listener()
        t = train.Trainer(s, Ranks.alone(), listener)
        with tqdm(desc="walk: earlier steps", unit=" steps") as t.log.bar:
            sample_earlier_steps(t, earlier)
        before = t.baseline.state_dict()
        before["std"] = t.baseline.std
        before["warm_up"] = t.step < t.baseline.warmup_steps or t.baseline.std == 0
        metrics = t.train_step()
    loss = listener.loss_by_hand
    assert math.isclose(loss, metrics["loss"], rel_tol=1e-5, abs_tol=1e-5), (
        f"the loss by hand is {loss}, but train_step returned {metrics['loss']}"
    )
    return {
        "settings": {**asdict(s), "out": ""},
        "before": before,
        "completions": completions(t, listener),
        "metrics": {name: metrics[name] for name in ("loss", "max_entropy", "grad_norm", "lr")},
    }


def sample_earlier_steps(t, earlier):
    """Sample and grade `earlier` steps without an update, for eq. (9). Then at most TRIES more,
    until a step has a correct and a wrong completion: train_step samples the same ones again."""
    while t.step < earlier + TRIES:
        rollouts = t.make_rollouts(t.next_problems())
        if t.step >= earlier and len({r.correct for r in rollouts}) == 2:
            return
        t.baseline.update(torch.tensor([r.reward for r in rollouts]))
        t.step += 1
        t.log.bar.update()


def completions(t, listener):
    """What is recorded of the completions after the step."""
    decode = t.tokenizer.decode
    rollouts = [rollout for rollout, _ in listener.heard]
    prompts = [r.prompt for r in rollouts]
    token_ids = [r.token_ids for r in rollouts]
    teacher_prompts = listener.teacher_prompts(t, rollouts)
    with torch.no_grad(), t.autocast():
        after = t.student(prompts, token_ids, t.s.score_temperature, False).logp
    recorded = []
    for i, (r, columns) in enumerate(listener.heard):
        known = {
            **r.as_json(),
            "solution": r.problem.solution,
            "prompt": decode(r.prompt),
            "teacher_prompt": decode(teacher_prompts[i]),
            "reward": r.reward,
            "A": r.advantage,
            "text": [decode([token]) for token in r.token_ids],
            "after": rounded(after[i, : len(r.token_ids)]),
            **columns,
        }
        recorded.append(known)
    return recorded


# ---- tell it


def fit(text):
    """The text in at most MOST_LINES lines of at most 116 characters: if it has more, the middle is
    cut out. Characters that would garble a terminal are shown as codes."""
    lines = []
    for line in visible(text).expandtabs().rstrip().split("\n"):
        parts = textwrap.wrap(line, 116, drop_whitespace=False, replace_whitespace=False)
        lines += [part.rstrip() for part in parts] or [""]
    if len(lines) > MOST_LINES:
        half = MOST_LINES // 2
        lines[half:-half] = ["[... cut ...]"]
    return "\n".join(lines)


def derived(c):
    """A recorded completion, with what a reader works out from its numbers."""
    change = [round(y - x, 4) for x, y in zip(c["log p_S"], c["after"], strict=True)]
    return {
        **c,
        "change": change,
        "sum": sum(c["term"]),
        "later": sum(-x * y for x, y in zip(c["A-hat"], c["after"], strict=True)),
        "rose": sum(x > 0 for x in change),
        "fell": sum(x < 0 for x in change),
        "kinds": Counter(c["kind"]),
    }


def tokens_table(c, columns, places):
    """The values of a completion's tokens at these places, a line each."""
    head = "".join(f"{name:>9}" for name in columns)
    lines = [f"   t  text              {head}  kind"]
    for t in places:
        text = visible(c["text"][t]).replace("\n", "\\n").replace("\t", "\\t")
        numbers = "".join(f"{c[name][t]:9.4f}" for name in columns)
        lines.append(f"{t + 1:4}  {text[:16]:18}{numbers}  {c['kind'][t]}")
    return "\n".join(lines)


def interest(c):
    """Completion 1 is the one with more kinds of tokens, or else the correct one."""
    return len(c["kinds"]), c["correct"]


def tell(record: dict, command: str = PROGRAM) -> str:
    """walk.txt with the numbers of a record; `command` made the text."""
    before = record["before"]
    center = before["mean"]
    scale = before["std"]
    if before["warm_up"]:  # A = r - 0.5
        center = 0.5
        scale = 1
    c, other = sorted(map(derived, record["completions"]), key=interest, reverse=True)
    tokens = c["tokens"] + other["tokens"]
    top = c["H"].index(max(c["H"]))
    places = sorted(range(c["tokens"]), key=c["change"].__getitem__, reverse=True)
    largest = dict.fromkeys(places[:MOST_CHANGES] + places[-MOST_CHANGES:])
    values = {
        **record,
        "command": command,
        "most": MOST_TOKENS,
        "egrsd": egrsd,
        "center": center,
        "scale": scale,
        "c": c,
        "o": other,
        "t": top + 1,
        "k": {name: c[name][top] for name in COLUMNS},
        "by_hand": (c["sum"] + other["sum"]) / tokens,
        "now": (c["later"] + other["later"]) / tokens,
        "table": tokens_table(c, COLUMNS, range(c["tokens"])[:MOST_TOKENS]),
        "largest": tokens_table(c, ("A-hat", "log p_S", "after", "change"), largest),
    }
    template = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
    told = []
    for paragraph in template.strip().split("\n\n"):
        text = textwrap.dedent(paragraph).format(**values)
        if paragraph.startswith(" "):
            told.append(textwrap.indent(fit(text), "    "))
        else:
            told.append(textwrap.fill(text, 120, break_on_hyphens=False))
    return "\n\n".join(told)


def main() -> None:
    parser = Parser(__doc__, prog=PROGRAM)
    add_flags(parser, [f for f in fields(Settings) if f.name in FLAGS])
    add = parser.add_argument
    add("--earlier", type=int, default=32, help="steps to sample first (default: %(default)s)")
    add("--out", type=nonempty_path, default=None, help="write the numbers to this JSON file too")
    add("--from", dest="source", type=nonempty_path, default=None, help="tell a file of --out")
    with one_line_errors(PROGRAM, "stopped, nothing was written"):
        a = parser.parse_args()
        given = {name: value for name, value in vars(a).items() if name in FLAGS}
        command = PROGRAM
        if not a.source:
            found = record(given, a.earlier)
        elif given or a.out:
            raise InputError("--from tells a step made before: leave out --out and settings")
        else:
            found = parsed(a.source.read_text(), a.source)
            command += f" --from {a.source}"
        print(tell(found, command), flush=True)
        if a.out:
            a.out.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
