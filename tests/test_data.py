"""support/data.py: what a user can get wrong in a data file, and what the message says."""

import json
import shutil

import pytest
import torch
from conftest import tiny_hybrid, tiny_qwen3
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

import lora
import toy
from support.data import InputError, Problem, add_adapter, load_model, load_problems
from support.run import thinking_line

GOOD = {"problem": "What is 2+3?", "solution": "2+3=5. \\boxed{5}", "answer": "5"}


def write(tmp_path, *lines):
    path = tmp_path / "data.jsonl"
    path.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    )
    return path


def test_accepted_forms(tmp_path):
    path = write(
        tmp_path,
        GOOD,
        b"",
        {"question": "q", "solution": "\\boxed{7}"},
        {"prompt": "p", "solution": "s", "answer": 0.5},
        {"problem": "line\u2028separator", "solution": "s", "answer": "1"},
    )
    problems, left_out = load_problems(path)
    assert left_out == 0 and problems == [
        Problem(GOOD["problem"], GOOD["solution"], "5", 1),
        Problem("q", "\\boxed{7}", "7", 3),
        Problem("p", "s", "0.5", 4),
        Problem("line\u2028separator", "s", "1", 5),
    ]


def test_evaluation_needs_no_solution(tmp_path):
    path = write(tmp_path, {"problem": "p", "answer": "1"})
    assert load_problems(path, need_solution=False)[0] == [Problem("p", "", "1", 1)]
    with pytest.raises(InputError, match="line 1: field 'solution' is missing"):
        load_problems(path)


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"problem": "p"', "line 2: not valid JSON"),
        (b"\xff\xfe", "line 2: not valid JSON"),
        (b"[1, 2]", "line 2: a JSON list"),
        ({"solution": "s", "answer": "1"}, "line 2: field 'problem' is missing"),
        ({"question": 5, "solution": "s", "answer": "1"}, "line 2: field 'question' must be text"),
        ({"problem": " ", "solution": "s", "answer": "1"}, "line 2: field 'problem' is empty"),
        ({"problem": "p", "answer": "1"}, "line 2: field 'solution' is missing"),
        (
            {"problem": "p", "solution": "s", "answer": {"x": 1}},
            "line 2: field 'answer' must be text",
        ),
        ({"problem": "p", "solution": "no box"}, "line 2: field 'answer': 1 gold answers"),
        ({"problem": "p", "solution": "s", "answer": "\\frac{1}{0}"}, "--skip-ungradable"),
    ],
)
def test_mistakes_name_file_line_field_and_remedy(tmp_path, line, message):
    path = write(tmp_path, GOOD, line)
    with pytest.raises(InputError) as error:
        load_problems(path)
    assert (
        message in str(error.value)
        and str(path) in str(error.value)
        and "\n" not in str(error.value)
    )


def test_ungradable_golds_are_refused_with_their_lines_or_left_out(tmp_path):
    """An unparseable gold counts as correct, or as wrong for ever, in other trainers: reward
    noise."""
    no_answer = {"problem": "p", "solution": "no box", "answer": ""}
    path = write(tmp_path, GOOD, no_answer, GOOD, GOOD | {"answer": "\\frac{1}{0}"})
    with pytest.raises(InputError, match="line 2, 4: field 'answer': 2 gold"):
        load_problems(path)
    problems, left_out = load_problems(path, skip_ungradable=True)
    assert left_out == 2 and [p.line for p in problems] == [1, 3]


BOX = "2+3=5. \\boxed{5}"
PENS = "In May it sold 48/2 = <<48/2=24>>24 pens.\nTogether 48+24 = <<48+24=72>>72 pens.\n#### 72"
# rows as data sets write them, and the answer to use; "" is none
ROWS = [
    ({"solution": "Suppose not.", "answer": "proof"}, ""),
    ({"solution": "Take roots.", "answer": "notfound"}, ""),
    ({"solution": BOX, "answer": "\\boxed{}"}, ""),
    ({"solution": BOX, "answer": "N/A"}, ""),
    ({"answer": "N/A"}, ""),
    ({"solution": BOX, "answer": ["5", "6"]}, ""),
    ({"solution": BOX, "answer": []}, ""),
    ({"solution": BOX, "answer": "6"}, ""),  # the box says 5
    ({"solution": "First \\boxed{4}, then \\boxed{5}.", "answer": "4"}, ""),
    ({"solution": "The roots are \\boxed{3} and \\boxed{4}."}, ""),  # not 4
    ({"solution": "First \\boxed{4}. Then \\boxed{5}."}, "5"),
    ({"solution": BOX, "answer": float("inf")}, ""),
    ({"solution": BOX, "answer": "\\boxed{5}"}, "5"),
    ({"solution": BOX, "answer": "$\\boxed{5}$"}, "5"),
    ({"solution": BOX, "answer": "\\[5\\]"}, "5"),
    ({"solution": BOX, "answer": "#### 5"}, "5"),
    ({"solution": BOX, "answer": "<answer>5</answer>"}, "5"),
    ({"solution": BOX, "answer": "**5**"}, "5"),
    ({"solution": BOX, "answer": "['5']"}, "5"),
    ({"solution": BOX, "answer": ["5"]}, "5"),
    ({"solution": BOX, "answer": [5]}, "5"),
    ({"solution": BOX, "answer": " "}, "5"),
    ({"problem": None, "question": "q", "prompt": None, "solution": BOX, "answer": "5"}, "5"),
    ({"solution": "\\boxed{\\textbf{(E)}\\ 12}", "answer": "E"}, "E"),
]


@pytest.mark.parametrize("row, gold", ROWS)
def test_gold_answers_as_data_sets_write_them(tmp_path, row, gold):
    path = write(tmp_path, GOOD, {"problem": "p"} | row)
    if gold:
        assert load_problems(path)[0][1].answer == gold
        return
    with pytest.raises(InputError, match="line 2: field 'answer': 1 gold .*--skip-ungradable$"):
        load_problems(path)
    problems, left_out = load_problems(path, skip_ungradable=True)
    assert left_out == len(problems) == 1


def test_a_worked_answer_is_the_solution_too(tmp_path):
    path = write(
        tmp_path,
        {"question": "How many?", "answer": PENS},
        {"question": "How many?", "answer": PENS, "solution": "48 and 24."},
    )
    assert load_problems(path)[0] == [
        Problem("How many?", PENS, "72", 1),
        Problem("How many?", "48 and 24.", "72", 2),
    ]
    with pytest.raises(InputError, match="line 1: field 'solution' is missing"):
        load_problems(write(tmp_path, {"question": "How many?", "answer": "#### 72"}))


@pytest.mark.parametrize(
    "field, text, command",
    [
        ("answer", r"\frac{1}{2}", r"\frac"),
        ("answer", r"6\text{ cm}", r"\text"),
        ("answer", r"6\times 10^2", r"\times"),
        ("answer", r"\beta", r"\beta"),
        ("solution", r"It is \boxed{5}", r"\boxed"),
        ("problem", r"Let \theta be", r"\theta"),
        ("solution", r"x\to\infty", None),  # no JSON: \i
        ("solution", r"as x\to 0", r"\to"),
        ("restated", r"(1\right)", r"\right"),
        ("problem", r"\tan x", r"\tan"),
        ("answer", r"x \neq 5", r"\neq"),
        ("answer", r"\nabla f", r"\nabla"),
        ("answer", r"x \ne 5", r"\ne"),
        ("answer", r"\nu", r"\nu"),
    ],
)
def test_backslashes_that_were_not_doubled_are_refused(tmp_path, field, text, command):
    doubled = json.dumps(GOOD | {field: "TEXT"}).replace("TEXT", text.replace("\\", "\\\\"))
    single = doubled.replace(text.replace("\\", "\\\\"), text).encode()
    message = "not valid JSON" if command is None else f"field '{field}': {command} has one"
    with pytest.raises(InputError) as error:
        load_problems(write(tmp_path, GOOD, single))
    assert f"line 2: {message}" in str(error.value) and "\n" not in str(error.value)
    if command:
        assert str(error.value).endswith(f"double it, \\{command}")


@pytest.mark.parametrize(
    "text",
    [
        "x\ty\nan apple\tan orange\n5\to\tx\there",
        "first line\nnot a command\r\nright\nu = 5\nequal",
        "page one\fPage two\f\n",
        "tab\tonly, \ttext-like textile\ttexture",
    ],
)
def test_tabs_and_lines_in_prose_are_no_lost_commands(tmp_path, text):
    row = GOOD | {"problem": text, "solution": text}
    assert load_problems(write(tmp_path, row))[0][0].problem == text


def test_a_worked_answer_of_several_lines_has_no_lost_commands(tmp_path):
    answer = "Let u be 2.\nu = 2, so\ne = 3.\n#### 5"
    assert load_problems(write(tmp_path, {"problem": "p", "answer": answer}))[0][0].answer == "5"


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(InputError, match="no such data file"):
        load_problems(tmp_path / "nothing.jsonl")
    with pytest.raises(InputError, match="no problem in this file"):
        load_problems(write(tmp_path, b"", b"  "))


def test_a_model_that_cannot_be_sampled_is_refused_in_one_line(tiny_toy, tmp_path):
    """Found at the start, not after hours."""
    shutil.copytree(tiny_toy / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["sliding_window"] = 8
    config["layer_types"] = ["chunked_attention"] * config["num_hidden_layers"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError, match="chunked_attention by 'sdpa'.*: choose another --model"
    ) as error:
        load_model(str(tmp_path / "model"), torch.float32, torch.device("cpu"))
    assert "\n" not in str(error.value)


def test_a_model_that_cannot_be_scored_is_refused_in_one_line_where_it_would_be(tmp_path):
    """A cap on the logits that this model does not know; evaluation only samples."""
    tiny_qwen3(vocab_size=len(toy.make_tokenizer())).save_pretrained(tmp_path)
    toy.make_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"final_logit_softcapping": 30.0}))
    with pytest.raises(
        InputError, match="final_logit_softcapping.*: choose another --model"
    ) as error:
        load_model(str(tmp_path), torch.float32, torch.device("cpu"))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    model, tokenizer = load_model(str(tmp_path), torch.float32, torch.device("cpu"), scored=False)
    assert model.config.final_logit_softcapping == 30.0 and tokenizer.chat_template


def test_no_dropout_is_left(tmp_path):
    """A student read with dropout would be another one than sampled."""
    tiny_qwen3(vocab_size=len(toy.make_tokenizer()), attention_dropout=0.5).save_pretrained(
        tmp_path
    )
    toy.make_tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), torch.float32, torch.device("cpu"))
    assert model.model.layers[0].self_attn.attention_dropout == 0
    assert model.config.attention_dropout == 0.5  # for an export


# ---- what the adapter covers


def test_the_adapter_says_what_it_covers():
    usual = "gate_proj, up_proj, down_proj, q_proj, k_proj, v_proj, o_proj"
    assert add_adapter(tiny_hybrid(), 4, 8) == (
        f"adapter: 16 of 31 linear layers ({usual}); "
        "left out: out_proj, in_proj_qkv, in_proj_z, in_proj_b, in_proj_a"
    )
    assert add_adapter(tiny_hybrid(), 4, 8, ["all-linear"]).startswith(
        "adapter: 31 of 31 linear layers (out_proj,"
    )
    line = add_adapter(tiny_qwen3(), 4, 8, ["up_proj", "v_proj"])
    assert line == (
        "adapter: 4 of 14 linear layers (v_proj, up_proj); "
        "left out: q_proj, k_proj, o_proj, gate_proj, down_proj"
    )


@pytest.mark.parametrize(
    "targets, message",
    [
        (
            ["q_proj"],
            "leave out all of the MLPs: say --lora-targets q_proj gate_proj up_proj "
            "down_proj, or all-linear",
        ),
        (
            ["up_proj"],
            "leave out all of the attention: say --lora-targets up_proj q_proj k_proj v_proj "
            "o_proj, or all",
        ),
        (["c_attn"], "leave out all of the attention"),
        (
            ["q_proj", "up_proj", "lm_head"],
            "no layer that can be adapted is named lm_head: there are q_proj, k_proj",
        ),
        (
            ["q_proj", "up_projj"],
            "no layer that can be adapted is named up_projj: there are q_proj, k_proj, v_proj",
        ),
    ],
)
def test_targets_that_are_not_there_or_leave_half_the_model_out_are_refused(targets, message):
    with pytest.raises(InputError, match=message):
        add_adapter(tiny_qwen3(), 4, 8, targets)


def test_routers_and_experts_stay_frozen():
    torch.manual_seed(0)
    model = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=61,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        )
    )
    line = add_adapter(model, 4, 8, ["all-linear"])
    assert line.startswith("adapter: 7 of 7 linear layers")
    assert isinstance(model.model.layers[0].mlp.shared_expert_gate, torch.nn.Linear)
    assert isinstance(model.model.layers[0].mlp.shared_expert.up_proj, lora.LoRALinear)


# ---- chat templates

OPEN = (
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<|im_start|>assistant"
)
TEMPLATES = {
    toy.CHAT_TEMPLATE: (
        r"--no-thinking: prompts end in "
        r"'<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n'; with --thinking in "
        r"'<|im_end|>\n<|im_start|>assistant\n'"
    ),
    OPEN + "{% if not thinking %}</think>{% endif %}": (
        "--no-thinking: prompts end in '<|im_end|><|im_start|>assistant</think>'; with "
        "--thinking in '<|im_end|><|im_start|>assistant'"
    ),
    OPEN + "<think>": (
        "--no-thinking: prompts end in '<|im_end|><|im_start|>assistant<think>'; --thinking "
        "changes nothing: this chat template has no switch of that name"
    ),
    "{% if enable_thinking %}/think{% endif %}" + OPEN: (
        "--no-thinking: prompts end in '<|im_end|><|im_start|>assistant'; with --thinking in "
        "'<|im_end|><|im_start|>assistant'"
    ),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_thinking_does_is_said(template):
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = template
    assert thinking_line(tokenizer, False) == TEMPLATES[template]
    assert thinking_line(tokenizer, True).startswith("--thinking: prompts end in '<|im_end|>")


@pytest.mark.parametrize(
    "condition",
    [
        "'Reference' in messages[0].content",
        "messages[0].content | length > 900",
        "enable_thinking and 'Reference' in messages[0].content",
    ],
)
def test_a_template_that_asks_student_and_teacher_otherwise_is_refused(tmp_path, condition):
    tiny_qwen3(vocab_size=len(toy.make_tokenizer())).save_pretrained(tmp_path)
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = OPEN + "{% if " + condition + " %}<think>{% endif %}"
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"end in '<\|im_end.*<think>'.*: correct chat_template.jinja"
    ) as error:
        load_model(str(tmp_path), torch.float32, torch.device("cpu"))
    # evaluation has no teacher
    load_model(str(tmp_path), torch.float32, torch.device("cpu"), scored=False)
    assert "\n" not in str(error.value)
