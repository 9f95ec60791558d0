"""What a method, a teacher or a gate of the family changes in the training step: the object that
train.Trainer asks in the place of train.EGRSD."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

import egrsd
import lora
import rollout
import teacher
import train
from family import asking
from family.contexts import CONTEXTS, Example
from family.divergences import (
    dual_weight,
    finite,
    forward_kl,
    per_token_divergence,
    position_weight,
    two_view_gate,
)
from family.methods import METHODS, Batch, Method
from family.settings import FamilySettings
from support import checkpoint
from support.data import InputError, Problem
from support.run import SAMPLES_PER_STEP, say
from support.sampling import Rollout, check_window

# EGRSD with a flag of the family: train.EGRSD has its loss
WITH_A_FLAG = Method(
    None, "with a flag of the family", uses=("advantage", "gamma", "window", "eps", "floor")
)
PAD = partial(nn.utils.rnn.pad_sequence, batch_first=True)  # [T_i] each -> [B, T]


class GroupAdvantage(egrsd.RunningAdvantage):
    """GRPO, arXiv 2402.03300: A = (r - mean) / (std + 1e-4) within a problem's `group` rollouts;
    ValueError if < 2."""

    def __init__(self, group: int):
        super().__init__()
        if group < 2:
            raise ValueError(
                f"group must be >= 2, the standard deviation of one reward is not defined, got {group}"
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


@contextmanager
def replaced(model: nn.Module, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Inside, `tensors` are the adapter's weights, in the order and shapes of `lora_parameters`:
    those of an older or an averaged student. ValueError if they are more or fewer."""
    parameters = lora.lora_parameters(model)
    before = [parameter.data for parameter in parameters]
    try:
        for parameter, tensor in zip(parameters, tensors, strict=True):
            parameter.data = tensor
        yield
    finally:
        for parameter, own in zip(parameters, before, strict=True):
            parameter.data = own


class Neighbour:
    """For train.Trainer: what train.EGRSD is for EGRSD. `t` is the Trainer."""

    def __init__(self, s: FamilySettings):
        self.s, self.core = s, train.EGRSD()
        self.method = METHODS.get(s.method, WITH_A_FLAG)
        self.context, self.source = CONTEXTS[s.teacher_context], s.source
        self.two_views = self.method.views or s.gate == "two-view"
        self.keeps_states = self.method.full_distributions or s.gate in ("two-view", "dual")
        # fields of the problems that the teacher is shown
        self.needs = self.context.needs if self.method.teacher or self.source == "teacher" else ()
        self.needs_solution = self.source == "reference" or "solution" in self.needs
        self.has_rollouts = self.method.rollouts or self.source == "teacher"  # for samples.jsonl
        self.baseline = egrsd.RunningAdvantage()
        if s.advantage == "group":
            self.baseline = GroupAdvantage(s.rollouts_per_prompt)
        self.is_ready, self.rollouts, self.written, self.figures = False, [], [], Counter()
        self.success_rate = 0.0
        self.numbers = {
            "median_entropies": [],  # of H over the rollouts of every step so far
            # over all tokens so far: their number, sum of Batch.views, sum of squares
            "view_sums": [0.0, 0.0, 0.0],
        }
        self.tensors = {"teacher": []}  # the adapter of a teacher that is not frozen

    def begin(self, t: train.Trainer) -> None:
        """Check that every text fits, and make what lasts for the run."""
        s = self.s
        self.check_data(t)
        self.is_ready = True
        t.rows_per_problem = s.rollouts_per_prompt * self.method.rollouts + bool(self.source)
        if s.teacher_schedule != "frozen":
            self.tensors["teacher"] = [p.detach().clone() for p in t.parameters]
        if self.source == "reference":
            long = [p for p in t.problems if len(p.solution.encode()) >= s.max_new_tokens]
            cut = sum(not self.reference(t, p).finished for p in long)
            if cut and t.ranks.rank == 0:
                say(
                    f"--method {s.method}: {cut} of {len(t.problems)} reference solutions are longer "
                    f"than --max-new-tokens {s.max_new_tokens} and are cut there"
                )

    def check_data(self, t: train.Trainer) -> None:
        """InputError if a problem lacks a field, or a prompt, quotations included, is too long."""
        data, question, most = t.files["--data"], self.context.question, self.s.max_new_tokens
        quoting = (1 + self.context.quoted) * most
        self.longest = max(t.problems, key=lambda p: len((p.problem + p.solution).encode()))
        fits = partial(check_window, t.model, data, t.problems)

        def shown(p: Problem) -> list[list[int]]:
            return self.teacher_prompts(t, [Example([], [], False, p, t.student_prompt(p))])

        fits(quoting, lambda p: [t.student_prompt(p), *shown(p)])
        for problem, name in ((problem, name) for problem in t.problems for name in self.needs):
            if not getattr(problem, name):
                raise InputError(
                    f"{data}: line {problem.line}: field '{name}' is missing: add it, or choose "
                    "another --teacher-context"
                )
        if self.s.teacher_context == "other" and len(t.problems) < 2:
            raise InputError(f"{data}: one problem, --teacher-context other needs two: add one")
        if question:
            about = partial(Example, [], [], False, prompt=[])
            fits(
                quoting,
                lambda p: [asking.encode(t, question.text(about(problem=p), t.tokenizer))],
            )
        if self.method.overlap:
            fits(most, lambda p: [asking.hinted(t, p)])

    def note(self, name: str, values: Sequence[float], mean: bool = True) -> None:
        """metrics.jsonl gets the mean of all values of the step, or their sum."""
        if values or not mean:
            self.figures[name, "sum"] += float(sum(values))
            self.figures[name, "count"] += len(values) * mean

    # ---- which rows, and what the teacher is shown

    def examples(
        self, t: train.Trainer, problems: list[Problem]
    ) -> tuple[list[Example], list[Example]]:
        """Rollouts, about which is asked what the teacher's prompts need; and solutions to learn
        from: those of the data, or one of the teacher's for each problem."""
        self.figures, others = Counter(), []
        rollouts = t.make_rollouts(problems) if self.method.rollouts else []
        self.rollouts = [
            Example(**vars(row), marked=torch.zeros(len(row.token_ids), dtype=torch.bool))
            for row in rollouts
        ]
        if self.context.question and self.rollouts:
            asking.ask_about(t, self.rollouts)
        if self.source == "reference":
            others = [self.reference(t, problem) for problem in problems]
        elif self.source == "teacher":
            others = self.written = asking.solutions(t, problems, self.rollouts)
        (self.num_reference,) = t.ranks.sum([sum(len(row.token_ids) for row in others)])
        return self.rollouts, others

    def reference(self, t: train.Trainer, problem: Problem) -> Example:
        """The reference solution and a stop token as a completion; not finished if it is cut at
        --max-new-tokens."""
        eos, cap = t.tokenizer.eos_token_id, self.s.max_new_tokens
        stop = rollout.stop_ids(t.model, t.tokenizer)[0] if eos is None else eos
        ids = t.tokenizer.encode(problem.solution, add_special_tokens=False) + [stop]
        return Example(
            ids[:cap],
            [0.0] * len(ids[:cap]),
            len(ids) <= cap,
            problem,
            t.student_prompt(problem),
            problem.solution,
            problem.answer,
            True,
            is_reference=True,
        )

    def teacher_prompts(self, t: train.Trainer, rows: list[Rollout]) -> list[list[int]]:
        """What --teacher-context says. A row whose teacher has nothing to be shown gets the
        student's prompt."""
        n = self.s.rollouts_per_prompt
        rows = [row if isinstance(row, Example) else Example(**vars(row)) for row in rows]
        for i, row in enumerate(rows):
            learns = self.method.teacher and not row.is_reference
            is_taught = self.source == "teacher" or learns
            if row.teacher_prompt is None:
                group = rows[i - i % n : i - i % n + n]
                row.teacher_prompt = self.prompt_of(t, row, group, i) if is_taught else row.prompt
            has_text = row.teacher_prompt is not row.prompt
            row.has_context = is_taught and (has_text or self.context.is_bare)
        return [row.teacher_prompt for row in rows]

    def prompt_of(
        self, t: train.Trainer, row: Example, group: list[Example], number: int
    ) -> list[int]:
        """The teacher's prompt for a rollout of a problem, of whose rollouts `group` has all;
        `number` counts this rank's. The student's prompt, if there is nothing to show."""
        s = self.s
        first = t.ranks.rank * (s.prompts_per_step // t.ranks.world * s.rollouts_per_prompt)
        rng = np.random.default_rng((s.seed, t.step, first + number, asking.SEEDS["contexts"]))
        others = [group[i] for i in rng.permutation(len(group)) if group[i] is not row]
        example = self.longest
        if self.is_ready and len(t.problems) > 1:  # any but the row's own; lines are in order
            place = int(rng.integers(len(t.problems) - 1))
            example = t.problems[place + (t.problems[place].line >= row.problem.line)]
        correct = [other.text for other in others if other.correct]
        failed = [other.text for other in others if not other.correct]
        shown = self.context.text(row, correct, failed, example)
        return row.prompt if shown is None else t.teacher_prompt(row.problem, shown)

    # ---- as whom the teacher reads

    def as_teacher(self, t: train.Trainer):
        """Inside, the model is the base model, or what --teacher-schedule made of the student."""
        own = self.tensors["teacher"]
        return replaced(t.model, own) if own else lora.disabled(t.model)

    def read_as_teacher(self, t: train.Trainer, rows: list[Example]) -> teacher.Reading:
        """log p_T and H, with a mask that leaves out rows whose teacher has nothing to be shown.
        Also finds what else a method needs before the first backward."""
        if not self.method.teacher:
            longest = max(len(row.token_ids) for row in rows)
            nothing = torch.zeros(len(rows), longest, device=t.ranks.device)
            return teacher.Reading(nothing, nothing, nothing.bool())
        with self.as_teacher(t):
            reading = t.read(self.teacher_prompts(t, rows), rows, hidden=self.keeps_states)
        reading.mask &= torch.tensor([[row.has_context] for row in rows], device=t.ranks.device)
        reading.entropy *= reading.mask
        medians = [
            H[: len(row.token_ids)].median().item() if row.has_context else torch.nan
            for H, row in zip(reading.entropy, rows, strict=True)
            if not row.is_reference
        ]
        median = t.ranks.gather(torch.tensor(medians)).nanmedian().nan_to_num().item()
        self.numbers["median_entropies"].append(median)
        solved, count = t.ranks.sum([sum(row.correct for row in self.rollouts), len(self.rollouts)])
        self.success_rate = solved / max(1, count)
        if self.two_views:
            self.compare_views(t, rows, reading)
        if self.method.margin or self.method.keeps:
            self.read_ahead(t, rows, reading)
        return reading

    @torch.no_grad()
    def compare_views(
        self, t: train.Trainer, rows: list[Example], reading: teacher.Reading
    ) -> None:
        """The teacher reads again without a text: KL(p_T || that), its mean and deviation over all
        tokens so far of rollouts whose teacher had something to be shown."""
        with self.as_teacher(t):
            bare = t.read([row.prompt for row in rows], rows, hidden=True)
        with t.autocast():
            head, temperature = teacher.output_head(t.model), self.s.score_temperature
            views = per_token_divergence(
                head, bare.hidden, reading.hidden, bare.mask, forward_kl, temperature
            )
        for row, some, hidden in zip(rows, views, bare.hidden, strict=True):
            row.views = some[: len(row.token_ids)]
            row.bare_hidden = hidden if self.method.views else None
        seen = [row.views.tolist() for row in self.rollouts if row.has_context]
        counted = [value for values in seen for value in values]
        new = t.ranks.sum([len(counted), sum(counted), sum(value**2 for value in counted)])
        before = self.numbers["view_sums"]
        self.numbers["view_sums"] = [a + b for a, b in zip(before, new, strict=True)]
        self.note("view_kl", counted)

    def read_ahead(self, t: train.Trainer, rows: list[Example], reading: teacher.Reading) -> None:
        """The student reads, for PBSD's margins (of every problem's two solutions, the rollout and
        the teacher's), or for which tokens a method keeps."""
        student = t.read([row.prompt for row in rows], rows)
        d = torch.where(reading.mask, finite(reading.logp) - finite(student.logp), 0.0)
        if self.method.keeps:
            kept = self.method.keeps(d, student.entropy, student.mask, t.step)
            for row, some in zip(rows, kept, strict=True):
                row.kept = some[: len(row.token_ids)]
            (self.num_kept,) = t.ranks.sum([kept.sum().item()])
        if self.method.margin:
            n, ratios = len(self.rollouts), -d.double().sum(1)  # log (p_S / p_T)
            for row, margin in zip(rows, (ratios[n:] - ratios[:n]).repeat(2).tolist(), strict=True):
                row.margin = margin
            self.note("margin", [row.margin for row in self.rollouts])

    # ---- the loss of a micro-batch

    def loss(self, t: train.Trainer, micro: train.Batch) -> Tensor:
        """The method's loss: means over the step's tokens, of rollouts and of other rows apart."""
        s, self.gate, student = self.s, None, micro.by_student
        seen = self.seen(micro)
        if s.gate:
            self.gate = self.other_gate(t, seen)
            weights = egrsd.token_advantages(
                micro.advantage,
                seen.by_teacher.logp,
                student.logp,
                seen.by_teacher.entropy,
                student.mask,
                gamma=0,
                eps=s.eps,
            )
            return egrsd.policy_loss(
                student.logp, weights * self.gate, student.mask, micro.num_tokens
            )
        if self.method is WITH_A_FLAG:
            return self.core.loss(t, seen)
        batch = self.batch(t, seen)
        losses = self.method.loss(batch)
        self.gate = batch.weight
        share = 1 / max(1, batch.num_tokens)
        share_of_others = 1 / max(1, self.num_reference)
        shares = torch.where(batch.is_reference, share_of_others, share).unsqueeze(-1)  # [B, 1]
        return (torch.where(batch.mask, losses, 0.0) * shares).sum()

    def seen(self, micro: train.Batch) -> train.Batch:
        """The same micro-batch with d = 0 where the teacher has nothing to be shown."""
        own = micro.by_student.logp.detach()
        logp = torch.where(micro.by_teacher.mask, micro.by_teacher.logp, own)
        return replace(micro, by_teacher=replace(micro.by_teacher, logp=logp))

    def batch(self, t: train.Trainer, micro: train.Batch) -> Batch:
        """What the methods read."""
        s, rows, device = self.s, micro.examples, t.ranks.device
        own = partial(self.divergence, t, micro)
        return Batch(
            logp=micro.by_student.logp,
            teacher_logp=micro.by_teacher.logp,
            entropy=micro.by_teacher.entropy,
            mask=micro.by_student.mask,
            advantage=micro.advantage,
            correct=torch.tensor([row.correct for row in rows], device=device),
            is_reference=torch.tensor([row.is_reference for row in rows], device=device),
            divergence=lambda f: own(micro.by_teacher.hidden, f) * micro.by_teacher.mask,
            max_entropy=micro.max_entropy,
            num_tokens=self.num_kept if self.method.keeps else micro.num_tokens,
            num_completions=s.prompts_per_step * s.rollouts_per_prompt,
            step=t.step,
            median_entropies=self.numbers["median_entropies"],
            gamma=s.gamma,
            window=s.window,
            eps=s.eps,
            floor=s.floor,
            num_reference=self.num_reference,
            success_rate=self.success_rate,
            kept=PAD([row.kept for row in rows]) if self.method.keeps else None,
            margin=torch.tensor([row.margin for row in rows], device=device),
            marked=PAD([row.marked for row in rows]).to(device) if self.method.marks else None,
            views=self.views(rows) if self.two_views else None,
            anchor=lambda f: own([row.bare_hidden for row in rows], f),
        )

    def divergence(
        self, t: train.Trainer, micro: train.Batch, hidden: list[Tensor], f: Callable
    ) -> Tensor:
        """f of the distributions behind these states and of the student's: [B, T]."""
        student, head = micro.by_student, teacher.output_head(t.model)
        with t.autocast():
            return per_token_divergence(
                head, student.hidden, hidden, student.mask, f, self.s.score_temperature
            )

    def views(self, rows: list[Example]) -> Tensor:
        """Batch.views."""
        count, total, squares = self.numbers["view_sums"]
        mean = total / max(1, count)
        deviation = max(0.0, squares / max(1, count) - mean**2) ** 0.5
        return (PAD([row.views for row in rows]) - mean) / (deviation + 1e-6)

    def other_gate(self, t: train.Trainer, micro: train.Batch) -> Tensor:
        """What --gate says, [B, T]; two-view and dual are 1 where the teacher had nothing to be
        shown."""
        if self.s.gate == "position":
            return position_weight(micro.by_student.mask)
        if self.s.gate == "two-view":
            gate = two_view_gate(self.views(micro.examples))
        else:
            gate = self.divergence(t, micro, micro.by_teacher.hidden, dual_weight).detach()
        return torch.where(micro.by_teacher.mask, gate, 1.0)

    def token_metrics(self, t: train.Trainer, micro: train.Batch) -> dict[str, Tensor]:
        """Those of train.EGRSD that the method makes use of, 0 at rows that are no rollouts."""
        unused = {"entropy", "delta"} if not self.method.teacher else set()
        unused |= {"magnitude", "clipped"} if "eps" not in self.method.uses else set()
        unused |= {"gate"} if "gamma" not in self.method.uses else set()
        metrics = self.core.token_metrics(t, self.seen(micro))
        metrics = {name: value for name, value in metrics.items() if name not in unused}
        metrics |= {"gate": self.gate} if self.gate is not None else {}
        flags = [[not row.is_reference] for row in micro.examples]
        is_rollout = torch.tensor(flags, device=t.ranks.device)
        return {name: value * is_rollout for name, value in metrics.items()}

    # ---- after the update

    def after_update(self, t: train.Trainer) -> dict[str, float]:
        """What --teacher-schedule says (an average is one of the matrices A and of the B, not of
        their product), and what was noted in the step on all ranks."""
        for row in self.rollouts:
            # they would stay in memory while the next step samples
            row.views = row.bare_hidden = None
        # of a frozen teacher the first is empty
        for old, new in zip(self.tensors["teacher"], t.parameters, strict=False):
            if self.s.teacher_schedule == "ema":
                old.lerp_(new.detach(), 1 - self.s.teacher_decay)
            elif t.step % self.s.teacher_every == 0:
                old.copy_(new.detach())
        if self.written and not self.rollouts and t.ranks.rank == 0:  # else with the rollouts
            lines = [{"step": t.step} | row.as_json() for row in self.written[:SAMPLES_PER_STEP]]
            checkpoint.append_jsonl(t.out / "samples.jsonl", lines)
        sums = Counter()
        for key, value in t.ranks.gather_lists(list(self.figures.items())):
            sums[key] += value
        figures = {
            name: total / (sums[name, "count"] or 1)
            for (name, part), total in sums.items()
            if part == "sum"
        }
        return figures | ({"ask_s": t.log.seconds["ask"]} if "asked_tokens" in figures else {})
