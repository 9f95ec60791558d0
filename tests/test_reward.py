"""reward.py: which box holds the answer, what it is graded, and the shaped reward."""

import doctest
import json
import random

import pytest
from conftest import is_cheap
from fuzz_verifier import fuzz
from test_verifier import DATA, FRAGMENTS, HOSTILE, SHARED, TABLES

import reward
import verifier
from support import golds

GOLDS = json.loads((DATA / "gold_cases.json").read_text())


def test_doctests():
    results = doctest.testmod(reward)
    assert results.attempted > 3 and results.failed == 0


def test_is_equal_is_the_verifier_s():
    assert reward.is_equal is verifier.is_equal


@pytest.mark.parametrize("text, gold, expected, note", SHARED["extract"])
def test_shared_completions(text, gold, expected, note):
    assert reward.grade(text, gold) is expected, note


@pytest.mark.parametrize("table", TABLES)
def test_gold_of_a_true_pair_grades_itself(table):
    golds = [gold for _, gold, expected in TABLES[table] if expected]
    assert [
        gold
        for gold in golds
        if not reward.grade(rf"so $\boxed{{{gold}}}$.", gold)
        and reward.extract_answer(rf"\boxed{{{gold}}}") == gold
    ] == []


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"\boxed 5", "5"),
        (r"\boxed 42.", "42"),
        (r"\boxed{ 5 }", "5"),
        ("\\boxed\n{5}", "5"),
        (r"\framebox{7}", "7"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\}}", r"\}"),
        (r"\boxed{<}", "<"),
        (r"\boxed{1\\2}", r"1\\2"),
        (r"\boxed{x} and \fbox{y}", "y"),
        (r"\boxed{a\boxed{b}c}", "b"),
        (r"\boxed{\{\}}", r"\{\}"),
        (r"<think>\boxed{1}</think>\boxed{2}", "2"),
        (r"a</think>\boxed{3}", "3"),
        (r"\boxed{\text{no answer}}", r"\text{no answer}"),
        (r"<think>\boxed{1}</think>no box", None),
        (r"\boxed{1}<think>", None),
        (r"<think>a</think><think>\boxed{4}", None),
        (r"\boxed{1}\boxed{", None),
        (r"\boxed{1}\boxed", None),
        (r"\boxed{x", None),
        (r"\boxedx{1}", None),
        (r"\boxed{}", None),
        (r"\boxed{\text{}}", None),
        (r"\boxed{ }", None),
        (r"\boxed{\,}", None),
        (r"\boxed{?}", None),
        (r"\boxed{...}", None),
        (r"\boxed{\ldots}", None),
        (r"\boxed{answer}", None),
        (r"\boxed{\text{your answer}}", None),
        (r"\boxed{<answer>}", None),
        (r"\boxed{\text{Answer here}}", None),
        (r"\boxed{\boxed{}}", None),
        ("", None),
        (None, None),
    ],
)
def test_extract_answer(text, answer):
    assert reward.extract_answer(text) == answer


@pytest.mark.parametrize("unit", [".", ". ", r"\ldots", "your ", "\ud800", "\x00", "{", "1,"])
def test_a_million_characters_are_read_in_linear_time(unit):
    """30 ms are usual; what is not linear takes minutes."""
    text = rf"\boxed{{{(unit * 10**6)[: 10**6]}}}"
    assert is_cheap(lambda: reward.extract_answer(text), 0.3)


def test_five_million_characters_are_harmless():
    text = "\ud800\x00.{" * 1_250_000
    assert reward.extract_answer(text) is None and reward.extract_answer(text + r"\boxed{5}") == "5"
    assert not reward.grade(rf"\boxed{{{text}}}", "5") and not reward.grade(
        r"\boxed{" + "." * 5_000_000 + "}", "5"
    )


@pytest.mark.parametrize(
    "unit",
    ["\\boxed{", "\n\n\\ \\boxed{", "\\boxed{1} and ", "no ", "not a ", "answer: ", "<answer>"],
)
def test_a_long_gold_is_cheap(unit):
    """20 ms are usual; work that is not linear took seconds."""
    text = (unit * 20_000)[:20_000]
    assert is_cheap(lambda: golds.gold_answer(text), 0.2)
    assert is_cheap(lambda: golds.agrees(text, "5"), 0.2)
    assert is_cheap(lambda: golds.agrees(rf"\boxed{{{text}}}", text), 0.2)


@pytest.mark.parametrize("text, gold", GOLDS["gold"])
def test_gold_answers_are_unwrapped_or_none(text, gold):
    assert golds.gold_answer(text) == gold


@pytest.mark.parametrize("table", TABLES)
def test_unwrapping_a_gold_changes_no_value(table):
    written = [gold for _, gold, expected in TABLES[table] if expected]
    changed = [gold for gold in written if not reward.is_equal(golds.gold_answer(gold), gold)]
    assert {*changed} <= {"(,)", ",", "...", "None"}


@pytest.mark.parametrize("solution, gold, expected", GOLDS["agrees"])
def test_a_solution_agrees_with_its_gold(solution, gold, expected):
    assert golds.agrees(solution, gold) is expected


def test_what_is_a_worked_answer():
    assert golds.is_worked("5+3=8 pens.\n#### 8") and golds.is_worked("2+3=5. \\boxed{5}")
    assert golds.is_worked("As both are even, so is the sum: \\boxed{\\text{even}}")
    for answer in (
        "#### 8",
        "\\boxed{8}",
        "x = \\boxed{8}",
        "The final answer is \\boxed{8}",
        "2+3=5",
    ):
        assert not golds.is_worked(answer)


@pytest.mark.parametrize(
    "completion, gold, expected",
    [
        (r"\boxed{E) 12}", "E", True),
        (r"\boxed{E: a score}", "E", True),
        (r"\boxed{\textbf{(E)}\ 12}", "E", True),
        (r"\boxed{\text{Option E}}", "E", True),
        (r"\boxed{e}", "E", True),
        (r"\boxed{E}", r"\textbf{(E)}\ 12", True),
        (r"\boxed{E}", "E) 12", True),
        (r"\boxed{D) 12}", "E", False),
        (r"\boxed{E}", "F", False),
        (r"\boxed{A}", "a = 3", False),
        (r"\boxed{e^2}", "E", False),
    ],
)
def test_choices(completion, gold, expected):
    assert reward.grade(completion, gold) is expected


def test_shaped_reward():
    assert reward.shaped_reward(True, 0, 1024) == 1.5
    assert reward.shaped_reward(True, 1024, 1024) == 1.0
    assert reward.shaped_reward(True, 256, 1024, beta=1.0) == 1.75
    assert reward.shaped_reward(False, 0, 1024) == 0.0


@pytest.mark.parametrize(
    "arguments",
    [
        (2, 1, 8),
        (True, -1, 8),
        (True, 9, 8),
        (True, float("nan"), 8),
        (True, 0, 0),
        (True, 1, 8, -0.5),
        (True, 1, 8, float("inf")),
    ],
)
def test_shaped_reward_refuses(arguments):
    with pytest.raises(ValueError, match="out of range"):
        reward.shaped_reward(*arguments)


@pytest.mark.parametrize("bad", [None, 5, 0.5, b"5", ["5"]])
def test_what_is_no_string_is_no_answer(bad):
    assert reward.extract_answer(bad) is None and not reward.grade(bad, "5")


def test_noise_in_a_box_never_raises():
    draw = random.Random(0)
    for _ in range(1500):
        left, right = ("".join(draw.choices(FRAGMENTS, k=draw.randint(1, 20))) for _ in range(2))
        assert reward.grade("\\boxed{" + left + "}", right) in (True, False)


@pytest.mark.parametrize("unit", HOSTILE)
@pytest.mark.parametrize("size", [20_000, 400, 150])
def test_hostile_completions_are_cheap(unit, size):
    """A bound against super-linear work, of the processor's time: the measured worst case is a few
    milliseconds."""
    text = (unit * size)[:size].rstrip("+")

    def work():
        reward.grade("\\boxed{" + text, "1")
        reward.grade("\\boxed{" + text + "}", text)

    assert is_cheap(work, 0.2)


@pytest.mark.parametrize("calls", [2_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_fuzz(calls):
    """The longer form, with times, is a script: python tests/fuzz_verifier.py."""
    mistakes, _ = fuzz(calls, seed=calls, files=[])
    assert mistakes == []
