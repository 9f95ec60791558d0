"""toy.py: ordinary files, the same for the same seed."""

import doctest
import json

import numpy as np

import reward
import toy
from data import load_problems


def test_same_seed_same_files(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "UPDATES", 4)
    monkeypatch.setattr(toy, "accuracy", lambda *args: 0.0)
    paths = [toy.build(seed, tmp_path / name) for seed, name in ((0, "a"), (0, "b"), (1, "a"))]
    assert paths[0].name == paths[1].name != paths[2].name and toy.build(0, tmp_path / "a") == paths[0]
    contents = [{file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()} for path in paths]
    assert contents[0] == contents[1] and contents[0].keys() == contents[2].keys()
    assert all(contents[0][name] != contents[2][name] for name in contents[0] if name.suffix in (".safetensors", ".jsonl"))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted({paths[0].name, paths[2].name})  # nothing left over


def test_problems_grade_and_held_out_ones_are_held_out(tiny_toy):
    train, test = (load_problems(tiny_toy / f"{name}.jsonl")[0] for name in ("train", "test"))
    assert not {p.problem for p in train} & {p.problem for p in test}
    assert all(reward.grade(p.solution, p.answer) for p in train + test)


def test_habits_make_wrong_and_repeated_steps():
    rng = np.random.default_rng(0)
    traces = [toy.make_trace(toy.make_problem(rng), rng, wrong=0.2, again=0.5) for _ in range(200)]
    assert any("wait" in trace for trace in traces)
    right = 0
    for trace in traces:
        first, *rest = [int(n) for n in trace.split("=")[0].split("+")]
        right += json.loads(trace.split("=")[1].split(".")[0]) == first + sum(rest)
    assert 0.7 < right / 200 < 0.9  # of the first steps, 0.8 expected


def test_tokenizer_encodes_any_text_and_its_template_knows_thinking():
    tokenizer = toy.make_tokenizer()
    for text in ("What is 7+5?", "\\frac{1}{2} {x} é ∑ 😀\n\t", "Janet’s ducks"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    messages = [{"role": "user", "content": "hi"}]
    closed, opened = (tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, enable_thinking=thinking)
                      for thinking in (False, True))
    assert closed == opened + "<think>\n\n</think>\n\n" and opened.endswith("<|im_start|>assistant\n")
    assert len(tokenizer.encode("117")) == 3  # digits stay single


def test_doctests():
    results = doctest.testmod(toy)
    assert results.attempted > 0 and results.failed == 0
