"""eval.py: the figures against brute force, the command line against samples graded again."""

import doctest
import itertools
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import in_background

import eval as evaluation
import reward
import rollout


def test_pass_at_k_equals_counting_all_subsets():
    for n, correct in itertools.product(range(1, 7), range(7)):
        for k in range(1, n + 1):
            if correct <= n:
                subsets = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
                assert evaluation.pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_majority_votes_over_equivalence_classes():
    """A vote on raw strings splits 1/2 and \\frac12, and lets "no answer" win nothing or everything."""
    assert evaluation.majority_accuracy(["1/2", "\\frac12", "3", "3", "0.5"], "0.5") == 1
    assert evaluation.majority_accuracy(["1/2", "\\frac12", "3", "3"], "0.5") == 0.5
    assert evaluation.majority_accuracy([None, None, "3"], "3") == 0
    assert evaluation.majority_accuracy([None, "3"], "3") == 0.5


def test_bootstrap_interval_covers_what_it_should():
    low, high = evaluation.bootstrap_interval([0.0] * 50 + [1.0] * 50)
    assert low == pytest.approx(0.40, abs=0.02) and high == pytest.approx(0.60, abs=0.02)  # 0.5 +- 1.96 * 0.05
    assert evaluation.bootstrap_interval([1.0] * 5) == (1.0, 1.0)


def test_two_checkpoints_on_two_files(tiny_run, tiny_toy, tmp_path, monkeypatch, capsys):
    """The whole command: a table, and samples that grade again to the same figures."""
    lines = (tiny_toy / "test.jsonl").read_text().splitlines()[:60]
    test, other, model = tmp_path / "test.jsonl", tmp_path / "other.jsonl", tiny_toy / "model"
    question = {"question": "Is it \\frac{1}{2}?", "answer": "1"}
    test.write_text("\n".join(lines) + "\n")
    other.write_text(lines[0] + "\n" + json.dumps(question) + "\n")
    argv = ["eval.py", "--model", model, "--model", model, "--adapter", tiny_run / "checkpoints/step-000004/adapter",
            "--data", test, "--data", other, "--samples", 3, "--max-new-tokens", 12, "--no-thinking",
            "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    evaluation.main()
    table = capsys.readouterr().out
    assert table.count("macro average") == 2 and table.count("step-000004/adapter") == 3
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 3 * (len(lines) + 2)
    assert all(row["correct"] == (row["finished"] and reward.grade(row["completion"], row["gold"])) for row in rows)
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    first = results[0]["checkpoint"]
    mine = [row for row in rows if row["checkpoint"] == first and row["data"] == str(test)]
    assert results[0]["avg"] > 0 and results[0]["avg"] == pytest.approx(sum(row["correct"] for row in mine) / len(mine))
    assert results[0]["length"] == pytest.approx(sum(row["tokens"] for row in mine) / len(mine))
    assert results[2]["avg"] == pytest.approx((results[0]["avg"] + results[1]["avg"]) / 2)  # macro, not micro


@pytest.fixture(scope="module", autouse=True)
def two_processes(tiny_toy, tmp_path_factory):
    out, program = tmp_path_factory.mktemp("two"), Path(evaluation.__file__)
    lines = (tiny_toy / "test.jsonl").read_text().splitlines(keepends=True)[:9]
    (out / "nine.jsonl").write_text("".join(lines))
    flags = ["--model", tiny_toy / "model", "--data", out / "nine.jsonl", "--samples", "2", "--max-new-tokens", "12"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", program]
    with in_background([*torchrun, *flags, "--out", out / "two"], out / "log", cwd=program.parent,
                       env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        yield process, out, list(map(str, flags))


def test_two_processes_write_the_samples_of_one(two_processes, monkeypatch):
    process, out, flags = two_processes
    monkeypatch.setattr(sys, "argv", ["eval.py", *flags, "--out", str(out / "one")])
    evaluation.main()
    assert process.wait(timeout=200) == 0, (out / "log").read_text()
    assert sorted(path.name for path in (out / "two").iterdir()) == ["results.json", "samples.jsonl"]
    assert (out / "one" / "samples.jsonl").read_text() == (out / "two" / "samples.jsonl").read_text()


@pytest.mark.parametrize("change, message", [
    (["--data", "nothing.jsonl"], "nothing.jsonl: no such data file"),
    (["--model", "./nothing"], "./nothing: no such model"),
    (["--samples", "0"], "--samples"),
    (["--adapter", "a", "--adapter", "b"], "--adapter"),
    (["--adapter", "a"], "a: cannot load"),
    (["--max-new-tokens", "5000"], "line 1: field 'problem'"),
    (["--top-p", "2"], "--top-p"),
    (["--sampels", "2"], "--sampels")])
def test_mistakes_are_one_line(tiny_toy, tmp_path, monkeypatch, capsys, change, message):
    argv = ["eval.py", "--out", str(tmp_path / "out"), "--max-new-tokens", "4"]
    for name, value in (("--model", "model"), ("--data", "test.jsonl")):
        argv += [] if name in change else [name, str(tiny_toy / value)]
    monkeypatch.setattr(sys, "argv", argv + change)
    with pytest.raises(SystemExit) as exit:
        evaluation.main()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit.value.code == 1 and error.startswith("eval.py: ") and message in error
    assert not (tmp_path / "out").exists()


def test_no_free_memory_names_the_flag_to_lower(tiny_toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rollout, "sample", lambda *args, **kwargs: torch.empty(2**60))
    argv = ["eval.py", "--model", tiny_toy / "model", "--data", tiny_toy / "test.jsonl", "--max-new-tokens", 4,
            "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    with pytest.raises(SystemExit) as exit:
        evaluation.main()
    assert exit.value.code == 1 and "--slots" in capsys.readouterr().err.splitlines()[-1]


def test_doctests():
    results = doctest.testmod(evaluation)
    assert results.attempted > 2 and results.failed == 0
