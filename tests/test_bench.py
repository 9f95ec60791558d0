"""experiments/bench.py on models that take seconds: it runs, and its instruments measure."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

import toy
from experiments import bench


@pytest.mark.slow
def test_bench_measures_and_reports(monkeypatch, tmp_path, capsys):
    tiny = dict(vocab_size=128, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8)
    monkeypatch.setattr(bench, "SMALL", bench.SMALL | tiny)
    monkeypatch.setattr(bench, "VOCABULARY", 256)
    flags = ["--rows", "1", "2", "3", "--repeats", "1", "--out", str(tmp_path / "b.json")]
    monkeypatch.setattr(sys, "argv", ["bench", *flags])
    bench.main()
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["command"].startswith("python -m experiments.bench --rows 1 2 3 --repeats 1 --out ")
    rows = {row["row"] + " " + row["unit"]: row for row in written["rows"]}
    assert len(rows) == 7 and all(len(row["ours"]) >= 1 and min(row["ours"]) >= 0 for row in rows.values())
    mixed = rows["1 mixed lengths tokens/s"]
    second = rows["1 mixed lengths, second peer tokens/s"]
    assert mixed["peer"][0] > 0 and mixed["limit"][0] > 0 and second["peer"][0] > 0
    assert second["ours"] == mixed["ours"] and second["limit"] == [] and "second" not in mixed
    printed = capsys.readouterr().out
    assert f"{mixed['ours'][0] / mixed['peer'][0]:.2f}" in printed and torch.__version__ in printed


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_memory_is_that_of_the_work():
    def work():
        torch.ones(32 * 2**20)  # 128 MiB, gone at once
        torch.ones(8 * 2**20)
    assert 0.12 < bench.peak_gib(work) < 0.14


def test_useful_tokens_are_counted_alike(model):
    """With one token that always stops both samplers make one token per row, with none both run to the cap."""
    prompts = bench.random_prompts(4, 6, 61)
    for sampler in (bench.our_tokens, bench.peer_tokens):
        assert sampler(model, prompts, 0, max_new_tokens=7, stop_ids=list(range(61)), slots=2) == 4
        assert sampler(model, prompts, 0, max_new_tokens=7, stop_ids=[], slots=4, samples_per_prompt=2) == 4 * 2 * 7


def test_both_peers_count_as_ours_does(model, monkeypatch):
    """Greedily all make the same tokens: some rows stop, some run to the cap, and more wait than are decoded."""
    monkeypatch.setattr(bench, "DRAW", {"do_sample": False, "pad_token_id": 0})
    model.set_attn_implementation("eager")  # generate_batch needs another, and puts it back
    prompts, settings = bench.random_prompts(7, 6, 61), dict(max_new_tokens=20, stop_ids=[3, 5, 7, 11, 13], slots=3)
    ours = bench.our_tokens(model, prompts, 0, temperature=0, **settings)
    assert 7 < ours < 7 * 20
    assert bench.peer_tokens(model, prompts, 0, **settings) == ours
    assert bench.batching_tokens(model, prompts, 0, **settings) == ours
    assert model.config._attn_implementation == "eager"


def test_generate_batch_decodes_as_many_rows_as_there_are_slots(model, monkeypatch):
    together = []
    monkeypatch.setattr(model, "forward", lambda *args, forward=model.forward, **keywords: (
        together.append(len(keywords["logits_indices"])), forward(*args, **keywords))[1])
    assert bench.batching_tokens(model, bench.random_prompts(8, 6, 61), 0, max_new_tokens=9, stop_ids=[], slots=4) == 72
    assert together == [4] * 18


def test_failure_of_generate_batch_is_none_of_its_results(model, monkeypatch):
    def fail(*args, **keywords):
        raise ValueError("no such kernel")
    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(RuntimeError, match="no such kernel"):
        bench.batching_tokens(model, bench.random_prompts(2, 6, 61), 0, max_new_tokens=9, stop_ids=[], slots=2)


def test_step_without_trl_has_no_peer(monkeypatch, tmp_path, tiny_toy, capsys):
    monkeypatch.setattr(toy, "build", lambda: tiny_toy)
    monkeypatch.setitem(sys.modules, "trl", None)  # as if it were not installed
    monkeypatch.setattr(sys, "argv", ["bench", "--rows", "4", "--repeats", "2", "--out", str(tmp_path / "b.json")])
    bench.main()
    [row] = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert row["row"] == "4 training step, threads: 1" and len(row["ours"]) == 2 and min(row["ours"]) > 0
    assert row["peer"] == row["limit"] == []
    assert "row 4 has no peer, because TRL is missing (pip install trl peft): " in capsys.readouterr().err


def test_step_and_its_peer_take_turns(monkeypatch, tiny_toy):
    """A fake peer, whose steps take 1 s where ours take 10; the first ones take longer, and are left out."""
    clock = [0]

    def fake_peer(ours, steps, after_step):
        def work(step, seconds):
            clock[0] += seconds if step else 100
        our_steps = iter(range(steps))
        ours.train_step = lambda: work(next(our_steps), 10)
        return SimpleNamespace(train=lambda: [(work(step, 1), after_step("arguments", control=None))
                                              for step in range(steps)])
    monkeypatch.setattr(toy, "build", lambda: tiny_toy)
    monkeypatch.setattr(bench, "now", lambda: clock[0])
    monkeypatch.setattr(bench, "grpo_trainer", fake_peer)
    [row] = bench.training_step("cpu", 3)
    assert row["ours"] == [10, 10, 10] and row["peer"] == [1, 1, 1]


def test_step_beside_trl(monkeypatch, tiny_toy):
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    monkeypatch.setattr(toy, "build", lambda: tiny_toy)
    [row] = bench.training_step("cpu", 2)
    assert len(row["ours"]) == len(row["peer"]) == 2 and min(row["ours"] + row["peer"]) > 0


def test_missing_gpu_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cuda"])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert "needs a CUDA GPU" in capsys.readouterr().err
