"""EGRSD and CL-EGRSD training (arXiv 2605.13255): sample, verify, read twice, update.

    python train.py                                  the toy on a laptop CPU, a few minutes
    torchrun --standalone train.py                   the same on one GPU, or on the CPU
    torchrun --standalone --nproc-per-node=8 train.py --model Qwen/Qwen3-4B --data openthoughts.jsonl
                                                     the paper's recipe on eight GPUs
    python train.py --out runs/train --resume        go on where a stopped run left off

One step, `Trainer.train_step`:

    rollouts   every rank samples completions of its share of the problems     rollout.sample
    rewards    the verifier grades them; shorter correct ones get more         reward.shaped_reward
    advantage  against the rewards of earlier steps                            egrsd.RunningAdvantage  (9)
    teacher    adapter off, solution in the prompt: log p_T and entropy H      teacher.read            (4)
    student    adapter on: log p_theta                                         teacher.read
    loss       advantage x magnitude x gate                                    egrsd.token_advantages  (2) (5) (6) (8)
               a mean over the tokens of all ranks                             egrsd.policy_loss       (7)
    update     clip, AdamW; then the running advantage learns the step's rewards

What it is not: no importance ratio, no KL term, no replay of old rollouts, no separate inference
engine; only LoRA adapters are trained. family/ overrides some of Trainer's methods; without it this
file works as it stands.
"""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from support import settings
from support.errors import InputError, LocalError, parse_early

BEGAN = time.perf_counter()
if __name__ == "__main__":
    parse_early("train.py", lambda: settings.check_start(*settings.parse(sys.argv[1:], __doc__)))

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import egrsd
import eval as evaluation
import lora
import reward
import teacher
import toy
from support import checkpoint, graphs, run
from support.data import Problem, add_adapter, load_model, load_problems
from support.distributed import Ranks
from support.memory import slots_that_fit
from support.sampling import Rollout, check_window, grade_rollouts, progress, sample, student_prompt
from support.settings import Sampling, Settings

EVALUATION = 2**32 - 1  # stands for the step number in the seeds of evaluation
# rows decoded together in evaluation, unless --slots or the free memory says otherwise
EVALUATION_SLOTS = 128


class Student(nn.Module):
    """teacher.read as the forward of a module, which is where DistributedDataParallel hooks in."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, prompts, completions, temperature, hidden):
        return teacher.read(
            self.model, prompts, completions, temperature=temperature, hidden=hidden
        )


@dataclass
class Batch:
    """A micro-batch: B completions of up to T tokens; log-probs and entropies in nats, float32, 0
    outside the mask."""

    rows: list[Rollout]
    logp: Tensor  # [B, T] log p_theta, carries the gradient
    teacher_logp: Tensor  # [B, T]
    entropy: Tensor  # [B, T] H of the teacher
    mask: Tensor  # bool [B, T]
    advantage: Tensor  # [B]
    max_entropy: float  # of the step, over all ranks
    num_tokens: float  # of the step, over all ranks
    # [T_i, D] each, the student's, if the loss needs full distributions
    hidden: list[Tensor] | None
    teacher_hidden: list[Tensor] | None  # likewise


class Trainer:
    """EGRSD and CL-EGRSD, and the state of a run: model, problems, optimizer, running advantage,
    steps done."""

    needs_solution = True  # of the training problems
    has_rollouts = True  # in every step
    full_distributions = False  # the loss needs the hidden states of both readings
    quoted_completions = 0  # at most, in the teacher's prompt

    def __init__(self, s: Settings, ranks: Ranks):
        """Load and check everything; nothing is written yet."""
        self.s, self.ranks, self.out, self.step, self.rows_per_problem = (
            s,
            ranks,
            Path(s.out),
            0,
            s.rollouts_per_prompt,
        )
        self.stop, self.log, self.results = run.StopRequest(ranks), run.StepLog(self), {}
        self.make_decoder = graphs.choose(s.cuda_graphs, ranks.device)
        data, eval_data = toy.resolve(s.data, "train.jsonl"), toy.resolve(s.eval_data, "test.jsonl")
        self.problems, self.left_out = ranks.together(
            load_problems, data, self.needs_solution, s.skip_ungradable
        )
        self.held_out = (
            ranks.together(load_problems, eval_data, False, s.skip_ungradable)[0]
            if eval_data
            else []
        )
        name = ranks.once_per_node(lambda: toy.resolve(s.model, "model"))
        self.files = {"--data": data, "--model": name} | (
            {"--eval-data": eval_data} if eval_data else {}
        )
        self.bf16 = s.bf16 if s.bf16 is not None else ranks.device.type == "cuda"
        self.autocast = partial(
            torch.autocast, ranks.device.type, torch.bfloat16, enabled=self.bf16
        )
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        self.model, self.tokenizer = ranks.once_per_node(
            lambda: load_model(name, dtype, ranks.device)
        )
        self.student_prompt = partial(student_prompt, self.tokenizer, thinking=s.thinking)
        check_window(
            self.model,
            data,
            self.problems,
            (1 + self.quoted_completions) * s.max_new_tokens,
            lambda p: [
                self.student_prompt(p),
                *self.teacher_prompts([Rollout([], [], False, p, [])]),
            ],
        )
        check_window(
            self.model,
            eval_data,
            self.held_out,
            s.eval_max_new_tokens or s.max_new_tokens,
            lambda p: [self.student_prompt(p)],
        )

        torch.manual_seed(s.seed)
        # what it covers, in words
        self.adapter = add_adapter(self.model, s.lora_rank, s.lora_alpha, s.lora_targets)
        self.parameters = lora.lora_parameters(self.model)
        if s.gradient_checkpointing:
            try:
                self.model.activation_checkpointing_enable({"use_reentrant": False})
            except ValueError as error:
                raise InputError(f"{s.model}: {error} Say --no-gradient-checkpointing") from None
        self.student = Student(self.model)
        if ranks.distributed:
            self.student = DistributedDataParallel(self.student, forward_sync_buffers=False)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=s.lr, betas=(0.9, 0.999), weight_decay=s.weight_decay
        )
        self.baseline = egrsd.RunningAdvantage()

    # ---- one step

    def train_step(self) -> dict:
        """One optimizer step over all ranks; returns its metrics. Nothing has changed if it raises
        Stop."""
        s, ranks, log = self.s, self.ranks, self.log
        log.begin_step()
        problems = self.next_problems()
        # N, sampled by the student and graded by the verifier
        rollouts = self.make_rollouts(problems)
        rewards = torch.tensor([row.reward for row in rollouts])  # [N]
        # (9)
        for row, advantage in zip(rollouts, self.baseline.advantage(rewards).tolist(), strict=True):
            row.advantage = advantage
        # none in EGRSD: reference solutions, for example, in family/
        rows = rollouts + self.other_rows(problems)

        log.begin("teacher")
        reading = self.read_as_teacher(rows)  # log p_T and H [N, T], (4)
        max_entropy = ranks.max(reading.entropy.max().item())  # of all ranks and micro-batches, (5)
        # (7)
        num_tokens, all_tokens = ranks.sum(
            [sum(len(r.token_ids) for r in some) for some in (rollouts, rows)]
        )

        log.begin("student")
        teacher.reading_mode(self.model)
        batches = teacher.micro_batches(
            [len(row.prompt) + len(row.token_ids) for row in rows],
            self.most_tokens([row.prompt for row in rows]),
        )
        for indices in batches:
            if ranks.distributed:  # only the last backward averages the gradients of the ranks
                self.student.require_backward_grad_sync = indices is batches[-1]
            batch = self.read_as_student(indices, rows, reading, max_entropy, num_tokens)
            loss = self.loss(batch)
            # a rank's loss is its share of a sum, and averaging divides by world
            (loss * ranks.world).backward()
            log.add(loss, self.token_metrics(batch), batch)

        log.begin("update")
        self.before_clipping(num_tokens)
        # the norm before clipping
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, s.max_grad_norm).item()
        self.check_gradient(grad_norm)
        lr = s.lr * min(1.0, (self.step + 1) / max(1, s.lr_warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.baseline.update(ranks.gather(rewards).flatten())  # (9), for the steps to come
        self.after_update()
        return log.finish_step(
            self.step,
            rollouts,
            num_tokens,
            grad_norm=grad_norm,
            lr=lr,
            max_entropy=max_entropy,
            tokens=int(all_tokens),
        )

    def loss(self, batch: Batch) -> Tensor:
        """EGRSD and, with a window, CL-EGRSD: this micro-batch's share of the step's loss, a
        scalar."""
        s = self.s
        token_advantages = egrsd.token_advantages(  # A * w * omega [B, T]: (2), (5), (6), (8)
            batch.advantage,
            batch.teacher_logp,
            batch.logp,
            batch.entropy,
            batch.mask,
            gamma=s.gamma,
            window=s.window,
            eps=s.eps,
            floor=s.floor,
            max_entropy=batch.max_entropy,
        )
        return egrsd.policy_loss(batch.logp, token_advantages, batch.mask, batch.num_tokens)  # (7)

    def make_rollouts(self, problems: list[Problem]) -> list[Rollout]:
        """The student's completions of these problems, with their rewards."""
        s, log = self.s, self.log
        log.begin("rollout")
        sampling = Sampling(
            s.rollouts_per_prompt,
            s.max_new_tokens,
            s.temperature,
            s.top_p,
            s.top_k,
            s.slots or None,
            s.thinking,
        )
        first_row = self.ranks.rank * len(problems) * s.rollouts_per_prompt
        rollouts = self.sample(
            problems,
            sampling,
            self.step,
            first_row,
            progress(log.bar, log.status, counts=False, check=self.stop.interrupt),
        )
        log.begin("grade")
        for row in grade_rollouts(self.tokenizer, rollouts):
            row.reward = reward.shaped_reward(
                row.correct, len(row.token_ids), s.max_new_tokens, s.beta_length
            )
        return rollouts

    def read_as_teacher(self, rows: list[Rollout]) -> teacher.Reading:
        """log p_T and H of every row: the model as the teacher, with the teacher's prompts."""
        prompts = self.teacher_prompts(rows)
        self.model.eval()
        with self.as_teacher(), self.autocast():
            return teacher.read_in_batches(
                self.model,
                prompts,
                [row.token_ids for row in rows],
                self.most_tokens(prompts),
                temperature=self.s.score_temperature,
                hidden=self.full_distributions,
            )

    def read_as_student(
        self,
        indices: list[int],
        rows: list[Rollout],
        reading: teacher.Reading,
        max_entropy: float,
        num_tokens: float,
    ) -> Batch:
        """log p_theta of some rows, beside what the teacher said of them."""
        some = [rows[i] for i in indices]
        with self.autocast():
            student = self.student(
                [row.prompt for row in some],
                [row.token_ids for row in some],
                self.s.score_temperature,
                self.full_distributions,
            )
        width = student.mask.shape[1]
        return Batch(
            some,
            student.logp,
            reading.logp[indices, :width],
            reading.entropy[indices, :width],
            student.mask,
            torch.tensor([row.advantage for row in some], device=self.ranks.device),
            max_entropy,
            num_tokens,
            student.hidden,
            [reading.hidden[i] for i in indices] if self.full_distributions else None,
        )

    def check_gradient(self, norm: float) -> None:
        """InputError if the gradient, the same on all ranks, is not finite."""
        if not np.isfinite(norm):
            raise InputError(self.not_finite(f"the gradient's norm {norm}"))

    def not_finite(self, what: str) -> str:
        last = checkpoint.latest(self.out / "checkpoints") or "none yet"
        return (
            f"step {self.step + 1}: {what} is not finite, so the step was not applied: lower "
            f"--lr; the last good checkpoint is {last}"
        )

    # ---- what else a neighbour may override

    def teacher_prompts(self, rows: list[Rollout]) -> list[list[int]]:
        """The problem and the reference solution."""
        return [self.teacher_prompt(row.problem, row.problem.solution) for row in rows]

    def as_teacher(self):
        """Inside, the model is the teacher: the adapter is off."""
        return lora.disabled(self.model)

    def other_rows(self, problems: list[Problem]) -> list[Rollout]:
        """Rows that are no rollouts, to be read and learned from beside them."""
        return []

    def before_clipping(self, num_tokens: float) -> None:
        """What else changes the gradients of the step, of so many tokens of rollouts on all
        ranks."""

    def after_update(self) -> None:
        """What else changes with a step, such as the teacher's weights."""

    def token_metrics(self, batch: Batch) -> dict[str, Tensor]:
        """[B, T] each; metrics.jsonl holds their means. Nothing here goes into the loss.

        sampling_gap  |log-prob under the distribution drawn from - log p_S|
        entropy       H of the teacher, nats                      delta    log p_T - log p_S
        gate          omega        magnitude  w                   clipped  share of tokens whose w is at a bound
        """
        s, logp = self.s, batch.logp.detach()
        drawn = nn.utils.rnn.pad_sequence(
            [torch.tensor(row.logprobs, device=logp.device) for row in batch.rows], True
        )
        weight = egrsd.magnitude(batch.teacher_logp, logp, batch.advantage, s.eps)
        clipped = (
            ((weight - 1).abs() >= s.eps - 1e-6)
            & (batch.advantage != 0).unsqueeze(-1)
            & (s.eps > 0)
        )
        return {
            "sampling_gap": (drawn - logp).abs(),
            "entropy": batch.entropy,
            "delta": batch.teacher_logp - logp,
            "magnitude": weight,
            "clipped": clipped,
            "gate": egrsd.confidence_gate(
                batch.entropy, batch.mask, s.gamma, s.window, s.floor, batch.max_entropy
            ),
        }

    def state(self) -> tuple[dict, dict]:
        """(tensors, numbers) of a checkpoint, besides adapter, optimizer and random state."""
        return {}, {"step": self.step, "running_advantage": self.baseline.state_dict()}

    def load_state(self, tensors: dict, numbers: dict) -> None:
        self.step = numbers["step"]
        self.baseline.load_state_dict(numbers["running_advantage"])

    def teacher_prompt(self, problem: Problem, shown: str) -> list[int]:
        return teacher.encode(
            self.tokenizer, teacher.teacher_messages(problem.problem, shown), self.s.thinking
        )

    def next_problems(self) -> list[Problem]:
        """This rank's problems of the step: the data in a new random order every epoch, dealt out
        without gaps."""
        n, share = len(self.problems), self.ranks.share(self.s.prompts_per_step)
        places = [self.step * self.s.prompts_per_step + i for i in share]
        order = {
            epoch: np.random.default_rng((self.s.seed, epoch)).permutation(n)
            for epoch in {k // n for k in places}
        }
        return [self.problems[order[k // n][k % n]] for k in places]

    def sample(
        self, problems: list[Problem], sampling: Sampling, seed: int, first_row: int, show
    ) -> list[Rollout]:
        """Rollouts of this rank's problems, the first of which is row `first_row` of all ranks'
        rows."""
        return self.until_stopped(
            sample,
            self.model,
            self.tokenizer,
            problems,
            sampling,
            seed=(self.s.seed, seed),
            first_row=first_row,
            show=show,
            make_decoder=self.make_decoder,
        )

    def until_stopped(self, draw: Callable[..., list], *arguments, **more) -> list:
        """draw(*arguments, **more), which samples; Stop, if raised, is raised on every rank."""
        found = []
        try:
            with suppress(run.Interrupted), self.autocast():
                found = draw(*arguments, **more)
        except FloatingPointError as error:
            raise LocalError(self.not_finite(f"a log-prob ({error})")) from None
        self.stop.obey()
        return found

    def most_tokens(self, prompts: list[list[int]]) -> int:
        """Of a forward pass: as many as --micro-batch completions of full length have."""
        return self.s.micro_batch * (max(map(len, prompts)) + self.s.max_new_tokens)

    def evaluate(self, name: str) -> None:
        """Accuracy and length on the held-out problems, of which every rank takes its share, into
        evaluation.json."""
        s, self.log.phase = self.s, "evaluation"
        sampling = Sampling(
            s.eval_samples,
            s.eval_max_new_tokens or s.max_new_tokens,
            s.eval_temperature,
            s.eval_top_p,
            0,
            s.slots or EVALUATION_SLOTS,
            s.thinking,
        )
        sampling.slots, _ = slots_that_fit(self.model, self.tokenizer, self.held_out, sampling)

        def solve(problems, first_row, graded, keep, bar):
            show = progress(bar, check=self.stop.interrupt)
            rollouts = self.sample(problems, sampling, EVALUATION, first_row, show)
            for number, row in enumerate(grade_rollouts(self.tokenizer, rollouts)):
                keep(number, row)

        rows = evaluation.evaluate(self.held_out, s.eval_samples, solve, self.ranks, name)
        found = evaluation.summarise(rows, s.eval_samples)
        self.results[name] = {
            "accuracy": found["avg"],
            "length": found["length"],
            "efficiency": found["eff"],
            "truncated": found["truncated"],
            "no_answer": found["no_answer"],
            "completions": len(rows),
        }
        if self.ranks.rank == 0:
            checkpoint.write_json(self.out / "evaluation.json", self.results)

    def save(self) -> Path:
        """Write a checkpoint of the steps done; every rank calls it."""
        path = self.out / "checkpoints" / f"step-{self.step:06d}"
        checkpoint.save(path, self.model, self.optimizer, self.ranks, *self.state())
        return path


def train(s: Settings, resume: bool, trainer: type[Trainer] = Trainer) -> None:
    """The whole run, the same on every rank: evaluate, train, evaluate, export."""
    began = BEGAN if __name__ == "__main__" else time.perf_counter()
    ranks = Ranks()
    settings.check(s)
    with run.hold(s.out, ranks, None if resume else settings.REMEDY):
        with run.name_lack_of_memory(
            lambda: "while loading: lower --lora-rank, or take a smaller --model"
        ):
            t = trainer(s, ranks)
        if resume:
            run.check_inputs(t)
            checkpoint.load_latest(t.out / "checkpoints", t.model, t.optimizer, ranks, t.load_state)
            if run.is_done(t):
                return
        if ranks.rank == 0:
            run.write_config(t)
            for name in ["metrics.jsonl", "samples.jsonl"][: 1 + t.has_rollouts]:
                checkpoint.drop_later_steps(t.out / name, t.step)
        with t.stop.checkpointed(t), run.name_lack_of_memory(t.log.advice):
            evaluate_and_train(t)
        if ranks.rank == 0:
            run.export(t, began)
        ranks.barrier()  # nobody leaves while rank 0 still writes


def evaluate_and_train(t: Trainer) -> None:
    """The steps that are left, between the two evaluations; a checkpoint after the last one."""
    s, rank, watch = t.s, t.ranks.rank, run.Watch(t.parameters)
    t.results = run.read_results(t.out / "evaluation.json")
    if t.held_out and s.eval_before and "before" not in t.results:
        with lora.disabled(t.model):
            t.evaluate("before")
    with tqdm(
        total=s.steps, initial=t.step, disable=rank > 0, unit=" steps", desc="train"
    ) as t.log.bar:
        while t.step < s.steps:
            metrics = t.train_step()
            if rank == 0:
                checkpoint.append_jsonl(t.out / "metrics.jsonl", [metrics])
                for warning in watch.warnings(metrics):
                    t.log.bar.write(warning, file=sys.stderr)
            t.log.bar.update()
            if t.step % s.checkpoint_every == 0 or t.step == s.steps:
                t.save()
            t.stop.obey()
    if t.held_out:
        t.evaluate("after")


def parse_arguments(argv: list[str]) -> tuple[Settings, bool]:
    """(settings, resume?) from the command line."""
    return settings.parse(argv, __doc__)


def main() -> None:
    with run.one_line_errors("train.py", "interrupted before training began, nothing was written"):
        train(*parse_arguments(sys.argv[1:]))


if __name__ == "__main__":
    main()
