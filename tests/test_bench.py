"""experiments/bench.py on models that take seconds: it runs, and its instruments measure."""

import json
import sys

import pytest
import torch

from experiments import bench


@pytest.mark.slow
def test_bench_measures_and_reports(monkeypatch, tmp_path, capsys):
    tiny = dict(
        vocab_size=128, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8
    )
    monkeypatch.setitem(bench.SHAPE, "cpu", bench.SHAPE["cpu"] | tiny)
    monkeypatch.setattr(bench, "VOCABULARY", 256)
    flags = ["--rows", "1", "2", "3", "--repeats", "1", "--out", str(tmp_path / "b.json")]
    monkeypatch.setattr(sys, "argv", ["bench", *flags])
    bench.main()
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["command"].startswith(
        "python -m experiments.bench --rows 1 2 3 --repeats 1 --out "
    )
    rows = {row["row"] + " " + row["unit"]: row for row in written["rows"]}
    assert len(rows) == 6 and all(
        len(row["ours"]) >= 1 and min(row["ours"]) >= 0 for row in rows.values()
    )
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
