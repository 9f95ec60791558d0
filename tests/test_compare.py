"""experiments.compare and experiments.plot: the rules by which numbers become tables."""

import doctest
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import family
from experiments import compare, plot
from support import settings

ROOT = Path(compare.__file__).parent.parent


def test_doctests():
    assert doctest.testmod(compare).failed == 0 and doctest.testmod(plot).failed == 0


def test_interval_is_student_s_t():
    found = compare.interval([0.8, 0.9, 0.85, 0.95, 0.7])
    assert found["mean"] == pytest.approx(0.84)
    assert found["half_width"] == pytest.approx(2.776 * np.std([0.8, 0.9, 0.85, 0.95, 0.7], ddof=1) / 5 ** 0.5)
    assert compare.interval([0.5])["half_width"] is None


def arguments(tmp_path, *flags):
    paths = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json")]
    return compare.parse_arguments([*paths, *map(str, flags)])


@pytest.mark.parametrize("accuracy,chosen,tried", [
    ({3e-4: 0.5, 1e-3: 0.6, 3e-3: 0.4}, 1e-3, 3),  # inside
    ({3e-4: 0.6, 1e-3: 0.6, 3e-3: 0.4, 1e-4: 0.5}, 3e-4, 4),  # of equals the smallest; an edge is gone beyond
    ({3e-4: 0.1, 1e-3: 0.2, 3e-3: 0.3, 1e-2: 0.4, 3e-2: 0.5, 1e-1: 0.6}, 1e-1, 6)])  # as far as the ladder goes
def test_rule_for_the_learning_rate(tmp_path, monkeypatch, accuracy, chosen, tried):
    asked = []

    def run_all(jobs, a, title):
        asked.extend(jobs)
        assert all(seed == a.choose_seed and split == "validation" for _, _, seed, split in jobs)
        return [{"name": name, "rate": rate, "accuracy": accuracy[rate]} for name, rate, _, _ in jobs]
    monkeypatch.setattr(compare, "run_all", run_all)
    rates, runs = compare.choose_rates(["grpo"], arguments(tmp_path))
    assert rates == {"grpo": chosen} and len(runs) == tried == len(asked)


def test_every_run_has_the_same_number_of_rollouts(tmp_path):
    """... and train.py takes its flags, none of which is without effect."""
    a = arguments(tmp_path)
    for name in compare.variants():
        run, _ = settings.parse(compare.flags(name, a), "", family)
        settings.check(run, 1, family)
        assert run.prompts_per_step * run.rollouts_per_prompt == 32 and run.steps == 40
        assert run.method == name or name not in compare.methods()


def test_order_of_the_table():
    """That of the recorded comparison; a method that is added later comes last."""
    path = ROOT / "results" / "compare.json"
    if not path.exists():
        pytest.skip("no recorded comparison")
    recorded = json.loads(path.read_text())
    assert compare.methods()[:len(recorded["methods"])] == recorded["methods"]
    assert list(recorded["rows"]) == [compare.BASE, *recorded["methods"],
                                      *(name for name in compare.variants() if name not in compare.methods())]


def test_jobs(tmp_path, monkeypatch):
    """Methods with their own rate and all seeds, variants with their parent's rate and fewer."""
    seen = []

    def run_all(jobs, a, title):
        seen.extend(jobs)
        accuracy = {"opsd": {1e-3: 0.5, 3e-3: 0.6}, "cl-egrsd": {1e-3: 0.7}}
        return [result(name, seed, accuracy.get(name, {}).get(rate, 0.2)) | {"rate": rate, "seconds": 1.0}
                for name, rate, seed, _ in jobs]
    monkeypatch.setattr(compare, "run_all", run_all)
    monkeypatch.setattr(compare, "make_splits", lambda a: None)
    monkeypatch.setattr(sys, "argv", ["compare", "--only", "opsd", "gate off", "--work", str(tmp_path)])
    compare.main()
    assert [job for job in seen if job[3] == "test"] == [
        (name, rate, seed, "test") for name, rate in ((compare.BASE, 0.0), ("opsd", 3e-3), ("gate off", 1e-3))
        for seed in range(5)]
    written = json.loads((tmp_path / "only.json").read_text())  # not over the recorded comparison
    assert written["command"] == "python -m experiments.compare" and written["settings"]["seeds"] == [0, 1, 2, 3, 4]
    assert list(written["rows"]) == [compare.BASE, "opsd", "gate off"] and "gate off" in written["curves"]


@pytest.mark.parametrize("name, complaint", [("short", "1 problems, --validation takes 480"), ("none", "no such data")])
def test_mistakes_end_in_one_line(tmp_path, monkeypatch, capsys, name, complaint):
    (tmp_path / "short.jsonl").write_text("one problem\n")
    monkeypatch.setattr(sys, "argv", ["compare", "--work", str(tmp_path), "--data", str(tmp_path / f"{name}.jsonl")])
    with pytest.raises(SystemExit, match="1"):
        compare.main()
    message = capsys.readouterr().err
    assert message.startswith("python -m experiments.compare: ") and complaint in message
    assert message.count("\n") == 1


def result(name, seed, accuracy):
    return {"name": name, "seed": seed, "rate": 1e-3, "command": "c", "accuracy": accuracy, "length": 30.0, "eff": 2.0,
            "markers_per_response": 1.0, "markers_per_1000_tokens": 2.0, "repetition": 0.0, "curves": {}}


def test_differences_are_taken_seed_by_seed():
    rows = compare.summarise([result("cl-egrsd", 0, 0.8), result("cl-egrsd", 1, 0.6), result("grpo", 1, 0.5),
                              result("grpo", 0, 0.7)])
    assert rows["grpo"]["cl-egrsd minus this"]["accuracy"] == {
        "mean": pytest.approx(0.1), "half_width": pytest.approx(0, abs=1e-9), "values": [0.1, 0.1]}
    assert "cl-egrsd minus this" not in rows["cl-egrsd"] and "egrsd minus this" not in rows["grpo"]
    assert "| grpo | 0.001 | 60.0 ± 127.1 | 30.0 ± 0.0 |" in compare.table(rows)


def test_a_run_is_made_once_and_says_how(tiny_toy, tmp_path, monkeypatch):
    a = arguments(tmp_path, "--model", tiny_toy / "model", "--data", tiny_toy / "train.jsonl",
                  "--test", tiny_toy / "test.jsonl", "--steps", 1, "--max-new-tokens", 12, "--samples", 1,
                  "--completions", 8, "--validation", 50)
    monkeypatch.chdir(ROOT)
    compare.make_splits(a)
    train, validation = ((a.work / f"{name}.jsonl").read_text() for name in ("train", "validation"))
    assert train + validation == (tiny_toy / "train.jsonl").read_text() and validation.count("\n") == 50
    first = compare.run("grpo", 1e-3, 0, "validation", a)
    assert first["problems"] == 50 and 0 < first["accuracy"] < 1 and len(first["curves"]["reward"]) == 1
    assert "--method grpo --lr 0.001 --seed 0" in first["command"]
    samples = (a.work / "grpo" / "lr0.001-seed0" / "validation-samples.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["correct"] for line in samples) / 50 == first["accuracy"]
    trained = (a.work / "grpo" / "lr0.001-seed0" / "run" / "metrics.jsonl").stat().st_mtime_ns
    assert compare.run("grpo", 1e-3, 0, "validation", a) == first
    compare.run("grpo", 1e-3, 0, "test", a)  # the same model on other problems
    assert (a.work / "grpo" / "lr0.001-seed0" / "run" / "metrics.jsonl").stat().st_mtime_ns == trained
    a.steps = 2  # other settings, another run

    def train_again(command, **_):
        assert command[command.index("--steps") + 1] == "2"
        sys.exit("trains again")
    monkeypatch.setattr(compare.subprocess, "run", train_again)
    with pytest.raises(SystemExit, match="trains again"):
        compare.run("grpo", 1e-3, 0, "test", a)


def test_a_recorded_comparison_is_that_of_the_documentation():
    """The table of docs/evidence.md is the one that the recorded results give."""
    path = ROOT / "results" / "compare.json"
    if not path.exists():
        pytest.skip("no recorded comparison")
    rows = json.loads(path.read_text())["rows"]
    documentation = (ROOT / "docs" / "evidence.md").read_text()
    for line in compare.table(rows).splitlines()[2:]:
        assert line in documentation
