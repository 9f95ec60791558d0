"""experiments.figures and experiments.sweep: their numbers against loops, and both commands on the
tiny toy."""

import json
import sys

import numpy as np
import pytest
from conftest import train_here

from experiments import figures, sweep
from support.errors import InputError


def result(checkpoint, data, accuracy, length, half=0.02):
    bounds = {"low": accuracy - half, "high": accuracy + half}
    return {"checkpoint": checkpoint, "data": data, "avg": accuracy, "length": length} | bounds


def called(monkeypatch, capsys, module, *argv):
    monkeypatch.setattr(sys, "argv", [module.PROGRAM, *map(str, argv)])
    module.main()
    return capsys.readouterr().out


@pytest.fixture
def pyplot():
    pytest.importorskip("matplotlib").use("Agg")


# ---- figures


def test_a_checkpoint_is_the_mean_of_its_files():
    files = [
        {"results": [result("a", "x", 0.5, 100, 0.03), result("b", "x", 0.7, 90)]},
        {"results": [result("b", "y", 0.1, 110), result("a", "y", 0.3, 300, 0.04)]},
    ]
    points = figures.checkpoints(files)
    assert points["a"] == pytest.approx((200, 40, 100 * 0.05 / 2))
    assert points["b"] == pytest.approx((100, 40, 100 * 0.02 / 2**0.5))


@pytest.mark.parametrize(
    "results",
    [
        [],
        [result("a", "x", 0.5, 100), result("a", "x", 0.6, 100)],
        [result("a", "x", 0.5, 100), result("b", "y", 0.6, 100)],
    ],
)
def test_only_evaluations_on_the_same_files_are_compared(results):
    with pytest.raises(InputError, match="once on each data file"):
        figures.checkpoints([{"results": results}])


def test_the_frontier_is_what_no_other_checkpoint_beats():
    rng = np.random.default_rng(0)
    for _ in range(50):
        places = rng.integers(5, size=(8, 2))
        points = {str(n): (float(x), float(y), 0) for n, (x, y) in enumerate(places)}
        front = [points[name][:2] for name in figures.unbeaten(points)]
        for length, accuracy in places:
            is_beaten = any(
                (x <= length and y > accuracy) or (x < length and y >= accuracy) for x, y in places
            )
            assert is_beaten != ((length, accuracy) in front)


def test_evaluations_become_a_picture(pyplot, tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.json"
    path.write_text(
        json.dumps({"results": [result("a", "x", 0.5, 100), result("b", "x", 0.4, 120)]})
    )
    out = tmp_path / "front.png"
    printed = called(monkeypatch, capsys, figures, path, "--out", out)
    assert "| a | 50.0 ± 2.0 | 100.0 | 500.00 | yes |" in printed
    assert "| b | 40.0 ± 2.0 | 120.0 | 333.33 |  |" in printed
    assert out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        called(monkeypatch, capsys, figures, path, tmp_path / "none.json")


def test_diagnostics_become_a_picture(pyplot, tmp_path, monkeypatch, capsys):
    numbers = {"normalised": 0.25, "|d|": 0.125, "gate": 0.75, "cl_gate": 0.875, "change": 0.125}
    nothing = dict.fromkeys(numbers) | {"share": 0.0}
    found = {"deciles": [numbers] * 10, "regimes": {"a": numbers | {"share": 1.0}, "b": nothing}}
    (tmp_path / "diagnostics.json").write_text(json.dumps(found))
    out = tmp_path / "deciles.png"
    called(monkeypatch, capsys, figures, tmp_path / "diagnostics.json", "--out", out)
    assert out.read_bytes().startswith(b"\x89PNG")


# ---- sweep


def test_without_a_gate_there_is_no_lookahead():
    s = sweep.SweepSettings(gamma=[0.0, 0.3, 1.0], window=[0, 3])
    assert sweep.grid(s) == [(0.0, 0), (0.3, 0), (0.3, 3), (1.0, 0), (1.0, 3)]


def test_a_sweep_trains_evaluates_and_goes_on(pyplot, tiny_toy, tmp_path, monkeypatch, capsys):
    data = ["--data", tiny_toy / "test.jsonl"]
    train = ["--preset", "toy", "--model", tiny_toy / "model", *data, "--eval-data="]
    train += ["--prompts-per-step", 8, "--max-new-tokens", 12]
    # a stop after step 1 left a checkpoint, which is no snapshot
    point = ["--gamma", 1, "--window", 3, "--seed", 0, "--steps", 1]
    stopped = tmp_path / "out" / "gamma-1-W-3-seed0"
    train_here(*train, *point, "--out", stopped)
    assert (stopped / "checkpoints" / "step-000001").exists()
    capsys.readouterr()
    train = " ".join(map(str, [*train, "--steps", 3, "--checkpoint-every", 2]))
    flags = ["--gamma", 1, "--window", 3, "--seeds", 0, 1, "--train", train]
    flags += ["--test", f"--data {data[1]}", "--out", tmp_path / "out"]
    printed = called(monkeypatch, capsys, sweep, *flags)
    rows = json.loads((tmp_path / "out" / "sweep.json").read_text())["rows"]
    places = [(row["gamma"], row["W"], row["step"]) for row in rows]
    assert places == [("1", "3", "2"), ("1", "3", "3")]
    for row in rows:  # the files of the evaluations say the same
        found = []
        for seed in 0, 1:
            run = tmp_path / "out" / f"gamma-{row['gamma']}-W-{row['W']}-seed{seed}"
            config = json.loads((run / "config.json").read_text())["settings"]
            assert f"{config['gamma']:g}" == row["gamma"] and config["seed"] == seed
            results = json.loads((run / "test" / "results.json").read_text())["results"]
            result = results[int(row["step"]) - 2]
            assert f"step-00000{row['step']}" in result["checkpoint"]
            found.append((100 * result["avg"], result["length"]))
        accuracy, length = np.mean(found, axis=0)
        assert row["accuracy"] == f"{accuracy:.1f}" and row["length"] == f"{length:.1f}"
        assert row["accuracy of the seeds"] == ", ".join(f"{a:.1f}" for a, _ in found)
        assert f"| {' | '.join(row.values())} |" in printed
    picture = tmp_path / "out" / "sweep.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    # nothing is trained again
    times = [path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/metrics.jsonl")]
    assert called(monkeypatch, capsys, sweep, *flags) == printed and len(times) == 2
    assert times == [path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/metrics.jsonl")]
    with pytest.raises(SystemExit):
        called(monkeypatch, capsys, sweep, *flags[:-1], tmp_path / "other", "--launch", "false")
    assert "train.py ended with code 1" in capsys.readouterr().err
