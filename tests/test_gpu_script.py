"""experiments/gpu.py without a GPU: what it does with commands that work, fail or take too long."""

import json
import shutil
import sys

import pytest
import torch

from experiments import bench, gpu
from support import flags, settings

NEEDS_TIMEOUT = pytest.mark.skipif(not shutil.which("timeout"), reason="needs GNU's timeout")


def start(monkeypatch, root, commands, *argv):
    """The figures that the script writes when these are its commands; `root` is the repository."""
    (root / "results").mkdir(parents=True, exist_ok=True)
    for name, value in (("ROOT", root), ("RESULTS", root / "results"), ("COMMANDS", commands)):
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu, "SMALL", {text.split()[0]: "" for _, text in commands.values()})
    monkeypatch.setattr(sys, "argv", ["gpu", *argv])
    gpu.main()
    (place,) = root.glob("**/gpu.json")
    return place.relative_to(root), json.loads(place.read_text())


@NEEDS_TIMEOUT
def test_nothing_hides_the_rest(monkeypatch, tmp_path, capsys):
    commands = {
        "failing": (20, "no_such_module"),
        "hanging": (1, "http.server 0"),
        "working": (20, "this"),
        "showing": (20, "site"),  # prints sys.path, which has the directory of the repository
    }
    place, figures = start(monkeypatch, tmp_path, commands, "--small")
    assert place.parts[0] == "runs"  # results/ is for figures of a GPU
    assert [figures[name]["code"] for name in commands] == [1, 124, 0, 0]
    assert 1 <= figures["hanging"]["seconds"] < 10
    assert "No module named no_such_module" in figures["failing"]["log"]
    assert "Namespaces are one honking great idea" in figures["working"]["log"]
    assert str(tmp_path) not in json.dumps(figures) and "sys.path" in figures["showing"]["log"]
    *_, failing, hanging, working, _, last = capsys.readouterr().out.splitlines()
    for line, name, code in ((failing, "failing", 1), (hanging, "hanging", 124)):
        assert line.startswith(f"{name}: exit code {code}, ") and line.endswith(f"/{name}.log")
    assert working.startswith("working: exit code 0, ") and last.endswith("/gpu.json")


def test_a_gpu_is_needed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        start(monkeypatch, tmp_path, gpu.COMMANDS)
    assert "no CUDA GPU here: --small" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@NEEDS_TIMEOUT
def test_only_figures_of_a_gpu_go_to_results(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    commands = {"working": (20, "this")}
    assert start(monkeypatch, tmp_path / "a", commands)[0].parts[0] == "runs"  # it is simulated
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert start(monkeypatch, tmp_path / "b", commands)[0].parts[0] == "results"
    assert start(monkeypatch, tmp_path / "c", commands, "--small")[0].parts[0] == "runs"


def test_all_fits_into_nine_minutes():
    assert sum(limit + 5 for limit, _ in gpu.COMMANDS.values()) <= 540


@pytest.mark.parametrize("name", gpu.COMMANDS)
def test_flags_are_accepted(name):
    _, text = gpu.COMMANDS[name]
    words = (text + gpu.SMALL[text.split()[0]]).split()
    if "train.py" in words:
        s, _ = settings.parse(words[words.index("train.py") + 1 :], "")
        s.check()
        assert s.model == "toy" and s.eval_data == "" and s.steps == 4
    elif words[0] == "experiments.bench":
        assert flags.parse(bench.BenchSettings, words[1:], "").shape == "tiny"
    else:
        assert words[0] in ("pytest", "torch.utils.collect_env")


def test_steps_stand_beside_the_same_steps_of_another_run(tmp_path):
    def write(name, *rewards):
        (tmp_path / name).mkdir()
        lines = [
            json.dumps({"reward": reward, "grad_norm": 1.0, "rollout_s": 2.0}) + "\n"
            for reward in rewards
        ]
        (tmp_path / name / "metrics.jsonl").write_text("".join(lines))

    assert gpu.toy_rows(tmp_path) == []
    write("toy", 0.5, 0.75, 0.25)
    write("ranks", 0.25, 0.75)
    write("graphs", 1, 1, 1, 1)  # toy was stopped before
    rows = {row["row"]: row for row in gpu.toy_rows(tmp_path) if row["unit"] == "reward"}
    assert rows["ranks; peer: toy"]["ours"] == [0.25, 0.75]
    assert rows["ranks; peer: toy"]["peer"] == [0.5, 0.75]
    assert rows["toy; peer: toy_on_cpu"]["peer"] == pytest.approx(
        [0.6202, 0.4824, 0.4837], abs=1e-4
    )
    assert rows["graphs; peer: toy"]["ours"] == [1, 1, 1] and len(rows) == 3
    assert all(bench.line(row) for row in rows.values())
