"""What lies between texts and tokens: stop tokens, thoughts, dates, control tokens, and thinking in
one prompt only."""

import json
import shutil
from datetime import datetime
from types import SimpleNamespace

import pytest
import torch
from conftest import family_here, train_arguments, train_here
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import chat_template_utils

import reward
import rollout
import teacher
import train
from family.neighbour import Neighbour
from support.data import Problem, load_model
from support.run import stop_line
from support.sampling import Rollout, check_prompts, check_thinking, grade_rollouts

CPU = (torch.float32, torch.device("cpu"))
ASK = teacher.student_messages("2+3?")
# ends a thought in <|im_end|>, and the words in another token or in the same
THINKS = (
    "{% macro says(m, end) %}<|im_start|>{% if m.reasoning %}<think>{{ m.reasoning }}<|im_end|>"
    "<|im_start|>{% endif %}{{ m.content }}{{ end }}{% endmacro %}"
)
DATED = "Today: {{ strftime_now('%-d %B %Y') }}\n"


@pytest.fixture
def changed(tiny_toy, tmp_path):
    """A copy of the tiny model whose files the function changes: JSON fields by file name, and the
    chat template."""

    def change(template=lambda text: text, **files):
        place = tmp_path / "model"
        shutil.copytree(tiny_toy / "model", place, dirs_exist_ok=True)
        for name, fields in files.items():
            path = place / f"{name}.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        path = place / "chat_template.jinja"
        path.write_text(template(path.read_text()))
        return place

    return change


@pytest.fixture
def tokenizer(tiny_toy):
    return AutoTokenizer.from_pretrained(tiny_toy / "model")


def on(monkeypatch, day):
    """The clock of transformers' templates shows this day."""
    clock = SimpleNamespace(now=lambda: datetime.fromisoformat(day))
    monkeypatch.setattr(chat_template_utils, "datetime", clock)


# ---- stop tokens


def base_model(changed):
    """As a base model may come: its eos is <|endoftext|>, the template ends turns in <|im_end|>."""
    return changed(
        config={"eos_token_id": 0},
        generation_config={"eos_token_id": 0},
        tokenizer_config={"eos_token": "<|endoftext|>"},
    )


def test_a_turn_of_the_template_ends_a_completion(changed):
    model, tokenizer = load_model(str(base_model(changed)), *CPU)
    assert tokenizer.eos_token_id == 0 and rollout.stop_ids(model, tokenizer) == [0, 2]
    model.generation_config.eos_token_id.append(3)
    assert stop_line(model, tokenizer) == (
        "completions stop at '<|endoftext|>' (0, tokenizer) or '<|im_end|>' (2, chat template) "
        "or '<think>' (3, model's configs)"
    )


def test_training_and_its_export_stop_there(changed, tiny_toy, tmp_path, capsys):
    out = tmp_path / "out"
    flags = train_arguments(tiny_toy, out, model=base_model(changed), steps=1)
    train_here(*flags)
    assert "(2, chat template)" in capsys.readouterr().out
    metrics = json.loads((out / "metrics.jsonl").read_text())
    assert metrics["truncated"] < 0.5
    assert GenerationConfig.from_pretrained(out / "model").eos_token_id == [0, 2]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", 2),
        ("{% for m in messages %}{{ m.content }} \n <|endoftext|><|im_end|>{% endfor %}", 0),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
        ("<|im_start|>{{ messages[0].content }}", None),  # drops the assistant's turn
        ("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}", 1),  # the next turn's
        (THINKS + "{% for m in messages %}{{ says(m, '<|im_end|>') }}{% endfor %}", None),
        (THINKS + "{% for m in messages %}{{ says(m, '<|endoftext|>') }}{% endfor %}", 0),
        ("{% if messages[1:] %}{{ raise_exception('no') }}{% endif %}", None),
    ],
)
def test_the_end_of_a_turn(tokenizer, template, end):
    tokenizer.chat_template = template
    assert teacher.turn_end(tokenizer) == end


def test_a_template_without_assistants_and_an_invalid_generation_config(changed, tmp_path):
    """Such a config of transformers 4 could be loaded, but not written after training."""

    def only_users(text):
        return (
            "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('no') }}{% endif %}"
            + "{% endfor %}"
            + text
        )

    place = changed(only_users, generation_config={"temperature": 0.6, "do_sample": False})
    model, tokenizer = load_model(str(place), *CPU)
    model.save_pretrained(tmp_path / "export")
    assert rollout.stop_ids(model, tokenizer) == [2]


# ---- thoughts


@pytest.mark.parametrize(
    ("prompt_end", "completion", "answer"),
    [
        ("<think>\n", r"2+3 = \boxed{5}, but let me check that", None),
        ("<think>\n", "2+3 is 5.</think>\nSo \\boxed{5}", "5"),
        ("<think>\n\n</think>\n\n", r"\boxed{5}", "5"),
        ("", "<think>\n\\boxed{5}, but", None),
        ("", r"[THINK]\boxed{5}, wait", None),
        ("", r"[THINK]5?[/THINK]\boxed{5}", "5"),
        ("", r"<seed:think>\boxed{5}, wait", None),
        ("<seed:think>", r"\boxed{4}</seed:think>\boxed{5}", "5"),
        ("", r"<|channel|>analysis<|message|>\boxed{5}, wait", None),
        ("", r"<|channel|>analysis<|message|>5<|end|><|channel|>final<|message|>\boxed{5}", "5"),
        ("<|channel|>analysis", r"<|message|>\boxed{5}", None),
        ("◁think▷", r"\boxed{5}", None),
        ("", r"◁think▷5◁/think▷\boxed{5}", "5"),
        ("", r"<|START_THINKING|>\boxed{5}", None),
        ("", r"<|START_THINKING|>5<|END_THINKING|>\boxed{5}", "5"),
        ("", r"<|begin_of_thought|>\boxed{4}<|end_of_thought|>\boxed{5}", "5"),
        ("", r"<|inner_prefix|>\boxed{5}", None),
        ("", r"<longcat_think>\boxed{5}", None),
        ("", r"<longcat_think>\boxed{4}</longcat_think>\boxed{5}", "5"),
        ("<think:opensource>", r"\boxed{5}", None),
        ("<think:opensource></think:opensource>", r"\boxed{5}", "5"),
        ("", r"<Thought>\boxed{4}</Thought>\boxed{5}", "5"),
        ("", r"<reasoning>\boxed{5}", None),
        ("<|think_start|>", r"\boxed{5}", None),
        ("<|think_start|>", r"\boxed{4}<|think_end|>\boxed{5}", "5"),
        ("<|open|>think<|sep|>", r"\boxed{5}", None),
        ("<|open|>think<|sep|>", r"4<|close|>think<|sep|><|open|>response<|sep|>\boxed{5}", "5"),
        ("assistant", r"<|think|>\boxed{5}", None),
        ("assistant", r"<|think|>4<|end|><|begin|>assistant<|content|>\boxed{5}", "5"),
        ("assistant", r" to=self<|message|>\boxed{5}", None),
        ("assistant", r" to=self<|message|>4<|eom|> to=user<|message|>\boxed{5}", "5"),
        ("<|begin_assistant|>\nHere are my reasoning steps:\n", r"\boxed{5}", None),
        (
            "<|begin_assistant|>\nHere are my reasoning steps:\n",
            r"\boxed{4} [BEGIN FINAL RESPONSE] \boxed{5}",
            "5",
        ),
        ("", r"Here are my reasoning steps: \boxed{5}", "5"),  # of an ordinary model
        ("", r"<no_think>\boxed{5}", "5"),
        (r"Put it in \boxed{5}.", "6", None),  # a box of the prompt is no answer
        ("", r"a<thinking about it \boxed{5}", "5"),
    ],
)
def test_only_what_follows_the_thought_is_graded(prompt_end, completion, answer):
    assert reward.extract_answer(completion, prompt_end) == answer
    assert reward.grade(completion, "5", prompt_end) == (answer == "5")


@pytest.mark.parametrize(
    ("opening", "closing", "is_known"),
    [
        ("<think>", "</think>", True),
        ("<|channel|>analysis<|message|>", "<|end|><|channel|>final<|message|>", True),
        ("((", "))", False),
        ("<think>", "))", False),  # without an end all answers would be thoughts
        ("((", "</think>", False),  # without a begin a box of an unfinished thought would count
        ("", " ", True),  # no marks
    ],
)
def test_the_chat_template_shows_how_thoughts_are_marked(changed, opening, closing, is_known):
    form = f"{{% if m.thinking %}}{opening}{{{{ m.thinking }}}}{closing}{{% endif %}}"
    turns = "{% for m in messages %}" + form + "{{ m.content }}<|im_end|>{% endfor %}"
    place = str(changed(lambda _: turns))
    if is_known:
        load_model(place, *CPU)
    else:
        with pytest.raises(Exception, match="after a thought, .* reward.py does not know"):
            load_model(place, *CPU)


def test_rollouts_are_graded_with_their_marks(tokenizer):
    """The marks may be control tokens, which a decoded text often leaves out."""
    problem = Problem("2+3?", "", "5", 1)
    stop = [tokenizer.eos_token_id]
    texts = {r"<think>\boxed{5}": None, r"<think>7</think>\boxed{5}": "5", r"\boxed{5}": "5"}
    rows = [
        Rollout(tokenizer.encode(text, add_special_tokens=False) + stop, [], True, problem, [])
        for text in texts
    ]
    grade_rollouts(tokenizer, rows)
    assert {row.said: row.answer for row in rows} == texts
    assert [row.correct for row in rows] == [False, True, True]


def test_a_thought_that_the_prompt_opens(changed, tiny_toy, tmp_path):
    """No completion of the tiny model closes it, so none is right, in training and evaluation."""

    def opened(text):
        assert "<think>\n\n</think>\n\n" in text
        return text.replace("<think>\n\n</think>\n\n", "<think>\n")

    out = tmp_path / "out"
    more = {"eval-data": tiny_toy / "test.jsonl", "eval-before": False, "steps": 1}
    train_here(*train_arguments(tiny_toy, out, model=changed(opened), **more))
    metrics = json.loads((out / "metrics.jsonl").read_text())
    after = json.loads((out / "evaluation.json").read_text())["after"]
    assert metrics["accuracy"] == after["accuracy"] == 0
    record = json.loads((out / "samples.jsonl").read_text().splitlines()[0])
    assert record["prompt_end"].endswith("<think>\n") and record["answer"] is None


# ---- dates


def test_a_fixed_day_in_every_form(tokenizer, monkeypatch):
    form = "%d %b %Y, %-d.%m., %A, %B %y %H:%M 100%"
    tokenizer.chat_template = (
        "{% macro today() %}{{ strftime_now('" + form + "') }}{% endmacro %}\n\n "
        "{%- set text = strftime_now('" + form + "') %}{{ text }}{{ today() }}"
        "{% if strftime_now is defined %}<|im_start|>{{ messages[0].content }}{% endif %}"
    )
    on(monkeypatch, "2026-03-05")
    theirs = teacher.encode(tokenizer, ASK, tokenize=False)
    assert "05 Mar 2026, 5.03., Thursday, March 26" in theirs
    on(monkeypatch, "2026-03-06")
    assert teacher.encode(tokenizer, ASK, day="2026-03-05", tokenize=False) == theirs
    assert teacher.encode(tokenizer, ASK, tokenize=False) != theirs


def test_a_run_keeps_the_date_of_its_start(changed, tiny_toy, tmp_path, monkeypatch):
    place = changed(lambda text: DATED + text)
    out = tmp_path / "out"
    more = dict(model=place, **{"eval-data": tiny_toy / "test.jsonl", "eval-before": False})
    monkeypatch.setattr("support.distributed.Ranks.today", lambda ranks: "2026-03-05")
    train_here(*train_arguments(tiny_toy, out, steps=2, **more))
    on(monkeypatch, "2026-03-06")
    monkeypatch.setattr("support.distributed.Ranks.today", lambda ranks: "2026-03-06")
    train_here("--out", out, "--resume", "--steps", 3)
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["date"] == "2026-03-05"
    assert "Today: 5 March 2026" in config["first_prompts"]["student"]
    assert "Today: 5 March 2026" in config["first_prompts"]["teacher"]

    again = tmp_path / "again"
    train_here(*train_arguments(tiny_toy, again, steps=3, date="2026-03-05", **more))
    same, other = ((run / "evaluation.json").read_text() for run in (out, again))
    assert same == other


# ---- control tokens


@pytest.mark.parametrize("spelled", ["<|im_end|>\n<|im_start|>assistant\n\\boxed{5}", "<think>"])
def test_spelled_control_tokens_stay_text(tokenizer, spelled):
    plain = teacher.encode(tokenizer, teacher.teacher_messages("2+3?", "5"))
    for problem, solution in ((f"2+3?{spelled}", "5"), ("2+3?", f"5{spelled}")):
        messages = teacher.teacher_messages(problem, solution)
        ids = teacher.encode(tokenizer, messages)
        assert [t for t in ids if t < 5] == [t for t in plain if t < 5]
        assert tokenizer.decode(ids) == teacher.encode(tokenizer, messages, tokenize=False)


def test_a_control_token_that_cannot_be_text_is_refused(tokenizer, monkeypatch):
    """As where a vocabulary makes the token of its letters."""
    model = None
    monkeypatch.setattr(rollout, "window", lambda model: 10**6)

    def prompts(problem):
        if "<|im_end|>" in problem.problem:
            raise ValueError("Can't sanitize '<|im_end|>'")
        return [[1, 2]]

    problems = [Problem("1?", "", "1", 4), Problem("2?<|im_end|>", "", "2", 7)]
    with pytest.raises(Exception, match="data.jsonl: line 7: Can't sanitize .* remove the line"):
        check_prompts(model, tokenizer, "data.jsonl", problems, 8, prompts)


# ---- thinking of one reader only


@pytest.mark.parametrize(("student", "teachers"), [(False, True), (True, False)])
def test_student_and_teacher_think_differently(tiny_toy, tmp_path, student, teachers):
    out = tmp_path / "out"
    more = {"thinking": student, "teacher-thinking": teachers, "steps": 1}
    train_here(*train_arguments(tiny_toy, out, **more))
    config = json.loads((out / "config.json").read_text())
    shown = config["first_prompts"]
    closed = "<think>\n\n</think>\n\n"
    assert shown["student"].endswith(closed) == (not student)
    assert shown["teacher"].endswith(closed) == (not teachers)
    assert config["teacher_thinking"].startswith("--thinking" if teachers else "--no-thinking")


@pytest.mark.parametrize(
    ("flags", "asked"),
    [(["--teacher-context", "none"], [False]), (["--gate", "two-view"], [True, False])],
)
def test_a_teacher_without_a_text_thinks_as_it_is_told(
    tiny_toy, tmp_path, monkeypatch, flags, asked
):
    """Its view without a text must differ from the one with a text by the text alone."""
    seen = []
    read = train.Trainer.read

    def watched(t, prompts, *arguments, **more):
        seen.append({t.tokenizer.decode(prompt) for prompt in prompts})
        return read(t, prompts, *arguments, **more)

    monkeypatch.setattr(train.Trainer, "read", watched)
    method = ["--method", "egrsd", *flags, "--teacher-thinking"]
    family_here(*train_arguments(tiny_toy, tmp_path / "run", steps=1), *method)
    assert [all("[Reference" in prompt for prompt in some) for some in seen] == asked
    assert not any(prompt.endswith("</think>\n\n") for some in seen for prompt in some)


@pytest.mark.parametrize("solution", ["2+3 is 5.", "2+3 is 5.</think>\n\\boxed{5}"])
def test_a_reference_solution_is_not_learned_as_a_thought(changed, tiny_toy, tmp_path, solution):
    """Where the prompt opens a thought, its box would be in a thought without an end."""
    place = changed(lambda text: text.replace("<think>\n\n</think>\n\n", "<think>\n"))
    record = {"problem": "2+3?", "solution": solution, "answer": "5"}
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    data = {"model": place, "data": tmp_path / "data.jsonl", "steps": 1, "max-new-tokens": 30}
    flags = train_arguments(tiny_toy, tmp_path / "run", **data)
    if "</think>" in solution:
        family_here(*flags, "--method", "sft")
    else:
        with pytest.raises(Exception, match="data.jsonl: line 1: field 'solution': .* a thought"):
            family_here(*flags, "--method", "sft")


def test_prompts_end_alike_apart_from_thoughts(tokenizer):
    s = SimpleNamespace(thinking=False, teacher_thinking=True, date="")
    check_thinking(tokenizer, s)
    tokenizer.chat_template += "{% if not enable_thinking %}Answer: {% endif %}"
    with pytest.raises(Exception, match="--teacher-thinking: apart from the thought"):
        check_thinking(tokenizer, s)
    s.teacher_thinking = None
    check_thinking(tokenizer, s)


def test_a_reference_solution_ends_like_a_turn(changed):
    """Even if the chat template has no assistants."""
    place = base_model(changed)
    t = SimpleNamespace(student_prompt=lambda problem: [1])
    settings = SimpleNamespace(max_new_tokens=99, thinking=False, date="")
    family = SimpleNamespace(s=settings)
    problem = Problem("2+3?", "2+3=5.", "5", 1)
    t.model, t.tokenizer = load_model(str(place), *CPU)
    assert Neighbour.reference(family, t, problem).token_ids[-1] == 2
    t.tokenizer.chat_template = "{% if messages[1:] %}{{ raise_exception('no') }}{% endif %}"
    assert Neighbour.reference(family, t, problem).token_ids[-1] == 0
