"""What the teacher is shown, what the model is asked for, and rows that the student did not
write."""

import json
import math
import os
import signal
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_ended_well, exit_code, family_here, start_ranks
from test_family import adapter, arguments, every_other_one_is_correct, metrics
from test_train import assert_same_run, wait_for
from tqdm import tqdm

import lora
import rollout
import toy
import train
from experiments import gradients
from family import METHODS, asking, contexts, methods, neighbour
from family import __main__ as lab
from family.contexts import CONTEXTS, LABELS, Example
from support.data import InputError, Problem, load_problems
from support.sampling import Rollout

PROBLEMS = [Problem(f"P{line}", f"S{line}", "7", line, f"in words {line}") for line in (1, 2, 5, 6)]


def shown(context, texts, correct, i, step=0, **changes):
    """What the teacher of rollout i is shown, as Neighbour.teacher_prompts makes it."""
    rows = [
        Example([2], [0.0], True, PROBLEMS[1], [3], text, "8", ok, **changes)
        for text, ok in zip(texts, correct, strict=True)
    ]
    t = SimpleNamespace(
        step=step,
        ranks=SimpleNamespace(share=range),
        problems=PROBLEMS,
        teacher_prompt=lambda problem, text: text,
    )
    flags = ["--method", "sdpo", "--teacher-context", "other" if context == "label" else context]
    flags += ["--rollouts-per-prompt", max(2, len(rows)), "--prompts-per-step", 1]
    s, _, n = lab.parse_arguments(["--model", "m", "--data", "d", *map(str, flags)])
    s.rollouts_per_prompt = len(rows)
    n.context = CONTEXTS[context]
    asked = n.teacher_prompts(t, rows)
    assert n.teacher_prompts(t, rows) == asked
    return None if asked[i] == [3] and not rows[i].has_context else asked[i]


@pytest.mark.parametrize(
    "context,i,expected",
    [
        ("solution", 0, "S2"),
        ("answer", 0, "The final answer is \\boxed{7}."),
        ("peer", 0, "c"),
        ("peer", 2, "a"),
        ("peers", 0, "Correct attempt:\nc\n\nFailed attempt:\nb"),
        ("feedback", 0, "c\n\nYour answer is correct."),
        ("restated", 0, "The same problem in other words:\nin words 2"),
        ("reflection", 0, "Correct attempt:\na"),
        ("reflection", 1, "Failed attempt:\nb\n\nThe answer 8 is wrong.\n\nWhat went wrong:\n"),
        ("label", 0, None),
    ],
)
def test_contexts(context, i, expected):
    assert shown(context, ["a", "b", "c"], [True, False, True], i) == expected


def test_contexts_without_a_correct_peer():
    for context, expected in (
        ("peer", None),
        ("peers", None),
        ("feedback", "S2\n\nYour answer is correct."),
    ):
        assert shown(context, ["a", "b"], [True, False], 0) == expected


def test_what_was_asked_for_is_shown():
    assert shown("reflection", ["b"], [False], 0, asked={"reflection": "I forgot"}).endswith(
        "went wrong:\nI forgot"
    )
    assert shown("label", ["b"], [False], 0, label="setup") == "What matters here: setup."


def test_peers_are_drawn_at_random_and_never_the_rollout_itself():
    """The others uniformly, seeded by step and row: the same again when asked again."""
    one = Counter(
        shown("peer", list("abcde"), [True, True, False, True, True], 1, step)
        for step in range(400)
    )
    assert one.keys() == {"a", "d", "e"} and min(one.values()) > 100
    two = Counter(
        shown("peers", list("abcde"), [True, True, True, False, False], 0, step)
        for step in range(400)
    )
    first, second = (f"Correct attempt:\n{x}\n\nCorrect attempt:\n{y}" for x, y in ("bc", "cb"))
    assert two.keys() == {
        f"{pair}\n\nFailed attempt:\n{z}" for pair in (first, second) for z in "de"
    }
    assert min(two.values()) > 60


def test_the_other_problem_is_any_but_the_own():
    found = Counter(shown("other", ["a"], [True], 0, step) for step in range(300))
    assert found.keys() == {
        f"Another problem:\nP{line}\n\nIts solution:\nS{line}" for line in (1, 5, 6)
    }
    assert min(found.values()) > 70


# ---- questions and answers


@pytest.fixture(scope="module")
def tokenizer():
    return toy.make_tokenizer()


def row_of(tokenizer, text, correct=True, **changes):
    return Example(
        tokenizer.encode(text), [], True, PROBLEMS[0], [3], text, "8", correct, **changes
    )


def test_segments_are_lines_and_sentences(tokenizer):
    text = "12+3=15. So 1.5 is it!\nThen 20+5=25. ok. Is it 7? yes"
    row = row_of(tokenizer, text)
    parts = contexts.segments(row, tokenizer)
    assert [tokenizer.decode(row.token_ids[part.start : part.stop]).strip() for part in parts] == [
        # too short ones go with the next
        "12+3=15.",
        "So 1.5 is it!",
        "Then 20+5=25.",
        "ok. Is it 7?",
        "yes",
    ]
    assert [i for part in parts for i in part] == list(range(len(row.token_ids)))
    assert contexts.segments(row_of(tokenizer, ""), tokenizer) == []


def test_sentences_end_where_a_tokenizer_hides_spaces():
    """As SentencePiece's: a token decoded alone has no space before it."""
    words = dict(enumerate("First we add seven . Then we take nine away . It is two .".split()))
    hiding = SimpleNamespace(
        decode=lambda ids, **_: " ".join(words[i] for i in ids).replace(" .", ".")
    )
    parts = contexts.segments(Example(list(words), [], True, PROBLEMS[0], []), hiding)
    assert [(part.start, part.stop) for part in parts] == [(0, 5), (5, 11), (11, 15)]


LONG = "Let us count. " + "1+2=3 and then it is also so that 3+4=7. " * 3 + "So it is 7. \\boxed{7}"


@pytest.mark.parametrize(
    "answer, marked, label",
    [
        ("Segments: 1. Kind: setup", [1], "setup"),
        ("hm\nsegment: 1 , 2.\nkind: Case distinction.", [1, 2], "case distinction"),
        ("<think>Segments: 2. Kind: idea</think>Segments: 1. Kind: setup", [1], "setup"),
        ("Segments: 2, 2, 99, 0. Kind: idea", [2], "idea"),
        ("Segments: 2, 3, 1. Kind: idea", [2, 1], "idea"),  # 3 as well would be more than a quarter
        ("**Segments:** [2] and 1; **Kinds:** calculations", [2, 1], "calculation"),
        ("Segments: 99999999999999999999. Kind: idea", [], ""),
        ("<think>Segments: 1. Kind: setup", [], ""),
        # ends soon, too
        ("Segments: 1" + " " * 50_000 + "x" + "Segments: " + "1 and 1" * 9_000, [], ""),
        ("Segments: 1. Kind: magic", [], ""),
        ("Segments: . Kind: idea", [], ""),
        ("7+5=12. \\boxed{12}", [], ""),
    ],
)
def test_marks(tokenizer, monkeypatch, answer, marked, label):
    row = row_of(tokenizer, LONG)
    parts = contexts.segments(row, tokenizer)
    monkeypatch.setattr(
        contexts, "MOST_MARKED", (sum(len(parts[i - 1]) for i in (1, 2)) + 1) / len(row.token_ids)
    )
    contexts.MARKS.take(row, answer, tokenizer)
    assert row.label == label and row.asked == {"marks": answer, "label": label}
    assert row.marked.nonzero().flatten().tolist() == sorted(
        i for n in marked for i in parts[n - 1]
    )


def test_questions(tokenizer):
    """The gold answer is not given away where a reflection is asked for; nothing is asked about a
    correct one."""
    reflect, mark = contexts.REFLECTION.text, contexts.MARKS.text
    assert reflect(row_of(tokenizer, "x"), tokenizer) is None
    failed = row_of(tokenizer, "It is 8", False)
    asked = reflect(failed, tokenizer)
    assert (
        asked.startswith("P1\n\n[Attempt]\nIt is 8\n")
        and "The answer 8 is wrong." in asked
        and "7" not in asked
    )
    assert "no boxed answer" in reflect(replace(failed, answer=None), tokenizer)
    assert "cut off" in reflect(replace(failed, finished=False), tokenizer)
    asked = mark(row_of(tokenizer, LONG), tokenizer)
    assert (
        "S1" in asked
        and "[1] Let us count. \n[2] 1+2=3" in asked
        and all(label in asked for label in LABELS)
    )
    assert "is correct" in asked and "is wrong" in mark(failed, tokenizer)


# ---- solutions that the teacher writes


def test_likeness_is_a_share_of_the_solution():
    """Also of one that is longer than the rollout."""
    top = torch.tensor([[1, 2], [3, 4], [5, 6]])
    for ids, expected in (
        ([1, 4, 5], 1.0),
        ([1, 9], 0.5),
        ([9, 9, 9, 5, 5], 0.0),
        ([2, 9, 9, 1], 1 / 4),
    ):
        assert asking.likeness(Example(ids, [], True, PROBLEMS[0], []), top) == pytest.approx(
            expected
        )


@pytest.mark.parametrize(
    "overlap, texts, hint, chosen",
    [
        # the most alike of the correct ones
        (True, ["\\boxed{7} aaa", "bbb \\boxed{7}", "bbb"], None, 1),
        # none is correct, the one that is shown the answer is
        (True, ["bbb", "aab", "aaa"], "x \\boxed{7}", 3),
        (True, ["bbb", "aab", "aaa"], "x \\boxed{8}", 0),
        (False, ["bbb", "\\boxed{7} b", "\\boxed{7}"], None, 1),
    ],
)
def test_the_chosen_solution(tokenizer, monkeypatch, overlap, texts, hint, chosen):
    """The student's rollout is of b's only; correct goes before alike, and alike counts for some
    methods only."""

    def answers(t, prompts, what, writer):
        assert writer == "the teacher" and prompts == (
            ["shown S1"] * 3
            if what == "solutions"
            else [hint and "shown The final answer is \\boxed{7}."]
        )
        found = texts if what == "solutions" else [hint]
        stop = [tokenizer.eos_token_id]
        return [
            text and rollout.Completion(tokenizer.encode(text) + stop, [], True) for text in found
        ]

    def prompts_of(t, rows):
        for row in rows:
            row.teacher_prompt = "shown " + row.problem.solution
        return [row.teacher_prompt for row in rows]

    monkeypatch.setattr(asking, "ask", answers)
    b = tokenizer.encode("b")
    monkeypatch.setattr(asking, "top_tokens", lambda t, rows: [torch.tensor([b] * 50)])
    notes, first = {}, row_of(tokenizer, "bbb", False)
    t = SimpleNamespace(
        s=SimpleNamespace(teacher_rollouts=3, thinking=False, teacher_thinking=None, date=""),
        objective=SimpleNamespace(
            method=SimpleNamespace(overlap=overlap),
            note=lambda t, name, values: notes.update({name: values}),
            teacher_prompts=prompts_of,
            as_teacher=lambda t: "the teacher",
        ),
        tokenizer=tokenizer,
        teacher_prompt=lambda problem, text: "shown " + text,
    )
    (row,) = asking.solutions(t, [PROBLEMS[0]], [first])
    all_texts = texts + ([hint] if chosen == 3 else [])
    assert row.text == all_texts[chosen] and first.asked["solutions"] == all_texts
    assert first.asked["chosen"] == chosen and first.asked["correct"] == [
        "7" in text for text in all_texts
    ]
    assert row.is_reference and row.teacher_prompt == "shown S1" and row.prompt == [3]
    assert row.correct == ("7" in row.text)


def test_top_tokens_are_those_of_whole_logits(tiny_toy, tmp_path):
    t = trainer(tiny_toy, tmp_path, "brts")
    for parameter in t.parameters:
        torch.nn.init.normal_(parameter, std=0.1)
    ids = [[5, 6, 7], [8, 9]]
    rows = [Example(some, [], True, PROBLEMS[0], [3, 4, i]) for i, some in enumerate(ids)]
    t.model.eval()
    for row, top in zip(rows, asking.top_tokens(t, rows), strict=True):
        logits = t.model(torch.tensor([row.prompt + row.token_ids])).logits[0, 2:-1]
        assert top.sort().values.tolist() == logits.topk(16).indices.sort().values.tolist()


def trainer(tiny_toy, out, name, **changes):
    s, *_ = lab.parse_arguments(arguments(tiny_toy, out, name, **changes))
    return train.Trainer(s, train.Ranks(), neighbour.Neighbour(s))


# ---- steps


def test_pbsd_s_gradient_is_that_of_the_preference_loss():
    """Against autograd through -log sigma(m), on whole completions of random log-probs; two
    pairs."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(6) < torch.tensor([[4], [6], [5], [2]])
    logp, teacher = -3 * torch.rand(2, 4, 6, generator=generator, dtype=torch.float64) * mask
    logp.requires_grad_()
    ratios = ((logp - teacher) * mask).sum(1)  # two rollouts, then the teacher's two solutions
    loss = -torch.nn.functional.logsigmoid(0.1 * (ratios[2:] - ratios[:2])).mean()
    (exact,) = torch.autograd.grad(loss, logp)
    batch = SimpleNamespace(
        margin=(ratios[2:] - ratios[:2]).detach().repeat(2),
        logp=logp,
        mask=mask,
        is_reference=torch.tensor([False, False, True, True]),
        num_tokens=10.0,
        num_reference=7.0,
        num_completions=2,
    )
    batch.per_completion = methods.Batch.per_completion.fget(batch)
    share = torch.tensor([[10.0], [10.0], [7.0], [7.0]])  # by which the step divides
    (found,) = torch.autograd.grad((methods.pbsd(batch) / share).sum(), logp)
    torch.testing.assert_close(found, exact)


NEW = {
    "msd": {},
    "rp-opsd": {},
    "pbsd": {},
    "brts": {},
    "resd": {},
    "trace": {"max-new-tokens": 24},
    "sft": {"rows": "teacher"},
    "sft, in turns": {"rows": "interleaved"},
    "sft, in turns, kept": {"rows": "interleaved", "keep": "correct", "teacher-thinking": True},
    "sort": {},
    "atmanrl": {},
}


@pytest.mark.parametrize("name", ["brts"])  # the others below
def test_a_resumed_run_is_the_same(tiny_toy, tmp_path, name):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    family_here(*arguments(tiny_toy, whole, name, **NEW[name]))
    family_here(*arguments(tiny_toy, parts, name, steps=2, **NEW[name]))
    family_here("--out", parts, "--resume", "--steps", 4)
    assert_same_run(whole, parts)


@pytest.mark.slow
@pytest.mark.parametrize("name", NEW)
def test_twenty_steps_with_a_kill_by_one_and_two_processes(tiny_toy, tmp_path, name):
    """Killed without warning while it works, then resumed: by one process the same to the last
    bit."""
    changes = NEW[name]
    if name == "atmanrl":  # the tiny toy has no reasoning before its boxes
        changes = {"model": "toy", "data": "toy", "max-new-tokens": 64}
    name = name.split(",")[0]
    family_here(*arguments(tiny_toy, tmp_path / "whole", name, steps=20, **changes))
    for world, place in ((1, "one"), (2, "two")):
        out = tmp_path / place
        flags = arguments(tiny_toy, out, name, steps=20, **changes)
        processes = start_ranks(tmp_path, lab.main, "family", *flags, world=world)
        wait_for((out / "checkpoints" / "step-000006").exists)
        for process in processes:
            os.kill(process, signal.SIGKILL)
        assert all(exit_code(process) for process in processes) and not (out / "model").exists()
        resume = ["--out", out, "--resume"]
        assert_ended_well(start_ranks(tmp_path, lab.main, "family", *resume, world=world), tmp_path)
    assert_same_run(tmp_path / "whole", tmp_path / "one", step=20)
    assert len(metrics(tmp_path / "two")) == 20
    for key, tensor in adapter(tmp_path / "whole", 20).items():
        torch.testing.assert_close(adapter(tmp_path / "two", 20)[key], tensor, atol=1e-3, rtol=0)


def samples(run):
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "name, key",
    [
        ("pbsd", "solutions"),
        ("brts", "solutions"),
        ("resd", "reflection"),
        ("trace-errors", "marks"),
        ("sft", "solutions"),
        ("sft, in turns", "turns"),
        ("sort", "plan"),
    ],
)
def test_what_is_asked_for_is_written_down(tiny_toy, tmp_path, name, key):
    out = tmp_path / "run"
    changes = NEW.get(name, {})
    if name == "sort":
        changes = with_answers(tiny_toy, tmp_path, "-1")
    family_here(*arguments(tiny_toy, out, name.split(",")[0], steps=1, **changes))
    rows, (row,) = samples(out), metrics(out)
    if name == "sort":  # rollouts, and the two solutions that plans were asked for
        assert ["asked" in row for row in rows] == 2 * [True] + 4 * [False]
        rows = rows[:2]
        assert all(row["correct"] and row["completion"].startswith("A guess") for row in rows)
    assert len(rows) in (2, 4) and all(
        row["correct"] and key in ("reflection", "marks") or key in row["asked"] for row in rows
    )
    assert row["asked_tokens"] > 0 and 0 < row["ask_s"] < row["step_s"]
    figures = {
        "solutions": {"teacher_accuracy", "teacher_truncated"},
        "turns": {"teacher_accuracy", "teacher_truncated", "teacher_share"},
        "plan": {"repaired", "unplanned"},
    }.get(key, set())
    assert figures <= row.keys() and ("margin" in row) == (name == "pbsd")
    assert ("teacher_likeness" in row) == (name == "brts")
    if name == "brts":
        assert all(
            4 <= len(row["asked"]["solutions"]) <= 5 > row["asked"]["chosen"] for row in rows
        )


def test_the_progress_line_names_what_is_asked_for(tiny_toy, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(
        asking,
        "progress",
        lambda bar, prefix, f=asking.progress, **more: (
            shown.append(prefix),
            f(bar, prefix, **more),
        )[1],
    )
    family_here(*arguments(tiny_toy, tmp_path / "run", "brts", steps=2))
    assert [text.split(", ")[-1] for text in shown] == ["solutions: ", "shown the answer: "] * 2
    assert "accuracy" in shown[2]


def with_answers(tiny_toy, tmp_path, answer):
    rows = [
        json.loads(line) | {"answer": answer, "solution": rf"A guess. \boxed{{{answer}}}"}
        for line in (tiny_toy / "train.jsonl").read_text().splitlines()
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data": tmp_path / "data.jsonl"}


def assert_degenerate_as_declared(name, kind, row):
    if name.startswith("sft, in turns"):
        assert row["teacher_accuracy"] == (kind == "all right")
        assert row["teacher_truncated"] == 1 or kind != "truncated"
    if name == "sft, in turns, kept":
        assert (row["grad_norm"] > 0) == (kind == "all right")
    if name == "sort":  # group rewards are all alike
        assert row["repaired"] == (kind != "all right") == ("unplanned" in row)
        assert (row["grad_norm"] > 0) == (kind != "all right")
    if name == "atmanrl":
        assert row.get("saliency") == (1 if kind == "all right" else None)
        assert row["reward"] == (1.5 if kind == "all right" else 0) and row["grad_norm"] == 0


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize(
    "kind", ["all right", "all wrong", pytest.param("truncated", marks=pytest.mark.slow)]
)
def test_degenerate_steps(tiny_toy, tmp_path, monkeypatch, name, kind):
    """Nothing to be learned is learned from rewards alone; everything stays finite, and is
    defined."""
    changes = NEW[name] | ({"max-new-tokens": 2} if kind == "truncated" else {})
    changes |= with_answers(tiny_toy, tmp_path, "-1") if kind == "all wrong" else {}
    if kind == "all right":
        monkeypatch.setattr(
            Rollout, "grade", lambda row, said: vars(row).update(correct=True) or row
        )
        monkeypatch.setitem(
            neighbour.SALIENCY,
            "mask",
            lambda model, tokenizer, rows, check: [torch.ones(2)] * len(rows),
        )
    method = name.split(",")[0]
    family_here(*arguments(tiny_toy, tmp_path / "run", method, steps=1, **changes))
    for row in metrics(tmp_path / "run"):
        assert all(math.isfinite(value) for value in row.values())
        if method != "sft":
            assert row["accuracy"] == (kind == "all right")
        assert_degenerate_as_declared(name, kind, row)
        if name in ("pbsd", "brts", "sft"):
            assert row["teacher_accuracy"] == (kind == "all right")
            assert row["teacher_truncated"] == 1 or kind != "truncated"
        # only correct ones are asked about; all rewards alike, nothing can be parsed
        if name == "trace":
            assert row.get("unmarked") == (1 if kind == "all right" else None)
            assert row["grad_norm"] == 0 or kind == "all right"
        if name == "resd" and kind == "all right":
            assert row["asked_tokens"] == 0
        if name in ("msd", "rp-opsd", "pbsd", "brts"):
            assert row["grad_norm"] > 0


def test_unmarked_trace_is_group_grpo(tiny_toy, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "grade_rollouts", every_other_one_is_correct(train.grade_rollouts))
    for name in ("trace", "grpo-group"):
        family_here(*arguments(tiny_toy, tmp_path / name, name, steps=2))
    assert metrics(tmp_path / "trace")[1]["grad_norm"] > 0
    for key, tensor in adapter(tmp_path / "trace", 2).items():
        assert torch.equal(adapter(tmp_path / "grpo-group", 2)[key], tensor)


@pytest.mark.parametrize(
    "answer, plan",
    [
        ("Add.\n\n  Subtract. \n", "Add.\nSubtract."),
        ("<think>Add.</think>\nSubtract.", "Subtract."),
        ("1\n2\n3\n4\n5\n6\n7", "1\n2\n3\n4\n5"),
        ("Add.\nSo it is \\boxed{7}.", "Add."),
        ("\\boxed{7}", ""),
        ("<think>Add.", ""),
        (" \n", ""),
    ],
)
def test_plans(tokenizer, answer, plan):
    row = row_of(tokenizer, "x")
    contexts.PLAN.take(row, answer, tokenizer)
    assert row.asked == {"plan": plan}
    shown = CONTEXTS["plan"].text(row, [], [], None)
    assert shown == (f"A plan of the solution:\n{plan}" if plan else None)


def test_the_base_model_plans_and_only_failed_groups_are_repaired(tiny_toy, tmp_path, monkeypatch):
    """Of two problems the first was failed by all its rollouts."""
    grade = every_other_one_is_correct(train.grade_rollouts, from_row=4)
    monkeypatch.setattr(train, "grade_rollouts", grade)
    asked, ask = [], asking.ask

    def noting(t, prompts, what, writer=None, *more):
        asked.append([prompt and t.tokenizer.decode(prompt) for prompt in prompts])
        layer = next(m for m in t.model.modules() if isinstance(m, lora.LoRALinear))
        with writer:
            assert not layer.enabled
        return ask(t, prompts, what, lora.disabled(t.model), *more)

    monkeypatch.setattr(asking, "ask", noting)
    t = trainer(tiny_toy, tmp_path, "sort")
    t.log.bar = tqdm(disable=True)
    t.out.mkdir(exist_ok=True)
    problems = t.next_problems()
    metrics = t.train_step()
    ((first, second),) = asked
    assert problems[0].solution in first and "plan of this solution" in first and second is None
    (row,) = t.objective.others
    assert row.problem.line == problems[0].line and row.counts
    assert metrics["repaired"] == 0.5 and "entropy" not in metrics


def test_a_plan_that_is_an_open_thought_is_none(tiny_toy, tmp_path, monkeypatch):
    t = trainer(tiny_toy, tmp_path, "sort", thinking=True)
    monkeypatch.setattr(neighbour.teacher, "prompt_end", lambda *_: "<think>\n")
    row = t.objective.reference(t, t.problems[0])
    contexts.PLAN.take(row, "I add 7 and", t.tokenizer)
    assert row.asked == {"plan": ""}
    contexts.PLAN.take(row, "I add.</think>Add.", t.tokenizer)
    assert row.asked == {"plan": "Add."}


@pytest.mark.parametrize("context", ["plan", "other"])
def test_solutions_shown_depend_on_the_problem_s_place_only(tiny_toy, tmp_path, context):
    """Not on how many of the rank's problems before it were solved, nor on the rank."""
    t = trainer(tiny_toy, tmp_path, "sort", **{"teacher-context": context, "prompts-per-step": 4})
    found = []
    for first, failed in ((0, {0, 1, 2, 3}), (0, {2, 3}), (2, {3})):
        t.ranks.share = lambda n, first=first: range(first, n)
        n = t.objective
        n.others = [n.reference(t, problem) for problem in t.problems[first:4]]
        n.rollouts = [
            Example([], [], True, PROBLEMS[0], [], correct=i not in failed)
            for i in range(first, 4)
            for _ in range(4)
        ]
        n.figures = {}
        n.count_failed(t)
        assert [one.counts for one in n.others] == [i in failed for i in range(first, 4)]
        n.read_plans(t)
        found.append(n.others[-1].teacher_prompt)
        assert n.others[-1].planned.abs().sum() > 0
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    "name, like, right, answer",
    [
        # no group failed
        ("sort", {"method": "grpo-group"}, 0, "Add."),
        # no plan can be read
        ("sort", {"method": "sort", "teacher-context": "none"}, 8, "<think>"),
    ],
)
def test_what_sort_falls_back_to(tiny_toy, tmp_path, monkeypatch, name, like, right, answer):
    grade = every_other_one_is_correct(train.grade_rollouts, from_row=right)
    monkeypatch.setattr(train, "grade_rollouts", grade)
    ids = toy.make_tokenizer().encode(answer)

    def ask(t, prompts, *more):
        return [prompt and rollout.Completion(ids, [], False) for prompt in prompts]

    monkeypatch.setattr(asking, "ask", ask)
    for out, changes in (("one", {"method": name}), ("other", like)):
        family_here(*arguments(tiny_toy, tmp_path / out, "sort", steps=2, **changes))
    assert metrics(tmp_path / "one")[1]["grad_norm"] > 0
    for key, tensor in adapter(tmp_path / "one", 2).items():
        torch.testing.assert_close(adapter(tmp_path / "other", 2)[key], tensor)


def test_solved_and_failed_ones_weigh_the_same_in_resd():
    for solved in (1, 3, 7):
        correct = torch.arange(8) < solved
        batch = SimpleNamespace(
            success_rate=solved / 8,
            correct=correct,
            advantage=torch.zeros(8),
            num_tokens=8.0,
            per_completion=torch.ones(8, 1),
            mask=torch.ones(8, 1).bool(),
            divergence=lambda f: torch.ones(8, 1),
        )
        weights = methods.resd(batch)[:, 0]
        assert weights.mean().item() == pytest.approx(1)
        assert weights[correct].sum().item() == pytest.approx(weights[~correct].sum().item())


@pytest.mark.parametrize("gate", ["two-view", "dual"])
def test_gates_of_others(tiny_toy, tmp_path, gate):
    family_here(*arguments(tiny_toy, tmp_path / "run", "egrsd", steps=2, gate=gate))
    low = 0.05 if gate == "two-view" else 0.0
    assert all(low < row["gate"] < 1 and row["grad_norm"] > 0 for row in metrics(tmp_path / "run"))


def test_the_two_view_gate_uses_running_statistics(tiny_toy, tmp_path):
    """Those of all tokens so far, this step's included, over the whole run."""
    t = trainer(tiny_toy, tmp_path / "run", "egrsd", gate="two-view")
    t.log.bar = SimpleNamespace(set_postfix_str=lambda *_, **__: None, update=lambda *_: None)
    seen, steps = [], []
    t.out.mkdir()
    n, read, make, note = t.objective, t.read_as_student, t.make_rollouts, t.objective.note

    def watched(*arguments):
        steps[-1].append(read(*arguments))
        return steps[-1][-1]

    def while_sampling(problems):
        assert n.bare is None and not n.rollouts  # not kept while the next step samples
        steps.append([])
        return make(problems)

    def noted(t, name, values):
        assert len(values) == sum(len(row.token_ids) for row in n.rollouts)
        seen.extend(values)
        kept[:] = values
        note(t, name, values)

    t.read_as_student, t.make_rollouts, n.note, kept = watched, while_sampling, noted, []
    for _ in range(2):
        t.train_step()
    assert n.numbers["view_sums"] == pytest.approx([len(seen), sum(seen), sum(x**2 for x in seen)])
    own = kept[: len(n.rollouts[0].token_ids)]
    expected = (torch.tensor(own) - np.mean(seen)) / np.std(seen)
    (batch,) = steps[-1]
    place = [row.place for row in batch.examples].index(0)
    found = n.views[neighbour.places_of(batch)][place, : len(expected)]
    torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=1e-4)
    tensors, numbers = t.state()
    n.numbers["view_sums"] = [0.0] * 3
    t.load_state(tensors, json.loads(json.dumps(numbers)))
    assert n.numbers["view_sums"] == numbers["view_sums"] != [0.0] * 3


def test_a_row_without_context_is_no_part_of_the_two_views_statistics(tiny_toy, tmp_path):
    """Its KL is 0 because nothing was shown, which says nothing of the teacher."""
    changes = {"gate": "two-view", "teacher-context": "peer"}
    changes |= {"rollouts-per-prompt": 4, "prompts-per-step": 2}
    t = trainer(tiny_toy, tmp_path / "run", "egrsd", **changes)
    t.out.mkdir()
    t.log.bar, n = tqdm(disable=True), t.objective
    views, note = [], n.note

    def noted(t, name, values):
        views.append(values)
        note(t, name, values)

    n.note = noted
    t.train_step()
    without = [row for row in n.rollouts if not row.has_context]
    assert 0 < len(without) < 8
    (counted,) = views
    assert len(counted) == sum(len(row.token_ids) for row in n.rollouts if row.has_context)
    assert n.numbers["view_sums"] == pytest.approx(
        [len(counted), sum(counted), sum(x**2 for x in counted)]
    )


# ---- data, settings


def test_a_second_wording_comes_from_the_data(tiny_toy, tmp_path):
    first = load_problems(tiny_toy / "train.jsonl")[0][0]
    assert first.restated.startswith("What is ") and first.restated != first.problem
    lines = (tiny_toy / "train.jsonl").read_text().splitlines(keepends=True)[:9]
    row = json.loads(lines[3])
    for value, complaint in (
        (None, "line 4: field 'restated' is missing: add it"),
        (5, "must be text, got int"),
    ):
        lines[3] = json.dumps(row | {"restated": value}) + "\n"
        (tmp_path / "bad.jsonl").write_text("".join(lines))
        with pytest.raises(InputError, match=complaint):
            family_here(*arguments(tiny_toy, tmp_path / "run", "msd", data=tmp_path / "bad.jsonl"))
    family_here(
        *arguments(tiny_toy, tmp_path / "run", "opsd", steps=1, data=tiny_toy / "train.jsonl")
    )


@pytest.mark.parametrize(
    "name, context, most", [("egrsd", "reflection", 1400), ("trace", "label", 1000)]
)
def test_questions_must_fit_the_window(tiny_toy, tmp_path, name, context, most):
    """The toy's window of 4,096 tokens holds question, quoted attempts and answer."""
    with pytest.raises(InputError, match="beyond the model's window"):
        family_here(
            *arguments(
                tiny_toy,
                tmp_path / "run",
                name,
                **{"teacher-context": context, "max-new-tokens": most},
            )
        )


@pytest.mark.parametrize(
    "name, changes, field",
    [("sft", {"rows": "teacher"}, "solution"), ("brts", {"teacher-context": "none"}, "answer")],
)
def test_what_the_teacher_is_asked_must_fit_the_window(tiny_toy, tmp_path, name, changes, field):
    lines = (tiny_toy / "train.jsonl").read_text().splitlines(keepends=True)[:9]
    row = json.loads(lines[3]) | {"solution": "A guess."} | {field: "12345 " * 900}
    lines[3] = json.dumps(row) + "\n"
    (tmp_path / "long.jsonl").write_text("".join(lines))
    with pytest.raises(InputError, match="line 4: .* beyond the model's window"):
        family_here(
            *arguments(
                tiny_toy,
                tmp_path / "run",
                name,
                data=tmp_path / "long.jsonl",
                **changes,
                **{"skip-ungradable": False},
            )
        )


def test_the_window_must_hold_three_quotations_beside_the_marks(tiny_toy, tmp_path, monkeypatch):
    """The segments, which are quoted, may have three times the tokens of the rollout."""
    t = trainer(tiny_toy, tmp_path, "trace", **{"max-new-tokens": 20})
    rows = [Example([], [], False, problem, []) for problem in t.problems]
    questions = [contexts.MARKS.text(row, t.tokenizer) for row in rows]
    longest = max(len(asking.encode(t, question)) for question in questions)
    monkeypatch.setattr(rollout, "window", lambda model: longest + 4 * 20)
    t.objective.check_data(t)
    monkeypatch.setattr(rollout, "window", lambda model: longest + 4 * 20 - 1)
    with pytest.raises(InputError, match="beyond the model's window"):
        t.objective.check_data(t)


def test_texts_have_no_special_tokens_and_seeds_of_their_own(tiny_toy, tmp_path, monkeypatch):
    assert len({0, *asking.SEEDS.values()}) == 1 + len(asking.SEEDS)  # 0: the rollouts'
    t = trainer(tiny_toy, tmp_path, "resd")
    ids = [*t.tokenizer.encode("no carry"), t.tokenizer.eos_token_id]
    monkeypatch.setattr(
        asking, "ask", lambda t, prompts, *more: [rollout.Completion(ids, [], True)]
    )
    row = Example([1], [], True, t.problems[0], [], "", "8")
    asking.ask_about(t, [row])
    assert row.asked["reflection"] == "no carry"


def test_what_does_not_fit_is_not_asked(tiny_toy, tmp_path, monkeypatch):
    """Quotations may become longer when they are encoded anew: then there is no reflection."""
    monkeypatch.setattr(rollout, "window", lambda model: 60)
    t = SimpleNamespace(
        s=SimpleNamespace(max_new_tokens=20),
        objective=SimpleNamespace(context=CONTEXTS["reflection"], method=METHODS["resd"]),
        tokenizer=None,
        step=0,
        model=None,
    )
    monkeypatch.setattr(asking, "encode", lambda t, text: [0] * (39 + len(text.split("x"))))
    rows = [
        Example([1], [], True, PROBLEMS[0], [], "", "8"),
        Example([1], [], True, PROBLEMS[0], [], "x" * 9, "8"),
    ]
    asked = []
    monkeypatch.setattr(
        asking, "ask", lambda t, prompts, *more: asked.extend(prompts) or [None] * len(prompts)
    )
    asking.ask_about(t, rows)
    assert [prompt is not None for prompt in asked] == [True, False]


@pytest.mark.parametrize("name", ["cl-egrsd", "direction-aware", *METHODS])
def test_explain(name, capsys):
    with pytest.raises(SystemExit) as end:
        lab.parse_arguments(["--method", name, "--explain"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and said.startswith(f"{name}: ") and "cost: " in said
    assert name not in METHODS or "Grade" in said


@pytest.mark.parametrize(
    "flags, cost",
    [
        ([], "5 forward passes"),
        (["--method", "sft"], "3 forward"),
        (["--method", "sft", "--rows", "teacher"], "4 forward"),
        (["--method", "sft", "--rows", "interleaved"], "4 forward"),
        (["--method", "sort"], "37 forward"),
        (["--method", "atmanrl"], "32 forward"),
        (["--method", "grpo"], "4 forward"),
        (["--method", "pbsd"], "12 forward"),
        (["--method", "brts"], "15 forward"),
        (["--method", "rp-opsd"], "6 forward"),
        (["--method", "resd"], "6 forward"),
        (["--method", "trace"], "48 forward"),
        (["--method", "egrsd", "--gate", "two-view"], "6 forward"),
        (["--method", "egrsd", "--gate", "dual"], "5 forward"),
    ],
)
def test_costs(flags, cost, capsys):
    with pytest.raises(SystemExit):
        lab.parse_arguments([*flags, "--explain"])
    assert f"cost: {cost}" in capsys.readouterr().out


@pytest.mark.slow
def test_rows_of_the_comparison_have_gradients(tiny_toy):
    """By their own training step; EGRSD's are those of the other way to make them."""
    s = gradients.GradientsSettings(
        model=str(tiny_toy / "model"),
        data=str(tiny_toy / "train.jsonl"),
        batches=3,
        batch=8,
        max_new_tokens=12,
        gamma=[0.3],
        window=[0],
        eps=[0.2],
        also=["msd", "two-view gate"],
    )
    found = gradients.measure(s)["rows"]
    assert {"msd", "two-view gate", "egrsd"} < found.keys()
    assert len({round(row["alignment"][0], 6) for row in found.values()}) == len(found)


def test_gradients_of_steps_are_those_of_gradients(tiny_toy, monkeypatch):
    s = gradients.GradientsSettings(
        model=str(tiny_toy / "model"),
        data=str(tiny_toy / "train.jsonl"),
        batches=3,
        batch=8,
        max_new_tokens=12,
        gamma=[0.3],
        window=[0],
        eps=[0.2],
    )
    made = []
    monkeypatch.setattr(
        gradients,
        "batch_sketches",
        lambda model, tokenizer, rows, s, f=gradients.batch_sketches: (
            made.append((model, list(rows), f(model, tokenizer, rows, s))),
            made[-1][2],
        )[1],
    )
    gradients.measure(s)
    names = list(gradients.configurations(s))
    for name in ("grpo", "direction-aware", "egrsd"):
        steps = gradients.step_sketches(name, made[0][0], [rows for _, rows, _ in made], s)
        for own, (_, _, grid) in zip(steps, made, strict=True):
            torch.testing.assert_close(own, grid[names.index(name)], rtol=1e-4, atol=1e-6)


def test_settings_of_methods_that_ask():
    s, *_ = lab.parse_arguments(["--model", "m", "--data", "d", "--method", "brts"])
    asked = (s.teacher_rollouts, s.ask_temperature, s.ask_top_p, s.rollouts_per_prompt)
    assert asked == (4, 0.7, 0.95, 1)
    flags = ["--method", "sft", "--rows", "teacher", "--teacher-rollouts", "3"]
    flags += ["--model", "m", "--data", "d", "--teacher-context", "answer"]
    s, *_ = lab.parse_arguments(flags)
    assert s.source == "teacher" and s.teacher_rollouts == 3
    flags = ["--method", "sft", "--rows", "interleaved", "--model", "m", "--data", "d"]
    s, *_ = lab.parse_arguments(flags)
    assert (s.ask_temperature, s.ask_top_p, s.ask_top_k) == (0.7, 0.8, 20)
    s, *_ = lab.parse_arguments([*flags, "--ask-top-k", "5"])
    assert (s.ask_temperature, s.ask_top_k) == (0.7, 5)
