"""How train.Trainer's step changes for the methods of the family, and for ablations of EGRSD by the
family's flags."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor, nn

import egrsd
import lora
import rollout
import teacher
import train
from family import asking
from family.contexts import CONTEXTS, Row
from family.methods import (
    METHODS,
    Batch,
    Method,
    dual_weight,
    finite,
    forward_kl,
    position_weight,
    two_view_gate,
)
from family.settings import FamilySettings, rows
from support import checkpoint
from support.data import InputError, Problem
from support.distributed import Ranks
from support.run import SAMPLES_PER_STEP, say
from support.sampling import Rollout, check_window

# Stands for the core's methods with a flag of the family; its loss is never called, Trainer's own
# is.
EGRSD = Method(
    train.Trainer.loss,
    "with a flag of the family",
    uses=("advantage", "gamma", "window", "eps", "floor"),
)


PAD = partial(nn.utils.rnn.pad_sequence, batch_first=True)  # [T_i] each -> [B, T]


class GroupAdvantage(egrsd.RunningAdvantage):
    """GRPO, arXiv 2402.03300: A = (r - mean) / (std + 1e-4) within a problem's `group` rollouts;
    ValueError if < 2."""

    def __init__(self, group: int):
        super().__init__()
        if group < 2:
            raise ValueError(
                "group must be >= 2, the standard deviation of one reward is not defined, "
                f"got {group}"
            )
        self.group = group

    def advantage(self, rewards: Tensor) -> Tensor:
        """rewards [B] -> advantages [B]; rollouts of one problem stand beside each other.

        The sample standard deviation (n - 1), as torch.std has it. In float64, so that equal
        rewards give 0 and not the rounding of their mean.
        """
        groups = rewards.double().view(-1, self.group)
        centred = groups - groups.mean(1, keepdim=True)
        return (centred / (groups.std(1, keepdim=True) + 1e-4)).flatten().to(rewards.dtype)


class Neighbour(train.Trainer):
    """A Trainer whose method, teacher or gate is the family's."""

    def __init__(self, s: FamilySettings, ranks: Ranks):
        self.method, self.context, self.rows = (
            METHODS.get(s.method, EGRSD),
            CONTEXTS[s.teacher_context],
            rows(s),
        )
        self.two_views = self.method.views or s.gate == "two-view"
        self.full_distributions = self.method.full_distributions or s.gate in ("two-view", "dual")
        self.quoted_completions, self.is_ready = self.context.quoted, False
        needs = self.context.needs if self.method.teacher or self.rows == "teacher" else ()
        self.needs_solution = self.rows == "reference" or "solution" in needs
        # something for samples.jsonl
        self.has_rollouts = self.method.rollouts or self.rows == "teacher"
        super().__init__(s, ranks)
        self.check_data(needs)
        self.is_ready, self.rollouts, self.figures, self.success_rate = True, [], Counter(), 0.0
        self.rows_per_problem = (s.rollouts_per_prompt if self.method.rollouts else 0) + bool(
            self.rows
        )
        self.median_entropies: list[float] = []
        # over all tokens so far: their number, sum of Batch.views, sum of squares
        self.view_sums = [0.0, 0.0, 0.0]
        self.num_kept = 0.0  # tokens of this rank's rollouts that the mean of the step counts
        self.teacher_adapter = (
            [] if s.teacher_schedule == "frozen" else [p.detach().clone() for p in self.parameters]
        )
        if s.advantage == "group":
            self.baseline = GroupAdvantage(s.rollouts_per_prompt)
        long = [
            p
            for p in self.problems
            if self.rows == "reference" and len(p.solution.encode()) >= s.max_new_tokens
        ]
        cut = sum(not self.reference(p).finished for p in long)
        if cut and ranks.rank == 0:
            say(
                f"--method {s.method}: {cut} of {len(self.problems)} reference solutions are "
                f"longer than --max-new-tokens {s.max_new_tokens} and are cut there"
            )

    def check_data(self, needs: Sequence[str]) -> None:
        """InputError if a problem has no such field, or no room for what is asked about its
        rollouts."""
        data, question = self.files["--data"], self.context.question
        for problem, name in ((problem, name) for problem in self.problems for name in needs):
            if not getattr(problem, name):
                raise InputError(
                    f"{data}: line {problem.line}: field '{name}' is missing: add it, or choose "
                    "another --teacher-context"
                )
        if self.s.teacher_context == "other" and len(self.problems) < 2:
            raise InputError(f"{data}: one problem, --teacher-context other needs two: add one")
        if question:
            check_window(
                self.model,
                data,
                self.problems,
                (1 + self.context.quoted) * self.s.max_new_tokens,
                lambda p: [self.encode(question.text(Row([], [], False, p, []), self.tokenizer))],
            )
        if self.method.overlap:
            check_window(
                self.model,
                data,
                self.problems,
                self.s.max_new_tokens,
                lambda p: [asking.hinted(self, p)],
            )

    def train_step(self) -> dict:
        """The step, with what was noted in it on all ranks."""
        self.figures = Counter()
        metrics, sums = super().train_step(), Counter()
        for key, value in self.ranks.gather_lists(list(self.figures.items())):
            sums[key] += value
        figures = {
            name: total / (sums[name, "count"] or 1)
            for (name, part), total in sums.items()
            if part == "sum"
        }
        # else they stand with the rollouts
        if self.rows == "teacher" and not self.rollouts and self.ranks.rank == 0:
            checkpoint.append_jsonl(
                self.out / "samples.jsonl",
                [{"step": self.step} | row.as_json() for row in self.written[:SAMPLES_PER_STEP]],
            )
        return (
            metrics
            | figures
            | ({"ask_s": self.log.seconds["ask"]} if "asked_tokens" in figures else {})
        )

    def note(self, name: str, values: Sequence[float], mean: bool = True) -> None:
        """metrics.jsonl gets the mean of all values of the step, or their sum."""
        if values or not mean:
            self.figures[name, "sum"] += float(sum(values))
            self.figures[name, "count"] += len(values) * mean

    def encode(self, text: str) -> list[int]:
        return teacher.encode(self.tokenizer, [{"role": "user", "content": text}], self.s.thinking)

    def make_rollouts(self, problems: list[Problem]) -> list[Row]:
        """Also asks about them what the teacher's prompts need."""
        rollouts = super().make_rollouts(problems) if self.method.rollouts else []
        self.rollouts = [
            Row(**vars(row), marked=torch.zeros(len(row.token_ids), dtype=torch.bool))
            for row in rollouts
        ]
        if self.context.question and self.rollouts:
            asking.ask_about(self, self.rollouts)
        return self.rollouts

    def other_rows(self, problems: list[Problem]) -> list[Row]:
        """Solutions to learn from: those of the data, or one of the teacher's for each problem."""
        rows = [self.reference(problem) for problem in problems] if self.rows == "reference" else []
        if self.rows == "teacher":
            rows = self.written = asking.solutions(self, problems, self.rollouts)
        (self.num_reference,) = self.ranks.sum([sum(len(row.token_ids) for row in rows)])
        return rows

    def reference(self, problem: Problem) -> Rollout:
        """The reference solution and a stop token as a completion; not finished if it is cut at
        --max-new-tokens."""
        cap, eos = self.s.max_new_tokens, self.tokenizer.eos_token_id
        stop = rollout.stop_ids(self.model, self.tokenizer)[0] if eos is None else eos
        ids = self.tokenizer.encode(problem.solution, add_special_tokens=False) + [stop]
        return Row(
            ids[:cap],
            [0.0] * len(ids[:cap]),
            len(ids) <= cap,
            problem,
            self.student_prompt(problem),
            problem.solution,
            problem.answer,
            True,
            is_reference=True,
        )

    def teacher_prompts(self, rows: list[Rollout]) -> list[list[int]]:
        """What --teacher-context says. A row whose teacher has nothing to be shown gets the
        student's prompt."""
        group, prompts = self.s.rollouts_per_prompt, []
        for i, row in enumerate(rows):
            is_taught = self.rows == "teacher" or self.method.teacher and not row.is_reference
            if getattr(row, "teacher_prompt", None) is None:
                row.teacher_prompt = (
                    self.prompt_of(row, rows[i - i % group : i - i % group + group], i)
                    if (is_taught)
                    else row.prompt
                )
            row.has_context = is_taught and (
                row.teacher_prompt is not row.prompt or self.context.is_bare
            )
            prompts.append(row.teacher_prompt)
        return prompts

    def prompt_of(self, row: Rollout, group: list[Rollout], number: int) -> list[int]:
        """The teacher's prompt for a rollout of a problem, of whose rollouts `group` has all;
        `number` counts this rank's. The student's prompt, if there is nothing to show."""
        share = self.s.prompts_per_step // self.ranks.world * self.s.rollouts_per_prompt
        rng = np.random.default_rng(
            (self.s.seed, self.step, self.ranks.rank * share + number, asking.SEEDS["contexts"])
        )
        others = [group[i] for i in rng.permutation(len(group)) if group[i] is not row]
        example = self.longest
        if self.is_ready and len(self.problems) > 1:  # any but the row's own; lines are in order
            example = int(rng.integers(len(self.problems) - 1))
            example = self.problems[example + (self.problems[example].line >= row.problem.line)]
        # while prompts are checked, none is
        known = row if isinstance(row, Row) else Row(**vars(row))
        shown = self.context.text(
            known,
            [other.text for other in others if other.correct],
            [other.text for other in others if not other.correct],
            example,
        )
        return row.prompt if shown is None else self.teacher_prompt(row.problem, shown)

    @cached_property
    def longest(self) -> Problem:
        """Of the data, while the lengths of prompts are checked."""
        return max(
            self.problems, key=lambda problem: len((problem.problem + problem.solution).encode())
        )

    def as_teacher(self):
        """The base model, or what --teacher-schedule made of the student."""
        return (
            lora.replaced(self.model, self.teacher_adapter)
            if self.teacher_adapter
            else super().as_teacher()
        )

    def read_as_teacher(self, rows: list[Rollout]) -> teacher.Reading:
        """H is 0 where the teacher has nothing to be shown. Also notes the median of H over the
        step's rollouts, and what else a method needs before the first backward."""
        if not self.method.teacher:
            nothing = torch.zeros(
                len(rows), max(len(row.token_ids) for row in rows), device=self.ranks.device
            )
            return teacher.Reading(nothing, nothing, nothing.bool())
        reading = super().read_as_teacher(rows)
        reading.entropy *= self.has_context(rows)
        medians = [
            reading.entropy[i, : len(row.token_ids)].median().item()
            if row.has_context
            else torch.nan
            for i, row in enumerate(rows)
            if not row.is_reference
        ]
        self.median_entropies.append(
            self.ranks.gather(torch.tensor(medians)).nanmedian().nan_to_num().item()
        )
        solved, count = self.ranks.sum(
            [sum(row.correct for row in self.rollouts), len(self.rollouts)]
        )
        self.success_rate = solved / max(1, count)
        if self.two_views:
            self.compare_views(rows, reading)
        if self.method.margin:
            self.find_margins(rows, reading)
        return reading

    @torch.no_grad()
    def compare_views(self, rows: list[Row], reading: teacher.Reading) -> None:
        """The teacher reads again without a text: KL(p_T || that), its mean and deviation over all
        tokens so far."""
        prompts = [row.prompt for row in rows]
        with self.as_teacher(), self.autocast():
            bare = teacher.read_in_batches(
                self.model,
                prompts,
                [row.token_ids for row in rows],
                self.most_tokens(prompts),
                hidden=True,
                temperature=self.s.score_temperature,
            )
            views = teacher.per_token_divergence(
                teacher.output_head(self.model),
                bare.hidden,
                reading.hidden,
                reading.mask,
                forward_kl,
                self.s.score_temperature,
            )
        for row, some, hidden in zip(rows, views, bare.hidden, strict=True):
            row.views, row.bare_hidden = (
                some[: len(row.token_ids)],
                hidden if self.method.views else None,
            )
        counted = [value for row in self.rollouts for value in row.views.tolist()]
        new = self.ranks.sum([len(counted), sum(counted), sum(value**2 for value in counted)])
        self.view_sums = [before + more for before, more in zip(self.view_sums, new, strict=True)]
        self.note("view_kl", counted)

    def find_margins(self, rows: list[Row], reading: teacher.Reading) -> None:
        """The student reads both solutions of every problem, the rollout and the teacher's: PBSD's
        margins."""
        prompts, n = [row.prompt for row in rows], len(self.rollouts)
        teacher.reading_mode(self.model)
        with self.autocast():
            student = teacher.read_in_batches(
                self.model,
                prompts,
                [row.token_ids for row in rows],
                self.most_tokens(prompts),
                temperature=self.s.score_temperature,
            )
        ratios = (finite(student.logp) - finite(reading.logp)).double().sum(1)  # log (p_S / p_T)
        for row, margin in zip(rows, (ratios[n:] - ratios[:n]).repeat(2).tolist(), strict=True):
            row.margin = margin
        self.note("margin", [row.margin for row in self.rollouts])

    def has_context(self, rows: list[Rollout]) -> Tensor:
        """Whether the teacher had something to be shown: bool [B, 1]."""
        return torch.tensor([[row.has_context] for row in rows], device=self.ranks.device)

    def after_update(self) -> None:
        """What --teacher-schedule says. An average is one of the matrices A and of the B, not of
        their product."""
        for row in self.rollouts:
            # they would stay in memory while the next step samples
            row.views = row.bare_hidden = None
        # the first is empty for `frozen`
        for old, new in zip(self.teacher_adapter, self.parameters, strict=False):
            if self.s.teacher_schedule == "ema":
                old.lerp_(new.detach(), 1 - self.s.teacher_decay)
            elif self.step % self.s.teacher_every == 0:
                old.copy_(new.detach())

    def read_as_student(self, *arguments) -> train.Batch:
        """d = 0 where the teacher has nothing to be shown."""
        batch = super().read_as_student(*arguments)
        batch.teacher_logp = torch.where(
            self.has_context(batch.rows) & self.method.teacher,
            batch.teacher_logp,
            batch.logp.detach(),
        )
        return batch

    def loss(self, batch: train.Batch) -> Tensor:
        """The method's loss: means over the step's tokens, of rollouts and of reference solutions
        apart."""
        s, device, self.gate = self.s, self.ranks.device, None
        if s.gate:
            self.gate = self.other_gate(batch)
            weights = (
                egrsd.token_advantages(
                    batch.advantage,
                    batch.teacher_logp,
                    batch.logp,
                    batch.entropy,
                    batch.mask,
                    gamma=0,
                    eps=s.eps,
                )
                * self.gate
            )
            return egrsd.policy_loss(batch.logp, weights, batch.mask, batch.num_tokens)
        if self.method is EGRSD:
            return super().loss(batch)
        is_reference = torch.tensor([row.is_reference for row in batch.rows], device=device)
        own = Batch(
            **vars(batch),
            correct=torch.tensor([row.correct for row in batch.rows], device=device),
            is_reference=is_reference,
            divergence=self.divergence(batch),
            step=self.step,
            num_completions=s.prompts_per_step * s.rollouts_per_prompt,
            median_entropies=self.median_entropies,
            gamma=s.gamma,
            window=s.window,
            eps=s.eps,
            floor=s.floor,
            kept=batch.mask & ~is_reference.unsqueeze(-1),
            num_reference=self.num_reference,
            success_rate=self.success_rate,
            anchor=self.divergence(batch, bare=True),
            margin=torch.tensor([row.margin for row in batch.rows], device=device),
            views=self.views(batch) if self.two_views else None,
            marked=PAD([row.marked for row in batch.rows]).to(device)
            if self.method.marks
            else None,
        )
        losses = self.method.loss(own)
        self.gate = own.weight
        self.num_kept += own.kept.sum().item()
        share = torch.where(
            is_reference, 1 / max(1, self.num_reference), 1 / max(1, batch.num_tokens)
        ).unsqueeze(-1)
        return (torch.where(batch.mask, losses, 0.0) * share).sum()

    def before_clipping(self, num_tokens: float) -> None:
        """Make the mean one over the tokens that the method keeps, whose number in the step is
        known only now."""
        (kept,) = self.ranks.sum([self.num_kept])
        scale = num_tokens / kept if kept else 1.0  # exactly 1 where all are kept
        for parameter in self.parameters:
            parameter.grad *= scale
        self.log.loss, self.num_kept = self.log.loss * scale, 0.0

    def divergence(self, batch: train.Batch, bare: bool = False) -> Callable[[Callable], Tensor]:
        """Batch.divergence, 0 where the teacher had nothing to be shown, or Batch.anchor."""

        def divergence(f):
            hidden = [row.bare_hidden for row in batch.rows] if bare else batch.teacher_hidden
            with self.autocast():
                return (bare | self.has_context(batch.rows)) * teacher.per_token_divergence(
                    teacher.output_head(self.model),
                    batch.hidden,
                    hidden,
                    batch.mask,
                    f,
                    self.s.score_temperature,
                )

        return divergence

    def views(self, batch: train.Batch) -> Tensor:
        """Batch.views."""
        count, total, squares = self.view_sums
        mean = total / max(1, count)
        deviation = max(0.0, squares / max(1, count) - mean**2) ** 0.5
        return (PAD([row.views for row in batch.rows]) - mean) / (deviation + 1e-6)

    def other_gate(self, batch: train.Batch) -> Tensor:
        """What --gate says, [B, T]; two-view and dual are 1 where the teacher had nothing to be
        shown."""
        if self.s.gate == "position":
            return position_weight(batch.mask)
        gate = (
            two_view_gate(self.views(batch))
            if self.s.gate == "two-view"
            else self.divergence(batch)(dual_weight).detach()
        )
        return torch.where(self.has_context(batch.rows), gate, 1.0)

    def token_metrics(self, batch: train.Batch) -> dict[str, Tensor]:
        """Without what the method does not use."""
        unused = {"entropy", "delta"} if not self.method.teacher else set()
        unused |= {"magnitude", "clipped"} if "eps" not in self.method.uses else set()
        unused |= {"gate"} if "gamma" not in self.method.uses else set()
        metrics = {
            name: value
            for name, value in super().token_metrics(batch).items()
            if name not in unused
        }
        return metrics | ({"gate": self.gate} if self.gate is not None else {})

    def state(self) -> tuple[dict, dict]:
        tensors, numbers = super().state()
        return tensors | {"teacher": self.teacher_adapter}, numbers | {
            "median_entropies": self.median_entropies,
            "view_sums": self.view_sums,
        }

    def load_state(self, tensors: dict, numbers: dict) -> None:
        super().load_state(tensors, numbers)
        self.median_entropies = numbers["median_entropies"]
        self.view_sums = numbers.get("view_sums", self.view_sums)  # older checkpoints have none
        for old, saved in zip(self.teacher_adapter, tensors["teacher"], strict=True):
            old.copy_(saved)
