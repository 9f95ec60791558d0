"""Kill training at random moments, go on with it, and prove that no step was lost or made twice.

    python tests/kill_runs.py --kills 1000 --seed 0

A run on the tests' toy is started and killed with SIGKILL after a random time, again and again,
until it comes to its end; it must then equal a run that was never stopped, byte by byte: samples,
every checkpoint (adapter, optimizer, random state), evaluation, exported model, and metrics but for
seconds and memory. Then the next run begins, with other settings. Every start is a fork of this
process, in which torch is loaded already. A start that ends by itself must end well: else the
script ends with its log, and leaves its directory.
"""

import argparse
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import make_tiny_toy, train_arguments  # first: it sets the number of threads
from test_train import metrics, without_seconds
from tqdm import tqdm

import train
from family import __main__ as lab
from support import checkpoint, run

STEPS = 6
tqdm.monitor_interval = 0  # no thread in a process that forks
PHASES = (
    "before loading",
    "loading",
    "lock and config",
    "evaluation",
    "step",
    "metrics",
    "checkpoint",
    "export",
    "end",
)
VARIANTS = [  # of a run; all have a reference for each of SEEDS
    {"checkpoint-every": 1},
    {"checkpoint-every": 2},
    {
        "checkpoint-every": 2,
        "method": "antisd",
        "teacher-schedule": "ema",
        "prompts-per-step": 1,
        "rollouts-per-prompt": 4,
    },
]
SEEDS = 3


class Phase:
    """What a child is doing, in memory that it shares with its parent: what it was doing when it
    was killed."""

    def __init__(self):
        self.memory = mmap.mmap(-1, 64)

    def set(self, name: str) -> None:
        self.memory[:] = name.encode().ljust(64)

    def get(self) -> str:
        return self.memory[:].decode().strip()

    def during(self, owner, attribute: str, name: str, before: bool = True) -> None:
        """Set `name` whenever owner.attribute is called, or when it is done."""
        original = getattr(owner, attribute)

        @wraps(original)
        def marked(*args, **kwargs):
            if before:
                self.set(name)
            result = original(*args, **kwargs)
            if not before:
                self.set(name)
            return result

        setattr(owner, attribute, marked)

    def watch_training(self) -> None:
        self.during(lab, "parse_arguments", "before loading")
        self.during(train.Trainer, "__init__", "loading")
        self.during(train.Trainer, "__init__", "lock and config", before=False)
        self.during(train.Trainer, "evaluate", "evaluation")
        self.during(train.Trainer, "train_step", "step")
        self.during(train.Trainer, "train_step", "metrics", before=False)
        self.during(checkpoint, "save", "checkpoint")
        self.during(run, "export", "export")
        self.during(run, "export", "end", before=False)


def forked(work: Callable[[], None], log: Path) -> int:
    """The process id of a child that does this work and ends, 0 if all went well; its output goes
    to `log`."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        # its own is shared with the parent: a killed child may hold it
        tqdm.set_lock(threading.RLock())
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        work()
        code = 0
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int, seconds: float = 600, until: Callable[[], bool] = lambda: False) -> int | None:
    """The child's exit code once it has ended, None if it still runs after so many seconds or when
    `until` is true."""
    deadline = time.perf_counter() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.perf_counter() > deadline or until():
            return None
        time.sleep(0.0005)


def start(flags: list, log: Path) -> int:
    def work():
        sys.argv = ["family", *map(str, flags)]
        lab.main()  # for the core's methods the same as train.main

    return forked(work, log)


def finish(pid: int, log: Path) -> None:
    """Wait for a child that nobody kills."""
    if ended(pid) != 0:
        raise SystemExit(f"{log}: a start that was not killed failed:\n{log.read_text()}")


class Killer:
    """Runs one after the other in `directory`, each killed until it is done."""

    def __init__(self, directory: Path, kills: int, seed: int):
        self.directory, self.kills, self.random = directory, kills, random.Random(seed)
        self.phase, self.hits, self.counts = Phase(), Counter(), Counter()
        self.phase.watch_training()
        self.toy = directory / "toy"
        finish(forked(self.make_data, directory / "log"), directory / "log")
        self.references, self.bar = {}, tqdm(total=kills, unit=" kills")

    def make_data(self) -> None:
        make_tiny_toy(self.toy, problems=64)
        rows = (self.toy / "test.jsonl").read_text().splitlines(keepends=True)
        (self.toy / "test.jsonl").write_text("".join(rows[:2]))

    def flags(self, out: Path, variant: int, seed: int) -> list[str]:
        return train_arguments(
            self.toy,
            out,
            **VARIANTS[variant]
            | {
                "steps": STEPS,
                "seed": seed,
                "gradient-checkpointing": False,
                "eval-data": self.toy / "test.jsonl",
                "eval-samples": 1,
                "eval-top-p": 1.0,
            },
        )

    def reference(self, variant: int, seed: int) -> tuple[Path, float]:
        """A run that is not stopped, and how many seconds it took."""
        if (variant, seed) not in self.references:
            out, began = self.directory / f"reference-{variant}-{seed}", time.perf_counter()
            finish(
                start(self.flags(out, variant, seed), self.directory / "log"),
                self.directory / "log",
            )
            self.references[variant, seed] = out, time.perf_counter() - began
        return self.references[variant, seed]

    def work(self) -> None:
        while self.bar.n < self.kills:
            variant, seed = self.random.randrange(len(VARIANTS)), self.random.randrange(SEEDS)
            whole, seconds = self.reference(variant, seed)
            out = self.directory / "killed"
            self.kill_until_done(out, self.flags(out, variant, seed), seconds)
            self.compare(out, whole)
            shutil.rmtree(out)
        self.bar.close()

    def kill_until_done(self, out: Path, flags: list[str], seconds: float) -> None:
        """Once all kills are done, the run is left in peace."""
        log, code = self.directory / "log", None
        while code != 0:
            resumed = (out / "config.json").exists()
            self.phase.set("before loading")
            pid = start(["--out", out, "--resume"] if resumed else flags, log)
            self.counts["starts"] += 1
            in_peace = self.bar.n == self.kills
            code = ended(pid) if in_peace else self.wait(pid, seconds)
            if code is None:
                os.kill(pid, signal.SIGKILL)
                code = ended(pid)
            if code == -signal.SIGKILL and not in_peace:
                self.hits[self.phase.get()] += 1
                self.bar.update()
            elif code:
                raise SystemExit(
                    f"{log}: a start that was not killed ended with {code}:\n{log.read_text()}"
                )

    def wait(self, pid: int, seconds: float) -> int | None:
        """Until it is time to kill: any moment of a whole run, or one just after a phase began. The
        exit code, if the child ends before that."""
        if self.random.random() < 0.5:
            return ended(pid, self.random.uniform(0, seconds))
        phase, delay = self.random.choice(PHASES), 0.02 * self.random.random() ** 2
        code = ended(pid, until=lambda: self.phase.get() == phase)
        return ended(pid, delay) if code is None else code

    def compare(self, out: Path, whole: Path) -> None:
        steps = Counter(row["step"] for row in metrics(out))
        self.counts["runs"] += 1
        self.counts["steps"] += STEPS
        self.counts["lost"] += len(set(range(1, STEPS + 1)) - set(steps))
        self.counts["doubled"] += sum(steps.values()) - len(steps)
        assert [row["step"] for row in metrics(out)] == list(range(1, STEPS + 1)), f"{out}: {steps}"
        assert without_seconds(metrics(whole)) == without_seconds(metrics(out)), (
            f"{out}: metrics.jsonl"
        )
        one, other = contents(whole), contents(out)
        different = sorted(
            name for name in one.keys() | other.keys() if one.get(name) != other.get(name)
        )
        assert not different, f"{out}: {different}"


def contents(directory: Path) -> dict[str, bytes]:
    """The files of a run that may not depend on kills."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
        and path.name not in ("lock", "metrics.jsonl", "report.html")
        and path != directory / "config.json"
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began, directory = time.perf_counter(), Path(tempfile.mkdtemp(prefix="kill_runs-"))
    killer = Killer(directory, arguments.kills, arguments.seed)
    killer.work()
    c = killer.counts
    print(
        "killed during: "
        + ", ".join(f"{name} {count}" for name, count in killer.hits.most_common())
    )
    print(
        f"{arguments.kills} kills, {c['starts']} starts, {c['runs']} finished runs, "
        f"{c['steps']} steps compared, {c['lost']} lost, {c['doubled']} doubled, "
        f"{time.perf_counter() - began:.0f} seconds"
    )
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
