"""experiments/bench.py on models that take seconds: it runs, and its instruments measure."""

import json
import re
import sys

import pytest
import torch
from conftest import ROOT

import support.data
from experiments import bench
from support.settings import Settings


def figures(monkeypatch, tmp_path, *numbers, code=0):
    """The rows of these numbers at the tiny shape, by name and unit."""
    monkeypatch.setattr(bench, "VOCABULARY", 256)
    monkeypatch.chdir(tmp_path)
    flags = ["--shape", "tiny", "--repeats", "2", "--out", "b.json", "--rows", *map(str, numbers)]
    monkeypatch.setattr(sys, "argv", ["bench", *flags])
    with pytest.raises(SystemExit) as end:
        bench.main()
    assert end.value.code == code
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["command"].startswith("python -m experiments.bench --shape tiny --repeats 2")
    return {f"{row['row']} {row['unit']}": row for row in written["rows"]}


def test_bench_measures_and_reports(monkeypatch, tmp_path, capsys):
    rows = figures(monkeypatch, tmp_path, 1, 2, 3)
    assert len(rows) == 6 and all(
        len(row["ours"]) >= 1 and min(row["ours"]) >= 0 for row in rows.values()
    )
    mixed = rows["1 mixed lengths tokens/s"]
    assert min(mixed["peer"]) > 0 and min(mixed["limit"]) > 0
    printed = capsys.readouterr().out
    ratios = [ours / peer for ours, peer in zip(mixed["ours"], mixed["peer"], strict=True)]
    assert f"({min(ratios):.2f}-{max(ratios):.2f})" in printed and torch.__version__ in printed


def test_a_step_must_read_the_weights_and_the_columns_of_all_rows(monkeypatch, tmp_path):
    rows = figures(monkeypatch, tmp_path, 4)
    speed = 1e12 * rows["4 copying TB/s"]["ours"][0]
    shape = bench.SHAPES["tiny"]
    weights = sum(p.numel() for p in bench.random_model(tiny_settings()).parameters())
    # keys and values
    column = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    for count in (4, 32):
        row = rows[f"4 decode step, {count} x 1,024 s"]
        read = 4 * (weights + count * 1024 * column)
        assert row["limit"][0] * speed == pytest.approx(read)
        assert row["ours"][0] > 0


def test_the_profiler_says_which_attention_runs(monkeypatch, tmp_path, capsys):
    rows = figures(monkeypatch, tmp_path, 6)
    assert len(rows) == 2 and all("_attention" in name for name in rows)
    assert "# of Calls" in capsys.readouterr().out


def tiny_settings():
    return bench.BenchSettings(device="cpu", shape="tiny")


def test_the_training_step_is_the_paper_s(monkeypatch, tmp_path):
    """Of it, only the number of completions is that of one GPU of eight."""
    rows = figures(monkeypatch, tmp_path, 5)
    for phase in ("rollout", "teacher", "student"):
        seconds = rows[f"5 {phase} s"]
        assert len(seconds["ours"]) == 2 and min(seconds["ours"]) > 0
        assert min(rows[f"5 {phase} peak GiB"]["ours"]) > 0
    s = tiny_settings()
    load = bench.train.load_model
    t = bench.random_trainer(s, str(tmp_path))
    assert bench.train.load_model is load is support.data.load_model
    small = {"data": "toy", "out": str(tmp_path), "prompts_per_step": 4}
    small |= {"max_new_tokens": s.fewer(1024), "lora_rank": s.fewer(64)}
    assert t.s == Settings(**small)
    problem = t.problems[0]
    assert len(t.student_prompt(problem)) == pytest.approx(512, abs=20)
    assert len(t.teacher_prompt(problem, problem.solution)) == pytest.approx(1024, abs=50)
    metrics = t.train_step()
    assert metrics["tokens"] == 4 * s.fewer(1024) and metrics["truncated"] == 1


def test_the_formulas_are_those_of_the_page():
    page = (ROOT / "docs" / "gpu.md").read_text()

    def first(name):  # GiB of the 4B model in the row that begins like this
        return float(re.search(rf"^\| {name}.*?(\d+\.\d+) \| \d+\.\d+ \|$", page, re.M)[1])

    buckets = first(r"d \| DDP's buckets")
    for phase, name in (("rollout", "sampling"), ("teacher", "teacher"), ("student", "student, ")):
        assert bench.FORMULA[phase][0] == pytest.approx(first(name) - buckets, abs=0.06)


def test_a_row_that_fails_does_not_hide_the_next(monkeypatch, tmp_path, capsys):
    def broken(s):
        yield bench.row_of("4 before", "s", [1.0])
        raise RuntimeError("no kernel")

    monkeypatch.setitem(bench.ROWS, 4, broken)
    rows = figures(monkeypatch, tmp_path, 4, 1, code=1)
    assert list(rows) == ["4 before s", "1 mixed lengths tokens/s"]
    assert "no kernel" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_memory_is_that_of_the_work():
    def work():
        torch.ones(32 * 2**20)  # 128 MiB, gone at once
        torch.ones(8 * 2**20)

    assert 0.12 < bench.peak_gib(work) < 0.14


def test_useful_tokens_are_counted_alike(model):
    """With one token that always stops both samplers make one token per row, with none both run to
    the cap."""
    prompts = bench.random_prompts(4, 6, 61)
    for sampler in (bench.our_tokens, bench.peer_tokens):
        assert sampler(model, prompts, max_new_tokens=7, stop_ids=list(range(61)), slots=2) == 4
        assert (
            sampler(model, prompts, max_new_tokens=7, stop_ids=[], slots=4, samples_per_prompt=2)
            == 4 * 2 * 7
        )


def test_the_peer_counts_as_ours_does(model, monkeypatch):
    """Greedily both make the same tokens: some rows stop, some run to the cap, and more wait than
    are decoded."""
    monkeypatch.setattr(bench, "DRAW", {"do_sample": False, "pad_token_id": 0})
    prompts = bench.random_prompts(7, 6, 61)
    settings = dict(max_new_tokens=20, stop_ids=[3, 5, 7, 11, 13], slots=3)
    ours = bench.our_tokens(model, prompts, temperature=0, **settings)
    assert 7 < ours < 7 * 20
    assert bench.peer_tokens(model, prompts, **settings) == ours
