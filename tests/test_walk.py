"""experiments.walk: its step is train.py's, its numbers are those of plain loops, its page tells
the stored record."""

import copy
import json
import math
import re
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

import egrsd
import train
from experiments import walk
from support.distributed import Ranks
from support.settings import Settings

ROOT = Path(walk.__file__).parent.parent
READ = ("log p_S", "log p_T", "H")  # columns that no flag changes


@pytest.fixture(scope="module")
def make(tiny_toy):
    def make(**changes):
        return walk.record(
            {
                "model": str(tiny_toy / "model"),
                "data": str(tiny_toy / "train.jsonl"),
                "max_new_tokens": 12,
                "lr": 1e-2,
                "lora_rank": 4,
                "top_k": 0,
                "top_p": 1.0,
                "gradient_checkpointing": False,
            }
            | changes,
            earlier=10,
        )

    return make


@pytest.fixture(scope="module")
def found(make):
    return make()


def told(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["walk", *map(str, argv)])
    walk.main()
    return capsys.readouterr().out


def test_the_page_is_what_its_command_prints(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    printed = told(monkeypatch, capsys, "--from", "results/walk.json")
    assert printed == (ROOT / "docs" / "walk.md").read_text(encoding="utf-8"), (
        "make docs/walk.md again: see walk.py"
    )
    settings = json.loads((ROOT / "results" / "walk.json").read_text())["settings"]
    # no path of a machine
    assert (settings["model"], settings["data"], settings["out"]) == ("toy", "toy", "")


def test_the_step_is_the_trainer_s(found, tmp_path):
    t = train.Trainer(Settings(**found["settings"] | {"out": str(tmp_path)}), Ranks.alone())
    t.step = found["before"]["steps"]
    t.baseline.load_state_dict(found["before"])
    with tqdm(disable=True) as t.log.bar:
        metrics = t.train_step()
    assert {name: metrics[name] for name in found["metrics"]} == found["metrics"]


def test_every_number_is_that_of_its_definition(found):
    s, before, total = found["settings"], found["before"], 0.0
    assert (
        before["steps"] >= 10 and before["count"] == 2 * before["steps"] and not before["warm_up"]
    )
    for c in found["completions"]:
        A, near = c["A"], dict(abs=2e-4)
        assert A == pytest.approx((c["reward"] - before["mean"]) / before["std"])
        assert c["reward"] == (1 + 0.5 * (1 - c["tokens"] / 12) if c["correct"] else 0)
        assert len(c["text"]) == len(c["after"]) == c["tokens"] and c["after"] != c["log p_S"]
        for t in range(c["tokens"]):
            ratio = math.exp(math.copysign(1, A) * (c["log p_T"][t] - c["log p_S"][t]))
            least = min(c["H"][t : t + s["window"] + 1])
            omega = 1 - s["gamma"] * least / max(1, found["metrics"]["max_entropy"])
            assert c["w"][t] == pytest.approx(min(max(ratio, 0.8), 1.2), **near)
            assert c["least H"][t] == least and c["omega"][t] == pytest.approx(omega, **near)
            assert c["A-hat"][t] == pytest.approx(A * c["w"][t] * c["omega"][t], **near)
            total -= c["A-hat"][t] * c["log p_S"][t]
    assert {c["correct"] for c in found["completions"]} == {True, False}
    assert total / sum(c["tokens"] for c in found["completions"]) == pytest.approx(
        found["metrics"]["loss"], abs=2e-4
    )


def test_a_loss_that_is_another_is_noticed(make, monkeypatch):
    monkeypatch.setattr(
        egrsd,
        "policy_loss",
        lambda logp, weights, mask, num_tokens: -(logp * mask).sum() / num_tokens,
    )
    with pytest.raises(AssertionError, match="but train_step returned"):
        make()


@pytest.mark.parametrize(
    "flag, same, constant",
    [
        ("window", ("w",), ("least H", None)),
        ("gamma", ("w", "least H"), ("omega", 1)),
        ("eps", ("least H", "omega"), ("w", 1)),
    ],
)
def test_a_flag_at_0_changes_its_column(found, make, flag, same, constant):
    changed, (name, value) = make(**{flag: 0})["completions"], constant
    for c, other in zip(found["completions"], changed, strict=True):
        assert all(other[key] == c[key] for key in ("text", "A", "kind", *READ, *same))
        assert other[name] == (other["H"] if value is None else [value] * c["tokens"])
    for key in (name, "A-hat"):
        assert [c[key] for c in changed] != [c[key] for c in found["completions"]]


def test_the_kinds_look_soon_tokens_ahead_whatever_the_window(make):
    kinds = set()
    for c in make(window=0)["completions"]:
        for t, H in enumerate(c["H"]):
            soon = min(c["H"][t : t + egrsd.SOON + 1])
            expected = "lock" if H < egrsd.HIGH else "pivot" if soon < egrsd.LOW else "fork"
            assert c["kind"][t] == expected
            kinds.add(expected)
    assert len(kinds) > 1


def test_the_text_fits_and_its_paragraphs_are_paragraphs(found, monkeypatch):
    monkeypatch.setattr(walk, "MOST_TOKENS", 2)
    text = walk.tell(found)
    table = text.split("At most 2 tokens are shown:\n\n")[1].split("\n\n")[0]
    assert max(map(len, text.splitlines())) <= 120 and len(table.splitlines()) == 1 + 2
    for line in text.splitlines():  # no wrapped line begins a list, a quotation or a heading
        assert not re.match(r" {1,3}\S|[-+*>=]|\d+[.)]|#(?!#? )", line), line


def test_texts_of_the_data_cannot_leave_their_blocks(found):
    bad = (
        "```\n# x\n\n| a | `b` {c} \r\x1b[31m\u202e \\boxed{}\n\n</pre>\t"
        + "word" * 99
        + "\n" * 99
        + "end"
    )
    hostile = copy.deepcopy(found)
    for c in hostile["completions"]:
        c |= dict.fromkeys(
            ("problem", "solution", "prompt", "teacher_prompt", "completion", "answer", "gold"), bad
        )
        c["text"] = [bad] * c["tokens"]

    def prose(record):
        return [
            line for line in walk.tell(record).split("\n") if line and not line.startswith("    ")
        ]

    assert prose(hostile) == prose(found)
    text = walk.tell(hostile)
    assert (
        not re.search("[\r\x1b\u202e]", text)
        and max(map(len, text.splitlines())) <= 120
        and "... cut ..." in text
    )


def test_the_command_on_a_file(found, monkeypatch, capsys, tmp_path):
    stored = tmp_path / "walk.json"
    stored.write_text(json.dumps(found))
    command = f"python -m experiments.walk --from {stored}"
    assert told(monkeypatch, capsys, "--from", stored) == walk.tell(found, command) + "\n"
    for flags, message in (
        (["--from", tmp_path / "none"], "cannot be read"),
        (["--from", stored, "--gamma", "0"], "leave out"),
        (["--eps", "2"], "--eps must be below 1"),
    ):
        with pytest.raises(SystemExit):
            told(monkeypatch, capsys, *flags)
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
