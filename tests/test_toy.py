"""toy.py: ordinary files, the same for the same seed."""

import doctest
import json
import shutil
import threading

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

import reward
import teacher
import toy
from support import distributed
from support.data import load_model, load_problems


def files_of(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_same_seed_same_files(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "UPDATES", 1)
    for name, seed in (("first", 0), ("same", 0), ("other", 1)):
        toy.build(tmp_path / name, seed)
    first, same, other = (files_of(tmp_path / name) for name in ("first", "same", "other"))
    assert first == same and first.keys() == other.keys()
    assert first["model.safetensors"] != other["model.safetensors"]
    parts = [
        toy.problem_file("test.jsonl", tmp_path / str(seed), seed).read_text() for seed in (0, 0, 1)
    ]
    assert parts[0] == parts[1] != parts[2]


# ---- the model that comes with the files


def test_the_shipped_tokenizer_is_the_one_that_this_file_makes():
    """Else `python toy.py --build` is due."""
    shipped, made = AutoTokenizer.from_pretrained(toy.SHIPPED), toy.make_tokenizer()
    text = "What is 117+5?\n\\boxed{7} hmm maybe é"
    assert shipped.get_vocab() == made.get_vocab() and shipped.encode(text) == made.encode(text)
    assert shipped.chat_template == made.chat_template and shipped.eos_token == made.eos_token
    assert toy.known_prompts(shipped) == toy.known_prompts(made)
    ours, theirs = toy.make_model(made).config, AutoConfig.from_pretrained(toy.SHIPPED)
    assert (
        ours.hidden_size == theirs.hidden_size
        and ours.num_hidden_layers == theirs.num_hidden_layers
    )


def test_the_shipped_model_is_used_wherever_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert toy.resolve("toy", "model") == str(toy.SHIPPED) and not list(tmp_path.iterdir())
    assert toy.resolve("toy", "test.jsonl") == "runs/toy-problems/test.jsonl"
    assert toy.resolve("mine", "model") == "mine"


def test_its_accuracies_are_those_of_the_readme(tmp_path):
    lines = toy.problem_file("test.jsonl", tmp_path).read_text().splitlines(keepends=True)
    (tmp_path / "some.jsonl").write_text("".join(lines[::3]))
    model, tokenizer = load_model(str(toy.SHIPPED), torch.float32, torch.device("cpu"))
    plain, shown = (
        toy.accuracy(model, tokenizer, tmp_path / "some.jsonl", it) for it in (False, True)
    )
    # 0.36 and 0.77, with errors of 0.04 and 0.03 of 161 draws
    assert 0.24 < plain < 0.48 and 0.66 < shown < 0.88


@pytest.mark.slow
def test_a_rebuilt_toy_is_as_good(tmp_path):
    """Not the same: rounding differs between CPUs, and training makes more of it."""
    toy.build(tmp_path / "model", seed=1)
    test = toy.problem_file("test.jsonl", tmp_path)
    model, tokenizer = load_model(str(tmp_path / "model"), torch.float32, torch.device("cpu"))
    plain, shown = (
        toy.accuracy(model, tokenizer, test, privileged) for privileged in (False, True)
    )
    assert 0.25 < plain < 0.50 and 0.65 < shown < 0.90


@pytest.fixture
def quick_build(monkeypatch):
    monkeypatch.setattr(toy, "_warm_up", lambda *args: None)


@pytest.mark.parametrize("change", ["prompt", "template"])
def test_prompts_that_the_weights_do_not_know_start_the_warm_up(
    quick_build, tmp_path, monkeypatch, capsys, change
):
    """Not a comment in rollout.py: what is compared is what the model reads."""
    if change == "prompt":
        monkeypatch.setattr(teacher, "INSTRUCTION", "Think it over.")
    else:
        shutil.copytree(toy.SHIPPED, tmp_path / "shipped")
        monkeypatch.setattr(toy, "SHIPPED", tmp_path / "shipped")
        (tmp_path / "shipped" / "chat_template.jinja").write_text(
            toy.CHAT_TEMPLATE.replace("user", "person") + " "
        )
    path = toy.model_directory(tmp_path / "runs")
    assert "do not know the prompts of teacher.py" in capsys.readouterr().err and toy.fits(path)
    assert toy.model_directory(tmp_path / "runs") == path and capsys.readouterr().err == ""


def test_two_starts_at_the_same_moment(quick_build, tmp_path, monkeypatch):
    """Both make what is missing, each under a name of its own."""

    def both(work):
        def start():
            barrier.wait()
            paths.append(work())

        barrier, paths = threading.Barrier(3), []
        threads = [threading.Thread(target=start) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(paths) == 3 and len(set(paths)) == 1
        return paths[0]

    path = both(lambda: toy.problem_file("test.jsonl", tmp_path / "problems"))
    assert (
        files_of(tmp_path / "problems").keys() == {"test.jsonl"}
        and len(load_problems(path)[0]) == 481
    )
    monkeypatch.setattr(toy, "SHIPPED", tmp_path / "nothing")
    path = both(lambda: toy.model_directory(tmp_path / "runs"))
    assert list((tmp_path / "runs").iterdir()) == [path] and toy.fits(path)


def test_problems_that_somebody_changed_are_written_anew(tmp_path):
    path = toy.problem_file("train.jsonl", tmp_path)
    whole = path.read_text()
    path.write_text(whole[:-9])
    assert toy.problem_file("train.jsonl", tmp_path).read_text() == whole


# ---- problems, solutions, tokenizer


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
    assert (
        0.4
        < np.mean([step[0].isalpha() for trace in traces for step in trace.split(". ")[:2]])
        < 0.6
    )
    words = [
        tokenizer.decode([i]) for i in tokenizer.encode(next(t for t in traces if t[0].isalpha()))
    ]
    assert set(words[:8]) <= set(toy.MUSINGS) and words[8] == "2"


def test_tokenizer_encodes_any_text_and_its_template_knows_thinking():
    tokenizer = toy.make_tokenizer()
    for text in ("What is 7+5?", "\\frac{1}{2} {x} é ∑ 😀\n\t", "Janet’s ducks", "hmm  maybe hmm"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    messages = [{"role": "user", "content": "hi"}]
    closed, opened = (
        tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, enable_thinking=thinking
        )
        for thinking in (False, True)
    )
    assert closed == opened + "<think>\n\n</think>\n\n" and opened.endswith(
        "<|im_start|>assistant\n"
    )
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
    for parameters in (
        300_000,
        distributed.SMALL_MODEL - 1,
        distributed.SMALL_MODEL,
        4_000_000_000,
    ):
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
    toy.build(tmp_path / "model")
    assert threads == [1]


def test_doctests():
    results = doctest.testmod(toy)
    assert results.attempted > 0 and results.failed == 0
