"""How train.Trainer's step changes for the methods of the family, and for ablations of EGRSD by the family's flags."""

from collections.abc import Callable

import torch
from torch import Tensor

import egrsd
import lora
import rollout
import teacher
import train
from family.contexts import CONTEXTS
from family.methods import METHODS, Batch, Method, position_weight
from family.settings import FamilySettings
from support.data import Problem
from support.distributed import Ranks
from support.run import say
from support.sampling import Rollout

# Stands for the core's methods with a flag of the family; its loss is never called, Trainer's own is.
EGRSD = Method(train.Trainer.loss, "with a flag of the family", uses=("advantage", "gamma", "window", "eps", "floor"))


class GroupAdvantage(egrsd.RunningAdvantage):
    """GRPO, arXiv 2402.03300: A = (r - mean) / (std + 1e-4) within a problem's `group` rollouts; ValueError if < 2."""

    def __init__(self, group: int):
        super().__init__()
        if group < 2:
            raise ValueError(f"group must be >= 2, the standard deviation of one reward is not defined, got {group}")
        self.group = group

    def advantage(self, rewards: Tensor) -> Tensor:
        """rewards [B] -> advantages [B]; rollouts of one problem stand beside each other.

        The sample standard deviation (n - 1), as torch.std has it. In float64, so that equal rewards give 0 and not
        the rounding of their mean.
        """
        groups = rewards.double().view(-1, self.group)
        centred = groups - groups.mean(1, keepdim=True)
        return (centred / (groups.std(1, keepdim=True) + 1e-4)).flatten().to(rewards.dtype)


class Neighbour(train.Trainer):
    """A Trainer whose method, teacher or gate is the family's."""

    def __init__(self, s: FamilySettings, ranks: Ranks):
        self.method, self.context = METHODS.get(s.method, EGRSD), CONTEXTS[s.teacher_context]
        self.full_distributions, self.quoted_completions = self.method.full_distributions, self.context.most_peers
        self.needs_solution = self.method.reference or self.method.teacher and self.context.needs_solution
        self.has_rollouts = self.method.rollouts
        super().__init__(s, ranks)
        self.rows_per_problem = (s.rollouts_per_prompt if self.method.rollouts else 0) + int(self.method.reference)
        self.median_entropies: list[float] = []
        self.num_kept = 0.0  # tokens of this rank's rollouts that the mean of the step counts
        self.teacher_adapter = [] if s.teacher_schedule == "frozen" else [p.detach().clone() for p in self.parameters]
        if s.advantage == "group":
            self.baseline = GroupAdvantage(s.rollouts_per_prompt)
        long = [p for p in self.problems if self.method.reference and len(p.solution.encode()) >= s.max_new_tokens]
        cut = sum(not self.reference(p).finished for p in long)
        if cut and ranks.rank == 0:
            say(f"--method {s.method}: {cut} of {len(self.problems)} reference solutions are longer than "
                f"--max-new-tokens {s.max_new_tokens} and are cut there")

    def make_rollouts(self, problems: list[Problem]) -> list[Rollout]:
        return super().make_rollouts(problems) if self.method.rollouts else []

    def other_rows(self, problems: list[Problem]) -> list[Rollout]:
        """The reference solutions, for methods that learn from them."""
        rows = [self.reference(problem) for problem in problems] if self.method.reference else []
        self.num_reference, = self.ranks.sum([sum(len(row.token_ids) for row in rows)])
        return rows

    def reference(self, problem: Problem) -> Rollout:
        """The reference solution and a stop token as a completion; not finished if it is cut at --max-new-tokens."""
        cap, eos = self.s.max_new_tokens, self.tokenizer.eos_token_id
        stop = rollout.stop_ids(self.model, self.tokenizer)[0] if eos is None else eos
        ids = self.tokenizer.encode(problem.solution, add_special_tokens=False) + [stop]
        return Rollout(ids[:cap], [0.0] * len(ids[:cap]), len(ids) <= cap, problem, self.student_prompt(problem),
                       problem.solution, problem.answer, True, is_reference=True)

    def teacher_prompts(self, rows: list[Rollout]) -> list[list[int]]:
        """What --teacher-context says. A row whose teacher has nothing to be shown gets the student's prompt."""
        prompts, group = [], self.s.rollouts_per_prompt
        for i, row in enumerate(rows):
            shown = None
            if self.method.teacher and not row.is_reference:
                others = [other for other in rows[i - i % group:i - i % group + group] if other is not row]
                shown = self.context.text(row.problem, [other.text for other in others if other.correct],
                                          [other.text for other in others if not other.correct], row.correct)
            prompts.append(row.prompt if shown is None else self.teacher_prompt(row.problem, shown))
            row.has_context = not row.is_reference and (shown is not None or self.context.is_bare)
        return prompts

    def as_teacher(self):
        """The base model, or what --teacher-schedule made of the student."""
        return lora.replaced(self.model, self.teacher_adapter) if self.teacher_adapter else super().as_teacher()

    def read_as_teacher(self, rows: list[Rollout]) -> teacher.Reading:
        """H is 0 where the teacher has nothing to be shown. Also notes the median of H over the step's rollouts."""
        if not self.method.teacher:
            nothing = torch.zeros(len(rows), max(len(row.token_ids) for row in rows), device=self.ranks.device)
            return teacher.Reading(nothing, nothing, nothing.bool())
        reading = super().read_as_teacher(rows)
        reading.entropy *= self.has_context(rows)
        medians = [reading.entropy[i, :len(row.token_ids)].median().item() if row.has_context else torch.nan
                   for i, row in enumerate(rows) if not row.is_reference]
        self.median_entropies.append(self.ranks.gather(torch.tensor(medians)).nanmedian().nan_to_num().item())
        return reading

    def has_context(self, rows: list[Rollout]) -> Tensor:
        """Whether the teacher had something to be shown: bool [B, 1]."""
        return torch.tensor([[row.has_context] for row in rows], device=self.ranks.device)

    def after_update(self) -> None:
        """What --teacher-schedule says. An average is one of the matrices A and of the B, not of their product."""
        for old, new in zip(self.teacher_adapter, self.parameters, strict=False):  # the first is empty for `frozen`
            if self.s.teacher_schedule == "ema":
                old.lerp_(new.detach(), 1 - self.s.teacher_decay)
            elif self.step % self.s.teacher_every == 0:
                old.copy_(new.detach())

    def read_as_student(self, *arguments) -> train.Batch:
        """d = 0 where the teacher has nothing to be shown."""
        batch = super().read_as_student(*arguments)
        batch.teacher_logp = torch.where(self.has_context(batch.rows) & self.method.teacher, batch.teacher_logp,
                                         batch.logp.detach())
        return batch

    def loss(self, batch: train.Batch) -> Tensor:
        """The method's loss: means over the step's tokens, of rollouts and of reference solutions apart."""
        s, device = self.s, self.ranks.device
        if s.gate == "position":
            weights = egrsd.token_advantages(batch.advantage, batch.teacher_logp, batch.logp, batch.entropy, batch.mask,
                                             gamma=0, eps=s.eps) * position_weight(batch.mask)
            return egrsd.policy_loss(batch.logp, weights, batch.mask, batch.num_tokens)
        if self.method is EGRSD:
            return super().loss(batch)
        is_reference = torch.tensor([row.is_reference for row in batch.rows], device=device)
        own = Batch(
            **vars(batch), correct=torch.tensor([row.correct for row in batch.rows], device=device),
            is_reference=is_reference, divergence=self.divergence(batch), step=self.step,
            num_completions=s.prompts_per_step * s.rollouts_per_prompt, median_entropies=self.median_entropies,
            gamma=s.gamma, window=s.window, eps=s.eps, floor=s.floor, kept=batch.mask & ~is_reference.unsqueeze(-1))
        losses = self.method.loss(own)
        self.num_kept += own.kept.sum().item()
        share = torch.where(is_reference, 1 / max(1, self.num_reference), 1 / max(1, batch.num_tokens)).unsqueeze(-1)
        return (torch.where(batch.mask, losses, 0.0) * share).sum()

    def before_clipping(self, num_tokens: float) -> None:
        """Make the mean one over the tokens that the method keeps, whose number in the step is known only now."""
        kept, = self.ranks.sum([self.num_kept])
        scale = num_tokens / kept if kept else 1.0  # exactly 1 where all are kept
        for parameter in self.parameters:
            parameter.grad *= scale
        self.log.loss, self.num_kept = self.log.loss * scale, 0.0

    def divergence(self, batch: train.Batch) -> Callable[[Callable], Tensor]:
        """Batch.divergence: 0 where the teacher had nothing to be shown."""
        def divergence(f):
            with self.autocast():
                return self.has_context(batch.rows) * teacher.per_token_divergence(
                    teacher.output_head(self.model), batch.hidden, batch.teacher_hidden, batch.mask, f,
                    self.s.score_temperature)
        return divergence

    def token_metrics(self, batch: train.Batch) -> dict[str, Tensor]:
        """Without what the method does not use."""
        unused = {"entropy", "delta"} if not self.method.teacher else set()
        unused |= {"magnitude", "clipped"} if "eps" not in self.method.uses else set()
        unused |= {"gate"} if "gamma" not in self.method.uses else set()
        metrics = {name: value for name, value in super().token_metrics(batch).items() if name not in unused}
        return metrics | ({"gate": position_weight(batch.mask)} if self.s.gate == "position" else {})

    def state(self) -> tuple[dict, dict]:
        tensors, numbers = super().state()
        return tensors | {"teacher": self.teacher_adapter}, numbers | {"median_entropies": self.median_entropies}

    def load_state(self, tensors: dict, numbers: dict) -> None:
        super().load_state(tensors, numbers)
        self.median_entropies = numbers["median_entropies"]
        for old, saved in zip(self.teacher_adapter, tensors["teacher"], strict=True):
            old.copy_(saved)
