"""A run as its user meets it: the directory and its lock, signals, errors in one line, the log of a
step, export."""

import json
import logging
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from torch import Tensor

import lora
import teacher
from support import checkpoint, distributed, report
from support.data import digest, model_digest
from support.distributed import Ranks
from support.errors import DAMAGED, InputError, LocalError, one_line, reason
from support.sampling import Rollout
from support.settings import FORMAT, in_use

SAMPLES_PER_STEP = 4  # rollouts of rank 0 that go into samples.jsonl at each step
PATIENCE = 5  # steps without learning, before a warning


class Interrupted(Exception):
    """This rank got a signal while sampling."""


class Stop(Exception):
    """One rank got a signal, all know it, and stop at the same place."""


def say(text: str) -> None:
    """Print; a run goes on if nobody reads it any more, as in `train.py | head`, or if the disk
    behind it is full."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UnicodeError:
        print(ascii(text), flush=True)


@contextmanager
def hold(out: str | Path, ranks: Ranks, remedy: str | None = "choose another --out"):
    """Make the directory, and keep other processes out of it until this one ends; an empty one is
    removed again.

    InputError if it cannot be made, another process is in it, or, unless `remedy` is None, it is in
    use: not empty, but for what a killed start leaves.
    """
    path, problems, made = Path(out), [], []
    with ExitStack() as stack:
        if ranks.rank == 0:
            try:
                made = [place for place in (path, *path.parents) if not place.exists()]
                path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(checkpoint.locked(path / "lock"))
                if remedy and in_use(path):
                    problems = [f"{out}: output directory in use: {remedy}"]
            except BlockingIOError:
                problems = [
                    f"{out}: output directory in use by a process that is still running: "
                    "choose another --out"
                ]
            except FileExistsError:
                problems = [f"{out}: is a file, a directory is needed: choose another --out"]
            except (OSError, ValueError) as error:  # ValueError: a NUL in the name
                problems = [
                    f"{out}: cannot be made or written ({reason(error)}): choose another --out"
                ]
        try:
            for problem in ranks.gather_lists(problems):
                raise InputError(problem)
            yield
        finally:
            stack.close()
            for place in made:
                with suppress(OSError, ValueError):  # it is not empty, or was never made
                    place.rmdir()


class StopRequest:
    """Ctrl-C, SIGTERM or SIGHUP: noted when it comes, obeyed where all ranks agree to."""

    def __init__(self, ranks: Ranks):
        self.ranks, self.number = ranks, None

    def interrupt(self) -> None:
        """End the sampling on this rank, if a signal came."""
        if self.number is not None:
            raise Interrupted

    def obey(self) -> None:
        """Raise Stop on every rank if any of them got a signal; all ranks call it."""
        if self.ranks.max(self.number is not None):
            raise Stop

    @contextmanager
    def checkpointed(self, trainer):
        """Note signals from here on. If Stop comes out of the block: checkpoint, say how to go on,
        end the process. However the block ends, a report of the run is left."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it for SIGHUP
                signal.signal(number, lambda received, _: setattr(self, "number", received))
        try:
            yield
        except Stop:
            path = trainer.save()
            if self.ranks.rank == 0:
                print(
                    f"stopped after step {trainer.step}, {path} is complete: go on with "
                    f"--out {trainer.out} --resume",
                    file=sys.stderr,
                )
            raise SystemExit(128 + (self.number or signal.SIGTERM)) from None
        finally:
            if self.ranks.rank == 0:
                report.attempt(trainer.out)


@contextmanager
def one_line_errors(program: str, interrupted: str):
    """Around a whole command: InputError, failed reading or writing, and Ctrl-C end it with one
    line; the process group is left in any case."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # it tells of every try without a network
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        with one_line(program):
            yield
    except OSError as error:
        print(
            f"{program}: {error.filename or 'a file'}: cannot be read or written "
            f"({reason(error)}): free space or correct the path; what was complete before is "
            "untouched",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    except FloatingPointError as error:
        print(
            f"{program}: {error}, as the model's logits are not finite: check its weights",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        print(
            f"{program}: rank {os.environ.get('RANK')} lost another process, whose message "
            "says why",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(f"\n{program}: {interrupted}", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        distributed.close()


@contextmanager
def name_lack_of_memory(advice: Callable[[], str]):
    """LocalError in one line for what torch raises on the GPU and, as a RuntimeError of its own, on
    the CPU."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(
            error
        ):
            raise LocalError(f"no free memory {advice()}") from None
        raise


class Watch:
    """Finds, once each, what keeps a run from learning, when it was so for PATIENCE steps in a
    row."""

    def __init__(self, parameters: list[Tensor]):
        self.parameters, self.seen, self.said = parameters, Counter(), set()
        self.before = self.sums()

    def sums(self) -> Tensor:
        """One number for each parameter: a copy of all would take memory on the GPU."""
        return torch.stack([p.detach().sum(dtype=torch.double) for p in self.parameters])

    def warnings(self, metrics: dict) -> list[str]:
        """metrics: those of a step, after which the parameters are what they are now."""
        truncated, no_answer, spread = (
            metrics.get(name) for name in ("truncated", "no_answer", "reward_range")
        )
        before, self.before = self.before, self.sums()
        unmoved = torch.equal(before, self.before)
        signs = [
            (
                truncated == 1,
                "no completion finished: look at --max-new-tokens, and at samples.jsonl",
            ),
            (
                no_answer == 1,
                "no completion had a boxed answer: look at first_prompts in config.json",
            ),
            (
                spread == 0,
                "all rewards of a step were equal: are the problems too hard or too easy?",
            ),
            (
                unmoved,
                "the adapter's weights did not move: look at --lr, and at grad_norm in "
                "metrics.jsonl",
            ),
        ]
        self.seen = Counter({sign: self.seen[sign] + 1 for is_so, sign in signs if is_so})
        found = [
            sign for sign, steps in self.seen.items() if steps >= PATIENCE and sign not in self.said
        ]
        self.said.update(found)
        return [f"warning: for {PATIENCE} steps {sign}" for sign in found]


class StepLog:
    """What is reported of the training steps. `phase` is what is going on; its seconds are counted
    until the next."""

    def __init__(self, trainer):
        self.trainer, self.ranks, self.bar = trainer, trainer.ranks, None
        # status: of the last step, shown while the next one samples
        self.phase, self.status = "", ""
        self.begin_step()

    def begin_step(self) -> None:
        self.seconds, self.loss, self.token_sums, self.read = Counter(), 0.0, Counter(), {}
        self.began = self.phase_began = time.perf_counter()

    def begin(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[self.phase] += now - self.phase_began
        self.phase, self.phase_began = phase, now

    def advice(self) -> str:  # for `name_lack_of_memory`
        flag = "--slots" if self.phase in ("rollout", "ask", "evaluation") else "--micro-batch"
        return f"in the {self.phase or 'first'} phase: lower {flag} or --max-new-tokens"

    def add(self, loss: Tensor, values: dict[str, Tensor], batch) -> None:
        """A micro-batch: its loss, and values per token [B, T], to be averaged over the tokens of
        rollouts."""
        self.loss += loss.item()
        for name, value in values.items():
            self.token_sums[name] += (value * batch.by_student.mask).sum().double().item()
        shown = {"logp": batch.by_student.logp.detach()} | values
        self.read |= {id(row): (batch, shown, i) for i, row in enumerate(batch.examples)}

    def by_token(self, step: int, row: Rollout) -> dict:
        """Text and values of a rollout's tokens, in the steps that a report may show."""
        s = self.trainer.s
        if step not in (1, (s.steps + 1) // 2, s.steps) and step % s.checkpoint_every:
            return {}
        batch, values, i = self.read[id(row)]
        left_out = {"sampling_gap", "clipped"}
        if not batch.by_teacher.mask[i].any():  # the teacher had nothing to say of these tokens
            left_out |= {"entropy", "delta"}
        text = [self.trainer.tokenizer.decode([token]) for token in row.token_ids]
        rounded = {
            name: [round(x, 4) for x in value[i, : len(text)].tolist()]
            for name, value in values.items()
            if name not in left_out
        }
        return {"by_token": {"text": text} | rounded}

    def finish_step(self, step: int, rollouts: list[Rollout], num_tokens: float, **metrics) -> dict:
        """The line of metrics.jsonl, means over all ranks; also writes the samples and sets the
        status."""
        self.begin("")
        sums = {
            "reward": sum(r.reward for r in rollouts),
            "accuracy": sum(r.correct for r in rollouts),
            "advantage": sum(r.advantage for r in rollouts),
            "truncated": sum(not r.finished for r in rollouts),
            "no_answer": sum(r.answer is None for r in rollouts),
            "length": sum(len(r.token_ids) for r in rollouts),
        }
        loss, count, *totals = self.ranks.sum(
            [self.loss, len(rollouts), *sums.values(), *self.token_sums.values()]
        )
        counts = [count] * len(sums) + [num_tokens] * len(self.token_sums)
        means = {
            name: total / size
            for name, total, size in zip([*sums, *self.token_sums], totals, counts, strict=True)
            if size
        }
        rewards = self.ranks.gather_lists([row.reward for row in rollouts])
        if len(rewards) > 1:
            means["reward_range"] = max(rewards) - min(rewards)
        self.status = "".join(
            f"{name} {means[name]:.{digits}f}, "
            for name, digits in (("reward", 2), ("accuracy", 2), ("length", 0))
            if name in means
        )
        if self.bar is not None and rollouts:
            self.bar.set_postfix_str(
                f"{self.status}{num_tokens / self.seconds['rollout']:.0f} tokens/s", refresh=False
            )
        if self.ranks.rank == 0:
            checkpoint.append_jsonl(
                self.trainer.out / "samples.jsonl",
                [
                    {"step": step}
                    | row.as_json()
                    | {"reward": row.reward, "advantage": row.advantage}
                    | self.by_token(step, row)
                    for row in rollouts[:SAMPLES_PER_STEP]
                ],
            )
        seconds = {f"{phase}_s": self.seconds[phase] for phase in ("rollout", "teacher", "student")}
        return {
            "step": step,
            "loss": loss,
            **metrics,
            **means,
            **seconds,
            "step_s": time.perf_counter() - self.began,
            "memory_gib": self.ranks.max(peak_memory_gib()),
        }


def peak_memory_gib() -> float:
    """The most memory this process has used so far: on the GPU, or without one on the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def fingerprint(files: dict[str, str]) -> dict[str, str]:
    """By flag, what changes with the content of the files that it names."""
    return {
        flag: model_digest(name) if flag == "--model" else digest(Path(name))
        for flag, name in files.items()
    }


def check_inputs(trainer) -> None:
    """InputError if the data or the model of a resumed run are not those it began with; rank 0
    looks, all raise."""
    files, problems = trainer.files, []
    if trainer.ranks.rank == 0:
        config = json.loads((trainer.out / "config.json").read_text())
        written = config["fingerprint"]
        began = config["derived"]["bf16"]  # without a flag the device decides
        if began != trainer.bf16:
            problems = [
                f"{trainer.out}: the run began {'with' if began else 'without'} bfloat16, here it would "
                f"go on {'with' if trainer.bf16 else 'without'}: resume it on the kind of device "
                "that it began on"
            ]
        problems += [
            f"{files[flag]}: not what {flag} named when the run began: put that back, or start a "
            "new run with another --out"
            for flag, found in fingerprint(files).items()
            if found != written.get(flag)
        ]
    for problem in trainer.ranks.gather_lists(problems):
        raise InputError(problem)


def write_config(trainer) -> None:
    """config.json: the settings in use and what follows from them. Also say what is trained, and on
    what."""
    s, world, first = trainer.s, trainer.ranks.world, trainer.problems[0]
    completions = s.prompts_per_step * trainer.rows_per_problem
    derived = {
        "device": str(trainer.ranks.device),
        "threads": torch.get_num_threads(),
        "bf16": trainer.bf16,
        "problems": len(trainer.problems),
        "left_out": trainer.left_out,
        "held_out_problems": len(trainer.held_out),
        "completions_per_step": completions,
        "micro_batches_at_full_length": -(-completions // world // s.micro_batch),
        "most_tokens_per_step": completions * s.max_new_tokens,
        "base_parameters": sum(
            p.numel() for p in trainer.model.parameters() if not p.requires_grad
        ),
        "trained_parameters": sum(p.numel() for p in trainer.parameters),
    }
    versions = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    student = trainer.student_prompt(first)
    prompts = {
        "student": student,
        "teacher": trainer.objective.teacher_prompts(
            trainer, [Rollout([], [], False, first, student)]
        )[0],
    }
    checkpoint.write_json(
        trainer.out / "config.json",
        {
            "format": FORMAT,
            "entry": s.ENTRY,
            "settings": asdict(s),
            "world_size": world,
            "derived": derived,
            "versions": versions,
            "fingerprint": fingerprint(trainer.files),
            "adapter": trainer.adapter,
            "thinking": thinking_line(trainer.tokenizer, s.thinking),
            "first_prompts": {
                reader: trainer.tokenizer.decode(ids) for reader, ids in prompts.items()
            },
        },
    )
    left_out = f" ({trainer.left_out} left out)" if trainer.left_out else ""
    say(
        f"{s.method} trains an adapter of {derived['trained_parameters']:,} weights for "
        f"{s.model} on {len(trainer.problems):,} problems{left_out}: {s.steps} steps of "
        f"{completions} completions (device: {derived['device']}, processes: {world})\nall "
        f"settings: {trainer.out / 'config.json'}; --help has a sentence for each"
    )


def thinking_line(tokenizer, thinking: bool) -> str:
    """What --thinking does with this chat template, and how prompts end."""
    flags, messages = ["--no-thinking", "--thinking"], teacher.student_messages("1?")
    prompts = [teacher.encode(tokenizer, messages, on, tokenize=False) for on in (False, True)]
    ends = [prompt.rpartition(teacher.INSTRUCTION)[2] for prompt in prompts]
    effect = (
        f"with {flags[not thinking]} they end the same, but the text before differs"
        if ends[0] == ends[1]
        else f"with {flags[not thinking]} in {ends[not thinking]!r}"
    )
    if prompts[0] == prompts[1]:
        has_effort = "reasoning_effort" in str(tokenizer.chat_template)
        effect = "--thinking changes nothing: this chat template has no switch of that name" + (
            ", but reasoning_effort, which is left at its default" if has_effort else ""
        )
    return f"{flags[thinking]}: prompts end in {ends[thinking]!r}; {effect}"


def read_results(path: Path) -> dict:
    """evaluation.json, if an earlier start of the run wrote one."""
    try:
        results = json.loads(path.read_text()) if path.exists() else {}
        sum(
            result[name]
            for result in results.values()
            for name in ("accuracy", "length", "efficiency")
        )
        return results
    except DAMAGED as error:
        raise InputError(
            f"{path}: damaged ({reason(error)}): remove it, the evaluation is made again"
        ) from None


def is_done(trainer) -> bool:
    """Whether nothing is left to do for a resumed run, which rank 0 says."""
    exported = json.loads((trainer.out / "config.json").read_text()).get("exported")
    done = exported == trainer.step >= trainer.s.steps and (trainer.out / "model").is_dir()
    if done and trainer.ranks.rank == 0:
        say(
            f"{trainer.out}: all {trainer.step} steps are done, there is nothing to do: name "
            "more of them with --steps"
        )
    return done


def export(trainer, began: float) -> None:
    """Write model/, an ordinary checkpoint with the adapter merged in; say what came of the run,
    which `began` at this reading of time.perf_counter, and where to look."""
    out, lines = trainer.out, []
    try:
        lora.merge(trainer.model)
    except ValueError as error:
        raise InputError(
            f"the trained adapter cannot be exported ({error}): start again with a lower --lr"
        ) from None
    with checkpoint.atomic_directory(out / "model") as work:
        trainer.model.save_pretrained(work)
        trainer.tokenizer.save_pretrained(work)
    checkpoint.write_json(
        out / "config.json",
        json.loads((out / "config.json").read_text()) | {"exported": trainer.step},
    )
    if trainer.results:
        lines.append(
            f"\n{'held-out':10}{'accuracy':>10}{'mean length':>13}{'accuracy (%) per 1,000 tokens':>31}"
        )
    for name, r in trainer.results.items():
        lines.append(f"{name:10}{r['accuracy']:10.3f}{r['length']:13.1f}{r['efficiency']:31.0f}")
    minutes, seconds = divmod(round(time.perf_counter() - began), 60)
    lines += [f"\ntotal time {minutes} min {seconds} s; the trained model is {out / 'model'}"]
    if (out / "report.html").exists():
        lines += [f"open {out / 'report.html'}"]
    say("\n".join(lines))
