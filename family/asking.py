"""Sampling besides the rollouts: what the student says about them, and solutions that the teacher
writes.

`t` is the Trainer whose step it is, `t.objective` its Neighbour. Rollouts, `firsts` and candidates
are lists of Example. What is sampled depends on the seed, the step and the place of the prompt, not
on the number of ranks.
"""

from contextlib import nullcontext

import torch

import lora
import rollout
import teacher
from family.contexts import Example, show_answer
from support.sampling import grade_rollouts, progress, said, teacher_thinks

SEEDS = {  # the rollouts have 0
    "contexts": 1,
    "solutions": 2,
    "solutions, shown the answer": 3,
    "reflections": 4,
    "marks": 5,
    "plans": 6,
    "student's pieces": 7,
    "teacher's pieces": 8,
}
# a token of a teacher's solution counts as like the student's if it is among this many; BRTS,
# 2605.09725
TOP = 16


def ask(t, prompts, what, model_as=None, most=None, turn=0):
    """A completion of each prompt (token ids); None for None. The student writes it, or what the
    model is inside `model_as`; at most `most` tokens, by default --max-new-tokens. What is asked for
    more than once in a step has a number, `turn`. All ranks ask equally often, each for equally
    many prompts."""
    s = t.s
    t.log.begin("ask")
    places = [i for i, prompt in enumerate(prompts) if prompt is not None]
    n = len(prompts)
    generator = rollout.generator_for_rows((s.seed, t.step, SEEDS[what], turn), t.ranks.rank * n)
    seeds = rollout.row_seeds(generator, n)
    with model_as or nullcontext():
        completions = t.until_stopped(
            rollout.sample,
            t.model,
            [prompts[i] for i in places],
            max_new_tokens=most or s.max_new_tokens,
            stop_ids=rollout.stop_ids(t.model, t.tokenizer),
            temperature=s.ask_temperature,
            top_p=s.ask_top_p,
            top_k=s.ask_top_k,
            unused=rollout.unused_ids(t.model, t.tokenizer),
            slots=s.slots or None,
            seeds=[seeds[i] for i in places],
            progress=progress(
                t.log.bar, f"{t.log.status}{what}: ", counts=False, check=t.stop.interrupt
            ),
        )
    (tokens,) = t.ranks.sum([sum(len(completion.token_ids) for completion in completions)])
    t.objective.figures["asked_tokens"] += tokens
    found = dict(zip(places, completions, strict=True))
    return [found.get(i) for i in range(n)]


def encode(t, text):
    """Token ids of a question."""
    messages = [{"role": "user", "content": text}]
    return teacher.encode(t.tokenizer, messages, t.s.thinking, t.s.date)


def question_prompt(t, example):
    """The prompt that asks about a rollout; None if there is nothing to ask, or if the quotations,
    encoded anew, have become too long for the model's window."""
    text = t.objective.context.question.text(example, t.tokenizer)
    if text is None:
        return None
    prompt = encode(t, text)
    fits = len(prompt) + t.s.max_new_tokens <= rollout.window(t.model)
    return prompt if fits else None


def ask_about(t, examples):
    """Ask the question of --teacher-context about the examples for which the method has a use."""
    question = t.objective.context.question
    marks = t.objective.method.marks
    asked = []
    prompts = []
    for example in examples:
        if example.counts and (not marks or marks(example.correct, t.step)):
            asked.append(example)
            prompts.append(question_prompt(t, example))
        else:
            prompts.append(None)
    model_as = lora.disabled(t.model) if question.frozen else None
    for example, answer in zip(examples, ask(t, prompts, question.name, model_as), strict=True):
        if answer:
            question.take(example, said(t.tokenizer, answer), t.tokenizer)
    if question.missing:
        metric, key = question.missing
        t.objective.note(t, metric, [not example.asked.get(key) for example in asked])


def empty_example(t, problem):
    """An example without a completion, to make prompts with."""
    return Example([], [], False, problem, t.student_prompt(problem))


def solutions(t, problems, rollouts):
    """One solution of each problem by the teacher, chosen among --teacher-rollouts of them. Correct
    ones come first. Among equals a method with `overlap` takes the one most like the rollout, other
    methods take the first."""
    objective = t.objective
    # with the problem, its prompts and, if the method samples, a rollout
    firsts = rollouts or [empty_example(t, problem) for problem in problems]
    n = t.s.teacher_rollouts
    prompts = []
    for prompt in objective.teacher_prompts(t, firsts):
        prompts += [prompt] * n
    completions = ask(t, prompts, "solutions", objective.as_teacher(t))
    written = []
    for i, first in enumerate(firsts):
        some = completions[i * n : (i + 1) * n]
        written.append([graded(t, first, one, teacher_thinks(t.s)) for one in some])
    if objective.method.overlap:
        add_hinted(t, firsts, written)
        for candidates, top in zip(written, top_tokens(t, firsts), strict=True):
            for example in candidates:
                example.likeness = likeness(example, top)
    chosen = []
    for first, candidates in zip(firsts, written, strict=True):
        scores = [(example.correct, example.likeness) for example in candidates]
        best = scores.index(max(scores))  # the first among equals
        chosen.append(candidates[best])
        in_samples = first if rollouts else candidates[best]  # what samples.jsonl will show
        in_samples.asked |= {
            "solutions": [example.text for example in candidates],
            "correct": [example.correct for example in candidates],
            "chosen": best,
        }
    if objective.method.overlap:
        objective.note(t, "teacher_likeness", [example.likeness for example in chosen])
    return chosen


def graded(t, first, completion, thinking):
    """A solution that was written for the problem of `first`, as an example. `thinking`: whether its
    prompt let the chat template open a thought."""
    example = Example(
        **vars(completion),
        problem=first.problem,
        prompt=first.prompt,
        prompt_end=teacher.prompt_end(t.tokenizer, thinking, t.s.date),
        is_reference=True,
        has_context=first.has_context,
        teacher_prompt=first.teacher_prompt,
    )
    grade_rollouts(t.tokenizer, [example])
    return example


def add_hinted(t, firsts, written):
    """Where no solution is correct, a teacher that is shown the answer writes one more. It is added
    if it is correct."""
    prompts = []
    for first, candidates in zip(firsts, written, strict=True):
        hinted = t.teacher_prompt(first.problem, show_answer(first))
        is_solved = any(example.correct for example in candidates)
        prompts.append(None if is_solved else hinted)
    model_as = t.objective.as_teacher(t)
    completions = ask(t, prompts, "solutions, shown the answer", model_as)
    for first, candidates, completion in zip(firsts, written, completions, strict=True):
        if completion:
            example = graded(t, first, completion, teacher_thinks(t.s))
            if example.correct:
                candidates.append(example)


def likeness(example, top):
    """Share of a solution's tokens that are among `top` [T, k] at the same position. Behind the end
    of the rollout none is. 2605.09725."""
    pairs = zip(example.token_ids, top.tolist(), strict=False)
    return sum(token in likely for token, likely in pairs) / len(example.token_ids)


@torch.no_grad()
def top_tokens(t, examples):
    """The student's TOP likeliest tokens at every position of these rollouts, [T, TOP] each."""
    head = teacher.output_head(t.model)
    size = max(1, teacher.CHUNK_LOGITS // head.linear.out_features)
    reading = t.read([example.prompt for example in examples], examples, hidden=True)
    found = []
    with t.autocast():
        for states in reading.hidden:
            found.append(torch.cat([head(part).topk(TOP).indices for part in states.split(size)]))
    return found
