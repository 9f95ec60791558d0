"""Sampling besides the rollouts: answers of the student's about them, and solutions that the
teacher writes.

`t` is the Trainer whose step it is, `t.objective` its Neighbour. What is sampled is a function of
seed, step and row, for any number of ranks.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

import rollout
import teacher
from family.contexts import CONTEXTS, Example
from support.data import Problem
from support.sampling import progress

SEEDS = {"contexts": 1, "solutions": 2, "solutions, shown the answer": 3}  # rollouts: 0
SEEDS |= {"reflections": 4, "marks": 5}
# of the student's tokens, among which a solution of the teacher's counts as like it; BRTS,
# 2605.09725
TOP = 16


def ask(
    t, prompts: list[list[int] | None], what: str, by_teacher: bool = False
) -> list[rollout.Completion | None]:
    """A completion of each prompt, by the student or by the teacher; None for None. All ranks ask
    as often, each for as many prompts."""
    s, places = t.s, [i for i, prompt in enumerate(prompts) if prompt is not None]
    t.log.begin("ask")
    generator = rollout.generator_for_rows(
        (s.seed, t.step, SEEDS[what]), t.ranks.rank * len(prompts)
    )
    seeds = rollout.row_seeds(generator, len(prompts))
    show = progress(t.log.bar, f"{t.log.status}{what}: ", counts=False, check=t.stop.interrupt)
    with t.objective.as_teacher(t) if by_teacher else nullcontext():
        completions = t.until_stopped(
            rollout.sample,
            t.model,
            [prompts[i] for i in places],
            max_new_tokens=s.max_new_tokens,
            stop_ids=rollout.stop_ids(t.model, t.tokenizer),
            temperature=s.ask_temperature,
            top_p=s.ask_top_p,
            slots=s.slots or None,
            seeds=[seeds[i] for i in places],
            progress=show,
        )
    t.objective.note("asked_tokens", [len(c.token_ids) for c in completions], mean=False)
    found = dict(zip(places, completions, strict=True))
    return [found.get(i) for i in range(len(prompts))]


def encode(t, text: str) -> list[int]:
    """Token ids of a question."""
    return teacher.encode(t.tokenizer, [{"role": "user", "content": text}], t.s.thinking)


def decode(t, ids: list[int]) -> str:
    return t.tokenizer.decode(ids, skip_special_tokens=True)


def ask_about(t, rows: list[Example]) -> None:
    """The question of --teacher-context, about those rollouts for which the method has a use. None
    is asked whose quotations, encoded anew, have become too long for the model's window."""
    question, marks = t.objective.context.question, t.objective.method.marks
    room = rollout.window(t.model) - t.s.max_new_tokens
    texts, prompts = [], []
    for row in rows:
        is_of_use = not marks or marks(row.correct, t.step)
        texts.append(question.text(row, t.tokenizer) if is_of_use else None)
        prompt = encode(t, texts[-1]) if texts[-1] else None
        prompts.append(prompt if prompt and len(prompt) <= room else None)
    for row, answer in zip(rows, ask(t, prompts, question.name), strict=True):
        if answer:
            question.take(row, decode(t, answer.token_ids), t.tokenizer)
    if question.name == "marks":
        asked = [row for row, text in zip(rows, texts, strict=True) if text]
        t.objective.note("unmarked", [not row.label for row in asked])


def hinted(t, problem: Problem) -> list[int]:
    """The prompt of a teacher that is shown the answer."""
    row = Example([], [], False, problem, [])
    return t.teacher_prompt(problem, CONTEXTS["answer"].text(row, [], [], problem))


def solutions(t, problems: list[Problem], rollouts: list[Example]) -> list[Example]:
    """One solution of each problem by the teacher: of the --teacher-rollouts a correct one, if
    there is one, and of these, for methods that say so, the one most like the first rollout of the
    problem; of equals the first."""
    n, group, objective = t.s.teacher_rollouts, len(rollouts) // len(problems), t.objective
    firsts, prompts = [], []  # the first rollout of every problem, and its teacher's prompt
    for i, problem in enumerate(problems):
        peers = rollouts[i * group : (i + 1) * group]
        firsts.append(
            peers[0] if peers else Example([], [], False, problem, t.student_prompt(problem))
        )
        prompts.append(objective.prompt_of(t, firsts[i], peers, i))

    def graded(i: int, completion: rollout.Completion) -> Example:
        row = Example(**vars(completion), problem=problems[i], prompt=firsts[i].prompt)
        row.is_reference, row.teacher_prompt = True, prompts[i]
        row.text = decode(t, row.token_ids)
        return row.grade()

    asked = ask(t, [prompt for prompt in prompts for _ in range(n)], "solutions", by_teacher=True)
    written = [[graded(i, c) for c in asked[i * n : (i + 1) * n]] for i in range(len(problems))]
    tops = [None] * len(problems)
    if objective.method.overlap:
        tops = top_tokens(t, rollouts)
        hints = [
            None if any(row.correct for row in rows) else hinted(t, problem)
            for problem, rows in zip(problems, written, strict=True)
        ]
        for i, c in enumerate(ask(t, hints, "solutions, shown the answer", by_teacher=True)):
            more = graded(i, c) if c else None
            written[i] += [more] if more and more.correct else []
    chosen = []
    for rows, first, top in zip(written, firsts, tops, strict=True):
        likes = [likeness(row, top) if top is not None else 0.0 for row in rows]
        best = max(range(len(rows)), key=lambda i: (rows[i].correct, likes[i]))
        chosen.append(rows[best])
        (first if rollouts else rows[best]).asked |= {
            "solutions": [row.text for row in rows],
            "correct": [row.correct for row in rows],
            "chosen": best,
        }
        objective.note("teacher_likeness", [likes[best]] if top is not None else [])
    objective.note("teacher_accuracy", [row.correct for row in chosen])
    objective.note("teacher_truncated", [not row.finished for row in chosen])
    return chosen


def likeness(row: Example, top: Tensor) -> float:
    """Share of a solution's tokens that are among `top` [T, k] at the same position: none is, behind
    the end of the rollout. 2605.09725."""
    hits = [token in some for token, some in zip(row.token_ids, top.tolist(), strict=False)]
    return sum(hits) / len(row.token_ids)


@torch.no_grad()
def top_tokens(t, rows: list[Example]) -> list[Tensor]:
    """The student's TOP likeliest tokens at every position of these rollouts, [T, TOP] each."""
    head = teacher.output_head(t.model)
    size = max(1, teacher.CHUNK_LOGITS // head.linear.out_features)
    reading = t.read([row.prompt for row in rows], rows, hidden=True)
    with t.autocast():
        return [
            torch.cat([head(part).topk(TOP).indices for part in hidden.split(size)])
            for hidden in reading.hidden
        ]
