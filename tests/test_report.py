"""report.html: it is there whenever a run ends, says what the run's files say, and nothing in them
can break it."""

import doctest
import html.parser
import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import family_here, forked, train_arguments, train_here
from transformers import AutoModelForCausalLM, AutoTokenizer

import egrsd
import experiments.report
import teacher
import train
from support import report, run
from support.data import load_problems
from support.distributed import Ranks
from support.errors import InputError

TEXTS = ("student_entropy", "repeated", "mentions")  # curves
VOID = {"meta", "input", "br", "polyline", "path"}  # have no end, or end themselves
PAPER = "https://arxiv.org/abs/2605.13255"
EVIL = "</script><script>alert(1)</script><!-- \" ' {{data}} {{name}} \u202e \ud83d \x00 &amp;"


class Page(html.parser.HTMLParser):
    """Tags and texts of a page whose tags must be balanced and load nothing."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text, self.scripts = [], [], "", {}
        self.feed(text)
        links = {a["href"] for _, a in self.tags if not a.get("href", "#").startswith("#")}
        assert links <= {PAPER} and "src" not in {key for _, a in self.tags for key in a}
        text = text.replace(PAPER, "")
        assert not self.open and "http" not in text and "url(" not in text and "@import" not in text
        assert not [a for _, a in self.tags if any(name.startswith("on") for name in a)]
        assert not report.HIDDEN.search(text)
        self.data = json.loads(self.scripts["data"], parse_constant=lambda name: pytest.fail(name))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "script":
            self.scripts[self.open[-1][1].get("id", "")] = data
        elif self.open and self.open[-1][0] != "style":
            self.text += data

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)

    def colours(self):
        return [a["value"] for tag, a in self.tags if tag == "input"]


def page_of(directory):
    return Page((directory / "report.html").read_text(encoding="utf-8"))


def records_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def copied(tiny_run, tmp_path):
    """What a report needs of a run."""
    (tmp_path / "run").mkdir()
    names = ["config.json", "metrics.jsonl", "evaluation.json", "samples.jsonl"]
    for name in [*names, "held_out_before.jsonl", "held_out_after.jsonl"]:
        shutil.copy(tiny_run / name, tmp_path / "run")
    return tmp_path / "run"


def change(path, **changes):
    """Change every record of a log."""
    path.write_text("".join(json.dumps(record | changes) + "\n" for record in records_of(path)))


# ---- the values in samples.jsonl


def test_the_steps_that_have_values():
    """The first, the middle one, the last, and those that leave a checkpoint: of a run that stops
    early too."""
    log = run.StepLog(
        SimpleNamespace(
            ranks=None,
            s=SimpleNamespace(steps=9, checkpoint_every=4),
            tokenizer=SimpleNamespace(decode=str),
        )
    )
    rollout = SimpleNamespace(token_ids=[7, 8])
    mask = torch.tensor([[True] * 3, [True, True, False]])
    values = {"logp": torch.tensor([[0.0, 0.0, 0.0], [-1.23456, -2.0, 0.0]])}
    values |= {"entropy": torch.ones(2, 3), "clipped": torch.ones(2, 3)}
    batch = SimpleNamespace(by_teacher=SimpleNamespace(mask=mask))
    log.read[id(rollout)] = (batch, values, 1)
    found = {step: log.by_token(step, rollout) for step in range(1, 10)}
    assert [step for step, values in found.items() if values] == [1, 4, 5, 8, 9]
    shown = {"text": ["[7]", "[8]"], "logp": [-1.2346, -2.0]}
    assert found[9] == {"by_token": shown | {"entropy": [1.0, 1.0]}}
    mask[1] = False  # the teacher had nothing to be shown
    assert log.by_token(9, rollout) == {"by_token": shown}


def read_slowly(model, prompt, ids):
    """log-probs and entropies [T] of a completion, from whole logits in float64."""
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double()
    logp = logits.log_softmax(-1)
    return logp[range(len(ids)), ids], -(logp.exp() * logp).sum(-1)


@torch.no_grad()
def test_the_values_of_the_first_step_are_those_of_plain_forward_passes(tiny_run, tiny_toy):
    """There the student is still the base model."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_toy / "model")
    model = AutoModelForCausalLM.from_pretrained(tiny_toy / "model").double()
    problems = {p.line: p for p in load_problems(tiny_toy / "train.jsonl")[0]}
    ids_of = {tokenizer.decode([token]): token for token in range(len(tokenizer))}
    most = records_of(tiny_run / "metrics.jsonl")[0]["max_entropy"]
    records = [record for record in records_of(tiny_run / "samples.jsonl") if record["step"] == 1]
    assert len(records) == run.SAMPLES_PER_STEP
    for record in records:
        values, problem = record["by_token"], problems[record["line"]]
        ids = [ids_of[text] for text in values["text"]]
        assert (
            len(ids) == record["tokens"]
            and tokenizer.decode(ids, skip_special_tokens=True) == record["completion"]
        )
        assert "".join(values["text"]).startswith(record["completion"])
        asked, shown = (
            teacher.encode(tokenizer, messages)
            for messages in (
                teacher.student_messages(problem.problem),
                teacher.teacher_messages(problem.problem, problem.solution),
            )
        )
        logp, own_entropy = read_slowly(model, asked, ids)
        teacher_logp, H = read_slowly(model, shown, ids)
        w = torch.exp((teacher_logp - logp) * (1 if record["advantage"] > 0 else -1)).clamp(
            0.8, 1.2
        )
        soon = torch.stack([H[t : t + 4].min() for t in range(len(ids))])
        expected = {
            "logp": logp,
            "delta": teacher_logp - logp,
            "entropy": H,
            "student_entropy": own_entropy,
            "magnitude": w,
            "gate": (1 - 0.3 * soon / max(1, most)).clamp(0.1, 1),
        }
        assert {"text", *expected} == values.keys()
        for name, value in expected.items():
            assert values[name] == pytest.approx(value.tolist(), abs=2e-4), name


def test_micro_batches_do_not_mix_up_completions(tiny_toy, tmp_path):
    found = []
    for size in (2, 8):
        train_here(
            *train_arguments(tiny_toy, tmp_path / str(size), steps=1, **{"micro-batch": size})
        )
        found.append(records_of(tmp_path / str(size) / "samples.jsonl"))
    for one, other in zip(*found, strict=True):
        a, b = one.pop("by_token"), other.pop("by_token")
        assert one == other and a.pop("text") == b.pop("text")
        assert all(a[name] == pytest.approx(b[name], abs=2e-4) for name in a.keys() | b.keys())


# ---- the page


def test_what_the_page_of_a_run_says(tiny_run):
    page = page_of(tiny_run)
    assert (tiny_run / "report.html").stat().st_size < 400_000
    samples = [record for record in records_of(tiny_run / "samples.jsonl") if "by_token" in record]
    assert sorted({record["step"] for record in samples}) == [1, 2, 4] and all(
        f"step {n}" in page.text for n in (1, 2, 4)
    )
    assert [record["tokens"] for record in page.data] == [
        record["by_token"]["text"] for record in samples
    ]
    assert all(record["problem"] in page.text for record in samples)
    assert page.count("svg") == page.count("title") - 1 == 11 and page.colours() == [
        *report.COLOURS
    ]
    for name, found in json.loads((tiny_run / "evaluation.json").read_text()).items():
        assert (
            f"{name}{found['step']}{found['accuracy']:.3f}{found['length']:.1f}{found['truncated']:.3f}"
            in page.text
        )
    before, after = (
        records_of(tiny_run / f"held_out_{name}.jsonl") for name in ("before", "after")
    )
    for pair in zip(before[: report.MOST_PROBLEMS], after, strict=False):
        for record in pair:
            assert record["problem"] in page.text and record["completion"] in page.text
    assert before[report.MOST_PROBLEMS]["problem"] not in page.text.split("step 1")[0]
    dots = [a["points"] for tag, a in page.tags if a.get("class") == "dot"]
    assert [dot.split(",")[0] for dot in dots] == ["1", "4"] * 2  # of accuracy and of length
    assert (
        "4 of 4 steps" in page.text and "lora_rank4" in page.text and torch.__version__ in page.text
    )


@pytest.mark.parametrize(
    "after, words",
    [
        ({"accuracy": 0.87, "length": 38.0}, "37% \u2192 87% right,\n34% shorter"),
        ({"accuracy": 0.2, "length": 63.5}, "37% \u2192 20% right,\n10% longer"),
    ],
)
def test_the_headline_says_what_changed(copied, after, words):
    path = copied / "evaluation.json"
    before = json.loads(path.read_text())["before"] | {"accuracy": 0.37, "length": 57.6}
    after = after | {"step": 4}
    path.write_text(json.dumps({"before": before, "after": before | after}))
    change(copied / "metrics.jsonl", step_s=30.0)
    report.write([copied], copied / "report.html")
    text = page_of(copied).text
    assert words in text and "4 steps in 2.0 minutes" in text
    assert "cl-egrsd, gamma 0.3, W 3" in text and "before: " in text
    for results in (
        {"before": before},
        {"before": before, "after": before | after | {"step": 3}},  # more steps were done since
    ):
        path.write_text(json.dumps(results))
        report.write([copied], copied / "report.html")
        text = page_of(copied).text
        assert "% right" not in text and "before: " not in text


def test_bounds_of_axes_are_round():
    assert doctest.testmod(report).failed == 0
    for low, high in ((3.2, 3.2), (-5, -5), (1e-9, 3e5), (-0.07875, 0.2085), (0.9553, 0.9819)):
        bottom, top = report.round_bounds(low, high)
        assert bottom <= low <= high <= top > bottom
        assert top - bottom <= 3 * (high - low) or high == low
        assert all(float(f"{x:.2g}") == x for x in (bottom, top))


def test_what_is_derived_agrees_with_egrsd(tiny_run):
    config = json.loads((tiny_run / "config.json").read_text())["settings"]
    samples = [record for record in records_of(tiny_run / "samples.jsonl") if "by_token" in record]
    most = {
        record["step"]: record["max_entropy"] for record in records_of(tiny_run / "metrics.jsonl")
    }
    for shown, sample in zip(page_of(tiny_run).data, samples, strict=True):
        values = {
            name: torch.tensor([value])
            for name, value in sample["by_token"].items()
            if name != "text"
        }
        mask = torch.ones_like(values["logp"]).bool()
        soon = egrsd.lookahead_min(values["entropy"], mask, config["window"])
        weights = egrsd.token_advantages(
            torch.tensor([sample["advantage"]]),
            values["delta"] + values["logp"],
            values["logp"],
            values["entropy"],
            mask,
            gamma=config["gamma"],
            window=config["window"],
            eps=config["eps"],
            max_entropy=most[sample["step"]],
        )
        assert shown["lookahead"] == pytest.approx(soon[0].tolist()) and shown[
            "advantage"
        ] == pytest.approx(weights[0].tolist(), abs=5e-4)
        assert [egrsd.KINDS[kind] for kind in shown["kind"]] == [
            "lock" if h < 0.5 else "pivot" if s < 0.2 else "fork"
            for h, s in zip(shown["entropy"], soon[0].tolist(), strict=True)
        ]


def test_hostile_texts_are_only_texts(copied):
    for name in ("problem", "gold"):
        change(copied / "samples.jsonl", **{name: EVIL})
        change(copied / "held_out_before.jsonl", **{name: EVIL, "completion": EVIL})
    records = [
        record | {"by_token": record["by_token"] | {"text": [EVIL] * record["tokens"]}}
        if "by_token" in record
        else record
        for record in records_of(copied / "samples.jsonl")
    ]
    (copied / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = json.loads((copied / "config.json").read_text())
    config["settings"] |= {"model": EVIL, "data": EVIL}
    (copied / "config.json").write_text(json.dumps(config))
    report.write([copied], copied / "report.html")
    page = page_of(copied)
    assert page.count("script") == 2 and "alert" not in page.scripts[""]
    assert (
        page.data[0]["tokens"][0] == report.visible(EVIL)
        and "{{data}} {{name}} [U+202E] [U+D83D]" in page.text
    )
    report.write([copied, copied], copied / "report.html")
    assert page_of(copied).count("script") == 2


def test_numbers_that_are_none(copied):
    records = records_of(copied / "samples.jsonl")
    records[0]["by_token"]["delta"][0] = -float("inf")
    (copied / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    change(copied / "metrics.jsonl", loss=float("nan"))
    report.write([copied], copied / "report.html")
    page = page_of(copied)
    assert (
        page.data[0]["delta"][0] is None
        and page.count("svg") == 10
        and "loss by step" not in page.text
    )


def test_a_run_that_is_going_on(copied, tmp_path):
    """Its logs may end in the middle of a line."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        text = (copied / name).read_text()
        (copied / name).write_text(text[:-30])
    (copied / "evaluation.json").unlink()
    code, lines, out = forked(tmp_path, experiments.report.main, "report", copied)
    assert (code, lines, out) == (0, [], f"{copied / 'report.html'}\n")
    assert "3 of 4 steps" in page_of(copied).text and "None yet" in page_of(copied).text
    assert "reward by step, 1 to 3" in page_of(copied).text


def test_a_long_run_and_a_long_completion(copied):
    (record,) = records_of(copied / "metrics.jsonl")[:1]
    (copied / "metrics.jsonl").write_text(
        "".join(json.dumps(record | {"step": n}) + "\n" for n in range(1, 3001))
    )
    records = [
        record
        | {
            "tokens": 1000,
            "by_token": {name: value[:1] * 1000 for name, value in record["by_token"].items()},
        }
        for record in records_of(copied / "samples.jsonl")
        if "by_token" in record
    ]
    (copied / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    report.write([copied], copied / "report.html")
    page = page_of(copied)
    assert "300 of 1000 tokens" in page.text and "1 to 3000" in page.text
    lines = [a for tag, a in page.tags if tag == "polyline" and a.get("class") != "dot"]
    assert {len(a["points"].split()) for a in lines} == {3000}
    assert (copied / "report.html").stat().st_size < 2_000_000


def test_a_single_step_is_drawn_as_a_dot(copied):
    change(copied / "metrics.jsonl", step=1)
    first = (copied / "metrics.jsonl").read_text().splitlines(keepends=True)[0]
    (copied / "metrics.jsonl").write_text(first)
    report.write([copied], copied / "report.html")
    points = [a["points"].split() for tag, a in page_of(copied).tags if tag == "polyline"]
    assert all(first == last and first.startswith("1,") for first, last in points)


def test_several_runs_over_each_other(copied, tiny_run, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    config["settings"] |= {"seed": 7, "steps": 9, "out": "elsewhere"}
    (copied / "config.json").write_text(json.dumps(config))
    code, lines, out = forked(tmp_path, experiments.report.main, "report", copied, tiny_run)
    assert (code, lines, out) == (0, [], "report.html\n")
    page = page_of(tmp_path)
    # two lines of eleven curves and the dots of two
    assert (
        page.count("polyline") == 2 * (11 * 2 + 2 * 2) and page.count("tr") == 5 and page.data == []
    )
    assert (
        f"{copied} 4 of 9 steps" in page.text
        and ", seed 7" in page.text
        and ", seed 0" in page.text
    )
    assert "lora_rank" not in page.text and "elsewhere" not in page.text


@pytest.mark.parametrize("out", [".", "..", "metrics.jsonl"])
def test_a_page_is_not_written_over_anything_else(copied, tmp_path, out):
    code, lines, _ = forked(
        tmp_path, experiments.report.main, "report", copied, "--out", copied / out
    )
    assert code == 1 and len(lines) == 1 and "a page is needed here" in lines[0]


def test_values_beside_an_outlier(copied):
    """The script reads a value back from its place in the curve."""
    values = [0.05 + n / 1000 if n != 50 else 3000.0 for n in range(100)]
    (copied / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": n, "step_s": 1, "loss": x}) + "\n" for n, x in enumerate(values)
        )
    )
    report.write([copied], copied / "report.html")
    raw = next(
        a for tag, a in page_of(copied).tags if tag == "polyline" and a.get("class") == "raw"
    )
    places = {int(x): float(y) for x, y in (point.split(",") for point in raw["points"].split())}
    low, high = report.round_bounds(min(values), max(values))
    assert [high - places[n] / 100 * (high - low) for n in range(100)] == pytest.approx(
        values, abs=1e-5
    )


@pytest.mark.parametrize(
    "break_it, part",
    [
        (lambda p: (p / "config.json").unlink(), "No such file"),
        (
            lambda p: (p / "metrics.jsonl").write_text('{"step": 1}\n{step\n'),
            "metrics.jsonl: line 2: no valid JSON",
        ),
        (lambda p: (p / "evaluation.json").write_text("{"), "evaluation.json: no valid JSON"),
    ],
)
def test_what_is_no_run_is_one_line(copied, tmp_path, break_it, part):
    break_it(copied)
    code, lines, _ = forked(tmp_path, experiments.report.main, "report", copied)
    assert code == 1 and len(lines) == 1 and str(copied) in lines[0] and part in lines[0]


@pytest.mark.parametrize(
    "method, curves, colours",
    [
        ("sft", ["loss", "grad_norm"], []),
        ("grpo", ["reward", "accuracy", "length", *TEXTS, "loss", "grad_norm"], []),
        (
            "opsd",
            ["reward", "accuracy", "length", "entropy", *TEXTS, "loss", "grad_norm"],
            ["entropy"],
        ),
    ],
)
def test_a_neighbour_shows_what_it_has(tiny_toy, tmp_path, method, curves, colours):
    flags = train_arguments(tiny_toy, tmp_path / "run", method=method, steps=1)
    # it samples nothing
    for flag in ("--temperature", "--top-p", "--top-k") if method == "sft" else ():
        place = flags.index(flag)
        del flags[place : place + 2]
    family_here(*flags)
    page = page_of(tmp_path / "run")
    titles = [line.split(" by step")[0] for line in page.text.splitlines() if " by step, " in line]
    assert titles == curves and page.colours() == colours
    assert bool(page.data) == (method != "sft") and all(
        "advantage" not in record for record in page.data
    )


# ---- when it is written


def test_a_run_that_is_stopped_leaves_a_report(tiny_toy, tmp_path):
    def stop():
        finish = run.StepLog.finish_step

        def finish_step(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
            return finish(*args, **kwargs)

        run.StepLog.finish_step = finish_step

    code, lines, _ = forked(
        tmp_path, train.main, "train.py", *train_arguments(tiny_toy, "run"), before=stop
    )
    assert code == 143 and len(lines) == 1 and "stopped after step 1" in lines[0]
    assert (
        "1 of 4 steps" in page_of(tmp_path / "run").text
        and len(page_of(tmp_path / "run").data) == 4
    )


def test_a_run_that_fails_leaves_a_report(tiny_toy, tmp_path, monkeypatch):
    update = train.Trainer.update

    def fail_at_the_third(self):
        if self.step == 2:
            raise InputError("not finite")
        return update(self)

    monkeypatch.setattr(train.Trainer, "update", fail_at_the_third)
    with pytest.raises(InputError, match="not finite"):
        train_here(*train_arguments(tiny_toy, tmp_path / "run"))
    assert "2 of 4 steps" in page_of(tmp_path / "run").text
    monkeypatch.setattr(train.Trainer, "update", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_here(*train_arguments(tiny_toy, tmp_path / "at-once"))
    assert not (tmp_path / "at-once" / "report.html").exists()


def test_a_report_that_cannot_be_written_is_a_warning(tiny_toy, tmp_path, monkeypatch, capsys):
    real = report.checkpoint.write_text

    def write_text(path, text):
        if path.name == "report.html":
            raise OSError(28, "No space left on device")
        real(path, text)

    arguments = train_arguments(tiny_toy, tmp_path / "run", steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(report.checkpoint, "write_text", write_text)
        patch.setattr(
            report.checkpoint, "write_json", lambda path, value: path.write_text(json.dumps(value))
        )
        train_here(*arguments)
    out, error = capsys.readouterr()
    warnings = [line for line in error.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "no report.html" in warnings[0] and "No space left" in warnings[0]
    assert "report.html" not in out and (tmp_path / "run" / "model").is_dir()
    train_here(*train_arguments(tiny_toy, tmp_path / "other", steps=1))
    assert capsys.readouterr().out.splitlines()[-1] == f"open {tmp_path / 'other' / 'report.html'}"


def test_only_the_first_process_writes(tmp_path):
    ranks = Ranks.alone()
    ranks.rank = 1
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    with run.StopRequest(ranks).checkpointed(SimpleNamespace(out=tmp_path)):
        pass
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
