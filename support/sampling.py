"""Problems in, graded rollouts out: what training, evaluation and diagnostics have in common."""

import re
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

import reward
import rollout
import teacher
from support.data import Problem
from support.errors import InputError
from support.settings import Sampling


@dataclass
class Rollout(rollout.Completion):
    """One completion: token_ids, logprobs and finished as the sampler gives them, and what else is
    known of it."""

    problem: Problem
    prompt: list[int]  # token ids of the student's prompt
    text: str = ""  # decoded, without special tokens
    answer: str | None = None  # the box's content, None if there is none
    correct: bool = False  # finished, and the verifier says that the answer is right
    reward: float = 0.0
    advantage: float = 0.0
    prompt_end: str = ""  # what the prompt ends in, see teacher.prompt_end
    said: str = ""  # the text with its special tokens, which may mark a thought

    def grade(self, said: str) -> "Rollout":
        """Fill in said, answer and correct. A truncated completion is wrong whatever it says."""
        self.said = said
        self.answer = reward.extract_answer(said, self.prompt_end)
        can_be_right = self.finished and self.answer is not None
        self.correct = can_be_right and reward.is_equal(self.answer, self.problem.answer)
        return self

    def as_json(self) -> dict:  # what a samples.jsonl says of it
        return {
            "line": self.problem.line,
            "problem": self.problem.problem,
            "gold": self.problem.answer,
            "prompt_end": self.prompt_end,
            "completion": self.said,
            "answer": self.answer,
            "correct": self.correct,
            "finished": self.finished,
            "tokens": len(self.token_ids),
        }


def student_prompt(tokenizer, problem: Problem, s) -> list[int]:
    """Token ids of the student's prompt, the same in training and in evaluation. `s` are settings:
    thinking and date are used."""
    return teacher.encode(tokenizer, teacher.student_messages(problem.problem), s.thinking, s.date)


def teacher_prompt(tokenizer, problem: Problem, shown: str | None, s) -> list[int]:
    """Token ids of the teacher's prompt. It is `shown` the reference solution, something else, or
    nothing (None)."""
    messages = teacher.student_messages(problem.problem)
    if shown is not None:
        messages = teacher.teacher_messages(problem.problem, shown)
    return teacher.encode(tokenizer, messages, teacher_thinks(s), s.date)


def teacher_thinks(s) -> bool:
    """--teacher-thinking, by default --thinking."""
    return s.thinking if s.teacher_thinking is None else s.teacher_thinking


def check_thinking(tokenizer, s) -> None:
    """InputError if the prompts of student and teacher end differently, thoughts left out."""
    ends = []
    for thinking in (s.thinking, teacher_thinks(s)):
        end = teacher.prompt_end(tokenizer, thinking, s.date)
        ends.append(reward.outside_thoughts(end))
    if ends[0] != ends[1]:
        raise InputError(
            f"--teacher-thinking: apart from the thought, prompts end in {ends[0]!r} for the "
            f"student, in {ends[1]!r} for the teacher: leave the flag out with this model"
        )


def sample(
    model,
    tokenizer,
    problems: Sequence[Problem],
    sampling: Sampling,
    *,
    seed: tuple[int, ...],
    prompts: list[list[int]] | None = None,
    first_row: int = 0,
    show: Callable[[int, int], None] | None = None,
    make_decoder: Callable | None = None,
    leave_out: Container[int] = (),
    on_rollout: Callable[[int, Rollout], None] | None = None,
) -> list[Rollout]:
    """`sampling.samples` rollouts of each problem, in the order of the problems, not graded yet.

    The rollouts of all ranks are numbered, and the first one here has the number `first_row`. So the
    result does not depend on the number of ranks. The numbers in `leave_out` are not sampled, which
    changes no other rollout. `on_rollout(number, rollout)` gets each one as soon as it is there.
    `prompts` take the place of the student's.
    """
    k = sampling.samples
    prompts = prompts or [student_prompt(tokenizer, problem, sampling) for problem in problems]
    end = teacher.prompt_end(tokenizer, sampling.thinking, sampling.date)
    total = k * len(problems)
    seeds = rollout.row_seeds(rollout.generator_for_rows(seed, first_row), total)
    rows = [i for i in range(total) if i not in leave_out]
    shared = prompts
    if len(rows) < total:  # every row brings its own prompt, which is prefilled more often
        shared = [prompts[i // k] for i in rows]

    def rollout_of(i, c):
        return Rollout(**vars(c), problem=problems[i // k], prompt=prompts[i // k], prompt_end=end)

    def on_completion(number, completion):
        if on_rollout:
            on_rollout(rows[number], rollout_of(rows[number], completion))

    completions = rollout.sample(
        model,
        shared,
        max_new_tokens=sampling.max_new_tokens,
        stop_ids=rollout.stop_ids(model, tokenizer),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        unused=rollout.unused_ids(model, tokenizer),
        samples_per_prompt=k if len(rows) == total else 1,
        slots=sampling.slots,
        seeds=[seeds[i] for i in rows],
        progress=show,
        make_decoder=make_decoder,
        on_completion=on_completion,
    )
    return [rollout_of(i, c) for i, c in zip(rows, completions, strict=True)]


def grade_rollouts(tokenizer, rollouts: list[Rollout]) -> list[Rollout]:
    """Fill in what texts and grades say. Returns the same rollouts."""
    for one in rollouts:
        one.text = tokenizer.decode(one.token_ids, skip_special_tokens=True)
        one.grade(said(tokenizer, one))
    return rollouts


def said(tokenizer, completion: rollout.Completion) -> str:
    """The text of a completion without its stop token. Other special tokens stay: they may mark
    where a thought ends."""
    ids = completion.token_ids
    return tokenizer.decode(ids[:-1] if completion.finished else ids)


def check_prompts(
    model,
    tokenizer,
    path: str,
    problems: Sequence[Problem],
    new_tokens: int,
    prompts: Callable[[Problem], list[list[int]]],
) -> None:
    """InputError with the line of the first problem that leaves no room for `new_tokens` tokens in one
    of its `prompts`, or that spells a control token which the tokenizer cannot read as text."""
    window = rollout.window(model)
    template = max(map(len, prompts(Problem("", "", "", 0))))
    names = [token.content for token in tokenizer.added_tokens_decoder.values()]
    spelled = re.compile("|".join(re.escape(name) for name in names if name.strip()) or "(?!)")
    for p in problems:
        text = "\n".join((p.problem, p.solution, p.answer, p.restated))
        # A token has at least one byte, so most problems need no tokenizer here.
        fits = len(text.encode()) + template + new_tokens <= window
        if fits and not spelled.search(text):
            continue
        try:
            length = max(map(len, prompts(p)))
        except ValueError as error:  # from transformers, about a control token
            raise InputError(
                f"{path}: line {p.line}: {error}: spell it in another way, or remove the line"
            ) from None
        if length + new_tokens > window:
            raise InputError(
                f"{path}: line {p.line}: field 'problem' (with 'solution', where it is shown) "
                f"makes a prompt of {length} tokens, beyond the model's window of {window} "
                f"together with {new_tokens} new tokens: lower --max-new-tokens (or "
                "--eval-max-new-tokens), or shorten or remove the line"
            )


def progress(
    bar, prefix: str = "", counts: bool = True, check: Callable[[], None] = lambda: None
) -> Callable:
    """A callback for rollout.sample. It shows `prefix` and the tokens per second beside the bar. If
    `counts`, the bar also advances by the finished completions. `check` is called first, and may
    raise to end the sampling."""
    start = time.perf_counter()
    tokens = 0

    def show(new_tokens, finished):
        nonlocal tokens
        check()
        tokens += new_tokens
        rate = tokens / (time.perf_counter() - start)
        bar.set_postfix_str(f"{prefix}{rate:.0f} tokens/s", refresh=False)
        bar.update(finished if counts else 0)

    return show
