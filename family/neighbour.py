"""`Neighbour` takes the place of train.EGRSD in train.Trainer. It holds what a method, a teacher or a
gate of the family changes in the training step."""

from collections import Counter
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import egrsd
import lora
import reward
import rollout
import teacher
import train
from family import asking, interleaved
from family.contexts import CONTEXTS, Example, show_answer
from family.divergences import (
    dual_weight,
    finite,
    forward_kl,
    per_token_divergence,
    position_weight,
    two_view_gate,
)
from family.methods import EGRSD, Batch
from family.saliency import SALIENCY
from family.settings import FamilySettings
from support import checkpoint
from support.data import InputError, stop_sources
from support.run import SAMPLES_PER_STEP
from support.sampling import check_prompts
from teacher import Reading


class GroupAdvantage(egrsd.RunningAdvantage):
    """GRPO, arXiv 2402.03300: A = (r - mean) / (std + 1e-4) within the `group` rollouts of a
    problem; at least 2."""

    def __init__(self, group: int):
        super().__init__()
        self.group = group

    def advantage(self, rewards: Tensor) -> Tensor:
        """rewards [B] -> advantages [B]; rollouts of one problem stand beside each other.

        The sample standard deviation (n - 1), as torch.std has it. In float64, so that equal
        rewards give 0 and not the rounding of their mean.
        """
        groups = rewards.double().view(-1, self.group)
        spread = groups.std(1, keepdim=True) + 1e-4
        return ((groups - groups.mean(1, keepdim=True)) / spread).flatten().to(rewards.dtype)


@contextmanager
def replaced(model, tensors):
    """Inside, `tensors` are the adapter's weights, in the order and shapes of `lora_parameters`:
    those of an older or an averaged student."""

    def swap():
        for parameter, tensor in zip(lora.lora_parameters(model), tensors, strict=True):
            parameter.data, tensor.data = tensor.data, parameter.data

    swap()
    try:
        yield
    finally:
        swap()


class Neighbour(train.EGRSD):
    """EGRSD's step with another loss, teacher or gate. Arguments and results of its functions are
    those of train.EGRSD; `t` is the Trainer."""

    def __init__(self, s: FamilySettings):
        super().__init__()
        self.s = s
        self.method = s.entry
        self.source = s.source
        self.context = CONTEXTS[s.teacher_context if s.has_teacher else "none"]
        self.needs_solution = self.source == "reference" or self.context.needs == "solution"
        # something is sampled, so samples.jsonl is written
        self.has_rollouts = self.method.rollouts or s.writes
        self.keeps_states = self.method.full_distributions or s.gate in ("two-view", "dual")
        if s.advantage == "group":
            self.baseline = GroupAdvantage(s.rollouts_per_prompt)
        self.group = s.rollouts_per_prompt if self.method.rollouts else 1  # of one problem
        self.num_completions = s.prompts_per_step * self.group
        self.tensors = {"teacher": []}  # the adapter of a teacher that is not frozen
        self.numbers = {
            "median_entropies": [],  # of H over the rollouts of every step so far
            # KL of the two views of all tokens so far: their number, sum, sum of squares
            "view_sums": [0.0, 0.0, 0.0],
        }

    def begin(self, t):
        """Check that every text fits, and make what lasts for the run."""
        s = self.s
        self.check_data(t)
        t.rows_per_problem = s.rollouts_per_prompt * self.method.rollouts + bool(self.source)
        if s.teacher_schedule != "frozen":
            self.tensors["teacher"] = [p.detach().clone() for p in t.parameters]
        if self.source == "reference" and t.ranks.rank == 0:
            cut = sum(not self.reference(t, problem).finished for problem in t.problems)
            if cut:
                print(
                    f"--method {s.method}: {cut} of {len(t.problems)} reference solutions are longer "
                    f"than --max-new-tokens {s.max_new_tokens} and are cut there",
                    flush=True,
                )

    def check_data(self, t):
        """InputError if a problem lacks a field, or a prompt, quotations included, is too long."""
        data = t.files["--data"]
        context = self.context
        longest = max(t.problems, key=lambda p: len((p.problem + p.solution).encode()))

        def prompts(problem):
            example = asking.empty_example(t, problem)
            found = [example.prompt]
            found.append(t.teacher_prompt(problem, context.text(example, [], [], longest)))
            if context.question:
                found.append(asking.encode(t, context.question.text(example, t.tokenizer)))
            if self.method.overlap:
                found.append(t.teacher_prompt(problem, show_answer(example)))
            return found

        # the completion, and those that a text quotes or that a piece goes on from
        texts = 1 + context.quoted + (self.source == "interleaved")
        tokens = texts * self.s.max_new_tokens
        check_prompts(t.model, t.tokenizer, data, t.problems, tokens, prompts)
        end = teacher.prompt_end(t.tokenizer, self.s.thinking, self.s.date)
        for problem in t.problems:
            if self.source == "reference" and reward.after_thought(problem.solution, end) is None:
                raise InputError(
                    f"{data}: line {problem.line}: field 'solution': it would be learned as a thought "
                    "without an end: end the thought in it, or choose another --model or --method"
                )
            if context.needs == "restated" and not problem.restated:
                raise InputError(
                    f"{data}: line {problem.line}: field 'restated' is missing: add it, or choose "
                    "another --teacher-context"
                )

    def note(self, t, name, values):
        """metrics.jsonl gets the mean of these values of all ranks. Every rank calls it."""
        total, count = t.ranks.sum([sum(values), len(values)])
        if count:
            self.figures[name] = total / count

    # ---- the examples, and what the teacher is shown

    def examples(self, t, problems):
        """The step's rollouts, after the student was asked what the teacher's prompts need. And
        solutions to learn from: those of the data, or written ones."""
        self.figures = Counter()
        # what the last step read need not stay in memory while this one samples
        self.rollouts = []
        self.others = []
        self.bare = None
        if self.method.rollouts:
            self.rollouts = [Example(**vars(row)) for row in t.make_rollouts(problems)]
        if self.method.saliency:
            self.reward_saliency(t)
        if self.source == "reference":
            self.others = [self.reference(t, problem) for problem in problems]
        if self.method.repairs:
            self.count_failed(t)
        if self.context.question:
            asking.ask_about(t, self.others if self.method.repairs else self.rollouts)
        self.others += self.written(t, problems)
        self.asked = [one for one in self.others if one.asked][:SAMPLES_PER_STEP]
        if self.method.repairs:
            self.read_plans(t)
        counted = [one for one in self.others if one.counts]
        # a rank needs an example
        self.others = counted if counted or self.rollouts else self.others[:1]
        for place, example in enumerate(self.rollouts + self.others):
            example.place = place
        correct = sum(example.correct for example in self.rollouts)
        tokens = sum(len(example.token_ids) * example.counts for example in self.others)
        num_correct, self.num_reference = t.ranks.sum([correct, tokens])
        self.success_rate = num_correct / self.num_completions
        return self.rollouts, self.others

    def count_failed(self, t):
        """The solutions of problems that a rollout solved do not count."""
        for i, example in enumerate(self.others):
            rollouts = self.rollouts[i * self.group :][: self.group]
            example.counts = not any(one.correct for one in rollouts)
            example.teacher_prompt = None  # made once there is a plan
        self.note(t, "repaired", [example.counts for example in self.others])

    def read_plans(self, t):
        """The student reads the solutions that count, shown their plans."""
        self.teacher_prompts(t, self.others)  # of all: what is drawn depends on the place
        counted = [one for one in self.others if one.counts]
        if counted:
            planned = t.read([one.teacher_prompt for one in counted], counted).logp.cpu()
            for example, logp in zip(counted, planned, strict=True):
                example.planned = logp[: len(example.token_ids)]

    def written(self, t, problems):
        """Solutions that the teacher writes, alone or in turns with the student."""
        if self.source == "teacher":
            found = asking.solutions(t, problems, self.rollouts)
        elif self.source == "interleaved":
            found = interleaved.solutions(t, problems)
        else:
            return []
        for example in found:
            example.counts = example.correct or self.s.keep != "correct"
        self.note(t, "teacher_accuracy", [example.correct for example in found])
        self.note(t, "teacher_truncated", [not example.finished for example in found])
        return found

    def reward_saliency(self, t):
        """Add to the reward of a correct rollout the mean saliency of its reasoning, times a half."""
        t.log.begin("saliency")
        correct = [one for one in self.rollouts if one.correct]
        measure = SALIENCY[self.s.saliency or "mask"]
        found = t.until_stopped(measure, t.model, t.tokenizer, correct, t.stop.interrupt)
        means = [values.sum().item() / max(1, len(values)) for values in found]
        for one, mean in zip(correct, means, strict=True):
            one.reward += 0.5 * mean
        self.note(t, "saliency", means)

    def reference(self, t, problem):
        """The reference solution and a stop token as a completion; not finished if it is cut at
        --max-new-tokens."""
        # a solution that spells a control token has no control token
        ids = t.tokenizer.encode(
            problem.solution, add_special_tokens=False, split_special_tokens=True
        )
        # the last one is the chat template's, if it has one
        ends = [rollout.stop_ids(t.model, t.tokenizer)[0], *stop_sources(t.tokenizer)]
        ids.append(ends[-1])
        kept = ids[: self.s.max_new_tokens]
        prompt = t.student_prompt(problem)
        return Example(
            token_ids=kept,
            logprobs=[0.0] * len(kept),
            finished=kept == ids,
            problem=problem,
            prompt=prompt,
            correct=True,
            said=problem.solution,
            answer=problem.answer,
            prompt_end=teacher.prompt_end(t.tokenizer, self.s.thinking, self.s.date),
            is_reference=True,
            has_context=False,
            teacher_prompt=prompt,
        )

    def teacher_prompts(self, t, rows):
        """What --teacher-context says; the problem alone if there is nothing to show."""
        examples = [row if isinstance(row, Example) else Example(**vars(row)) for row in rows]
        for i, example in enumerate(examples):
            if example.teacher_prompt is None:
                shown = self.shown(t, examples, i)
                if shown is None:
                    example.has_context = self.context.is_bare
                example.teacher_prompt = t.teacher_prompt(example.problem, shown)
        return [example.teacher_prompt for example in examples]

    def shown(self, t, examples, number):
        """The text that the teacher is shown for rollout `number` of this rank. Rollouts of one
        problem stand beside each other."""
        example = examples[number]
        size = 1 if example.is_reference else self.group
        group = examples[number - number % size :][:size]
        number += t.ranks.share(self.s.prompts_per_step).start * size
        rng = np.random.default_rng((self.s.seed, t.step, number, asking.SEEDS["contexts"]))
        correct = []
        failed = []
        other = None
        for i in rng.permutation(len(group)):
            if group[i] is not example:
                texts = correct if group[i].correct else failed
                texts.append(group[i].text)
        if self.s.teacher_context == "other":
            others = [problem for problem in t.problems if problem.line != example.problem.line]
            other = others[rng.integers(len(others))]
        return self.context.text(example, correct, failed, other)

    # ---- as whom the teacher reads

    def as_teacher(self, t):
        """Inside, the model is the base model, or what --teacher-schedule made of the student."""
        own = self.tensors["teacher"]
        return replaced(t.model, own) if own else lora.disabled(t.model)

    def read_as_teacher(self, t, examples):
        """log p_T and H. The mask leaves out examples whose teacher has nothing to be shown. Also
        finds what else a method needs before the first backward pass."""
        device = t.ranks.device
        if not self.method.teacher:
            longest = max(len(example.token_ids) for example in examples)
            nothing = torch.zeros(len(examples), longest, device=device)
            return Reading(nothing, nothing, nothing.bool())
        with self.as_teacher(t):
            reading = t.read(self.teacher_prompts(t, examples), examples, self.keeps_states)
        reading.mask &= torch.tensor([[one.has_context] for one in examples], device=device)
        reading.entropy *= reading.mask
        entropy = reading.entropy.masked_fill(~reading.mask, torch.nan)
        # rollouts come first
        medians = t.ranks.gather(entropy[: len(self.rollouts)].nanmedian(1).values)
        self.numbers["median_entropies"].append(medians.nanmedian().nan_to_num().item())
        if self.s.two_views:
            self.compare_views(t, examples, reading)
        if self.method.margin or self.method.keeps:
            self.read_ahead(t, examples, reading)
        return reading

    @torch.no_grad()
    def compare_views(self, t, examples, reading):
        """The teacher reads again without a text: these are its two views. Their KL is normalised. Mean
        and deviation are over all tokens so far, of rollouts whose teacher had a text."""
        n = len(self.rollouts)
        with self.as_teacher(t):
            self.bare = t.read(
                [t.teacher_prompt(one.problem, None) for one in examples], examples, hidden=True
            )
        kl = self.divergence(t, self.bare, reading.hidden, forward_kl)  # [N, T]
        counted = kl[:n][reading.mask[:n]].tolist()
        new = t.ranks.sum([len(counted), sum(counted), sum(value**2 for value in counted)])
        sums = np.add(self.numbers["view_sums"], new).tolist()
        self.numbers["view_sums"] = sums
        count = max(1, sums[0])
        mean = sums[1] / count
        deviation = max(0.0, sums[2] / count - mean**2) ** 0.5
        self.views = (kl - mean) / (deviation + 1e-6)  # [N, T], Batch.views
        self.note(t, "view_kl", counted)

    def read_ahead(self, t, examples, reading):
        """The student reads before the first backward pass. PBSD needs that for its margins (every
        problem has a rollout and a solution of the teacher's), others for the tokens they keep."""
        student = t.read([example.prompt for example in examples], examples)
        d = (finite(reading.logp) - finite(student.logp)) * reading.mask
        if self.method.keeps:
            self.kept = self.method.keeps(d, student.entropy, student.mask, t.step)  # [N, T]
            (self.num_kept,) = t.ranks.sum([self.kept.sum().item()])
        if self.method.margin:
            n = len(self.rollouts)
            ratios = -d.double().sum(1)  # log (p_S / p_T)
            margins = ratios[n:] - ratios[:n]
            self.margins = margins.float().repeat(2)  # [N]: of the rollouts, of the solutions
            self.note(t, "margin", margins.tolist())

    # ---- the loss of a micro-batch

    def loss(self, t, micro):
        """The method's loss: the mean over the tokens of the step's rollouts, plus the mean over the
        tokens of its other examples."""
        by_teacher = micro.by_teacher
        own = micro.by_student.logp.detach()
        # d = 0 where the teacher has nothing to be shown
        by_teacher.logp = by_teacher.logp.where(by_teacher.mask, own)
        self.gate = None
        if self.s.gate:
            return self.gated_loss(t, micro)
        if self.method is EGRSD:
            return super().loss(t, micro)
        batch = self.batch(t, micro)
        counts = torch.tensor([[one.counts] for one in micro.examples], device=batch.mask.device)
        losses = torch.where(batch.mask & counts, self.method.loss(batch), 0.0)
        self.gate = batch.weight
        share_of_others = 1 / max(1, self.num_reference)
        shares = torch.where(batch.is_reference, share_of_others, 1 / max(1, batch.num_tokens))
        return (losses * shares.unsqueeze(-1)).sum()

    def gated_loss(self, t, micro):
        """EGRSD's loss with --gate in place of its gate. two-view and dual are 1 where the teacher
        had nothing to be shown."""
        own = micro.by_student
        by_teacher = micro.by_teacher
        if self.s.gate == "position":
            self.gate = position_weight(own.mask)
        else:
            if self.s.gate == "two-view":
                gate = two_view_gate(self.views[places_of(micro)])
            else:
                gate = self.divergence(t, own, by_teacher.hidden, dual_weight).detach()
            self.gate = torch.where(by_teacher.mask, gate, 1.0)
        weight = egrsd.magnitude(by_teacher.logp, own.logp, micro.advantage, self.s.eps)
        weight = micro.advantage.unsqueeze(-1) * weight * self.gate
        return egrsd.policy_loss(own.logp, weight, own.mask, micro.num_tokens)

    def batch(self, t, micro):
        """What the methods read."""
        device = t.ranks.device
        student = micro.by_student
        by_teacher = micro.by_teacher
        own = partial(self.divergence, t, student)
        batch = Batch(
            logp=student.logp,
            teacher_logp=by_teacher.logp,
            entropy=by_teacher.entropy,
            mask=student.mask,
            advantage=micro.advantage,
            correct=torch.tensor([example.correct for example in micro.examples], device=device),
            is_reference=is_reference(micro, device),
            divergence=lambda f: own(by_teacher.hidden, f) * by_teacher.mask,
            num_tokens=micro.num_tokens,
            num_completions=self.num_completions,
            step=t.step,
            median_entropies=self.numbers["median_entropies"],
            eps=self.s.eps,
            num_reference=self.num_reference,
            success_rate=self.success_rate,
        )
        places = places_of(micro)
        if self.method.keeps:
            batch.kept = self.kept[places]
            batch.num_tokens = self.num_kept
        if self.method.marks:
            marked = [example.marked for example in micro.examples]
            batch.marked = pad_sequence(marked, batch_first=True).to(device)
        if self.method.repairs:
            planned = [example.planned for example in micro.examples]
            batch.planned = pad_sequence(planned, batch_first=True).to(device)
        if self.method.margin:
            batch.margin = self.margins[places[0]]
        if self.method.views:
            batch.views = self.views[places]
            batch.anchor = partial(own, [self.bare.hidden[place] for place in places[0]])
        return batch

    def divergence(self, t, student, theirs, f):
        """f of the distributions behind the states `theirs` and of the student's: [B, T]."""
        with t.autocast():
            return per_token_divergence(
                teacher.output_head(t.model),
                student.hidden,
                theirs,
                student.mask,
                f,
                self.s.score_temperature,
            )

    def token_metrics(self, t, micro):
        """The metrics of train.EGRSD that the method uses. They are 0 at examples that are not
        rollouts."""
        metrics = super().token_metrics(t, micro)
        if not self.method.teacher:
            del metrics["entropy"], metrics["delta"]
        if "eps" not in self.method.uses:
            del metrics["magnitude"], metrics["clipped"]
        if "gamma" not in self.method.uses:
            del metrics["gate"]
        if self.gate is not None:
            metrics["gate"] = self.gate
        is_rollout = ~is_reference(micro, t.ranks.device).unsqueeze(-1)
        return {name: value * is_rollout for name, value in metrics.items()}

    # ---- after the update

    def after_update(self, t):
        """Update the teacher as --teacher-schedule says. With `ema` the matrices A and the matrices B
        are averaged, not their products. Returns what was noted in the step."""
        # for a frozen teacher the first list is empty
        for old, new in zip(self.tensors["teacher"], t.parameters, strict=False):
            if self.s.teacher_schedule == "ema":
                old.lerp_(new.detach(), 1 - self.s.teacher_decay)
            elif t.step % self.s.teacher_every == 0:
                old.copy_(new.detach())
        # the Trainer writes the rollouts down
        if self.asked and t.ranks.rank == 0:
            records = [{"step": t.step} | one.as_json() for one in self.asked]
            checkpoint.append_jsonl(t.out / "samples.jsonl", records)
        for phase in ("ask", "saliency"):
            if phase in t.log.seconds:
                self.figures[f"{phase}_s"] = t.log.seconds[phase]
        return self.figures


def places_of(micro):
    """What selects a micro-batch, [B, T], from a tensor of the whole step."""
    return [one.place for one in micro.examples], slice(micro.by_student.mask.shape[1])


def is_reference(micro, device):
    """bool [B]: the example is not a rollout."""
    return torch.tensor([example.is_reference for example in micro.examples], device=device)
