"""Sampling besides the rollouts: answers of the student's about them, and solutions that the
teacher writes.

`t` is the Neighbour whose step it is. What is sampled is a function of seed, step and row, for any
number of ranks.
"""

from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

import rollout
import teacher
from family.contexts import CONTEXTS, Row
from support.data import Problem
from support.sampling import progress

# rollouts: 0
SEEDS = {
    "contexts": 1,
    "solutions": 2,
    "solutions, shown the answer": 3,
    "reflections": 4,
    "marks": 5,
}
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
    with t.as_teacher() if by_teacher else nullcontext():
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
    t.note("asked_tokens", [len(c.token_ids) for c in completions], mean=False)
    found = dict(zip(places, completions, strict=True))
    return [found.get(i) for i in range(len(prompts))]


def ask_about(t, rows: list[Row]) -> None:
    """The question of --teacher-context, about those rollouts for which the method has a use. None
    is asked whose quotations, encoded anew, have become too long for the model's window."""
    question, room = t.context.question, rollout.window(t.model) - t.s.max_new_tokens
    texts = [
        question.text(row, t.tokenizer)
        if not t.method.marks or t.method.marks(row.correct, t.step)
        else None
        for row in rows
    ]
    prompts = [text and t.encode(text) for text in texts]
    answers = ask(
        t, [prompt if prompt and len(prompt) <= room else None for prompt in prompts], question.name
    )
    for row, answer in zip(rows, answers, strict=True):
        if answer:
            question.take(
                row, t.tokenizer.decode(answer.token_ids, skip_special_tokens=True), t.tokenizer
            )
    if question.name == "marks":
        t.note("unmarked", [not row.label for row, text in zip(rows, texts, strict=True) if text])


def hinted(t, problem: Problem) -> list[int]:
    """The prompt of a teacher that is shown the answer."""
    return t.teacher_prompt(
        problem, CONTEXTS["answer"].text(Row([], [], False, problem, []), [], [], problem)
    )


def solutions(t, problems: list[Problem], rollouts: list[Row]) -> list[Row]:
    """One solution of each problem by the teacher: of the --teacher-rollouts a correct one, if
    there is one, and of these, for methods that say so, the one most like the first rollout of the
    problem; of equals the first."""
    n, group = t.s.teacher_rollouts, len(rollouts) // len(problems)
    groups = [rollouts[i * group : (i + 1) * group] for i in range(len(problems))]
    firsts = [
        rows[0] if rows else Row([], [], False, problem, t.student_prompt(problem))
        for rows, problem in zip(groups, problems, strict=True)
    ]
    prompts = [
        t.prompt_of(row, rows, i) for i, (row, rows) in enumerate(zip(firsts, groups, strict=True))
    ]

    def graded(i: int, completion: rollout.Completion) -> Row:
        row = Row(
            **vars(completion),
            problem=problems[i],
            prompt=firsts[i].prompt,
            is_reference=True,
            teacher_prompt=prompts[i],
        )
        row.text = t.tokenizer.decode(row.token_ids, skip_special_tokens=True)
        return row.grade()

    asked = ask(t, [prompt for prompt in prompts for _ in range(n)], "solutions", by_teacher=True)
    written = [[graded(i, c) for c in asked[i * n : (i + 1) * n]] for i in range(len(problems))]
    tops = [None] * len(problems)
    if t.method.overlap:
        tops = top_tokens(t, rollouts)
        hints = [
            None if any(row.correct for row in rows) else hinted(t, problem)
            for problem, rows in zip(problems, written, strict=True)
        ]
        for i, c in enumerate(ask(t, hints, "solutions, shown the answer", by_teacher=True)):
            written[i] += [row for row in ([graded(i, c)] if c else []) if row.correct]
    chosen = []
    for rows, first, top in zip(written, firsts, tops, strict=True):
        likes = [likeness(row, top) for row in rows]
        best = max(range(len(rows)), key=lambda i: (rows[i].correct, likes[i]))
        chosen.append(rows[best])
        (first if rollouts else rows[best]).asked |= {
            "solutions": [row.text for row in rows],
            "correct": [row.correct for row in rows],
            "chosen": best,
        }
        t.note("teacher_likeness", likes[best : best + 1] if top is not None else [])
    t.note("teacher_accuracy", [row.correct for row in chosen])
    t.note("teacher_truncated", [not row.finished for row in chosen])
    return chosen


def likeness(row: Row, top: Tensor | None) -> float:
    """Share of the tokens that are among `top` [T, k] at the same position, as far as both reach.
    2605.09725."""
    pairs = zip(row.token_ids, () if top is None else top.tolist(), strict=False)
    return float(np.mean([token in some for token, some in pairs] or [0.0]))


@torch.no_grad()
def top_tokens(t, rows: list[Row]) -> list[Tensor]:
    """The student's TOP likeliest tokens at every position of these rollouts, [T, TOP] each."""
    head, prompts = teacher.output_head(t.model), [row.prompt for row in rows]
    size = max(1, teacher.CHUNK_LOGITS // head.linear.out_features)
    teacher.reading_mode(t.model)
    with t.autocast():
        reading = teacher.read_in_batches(
            t.model, prompts, [row.token_ids for row in rows], t.most_tokens(prompts), hidden=True
        )
        return [
            torch.cat([head(part).topk(TOP).indices for part in hidden.split(size)])
            for hidden in reading.hidden
        ]
