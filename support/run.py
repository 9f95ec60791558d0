"""A run as its user meets it: the directory and its lock, signals, errors in one line, the log of
the steps, the export."""

import json
import logging
import math
import resource
import shutil
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
import rollout
import teacher
from support import checkpoint, distributed, report
from support.data import digest, load_model, model_digest, stop_sources
from support.distributed import Ranks
from support.errors import InputError, LocalError, one_line, reason
from support.sampling import Rollout, teacher_thinks
from support.settings import FORMAT, in_use

SAMPLES_PER_STEP = 4  # rollouts of rank 0 that go into samples.jsonl at each step
PATIENCE = 5  # steps without learning, before a warning


class Interrupted(Exception):
    """This rank got a signal while sampling."""


class Stop(Exception):
    """A rank got a signal. All ranks know it, and stop at the same place."""


@contextmanager
def hold(out: str | Path, ranks: Ranks, remedy: str | None = "choose another --out"):
    """Make the directory `out` and lock it until the block ends. A new directory that is still empty
    then is removed.

    InputError if another process holds the lock. If there is a `remedy`, InputError also if the
    directory is not empty; files that a killed start left do not count.
    """

    def enter():
        path = Path(out)
        if not path.exists():
            stack.callback(remove_if_empty, path)
        path.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(checkpoint.locked(path / "lock"))
        except BlockingIOError:
            raise InputError(
                f"{out}: output directory in use by a process that is still running: choose "
                "another --out"
            ) from None
        if remedy and in_use(path):
            raise InputError(f"{out}: output directory in use: {remedy}")

    with ExitStack() as stack:
        ranks.on_first(enter)
        yield


def remove_if_empty(path):
    with suppress(OSError):
        path.rmdir()


class StopRequest:
    """Ctrl-C, SIGTERM or SIGHUP. The signal is only noted when it comes. All ranks stop together at
    the next call of `obey`."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.number = None  # of the signal that came

    def note(self, number, frame):
        self.number = number

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
        """Note signals from here on. If Stop comes out of the block: write a checkpoint, say how to
        go on, end the process. However the block ends, a report of the run is left."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self.note)
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
    """The net around a whole command. It ends with one line after a mistake of the user, after a file
    that cannot be read or written, after logits that are not finite, and after Ctrl-C. Anything else
    is a bug, and Python shows where."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # tells of every try to connect
    code = 1
    try:
        with one_line(program):
            yield
        return
    except OSError as error:
        line = f"{error.filename or 'a file'}: cannot be read or written ({reason(error)})"
    except FloatingPointError as error:
        line = f"{error}, as the model's logits are not finite: check its weights"
    except KeyboardInterrupt:
        line = interrupted
        code = 130
    finally:
        distributed.close()
    print(f"{program}: {line}", file=sys.stderr)
    raise SystemExit(code)


@contextmanager
def name_lack_of_memory(advice: Callable[[], str]):
    """If memory runs out inside, raise a LocalError with the advice. torch raises OutOfMemoryError on
    the GPU, and on the CPU a RuntimeError with "allocate memory" in its text."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if is_known or "allocate memory" in str(error):
            raise LocalError(f"no free memory {advice()}") from None
        raise


SIGNS = (  # of a run that does not learn: a metric, when it is one, what to say
    (
        "truncated",
        lambda x: x == 1,
        "no completion finished: look at --max-new-tokens, and at samples.jsonl",
    ),
    (
        "no_answer",
        lambda x: x == 1,
        "no completion had a boxed answer: look at first_prompts in config.json",
    ),
    (
        "reward_range",
        lambda x: x == 0,
        "all rewards of a step were equal: are the problems too hard or too easy?",
    ),
    (
        "moved",
        lambda x: not x,
        "the adapter's weights did not move: look at --lr, and at grad_norm in metrics.jsonl",
    ),
    (
        "repeated",
        lambda x: x > 0.5,
        "more than half of the 4-grams were repetitions: look at samples.jsonl; lower --lr",
    ),
    (
        "student_entropy",
        lambda x: x < 0.01,
        "the student's entropy was below 0.01 nats: completions hardly differ any more; lower --lr",
    ),
)
# Words of a completion, in lower case, that speak of the solution that only the teacher was shown.
MENTIONS = (
    "reference solution",
    "provided solution",
    "given solution",
    "solution above",
    "solution provided",
    "according to the solution",
    "as in the solution",
)


def repeated(token_ids: list[int]) -> float:
    """Share of a completion's 4-grams of tokens that it has had before.

    >>> repeated([1, 2, 1, 2, 1, 2, 1]), repeated([1, 2, 3])
    (0.5, 0.0)
    """
    grams = list(zip(*(token_ids[i:] for i in range(4)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def mentions_solution(text: str) -> bool:
    """Whether one of MENTIONS is in it.

    >>> mentions_solution("As the Reference Solution says"), mentions_solution("The solution is 3.")
    (True, False)
    """
    lower = text.lower()
    return any(words in lower for words in MENTIONS)


class Watch:
    """Tells of a sign that a run does not learn, when it was there for PATIENCE steps in a row."""

    def __init__(self, parameters: list[Tensor]):
        self.parameters = parameters
        self.steps = Counter()  # in a row, by metric
        self.before = self.sums()

    def sums(self):
        """One number for each parameter: a copy of all would take memory on the GPU."""
        return torch.stack([p.detach().sum(dtype=torch.double) for p in self.parameters])

    def warnings(self, metrics):
        """To be called after every step, with its metrics."""
        sums = self.sums()
        metrics = metrics | {"moved": not torch.equal(sums, self.before)}
        self.before = sums
        found = []
        for name, is_sign, text in SIGNS:
            found_now = name in metrics and is_sign(metrics[name])
            self.steps[name] = self.steps[name] + 1 if found_now else 0
            if self.steps[name] == PATIENCE:
                found.append(f"warning: for {PATIENCE} steps {text}")
        return found


class StepLog:
    """What is reported of the training steps.

    `phase` is what is going on; its seconds are counted until the next one begins.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.ranks = trainer.ranks
        self.bar = None
        self.phase = "first"
        self.status = ""  # of the last step, shown while the next one samples
        self.begin_step()

    def begin_step(self):
        self.seconds = Counter()
        self.peaks = Counter()  # GiB, by phase
        self.loss = 0.0
        self.token_sums = Counter()
        self.largest_gap = 0.0
        self.read = {}  # by id of a rollout: where its values are
        self.began = time.perf_counter()
        self.phase_began = self.began

    def begin(self, phase):
        now = time.perf_counter()
        self.seconds[self.phase] += now - self.phase_began
        self.peaks[self.phase] = max(self.peaks[self.phase], peak_memory_gib())
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        self.phase = phase
        self.phase_began = now

    def advice(self) -> str:  # for `name_lack_of_memory`
        flag = "--slots" if self.phase in ("rollout", "ask", "evaluation") else "--micro-batch"
        return f"in the {self.phase} phase: lower {flag} or --max-new-tokens"

    def add(self, loss, values, batch):
        """Add a micro-batch: its loss, and values [B, T], one for each token. The log gets the mean of
        each value over the tokens of rollouts."""
        self.loss += loss.item()
        for name, value in values.items():
            self.token_sums[name] += (value * batch.by_student.mask).sum().double().item()
        largest = (values["sampling_gap"] * batch.by_student.mask).max().item()
        self.largest_gap = max(self.largest_gap, largest)
        shown = {"logp": batch.by_student.logp.detach()} | values
        for i, example in enumerate(batch.examples):
            self.read[id(example)] = (batch, shown, i)

    def by_token(self, step, rollout):
        """Text and values of a rollout's tokens, in the steps that a report may show."""
        s = self.trainer.s
        middle = (s.steps + 1) // 2
        is_shown = step in (1, middle, s.steps) or step % s.checkpoint_every == 0
        if not is_shown:
            return {}
        batch, values, i = self.read[id(rollout)]
        left_out = {"sampling_gap", "clipped"}
        if not batch.by_teacher.mask[i].any():  # the teacher had nothing to say of these tokens
            left_out |= {"entropy", "delta"}
        found = {"text": [self.trainer.tokenizer.decode([token]) for token in rollout.token_ids]}
        for name, value in values.items():
            if name not in left_out:
                numbers = value[i, : len(rollout.token_ids)].tolist()
                found[name] = [round(x, 4) for x in numbers]
        return {"by_token": found}

    def finish_step(self, step: int, rollouts: list[Rollout], num_tokens: float, **metrics) -> dict:
        """Write the step's samples. Returns its line of metrics.jsonl: means over all ranks, seconds
        and memory of this rank, the largest memory of a rank."""
        self.begin("checkpoint")
        sums = {
            "reward": sum(r.reward for r in rollouts),
            "accuracy": sum(r.correct for r in rollouts),
            "advantage": sum(r.advantage for r in rollouts),
            "truncated": sum(not r.finished for r in rollouts),
            "no_answer": sum(r.answer is None for r in rollouts),
            "length": sum(len(r.token_ids) for r in rollouts),
            "repeated": sum(repeated(r.token_ids) for r in rollouts),
            "mentions": sum(mentions_solution(r.text) for r in rollouts),
        }
        own = [self.loss, len(rollouts), *sums.values(), *self.token_sums.values()]
        loss, count, *totals = self.ranks.sum(own)
        means = {}
        for name, total in zip([*sums, *self.token_sums], totals, strict=True):
            size = count if name in sums else num_tokens
            if size:
                means[name] = total / size
        rewards = self.ranks.gather_lists([r.reward for r in rollouts])
        if len(rewards) > 1:
            means["reward_range"] = max(rewards) - min(rewards)
        if rewards:
            means["sampling_gap_max"] = self.ranks.max(self.largest_gap)
        self.set_status(means, num_tokens)
        if self.ranks.rank == 0:
            self.write_samples(step, rollouts[:SAMPLES_PER_STEP])
        for phase in ("rollout", "teacher", "student"):
            means[f"{phase}_s"] = self.seconds[phase]
            means[f"{phase}_gib"] = self.peaks[phase]
        means["step_s"] = time.perf_counter() - self.began
        means["memory_gib"] = self.ranks.max(max(self.peaks.values()))
        return {"step": step, "loss": loss, **metrics, **means}

    def set_status(self, means, num_tokens):
        """What stands beside the bar; nothing where there were no rollouts."""
        if "reward" in means:
            self.status = (
                f"reward {means['reward']:.2f}, accuracy {means['accuracy']:.2f}, "
                f"length {means['length']:.0f}, "
            )
            if self.bar is not None:
                rate = num_tokens / self.seconds["rollout"]
                self.bar.set_postfix_str(f"{self.status}{rate:.0f} tokens/s", refresh=False)

    def write_samples(self, step, rollouts):
        records = []
        for r in rollouts:
            record = {"step": step, **r.as_json(), "reward": r.reward, "advantage": r.advantage}
            records.append(record | self.by_token(step, r))
        checkpoint.append_jsonl(self.trainer.out / "samples.jsonl", records)


def peak_memory_gib() -> float:
    """The most memory this process has used: on the GPU since the peak was reset, or without one on
    the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def fingerprint(files):
    """By flag, a digest of the file or model that it names."""
    found = {}
    for flag, name in files.items():
        found[flag] = model_digest(name) if flag == "--model" else digest(Path(name))
    return found


def check_inputs(trainer):
    """InputError if a resumed run would go on with other data, another model, or in another
    precision than it began with."""

    def check():
        config = read_config(trainer)
        if config["derived"]["bf16"] != trainer.bf16:  # without a flag the device decides
            words = {True: "with", False: "without"}
            raise InputError(
                f"{trainer.out}: the run began {words[not trainer.bf16]} bfloat16, here it would go "
                f"on {words[trainer.bf16]}: resume it on the kind of device that it began on"
            )
        for flag, found in fingerprint(trainer.files).items():
            if found != config["fingerprint"].get(flag):
                raise InputError(
                    f"{trainer.files[flag]}: not what {flag} named when the run began: put that "
                    "back, or start a new run with another --out"
                )

    trainer.ranks.on_first(check)


def check_disk(trainer):
    """InputError if the disk has no room for what the run will write."""
    s = trainer.s
    weights = trainer.model.num_parameters()  # shared ones count once
    trained = sum(p.numel() for p in trainer.parameters)
    checkpoints = math.ceil((s.steps - trainer.step) / s.checkpoint_every)
    # GB of float32: model/, and in each checkpoint the adapter and AdamW's two moments
    needed = 4e-9 * (weights + 3 * trained * checkpoints)
    free = 1e-9 * shutil.disk_usage(trainer.out).free
    if free < needed:
        raise InputError(
            f"{trainer.out}: the run writes {needed:.2f} GB (model/ in float32, checkpoints), but "
            f"the disk has {free:.2f} GB free: free space, or choose another --out"
        )


def write_config(trainer):
    """config.json: the settings in use and what follows from them. Also say what is trained, and on
    what."""
    s = trainer.s
    world = trainer.ranks.world
    first = trainer.problems[0]
    completions = s.prompts_per_step * trainer.rows_per_problem
    trained = sum(p.numel() for p in trainer.parameters)
    derived = {
        "device": str(trainer.ranks.device),
        "bf16": trainer.bf16,
        "problems": len(trainer.problems),
        "left_out": trainer.left_out,
        "held_out_problems": len(trainer.held_out),
        "completions_per_step": completions,
        "micro_batches_at_full_length": -(-completions // world // s.micro_batch),
        "trained_parameters": trained,
    }
    versions = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    student = trainer.student_prompt(first)
    example = Rollout([], [], False, first, student)
    shown = trainer.objective.teacher_prompts(trainer, [example])[0]
    decode = trainer.tokenizer.decode
    config = {
        "format": FORMAT,
        "entry": s.ENTRY,
        "settings": asdict(s),
        "world_size": world,
        "derived": derived,
        "versions": versions,
        "fingerprint": fingerprint(trainer.files),
        "adapter": trainer.adapter,
        "stop_tokens": stop_line(trainer.model, trainer.tokenizer),
        "thinking": thinking_line(trainer.tokenizer, s.thinking, s.date),
        "teacher_thinking": thinking_line(trainer.tokenizer, teacher_thinks(s), s.date),
        "first_prompts": {"student": decode(student), "teacher": decode(shown)},
    }
    path = trainer.out / "config.json"
    checkpoint.write_json(path, config)
    left_out = f" ({trainer.left_out} left out)" if trainer.left_out else ""
    done = f" ({trainer.step} are done)" if trainer.step else ""
    evaluations = ""
    if trainer.held_out:
        when = "before and after" if s.eval_before else "after"
        evaluations = (
            f"{when} training: {len(trainer.held_out) * s.eval_samples:,} completions of "
            f"{len(trainer.held_out):,} held-out problems (--eval-samples)\n"
        )
    print(
        f"{s.method} trains an adapter of {trained:,} weights for {s.model} on "
        f"{len(trainer.problems):,} problems{left_out}: {s.steps} steps{done} of {completions} "
        f"completions (device: {derived['device']}, processes: {world})\n"
        f"{evaluations}{config['stop_tokens']}\nall settings: {path}; --help has a sentence for each",
        flush=True,
    )


def stop_line(model, tokenizer):
    """Where completions stop, and what says so."""
    sources = stop_sources(tokenizer)
    shown = []
    for token in rollout.stop_ids(model, tokenizer):
        source = sources.get(token, "model's configs")
        shown.append(f"{tokenizer.decode([token])!r} ({token}, {source})")
    return f"completions stop at {' or '.join(shown)}"


def thinking_line(tokenizer, thinking, day=""):
    """What --thinking does with this chat template, and how prompts end."""
    messages = teacher.student_messages("1?")
    own, other = (
        teacher.encode(tokenizer, messages, on, day, tokenize=False)
        for on in (thinking, not thinking)
    )
    flag, switched = (
        ("--thinking", "--no-thinking") if thinking else ("--no-thinking", "--thinking")
    )
    end, other_end = (text.rpartition(teacher.INSTRUCTION)[2] for text in (own, other))
    effect = f"with {switched} in {other_end!r}"
    if own == other:
        effect = "--thinking changes nothing: this chat template has no switch of that name"
    return f"{flag}: prompts end in {end!r}; {effect}"


def is_done(trainer):
    """True if a resumed run has no steps left and its model is exported. Then rank 0 says so."""
    exported = read_config(trainer).get("exported")
    is_complete = exported == trainer.step >= trainer.s.steps and (trainer.out / "model").is_dir()
    if is_complete and trainer.ranks.rank == 0:
        print(
            f"{trainer.out}: all {trainer.step} steps are done, there is nothing to do: name "
            "more of them with --steps"
        )
    return is_complete


def read_config(trainer):
    return json.loads((trainer.out / "config.json").read_text())


def export(trainer):
    """Write model/, an ordinary checkpoint in float32 with the adapter merged in. Print the
    evaluations, and where the files are."""
    out = trainer.out
    model = trainer.model.cpu()  # a GPU may not have room for float32
    if trainer.bf16:  # the adapter belongs to the weights of the files, which may have been rounded
        name = trainer.files["--model"]
        model, _ = load_model(name, torch.float32, model.device, scored=False)
        lora.load_adapter(model, checkpoint.latest(out / "checkpoints") / "adapter")
    lora.merge(model)
    with checkpoint.atomic_directory(out / "model") as work:
        model.save_pretrained(work)
        trainer.tokenizer.save_pretrained(work)
    config = read_config(trainer) | {"exported": trainer.step}
    checkpoint.write_json(out / "config.json", config)
    lines = []
    if trainer.results:
        names = ("held-out", "accuracy", "mean length", "accuracy (%) per 1,000 tokens")
        lines.append("\n{:10}{:>10}{:>13}{:>31}".format(*names))
    for name, r in trainer.results.items():
        lines.append(f"{name:10}{r['accuracy']:10.3f}{r['length']:13.1f}{r['efficiency']:31.0f}")
    lines.append(f"\nthe trained model is {out / 'model'}")
    if (out / "report.html").exists():
        lines.append(f"open {out / 'report.html'}")
    print("\n".join(lines), flush=True)
