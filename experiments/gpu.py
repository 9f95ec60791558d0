"""What works on this GPU, how fast it is, and what does not work: nine minutes.

    python -m experiments.gpu                      on a machine with a CUDA GPU; the figures go to results/gpu.json
    python -m experiments.gpu --small              tries the script with tiny shapes; its figures mean nothing

These commands run, in the order of what they are worth:

    machine  GPU, driver, versions
    tests    pytest -m gpu
    toy      torchrun --standalone train.py
    4b       experiments.bench at the shape of Qwen3-4B: decode steps and their kernels, whole samplings
    step     experiments.bench: a training step of the paper at this shape; scoring
    graphs   16 steps of the toy with --cuda-graphs
    ranks    16 steps of the toy by a process on every GPU
    0.6b     as 4b, at the shape of Qwen3-0.6B

Each is stopped when its time is over; what it has printed until then is kept. None hides the rest if it fails. In the
end come a table of the toy, in the form of experiments.bench, and how each command ended. docs/gpu.md says how to read
them.
"""

import re
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments import bench
from support.checkpoint import write_json
from support.errors import InputError
from support.flags import flag, parse
from support.report import read_log
from support.run import one_line_errors

PROGRAM = "python -m experiments.gpu"
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
TORCHRUN = "torch.distributed.run --standalone --nproc-per-node {} train.py --out OUT/"
FEW = " --steps 16 --eval-data="
BENCH = "experiments.bench --repeats 1 --shape "
COMMANDS = {  # the seconds that each may take, and what follows `python -m`
    "machine": (20, "torch.utils.collect_env"),
    "tests": (80, "pytest -m gpu -n 0 -v -rP tests/test_gpu.py"),
    "toy": (60, TORCHRUN.format(1) + "toy"),
    "4b": (100, BENCH + "qwen3-4b --rows 4 1 6"),
    "step": (100, BENCH + "qwen3-4b --rows 5 3"),
    "graphs": (35, TORCHRUN.format(1) + "graphs --cuda-graphs" + FEW),
    "ranks": (35, TORCHRUN.format("auto") + "ranks" + FEW),
    "0.6b": (65, BENCH + "qwen3-0.6b --rows 4 1 6"),
}
SMALL = {  # what --small adds
    "torch.utils.collect_env": "",
    "pytest": "",
    "torch.distributed.run": " --steps 4 --prompts-per-step 8 --eval-data=",
    "experiments.bench": " --shape tiny",
}


@dataclass
class GpuSettings:
    """The command line."""

    small: bool = flag(False, "tiny shapes: to try the script, also without a GPU")


def toy_rows(out: Path) -> list[dict]:
    """Rows of experiments.bench, in which a turn is a step of training."""
    rows = []
    for name, peer in (
        ("toy", RESULTS / "toy_on_cpu"),
        ("graphs", out / "toy"),
        ("ranks", out / "toy"),
    ):
        logs = (read_log(path / "metrics.jsonl") for path in (out / name, peer))
        both = list(zip(*logs, strict=False))  # the steps that both have made
        for figure in ("reward", "grad_norm", "rollout_s") if both else ():
            ours, theirs = ([pair[i][figure] for pair in both] for i in (0, 1))
            rows.append(bench.row_of(f"{name}; peer: {peer.name}", figure, ours, theirs))
    return rows


def measure(s: GpuSettings) -> None:
    """Run all commands; write all figures after each of them."""
    if not (s.small or torch.cuda.is_available()):
        raise InputError("torch sees no CUDA GPU here: --small tries the script without one")
    out = time.strftime("runs/gpu-%Y%m%d-%H%M%S")
    (ROOT / out).mkdir(parents=True)
    folder = RESULTS if torch.version.cuda and not s.small else ROOT / out
    figures = {}
    ends = []
    for name, (limit, text) in COMMANDS.items():
        text = text.replace("OUT", out) + (SMALL[text.split()[0]] if s.small else "")
        print(f"\n{name}, at most {limit} s: python -m {text}", flush=True)
        log = ROOT / out / f"{name}.log"
        began = time.monotonic()
        with log.open("w") as file:
            # GNU's timeout stops what takes too long as Ctrl-C would, then kills it: code 124 or 137
            stop = f"timeout --foreground --signal=INT --kill-after=5 {limit}".split()
            command = [*stop, sys.executable, "-m", *text.split()]
            code = subprocess.call(command, cwd=ROOT, stdout=file, stderr=file)
        with suppress(FileNotFoundError):  # torchrun's processes, if it had no time to stop them
            subprocess.call(["pkill", "-KILL", "-f", f"train.py.*{out}"])
        seconds = time.monotonic() - began
        shown = log.read_text(errors="replace").replace(str(ROOT), ".")
        shown = re.sub(r".*%\|.*\n", "", shown)[-20_000:]  # without bars
        ends.append(f"{name}: exit code {code}, {seconds:.0f} s, {log}")
        print(f"{shown}\n{ends[-1]}", flush=True)
        figures[name] = {"command": text, "code": code, "seconds": seconds, "log": shown}
        figures["rows"] = toy_rows(ROOT / out)
        write_json(folder / "gpu.json", figures)
    print("\n".join([bench.HEADER, *map(bench.line, figures["rows"]), "", *ends]))
    print(f"all figures: {folder}/gpu.json")


def main() -> None:
    with one_line_errors(PROGRAM, "stopped; what has ended is written"):
        measure(parse(GpuSettings, sys.argv[1:], __doc__))


if __name__ == "__main__":
    main()
