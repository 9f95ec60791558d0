"""A run as its user meets it: the directory and its lock, signals, errors in one line, the log of a step, export."""

import fcntl
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from torch import Tensor

import lora
from support import checkpoint, distributed
from support.data import InputError
from support.distributed import Ranks
from support.sampling import Rollout

SAMPLES_PER_STEP = 4  # rollouts of rank 0 that go into samples.jsonl at each step


class Interrupted(Exception):
    """This rank got Ctrl-C or SIGTERM while sampling."""


class Stop(Exception):
    """One rank got Ctrl-C or SIGTERM, all know it, and stop at the same place."""


class OutOfMemory(InputError):
    """One rank ran out of memory; the others may not have."""


def check_out(out: str | Path, remedy: str = "choose another --out") -> None:
    """InputError if `out` is a file or a directory that is not empty."""
    if Path(out).is_file():
        raise InputError(f"{out}: is a file, a directory is needed: choose another --out")
    if Path(out).exists() and any(Path(out).iterdir()):
        raise InputError(f"{out}: output directory in use: {remedy}")


@contextmanager
def hold(out: Path, ranks: Ranks):
    """Make the directory, and hold it on rank 0 against other processes until this one ends, however it ends."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("a") as lock:
        in_use = False
        try:
            if ranks.rank == 0:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            in_use = True
        if ranks.max(in_use):
            raise InputError(f"{out}: output directory in use by a process that is still running: choose another --out")
        yield


class StopRequest:
    """Ctrl-C or SIGTERM: noted when it comes, obeyed where all ranks agree to."""

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
        """Note signals from here on. If Stop comes out of the block: checkpoint, say how to go on, end the process."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda received, _: setattr(self, "number", received))
        try:
            yield
        except Stop:
            path = trainer.save()
            if self.ranks.rank == 0:
                print(f"stopped after step {trainer.step}, {path} is complete: go on with --out {trainer.out} --resume",
                      file=sys.stderr)
            raise SystemExit(128 + (self.number or signal.SIGTERM)) from None


@contextmanager
def one_line_errors(program: str, interrupted: str):
    """Around a whole command: InputError and Ctrl-C end it with one line; the process group is left in any case."""
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    except InputError as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, OutOfMemory):  # else every rank says the same
            print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(f"\n{program}: {interrupted}", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        distributed.close()


@contextmanager
def name_lack_of_memory(advice: Callable[[], str]):
    """OutOfMemory in one line for what torch raises on the GPU and, as a RuntimeError of its own, on the CPU."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
            raise OutOfMemory(f"no free memory {advice()} or --max-new-tokens") from None
        raise


class StepLog:
    """What is reported of the training steps. `phase` is what is going on; its seconds are counted until the next."""

    def __init__(self, directory: Path, ranks: Ranks):
        self.directory, self.ranks, self.bar = directory, ranks, None
        self.phase, self.status = "", ""  # status: of the last step, shown while the next one samples
        self.begin_step()

    def begin_step(self) -> None:
        self.seconds, self.loss, self.token_sums = Counter(), 0.0, Counter()
        self.began = self.phase_began = time.perf_counter()

    def begin(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[self.phase] += now - self.phase_began
        self.phase, self.phase_began = phase, now

    def advice(self) -> str:  # for `name_lack_of_memory`
        flag = "--slots" if self.phase in ("rollout", "evaluation") else "--micro-batch"
        return f"in the {self.phase} phase: lower {flag}"

    def add(self, loss: Tensor, values: dict[str, Tensor], rows: list[Rollout], mask: Tensor) -> None:
        """A micro-batch: its loss, and values per token [B, T], to be averaged over the tokens of rollouts."""
        self.loss += loss.item()
        counted = mask & torch.tensor([[not row.is_reference] for row in rows], device=mask.device)
        for name, value in values.items():
            self.token_sums[name] += (value * counted).sum().double().item()

    def finish_step(self, step: int, rollouts: list[Rollout], num_tokens: float, **metrics) -> dict:
        """The line of metrics.jsonl, means over all ranks; also writes the samples and sets the status."""
        self.begin("")
        sums = {"reward": sum(r.reward for r in rollouts), "accuracy": sum(r.correct for r in rollouts),
                "advantage": sum(r.advantage for r in rollouts), "truncated": sum(not r.finished for r in rollouts),
                "no_answer": sum(r.answer is None for r in rollouts), "length": sum(len(r.token_ids) for r in rollouts)}
        loss, count, *totals = self.ranks.sum([self.loss, len(rollouts), *sums.values(), *self.token_sums.values()])
        counts = [count] * len(sums) + [num_tokens] * len(self.token_sums)
        means = {name: total / size for name, total, size in zip([*sums, *self.token_sums], totals, counts, strict=True)
                 if size}
        self.status = "".join(f"{name} {means[name]:.{digits}f}, " for name, digits in
                              (("reward", 2), ("accuracy", 2), ("length", 0)) if name in means)
        if self.ranks.rank == 0:
            checkpoint.append_jsonl(self.directory / "samples.jsonl", [
                {"step": step} | row.as_json() | {"reward": row.reward, "advantage": row.advantage}
                for row in rollouts[:SAMPLES_PER_STEP]])
        seconds = {f"{phase}_s": self.seconds[phase] for phase in ("rollout", "teacher", "student")}
        return {"step": step, "loss": loss, **metrics, **means, **seconds,
                "step_s": time.perf_counter() - self.began, "memory_gib": self.ranks.max(peak_memory_gib())}


def peak_memory_gib() -> float:
    """The most memory this process has used so far: on the GPU, or without one on the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def write_config(trainer) -> None:
    """config.json: the settings in use and what follows from them, which is also printed."""
    s, world = trainer.s, trainer.ranks.world
    completions = s.prompts_per_step * trainer.rows_per_problem
    derived = {"device": str(trainer.ranks.device), "threads": torch.get_num_threads(), "bf16": trainer.bf16,
               "problems": len(trainer.problems), "left_out": trainer.left_out,
               "held_out_problems": len(trainer.held_out), "completions_per_step": completions,
               "micro_batches_at_full_length": -(-completions // world // s.micro_batch),
               "most_tokens_per_step": completions * s.max_new_tokens,
               "base_parameters": sum(p.numel() for p in trainer.model.parameters() if not p.requires_grad),
               "trained_parameters": sum(p.numel() for p in trainer.parameters)}
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    checkpoint.write_json(trainer.out / "config.json", {
        "settings": asdict(s), "trainer": type(trainer).__name__, "world_size": world, "derived": derived,
        "versions": versions})
    shown = {"out": s.out, "world_size": world} | derived
    print("  ".join(f"{key}={value}" for key, value in shown.items()), flush=True)


def export(directory: Path, model, tokenizer, results: dict) -> None:
    """Write model/, an ordinary checkpoint with the adapter merged in; say what came of the run and where it lies."""
    lora.merge(model)
    with checkpoint.atomic_directory(directory / "model") as work:
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
    if results:
        print(f"\n{'held-out':10}{'accuracy':>10}{'mean length':>13}{'accuracy (%) per 1,000 tokens':>31}")
    for name, r in results.items():
        print(f"{name:10}{r['accuracy']:10.3f}{r['length']:13.1f}{r['efficiency']:31.0f}")
    print("", *(directory / name for name in ("model", "checkpoints", "metrics.jsonl", "samples.jsonl")), sep="\n")
