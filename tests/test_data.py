"""support/data.py: what a user can get wrong in a data file, and what the message says."""

import json
import shutil

import pytest
import torch
from conftest import tiny_qwen3

import toy
from support.data import InputError, Problem, load_model, load_problems

GOOD = {"problem": "What is 2+3?", "solution": "2+3=5. \\boxed{5}", "answer": "5"}


def write(tmp_path, *lines):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def test_accepted_forms(tmp_path):
    path = write(tmp_path, GOOD, b"", {"question": "q", "solution": "\\boxed{7}"},
                 {"prompt": "p", "solution": "s", "answer": 0.5},
                 {"problem": "line\u2028separator", "solution": "s", "answer": "1"})
    problems, left_out = load_problems(path)
    assert left_out == 0 and problems == [
        Problem(GOOD["problem"], GOOD["solution"], "5", 1), Problem("q", "\\boxed{7}", "7", 3),
        Problem("p", "s", "0.5", 4), Problem("line\u2028separator", "s", "1", 5)]


def test_evaluation_needs_no_solution(tmp_path):
    path = write(tmp_path, {"problem": "p", "answer": "1"})
    assert load_problems(path, need_solution=False)[0] == [Problem("p", "", "1", 1)]
    with pytest.raises(InputError, match="line 1: field 'solution' is missing"):
        load_problems(path)


@pytest.mark.parametrize("line, message", [
    (b'{"problem": "p"', "line 2: not valid JSON"), (b"\xff\xfe", "line 2: not valid JSON"),
    (b"[1, 2]", "line 2: a JSON list"),
    ({"solution": "s", "answer": "1"}, "line 2: field 'problem' is missing"),
    ({"question": 5, "solution": "s", "answer": "1"}, "line 2: field 'question' must be text"),
    ({"problem": " ", "solution": "s", "answer": "1"}, "line 2: field 'problem' is empty"),
    ({"problem": "p", "answer": "1"}, "line 2: field 'solution' is missing"),
    ({"problem": "p", "solution": "s", "answer": ["1"]}, "line 2: field 'answer' must be text"),
    ({"problem": "p", "solution": "no box"}, "line 2: field 'answer': 1 gold answers"),
    ({"problem": "p", "solution": "s", "answer": "\\frac{1}{0}"}, "--skip-ungradable")])
def test_mistakes_name_file_line_field_and_remedy(tmp_path, line, message):
    path = write(tmp_path, GOOD, line)
    with pytest.raises(InputError) as error:
        load_problems(path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_ungradable_golds_are_refused_with_their_lines_or_left_out(tmp_path):
    """An unparseable gold counts as correct, or as wrong for ever, in other trainers: reward noise."""
    path = write(tmp_path, GOOD, GOOD | {"answer": ""}, GOOD, GOOD | {"answer": "\\frac{1}{0}"})
    with pytest.raises(InputError, match="line 2, 4: field 'answer': 2 gold"):
        load_problems(path)
    problems, left_out = load_problems(path, skip_ungradable=True)
    assert left_out == 2 and [p.line for p in problems] == [1, 3]


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(InputError, match="no such data file"):
        load_problems(tmp_path / "nothing.jsonl")
    with pytest.raises(InputError, match="no problem in this file"):
        load_problems(write(tmp_path, b"", b"  "))


def test_a_model_that_cannot_be_sampled_is_refused_in_one_line(tiny_toy, tmp_path):
    """A linear-attention layer keeps a state that the cache here does not have; found at the start, not after hours."""
    shutil.copytree(tiny_toy / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["sliding_window"], config["layer_types"] = 8, ["chunked_attention"] * config["num_hidden_layers"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="chunked_attention by 'sdpa': choose another --model") as error:
        load_model(str(tmp_path / "model"), torch.float32, torch.device("cpu"))
    assert "\n" not in str(error.value)


def test_a_model_that_cannot_be_scored_is_refused_in_one_line_where_it_would_be(tmp_path):
    """Gemma 2 squashes its logits after the head, which `teacher.read` does not do; evaluation only samples."""
    tiny_qwen3(vocab_size=len(toy.make_tokenizer())).save_pretrained(tmp_path)
    toy.make_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"final_logit_softcapping": 30.0}))
    with pytest.raises(InputError, match="final_logit_softcapping.*: choose another --model") as error:
        load_model(str(tmp_path), torch.float32, torch.device("cpu"))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    model, tokenizer = load_model(str(tmp_path), torch.float32, torch.device("cpu"), scored=False)
    assert model.config.final_logit_softcapping == 30.0 and tokenizer.chat_template
