"""reward.py against tables of answers, seeded noise and hostile input.

tests/data/verifier_cases.json holds the shared cases (giant strings are rebuilt below);
tests/data/reward_cases.json one table per class of answers: [prediction, gold, equal?].
"""

import doctest
import json
import pathlib
import random
import time

import pytest

import reward

DATA = pathlib.Path(__file__).parent / "data"
SHARED = json.loads((DATA / "verifier_cases.json").read_text())
TABLES = json.loads((DATA / "reward_cases.json").read_text())


def test_doctests():
    assert doctest.testmod(reward).failed == 0


@pytest.mark.parametrize("prediction, gold, expected, note", SHARED["equal"])
def test_shared_pairs(prediction, gold, expected, note):
    assert reward.is_equal(prediction, gold) is expected, note


@pytest.mark.parametrize("text, gold, expected, note", SHARED["extract"])
def test_shared_completions(text, gold, expected, note):
    assert reward.grade(text, gold) is expected, note


@pytest.mark.parametrize("table", TABLES)
def test_table(table):
    wrong = [case for case in TABLES[table] if reward.is_equal(case[0], case[1]) is not case[2]]
    assert not wrong


@pytest.mark.parametrize("table", TABLES)
def test_gold_of_a_true_pair_grades_itself(table):
    golds = [gold for _, gold, expected in TABLES[table] if expected]
    assert [gold for gold in golds if not reward.grade(rf"so $\boxed{{{gold}}}$.", gold)
            and reward.extract_answer(rf"\boxed{{{gold}}}") == gold] == []


PUBLIC_DEFECTS = [
    ("-42", "42", False, "a number regex without a minus sign"),
    (r"\$36", "36", True, r"\$36 was not even equal to itself"),
    (r"\frac{1}{2}", r"\frac{1}{3}", False, "answers cut at the first closing brace"),
    ("99**98**97", "1", False, "sympy hangs on a power tower"),
    (r"4\sqrt(2)", "4", False, "a malformed root loses its factor"),
    ("3 1/2", "31/2", False, "spaces deleted: the mixed number becomes 31/2"),
    ("1 2", "12", False, "spaces deleted: two numbers become one"),
    ("528", "52_8", False, "subscripts glued to the digits"),
    ("1_000", "1000", False, "int() accepts underscores"),
    ("٣", "3", False, "int() accepts the digits of every script"),
    ("1e999", "1e998", False, "inf == inf"),
    ("nan", "nan", False, "not a number is not an answer"),
    ("x^2", "2x", False, "agrees at the two points that were tried"),
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}", False, "an absolute tolerance makes all tiny numbers equal"),
    ("1.4142135623730951", r"\sqrt{2}", False, "a relative tolerance of floats accepts rounded values"),
    ("12 or 13", "12", False, "the first number wins: hedging pays"),
    (r"5\text{ or more}", "5", False, "text after the number deleted whatever it says"),
    ("(1,2)", "(2,1)", False, "tuples compared as sets"),
    ("(0,1]", "(0,1)", False, "brackets deleted"),
    (r"\text{no}", "0", False, "no parsed as a false value"),
    ("1/0", "1/0", False, "zoo == zoo"),
    ("", "", False, "an empty box equals a missing gold"),
    ("[1,100]", "(1,100)", False, "1,100 read as a number inside an interval"),
    ("2abcd", "2", False, "every run of letters after a number taken for a unit"),
    ("__import__('os').getpid()", "1", False, "eval on model output"),
]


@pytest.mark.parametrize("prediction, gold, expected, defect", PUBLIC_DEFECTS)
def test_public_defects(prediction, gold, expected, defect):
    assert reward.is_equal(prediction, gold) is expected, defect
    assert reward.is_equal(gold, prediction) is expected, defect


@pytest.mark.parametrize("text, answer", [
    (r"\boxed 5", "5"), (r"\boxed 42.", "42"), (r"\boxed{ 5 }", "5"), ("\\boxed\n{5}", "5"),
    (r"\framebox{7}", "7"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed{\}}", r"\}"),
    (r"\boxed{<}", "<"),
    (r"\boxed{1\\2}", r"1\\2"), (r"\boxed{x} and \fbox{y}", "y"), (r"\boxed{a\boxed{b}c}", "b"),
    (r"\boxed{\{\}}", r"\{\}"),
    (r"<think>\boxed{1}</think>\boxed{2}", "2"), (r"a</think>\boxed{3}", "3"),
    (r"\boxed{\text{no answer}}", r"\text{no answer}"),
    (r"<think>\boxed{1}</think>no box", None), (r"\boxed{1}<think>", None),
    (r"<think>a</think><think>\boxed{4}", None),
    (r"\boxed{1}\boxed{", None), (r"\boxed{1}\boxed", None), (r"\boxed{x", None), (r"\boxedx{1}", None),
    (r"\boxed{}", None),
    (r"\boxed{\text{}}", None), (r"\boxed{ }", None), (r"\boxed{\,}", None), (r"\boxed{?}", None),
    (r"\boxed{...}", None),
    (r"\boxed{\ldots}", None), (r"\boxed{answer}", None), (r"\boxed{\text{your answer}}", None),
    (r"\boxed{<answer>}", None),
    (r"\boxed{\text{Answer here}}", None), (r"\boxed{\boxed{}}", None), ("", None), (None, None),
])
def test_extract_answer(text, answer):
    assert reward.extract_answer(text) == answer


def test_shaped_reward():
    assert reward.shaped_reward(True, 0, 1024) == 1.5
    assert reward.shaped_reward(True, 1024, 1024) == 1.0
    assert reward.shaped_reward(True, 256, 1024, beta=1.0) == 1.75
    assert reward.shaped_reward(False, 0, 1024) == 0.0


@pytest.mark.parametrize("arguments", [
    (2, 1, 8), (True, -1, 8), (True, 9, 8), (True, float("nan"), 8), (True, 0, 0), (True, 1, 8, -0.5),
    (True, 1, 8, float("inf")),
])
def test_shaped_reward_refuses(arguments):
    with pytest.raises(ValueError, match="out of range"):
        reward.shaped_reward(*arguments)


@pytest.mark.parametrize("bad", [None, 5, 0.5, b"5", ["5"]])
def test_no_string_is_no_answer(bad):
    assert not reward.is_equal(bad, "5") and not reward.is_equal("5", bad) and not reward.grade(bad, "5")


def test_different_letters_stand_for_different_numbers():
    letters = "abcdfghjklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert len({reward._sample_points(letter) for letter in letters}) == len(letters)


FRAGMENTS = (
    r"\frac \sqrt { } ( ) [ ] \{ \} 1 2 x y + - * / ^ _ , ; = < \le \pm \cup \in | ! . \pi e i \infty "
    r"\text{cm} \begin{pmatrix} \end{pmatrix} & \\ \sin \log \binom \choose \over 0.5 1,000 \overline{3} ° "
    r"% $ \left and cm apples \lfloor ² √ ± \circ \ln : 1e5 1e999 9! 2004! [3] \frac12").split()
FRAGMENTS += [" ", "\ud800", "\x00"]


def test_noise_never_raises():
    draw = random.Random(0)
    for _ in range(1500):
        left, right = ("".join(draw.choices(FRAGMENTS, k=draw.randint(1, 20))) for _ in range(2))
        assert reward.is_equal(left, right) in (True, False)
        assert reward.grade("\\boxed{" + left + "}", right) in (True, False)


def test_well_formed_noise_equals_itself():
    draw = random.Random(1)
    atoms = ["2", "x", r"\frac{1}{3}", r"\sqrt{2}", r"\pi", "0.5", "(y+1)", "n!", r"\sin x", "3^{2}"]
    for _ in range(300):
        formula = "".join(draw.choice(atoms) + draw.choice("+-*") for _ in range(4)) + draw.choice(atoms)
        shape = draw.choice(["{}", r"({},1)", r"[{},\infty)", r"\{{{},5\}}", "y={}", "x<{}", r"\pm {}",
        "1,{}"])
        gold = shape.format(formula)
        assert reward.is_equal(f"$ {gold} $", gold), gold


GIANTS = ["(" * 20_000 + "1" + ")" * 20_000, "\\frac{" * 5_000, "1+" * 20_000 + "1", "1," * 20_000 + "1"]


@pytest.mark.parametrize("giant", GIANTS, ids=("brackets", "unclosed", "sum", "list"))
@pytest.mark.parametrize("gold", ["1", "2", "20001"])
def test_giant_strings(giant, gold):
    assert not reward.is_equal(giant, gold)
    assert not reward.is_equal(gold, giant)


HOSTILE = ["(", "{", "\\{", "[", "\\frac", "\\frac12", "\\sqrt", "^", "2^", "-", "|", "\\pm ", " ",
"\\text{", "and ", "1,000,",
           "$", "\\", "\\begin{pmatrix}", "x=1,", "x<", "\\cup ", "_", '"', "°", "\\sin x+", "3 1/2 ",
           "(1,2),", "9!", "2400!+",
           "99^", "\\sqrt{2400!}+", "x^{1/3}+", "(x^2+y)^{30}+", "2^{12000}/3^{7000}+",
           "\\binom{2000}{1000}+", "\\ln 2+",
           "0.\\overline{3}", "\\boxed{", "\\boxed", "\\boxed{1}", "\\fbox[", "<think>", "{}"]


@pytest.mark.parametrize("unit", HOSTILE)
@pytest.mark.parametrize("size", [20_000, 400, 150])
def test_hostile_input_is_cheap(unit, size):
    """A generous bound against super-linear work; the measured worst case is a few milliseconds."""
    text = (unit * size)[:size].rstrip("+")
    start = time.perf_counter()
    for prediction, gold in ((text, text[::-1]), (text, text), (text, "1"), ("1", text)):
        reward.is_equal(prediction, gold)
    reward.grade("\\boxed{" + text, "1")
    reward.grade("\\boxed{" + text + "}", text)
    assert time.perf_counter() - start < 0.5


def test_deep_call_stack():
    def sink(levels):
        return sink(levels - 1) if levels else reward.is_equal(r"\frac{1}{1+\frac{1}{2}}",
        "2/3") in (True, False)
    for levels in range(700, 900, 20):
        assert sink(levels)
