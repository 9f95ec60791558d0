"""experiments/bench.py on models that take seconds: it runs, and its instruments measure."""

import json
import sys

import pytest
import torch

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
    assert len(rows) == 6 and all(len(row["ours"]) >= 1 and min(row["ours"]) >= 0 for row in rows.values())
    mixed = rows["1 mixed lengths tokens/s"]
    assert mixed["peer"][0] > 0 and mixed["limit"][0] > 0
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


def test_missing_gpu_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cuda"])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert "needs a CUDA GPU" in capsys.readouterr().err
