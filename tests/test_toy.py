"""toy.py: ordinary files, the same for the same seed."""

import doctest
import json

import numpy as np
import pytest
import torch

import reward
import toy
from experiments import diagnostics
from support import distributed
from support.data import load_problems


def test_same_seed_same_files(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "UPDATES", 2)
    monkeypatch.setattr(toy, "accuracy", lambda *args: 0.0)
    paths = [toy.build(seed, tmp_path / name) for seed, name in ((0, "a"), (0, "b"), (1, "a"))]
    assert paths[0].name == paths[1].name != paths[2].name and toy.build(0, tmp_path / "a") == paths[0]
    first, same, other = ({file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}
                          for path in paths)
    assert first == same and first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first if name.suffix in (".safetensors", ".jsonl"))
    assert {path.name for path in (tmp_path / "a").iterdir()} == {paths[0].name, paths[2].name}  # nothing left over


def test_problems_grade_and_held_out_ones_are_held_out(tiny_toy):
    train, test = (load_problems(tiny_toy / f"{name}.jsonl")[0] for name in ("train", "test"))
    assert not {p.problem for p in train} & {p.problem for p in test}
    assert all(reward.grade(p.solution, p.answer) for p in train + test)


def test_traces_have_wrong_and_repeated_steps():
    rng = np.random.default_rng(0)
    traces = [toy.make_trace(toy.make_problem(rng), rng, wrong=0.2, repeat=0.5) for _ in range(200)]
    assert any("wait" in trace for trace in traces)
    right = 0
    for trace in traces:
        first, *rest = [int(n) for n in trace.split("=")[0].split("+")]
        right += json.loads(trace.split("=")[1].split(".")[0]) == first + sum(rest)
    assert 0.7 < right / 200 < 0.9  # of the first steps, 0.8 expected


def test_musings_stand_before_steps_and_every_word_is_a_token():
    rng, tokenizer = np.random.default_rng(0), toy.make_tokenizer()
    traces = [toy.make_trace([2, 3, 4], rng, muse=0.5) for _ in range(100)]
    assert 0.4 < np.mean([step[0].isalpha() for trace in traces for step in trace.split(". ")[:2]]) < 0.6
    words = [tokenizer.decode([i]) for i in tokenizer.encode(next(t for t in traces if t[0].isalpha()))]
    assert set(words[:8]) <= set(toy.MUSINGS) and words[8] == "2"
    assert set(diagnostics.MARKERS) >= {word.strip() for word in toy.MUSINGS}


def test_tokenizer_encodes_any_text_and_its_template_knows_thinking():
    tokenizer = toy.make_tokenizer()
    for text in ("What is 7+5?", "\\frac{1}{2} {x} é ∑ 😀\n\t", "Janet’s ducks", "hmm  maybe hmm"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    messages = [{"role": "user", "content": "hi"}]
    closed, opened = (tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False,
                                                    enable_thinking=thinking) for thinking in (False, True))
    assert closed == opened + "<think>\n\n</think>\n\n" and opened.endswith("<|im_start|>assistant\n")
    assert len(tokenizer.encode("117")) == 3  # digits stay single


@pytest.fixture
def three_threads():
    """Starts with three threads, which no test asks for; restores the number of before."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_small_models_get_one_thread_and_large_ones_the_default(monkeypatch, three_threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(distributed, "DEFAULT_THREADS", 2)
    chosen = []
    for parameters in (300_000, distributed.SMALL_MODEL - 1, distributed.SMALL_MODEL, 4_000_000_000):
        distributed.choose_threads(parameters)
        chosen.append(torch.get_num_threads())
    assert chosen == [1, 1, 2, 2]


def test_omp_num_threads_wins(monkeypatch, three_threads):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    for parameters in (300_000, 4_000_000_000):
        distributed.choose_threads(parameters)
        assert torch.get_num_threads() == 3


def test_the_toy_is_made_with_the_threads_of_a_small_model(monkeypatch, three_threads, tmp_path):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = []
    monkeypatch.setattr(toy, "_warm_up", lambda *args: threads.append(torch.get_num_threads()))
    monkeypatch.setattr(toy, "accuracy", lambda *args: threads.append(torch.get_num_threads()) or 0.0)
    toy.build(0, tmp_path)
    assert threads == [1, 1, 1]


def test_doctests():
    results = doctest.testmod(toy)
    assert results.attempted > 0 and results.failed == 0
