"""EGRSD and CL-EGRSD training (arXiv 2605.13255): sample, verify, read twice, update.

    python train.py                                  the toy on a laptop CPU, a few minutes
    torchrun --standalone train.py                   the same through torchrun; both take a GPU if there is one
    torchrun --standalone --nproc-per-node=8 train.py --model Qwen/Qwen3-4B --data openthoughts.jsonl
                                                     the paper's recipe on eight GPUs
    python train.py --out runs/train --resume        go on where a stopped run left off

One step, `Trainer.train_step`:

    rollouts   every rank samples completions of its share of the problems     rollout.sample
    rewards    the verifier grades them; shorter correct ones get more         reward.shaped_reward
    advantage  against the rewards of earlier steps                            egrsd.RunningAdvantage  (9)
    teacher    adapter off, solution in the prompt: log p_T and entropy H      teacher.read_in_batches (4)
    student    adapter on: log p_theta                                         teacher.read
    loss       advantage x magnitude x gate                                    egrsd.token_advantages  (2) (5) (6) (8)
               a mean over the tokens of all ranks                             egrsd.policy_loss       (7)
    update     clip, AdamW; then the running advantage learns the step's rewards

What it is not: there is no importance ratio, no KL term, no replay of old rollouts and no separate
inference engine, and only LoRA adapters are trained. `Trainer` is the loop and the state of a run.
`EGRSD` is the method, an object that the loop asks. Another object may take its place (family/).
"""

import json
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from support import settings
from support.errors import InputError, LocalError, parse_early

if __name__ == "__main__":
    parse_early("train.py", lambda: settings.parse(sys.argv[1:], __doc__)[0].check())

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
from support.sampling import (
    Rollout,
    check_prompts,
    check_thinking,
    grade_rollouts,
    progress,
    sample,
    student_prompt,
    teacher_prompt,
)
from support.settings import Sampling, Settings
from teacher import Reading

# rows decoded together in evaluation, unless --slots or the free memory says otherwise
EVALUATION_SLOTS = 128


class Student(nn.Module):
    """teacher.read as the forward of a module, because DistributedDataParallel hooks in there."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, prompts, completions, temperature, hidden):
        return teacher.read(
            self.model, prompts, completions, temperature=temperature, hidden=hidden
        )


@dataclass
class Batch:
    """A micro-batch of the step: B completions of up to T tokens, read twice."""

    examples: list[Rollout]
    by_student: Reading  # logp carries the gradient
    by_teacher: Reading
    advantage: Tensor  # [B]
    max_entropy: float  # the largest H of the whole step, over all ranks
    num_tokens: float  # of the rollouts of the whole step, over all ranks


class EGRSD:
    """The method as an object: what `Trainer`, called `t` here, asks in its step.

    Another object with these attributes and functions is another method in the same loop.
    """

    needs_solution = True  # every training problem must have a solution
    has_rollouts = True  # every step writes samples.jsonl
    keeps_states = False  # both readings keep hidden states, for losses of whole distributions

    def __init__(self):
        self.baseline = egrsd.RunningAdvantage()
        self.tensors = {}  # these two become part of every checkpoint
        self.numbers = {}

    def begin(self, t: "Trainer") -> None:
        """Once, before the first step: InputError if a prompt is too long for the model."""

        def prompts(problem):
            return [t.student_prompt(problem), t.teacher_prompt(problem, problem.solution)]

        check_prompts(
            t.model, t.tokenizer, t.files["--data"], t.problems, t.s.max_new_tokens, prompts
        )

    def examples(
        self, t: "Trainer", problems: list[Problem]
    ) -> tuple[list[Rollout], list[Rollout]]:
        """The step's rollouts, and other examples to learn from: EGRSD has none."""
        return t.make_rollouts(problems), []

    def teacher_prompts(self, t: "Trainer", examples: list[Rollout]) -> list[list[int]]:
        """What the teacher is shown: the problem and the reference solution."""
        return [t.teacher_prompt(one.problem, one.problem.solution) for one in examples]

    def read_as_teacher(self, t: "Trainer", examples: list[Rollout]) -> Reading:
        """log p_T and H (4) of every example: the adapter is off, the solution in the prompt."""
        with lora.disabled(t.model):
            return t.read(self.teacher_prompts(t, examples), examples)

    def loss(self, t: "Trainer", batch: Batch) -> Tensor:
        """The micro-batch's share of the step's loss, a scalar."""
        readings, how = self.inputs(t, batch)
        # A-hat = A * w * omega [B, T], from (2), (5), (6) and (8)
        token_advantages = egrsd.token_advantages(*readings, **how)
        own = batch.by_student
        return egrsd.policy_loss(own.logp, token_advantages, own.mask, batch.num_tokens)  # (7)

    def signals(self, t: "Trainer", batch: Batch) -> egrsd.Signals:
        """What the loss is made of, for the log."""
        readings, how = self.inputs(t, batch)
        return egrsd.token_signals(*readings, **how)

    def inputs(self, t: "Trainer", batch: Batch) -> tuple[tuple, dict]:
        """The arguments of egrsd.token_advantages."""
        s = t.s
        own = batch.by_student
        theirs = batch.by_teacher
        how = {"gamma": s.gamma, "window": s.window, "eps": s.eps, "floor": s.floor}
        readings = (batch.advantage, theirs.logp, own.logp, theirs.entropy, own.mask)
        return readings, how | {"max_entropy": batch.max_entropy}

    def token_metrics(self, t: "Trainer", batch: Batch) -> dict[str, Tensor]:
        """Tensors [B, T] for the log; metrics.jsonl has their means. The loss computes its own.

        sampling_gap  |log-prob under the distribution drawn from - log p_S|
        entropy       H of the teacher, nats                      delta    log p_T - log p_S
        student_entropy  the same of the student
        gate          omega        magnitude  w                   clipped  1 if w is at a bound, else 0
        """
        signals = self.signals(t, batch)
        logp = batch.by_student.logp.detach()
        drawn = [torch.tensor(one.logprobs, device=logp.device) for one in batch.examples]
        drawn = nn.utils.rnn.pad_sequence(drawn, batch_first=True)  # [B, T]
        has_magnitude = (batch.advantage.unsqueeze(-1) != 0) & (t.s.eps > 0)
        at_a_bound = (signals.magnitude - 1).abs() >= t.s.eps - 1e-6
        return {
            "sampling_gap": (drawn - logp).abs(),
            "student_entropy": batch.by_student.entropy,
            "entropy": batch.by_teacher.entropy,
            "delta": batch.by_teacher.logp - logp,
            "magnitude": signals.magnitude,
            "clipped": at_a_bound & has_magnitude,
            "gate": signals.gate,
        }

    def after_update(self, t: "Trainer") -> dict[str, float]:
        """What else changes with a step, such as the teacher's weights; more of its metrics."""
        return {}


class Trainer:
    """A run: its model, problems, optimizer, running advantage and steps done; and its step."""

    def __init__(self, s: Settings, ranks: Ranks, objective: EGRSD | None = None):
        """Load and check everything; nothing is written yet."""
        self.s = s
        self.ranks = ranks
        self.objective = objective or EGRSD()
        self.baseline = self.objective.baseline
        self.out = Path(s.out)
        self.step = 0  # steps done
        self.results = {}  # of the evaluations
        self.rows_per_problem = s.rollouts_per_prompt
        self.stop = run.StopRequest(ranks)
        self.log = run.StepLog(self)
        self.make_decoder = graphs.choose(s.cuda_graphs, ranks.device)
        self.load_data()
        self.load_model()
        self.student = Student(self.model)
        if ranks.distributed:
            self.student = DistributedDataParallel(self.student, forward_sync_buffers=False)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=s.lr, betas=(0.9, 0.999), weight_decay=s.weight_decay
        )
        if self.held_out:
            check_prompts(
                self.model,
                self.tokenizer,
                self.files["--eval-data"],
                self.held_out,
                s.eval_max_new_tokens or s.max_new_tokens,
                lambda problem: [self.student_prompt(problem)],
            )
        self.objective.begin(self)

    def load_data(self):
        """Training and held-out problems, and the files that they stand in."""
        s = self.s
        load = partial(self.ranks.together, load_problems)
        data = toy.resolve(s.data, "train.jsonl")
        self.problems, self.left_out = load(data, self.objective.needs_solution, s.skip_ungradable)
        self.files = {"--data": data}
        self.held_out = []
        if s.eval_data:
            data = toy.resolve(s.eval_data, "test.jsonl")
            self.held_out, _ = load(data, False, s.skip_ungradable)
            self.files["--eval-data"] = data

    def load_model(self):
        """Model, tokenizer and the adapter that is trained."""
        s = self.s
        device = self.ranks.device
        name = self.ranks.once_per_node(lambda: toy.resolve(s.model, "model"))
        self.files["--model"] = name
        self.bf16 = s.bf16 if s.bf16 is not None else device.type == "cuda"
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=self.bf16)
        self.model, self.tokenizer = self.ranks.once_per_node(
            lambda: load_model(name, dtype, device)
        )
        check_thinking(self.tokenizer, s)
        self.student_prompt = partial(student_prompt, self.tokenizer, s=s)
        self.teacher_prompt = partial(teacher_prompt, self.tokenizer, s=s)
        torch.manual_seed(s.seed)
        # a line that says what the adapter covers
        self.adapter = add_adapter(self.model, s.lora_rank, s.lora_alpha, s.lora_targets)
        self.parameters = lora.lora_parameters(self.model)
        if s.gradient_checkpointing:
            try:
                self.model.activation_checkpointing_enable({"use_reentrant": False})
            except ValueError as error:
                raise InputError(f"{s.model}: {error} Say --no-gradient-checkpointing") from None

    # ---- one step

    def train_step(self) -> dict:
        """One optimizer step over all ranks; returns its metrics. Nothing has changed if it raises
        Stop."""
        ranks = self.ranks
        log = self.log
        objective = self.objective
        log.begin_step()
        # N rollouts, sampled by the student, graded by the verifier; others: none in EGRSD
        rollouts, others = objective.examples(self, self.next_problems())
        rewards = torch.tensor([one.reward for one in rollouts])  # [N]
        advantages = self.baseline.advantage(rewards)  # (9), from the rewards of earlier steps only
        for one, advantage in zip(rollouts, advantages.tolist(), strict=True):
            one.advantage = advantage
        examples = rollouts + others

        log.begin("teacher")
        by_teacher = objective.read_as_teacher(self, examples)  # log p_T and H [N, T], (4)
        # over all micro-batches and ranks: the largest H for (5), the number of tokens for (7)
        max_entropy = ranks.max(by_teacher.entropy.max().item())
        tokens = [len(one.token_ids) for one in examples]  # those of the rollouts come first
        num_tokens, all_tokens = ranks.sum([sum(tokens[: len(rollouts)]), sum(tokens)])

        log.begin("student")
        teacher.reading_mode(self.model)
        lengths = [len(one.prompt) + len(one.token_ids) for one in examples]
        prompts = [one.prompt for one in examples]
        batches = teacher.micro_batches(lengths, self.most_tokens(prompts))
        for indices in batches:
            if ranks.distributed:  # only the last backward averages the gradients of the ranks
                self.student.require_backward_grad_sync = indices is batches[-1]
            batch = self.read_as_student(indices, examples, by_teacher, max_entropy, num_tokens)
            loss = objective.loss(self, batch)
            # DDP averages gradients. We want their sum, so multiply by the number of ranks.
            (loss * ranks.world).backward()
            log.add(loss, objective.token_metrics(self, batch), batch)

        log.begin("update")
        norm, lr = self.update()
        self.baseline.update(ranks.gather(rewards).flatten())  # (9), for the steps to come
        more = objective.after_update(self)
        figures = {
            "grad_norm": norm,
            "lr": lr,
            "max_entropy": max_entropy,
            "tokens": int(all_tokens),
        }
        return log.finish_step(self.step, rollouts, num_tokens, **figures) | more

    def update(self) -> tuple[float, float]:
        """Clip the gradient, one step of AdamW. Returns the norm before clipping, and the learning
        rate. InputError if the gradient, the same on all ranks, is not finite."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.s.max_grad_norm).item()
        if not np.isfinite(norm):
            raise InputError(self.not_finite(f"the gradient's norm {norm}"))
        lr = self.s.lr * min(1.0, (self.step + 1) / max(1, self.s.lr_warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return norm, lr

    def make_rollouts(self, problems: list[Problem]) -> list[Rollout]:
        """The student's completions of these problems, with their rewards."""
        s = self.s
        log = self.log
        log.begin("rollout")
        sampling = Sampling(
            s.rollouts_per_prompt,
            s.max_new_tokens,
            s.temperature,
            s.top_p,
            s.top_k,
            s.slots or None,
            s.thinking,
            s.date,
        )
        first_row = self.ranks.rank * len(problems) * s.rollouts_per_prompt
        show = progress(log.bar, log.status, counts=False, check=self.stop.interrupt)
        rollouts = self.sample(problems, sampling, self.step, first_row, show)
        log.begin("grade")
        for one in grade_rollouts(self.tokenizer, rollouts):
            length = len(one.token_ids)
            one.reward = reward.shaped_reward(one.correct, length, s.max_new_tokens, s.beta_length)
        return rollouts

    def read(
        self, prompts: list[list[int]], examples: list[Rollout], hidden: bool = False
    ) -> Reading:
        """log p and H of every example after its prompt, without gradients."""
        self.model.eval()
        with self.autocast():
            return teacher.read_in_batches(
                self.model,
                prompts,
                [one.token_ids for one in examples],
                self.most_tokens(prompts),
                temperature=self.s.score_temperature,
                hidden=hidden,
            )

    def read_as_student(self, indices, examples, by_teacher, max_entropy, num_tokens):
        """log p_theta of some examples, beside what the teacher said of them."""
        some = [examples[i] for i in indices]
        with self.autocast():
            by_student = self.student(
                [one.prompt for one in some],
                [one.token_ids for one in some],
                self.s.score_temperature,
                self.objective.keeps_states,
            )
        by_teacher = by_teacher.select(indices, by_student.mask.shape[1])
        advantage = torch.tensor([one.advantage for one in some], device=self.ranks.device)
        return Batch(some, by_student, by_teacher, advantage, max_entropy, num_tokens)

    def not_finite(self, what):
        last = checkpoint.latest(self.out / "checkpoints") or "none yet"
        return (
            f"step {self.step + 1}: {what} is not finite, so the step was not applied: lower "
            f"--lr; the last good checkpoint is {last}"
        )

    def state(self):
        """(tensors, numbers) of a checkpoint, besides adapter, optimizer and random state."""
        own = {"step": self.step, "running_advantage": self.baseline.state_dict()}
        return self.objective.tensors, own | self.objective.numbers

    def load_state(self, tensors, numbers):
        """Put back what `state` gave."""
        self.step = numbers["step"]
        self.baseline.load_state_dict(numbers["running_advantage"])
        for name, own in self.objective.tensors.items():
            for tensor, saved in zip(own, tensors[name], strict=True):
                tensor.copy_(saved)
        for name in self.objective.numbers:
            self.objective.numbers[name] = numbers[name]

    def next_problems(self):
        """This rank's problems of the step: the data in a new random order every epoch, dealt out
        without gaps."""
        n = len(self.problems)
        first = self.step * self.s.prompts_per_step
        orders = {}
        found = []
        for i in self.ranks.share(self.s.prompts_per_step):
            epoch, place = divmod(first + i, n)
            if epoch not in orders:
                orders[epoch] = np.random.default_rng((self.s.seed, epoch)).permutation(n)
            found.append(self.problems[orders[epoch][place]])
        return found

    def sample(self, problems, sampling, seed, first_row, show):
        """Rollouts of this rank's problems. The rollouts of all ranks are numbered, and the first one
        here has the number `first_row`. `seed`, mostly the step, is combined with --seed."""
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

    def until_stopped(self, draw, *arguments, **more):
        """Call draw(*arguments, **more), which samples. If any rank got a signal, raise Stop on all."""
        found = []
        try:
            with suppress(run.Interrupted), self.autocast():
                found = draw(*arguments, **more)
        except FloatingPointError as error:
            raise LocalError(self.not_finite(f"a log-prob ({error})")) from None
        self.stop.obey()
        return found

    def most_tokens(self, prompts):
        """The most tokens in a forward pass: --micro-batch x (longest prompt + --max-new-tokens)."""
        return self.s.micro_batch * (max(map(len, prompts)) + self.s.max_new_tokens)

    def evaluate(self, name: str) -> None:
        """Accuracy and length on the held-out problems, into evaluation.json. Every rank takes its
        share of the problems."""
        s = self.s
        self.log.phase = "evaluation"
        sampling = Sampling(
            s.eval_samples,
            s.eval_max_new_tokens or s.max_new_tokens,
            s.eval_temperature,
            s.eval_top_p,
            0,
            s.slots or EVALUATION_SLOTS,
            s.thinking,
            s.date,
        )
        sampling.slots, _ = slots_that_fit(self.model, self.tokenizer, self.held_out, sampling)

        def solve(problems, first_row, graded, keep, bar):
            show = progress(bar, check=self.stop.interrupt)
            rollouts = self.sample(problems, sampling, evaluation.SEED, first_row, show)
            for number, one in enumerate(grade_rollouts(self.tokenizer, rollouts)):
                keep(number, one)

        records = evaluation.evaluate(self.held_out, s.eval_samples, solve, self.ranks, name)
        found = evaluation.summarise(records, s.eval_samples)
        if self.ranks.rank == 0:
            lines = [json.dumps(record) + "\n" for record in records]
            checkpoint.write_text(self.out / f"held_out_{name}.jsonl", "".join(lines))
        self.results[name] = {
            "step": self.step,
            "accuracy": found["avg"],
            "length": found["length"],
            "efficiency": found["eff"],
            "truncated": found["truncated"],
            "no_answer": found["no_answer"],
            "completions": len(records),
        }
        if self.ranks.rank == 0:
            checkpoint.write_json(self.out / "evaluation.json", self.results)

    def save(self) -> Path:
        """Write a checkpoint of the steps done; every rank calls it."""
        path = self.out / "checkpoints" / f"step-{self.step:06d}"
        checkpoint.save(path, self.model, self.optimizer, self.ranks, *self.state())
        return path


def train(s: Settings, resume: bool, objective: EGRSD | None = None) -> None:
    """The whole run; every rank calls it. Evaluate, train, evaluate; then rank 0 exports."""
    ranks = Ranks()
    s.check()
    s.date = s.date or ranks.today()  # a resumed run has the date of its start
    with run.hold(s.out, ranks, None if resume else settings.REMEDY):
        with run.name_lack_of_memory(
            lambda: "while loading: lower --lora-rank, or take a smaller --model"
        ):
            t = Trainer(s, ranks, objective)
        if resume:
            run.check_inputs(t)
            checkpoint.load_latest(t.out / "checkpoints", t.model, t.optimizer, ranks, t.load_state)
            if run.is_done(t):
                return
        ranks.on_first(partial(run.check_disk, t))
        if ranks.rank == 0:
            run.write_config(t)
            checkpoint.drop_later_steps(t.out / "metrics.jsonl", t.step)
            if t.objective.has_rollouts:
                checkpoint.drop_later_steps(t.out / "samples.jsonl", t.step)
        with t.stop.checkpointed(t), run.name_lack_of_memory(t.log.advice):
            evaluate_and_train(t)
        if ranks.rank == 0:
            run.export(t)
        ranks.barrier()  # nobody leaves while rank 0 still writes


def evaluate_and_train(t: Trainer) -> None:
    """The steps that are left, between the two evaluations; a checkpoint after the last one."""
    s = t.s
    is_first = t.ranks.rank == 0
    watch = run.Watch(t.parameters)
    path = t.out / "evaluation.json"
    if path.exists():  # from an earlier start of the run
        t.results = json.loads(path.read_text())
    if t.held_out and s.eval_before and "before" not in t.results:
        with lora.disabled(t.model):
            t.evaluate("before")
    with tqdm(
        total=s.steps, initial=t.step, disable=not is_first, unit=" steps", desc="train"
    ) as t.log.bar:
        while t.step < s.steps:
            metrics = t.train_step()
            if is_first:
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
