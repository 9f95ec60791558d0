"""What the tests share: tiny random models, so that every comparison runs in seconds and offline,
and processes.

Torch is imported where it is used: with pytest-xdist this file is also read by a process that runs
no test.
"""

import fcntl
import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
# here and in the processes that the tests start: some are compared bit by bit
os.environ["OMP_NUM_THREADS"] = "1"
# `pytest -m gpu` runs what needs a GPU
if "gpu" not in sys.argv and "PYTEST_XDIST_WORKER" not in os.environ:
    # everything else compares runs on the CPU; workers inherit this
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

ROOT = Path(__file__).resolve().parent.parent
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
for number in SIGNALS:
    if signal.getsignal(number) is signal.SIG_IGN:  # `pytest &`, nohup: children would inherit it
        signal.signal(number, lambda *_: None)


def tiny_qwen3(vocab_size=61, layers=2, seed=0, window=256, **settings):
    """A random Qwen3 whose next-token distributions are neither flat nor certain."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=window,
        eos_token_id=1,
        pad_token_id=1,
        bos_token_id=None,
        initializer_range=0.3,
        **settings,
    )
    return Qwen3ForCausalLM(config).eval()


def tiny_hybrid():
    """Three layers of linear attention, which keep states of fixed size for each row, and one of
    attention."""
    import torch
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(0)
    return Qwen3_5ForCausalLM(
        Qwen3_5TextConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            head_dim=8,
            num_key_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            max_position_embeddings=256,
            eos_token_id=1,
            pad_token_id=1,
            initializer_range=0.3,
        )
    ).eval()


def random_ids(lengths, vocab_size=61, seed=0):
    """One list of token ids per length, without the stop token 1."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(2, vocab_size, (length,), generator=generator).tolist() for length in lengths
    ]


@pytest.fixture
def model():
    return tiny_qwen3()


def make_tiny_toy(root, problems):
    """A toy that is made in seconds: the problems have one number, the traces are its box.

    It is half learned, so that some answers are right. Of training and of held-out problems there
    are so many.
    """
    import torch
    from transformers import AutoModelForCausalLM

    import toy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "make_problem", lambda rng: rng.integers(100, 1000, size=1).tolist())
        patch.setattr(toy, "UPDATES", 45)
        toy.build(root / "model")
        model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
        model.save_pretrained(root / "model")  # for tests that take the dtype of the files
        files = [toy.problem_file(part, root) for part in ("train.jsonl", "test.jsonl")]
    for path in files:
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:problems]))


@pytest.fixture(scope="session")
def tiny_toy(tmp_path_factory):
    """The same one for all workers of pytest-xdist."""
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "tiny-toy"
    root.mkdir(exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "test.jsonl").exists():
            make_tiny_toy(root, problems=96)
    return root


def train_arguments(tiny_toy, out, **changes):
    """Flags of a run of a few seconds on `tiny_toy`."""
    settings = {
        "model": tiny_toy / "model",
        "data": tiny_toy / "train.jsonl",
        "out": out,
        "steps": 4,
        "prompts-per-step": 8,
        "micro-batch": 8,
        "max-new-tokens": 12,
        "temperature": 1.0,
        "top-p": 1.0,
        "top-k": 0,
        "lr": 1e-2,
        "lora-rank": 4,
        "lora-alpha": 8,
        "checkpoint-every": 2,
        "eval-data": "",
        "preset": "paper-4b",
    } | changes
    flags = []
    for name, value in settings.items():
        flags += (
            [f"--{'' if value else 'no-'}{name}"]
            if isinstance(value, bool)
            else [f"--{name}", str(value)]
        )
    return flags


def train_here(*flags, entry=None):
    """train.py in this process; the signal handlers that it sets are taken off again."""
    import train

    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        train.train(*(entry or train).parse_arguments([str(flag) for flag in flags]))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def greedy_by_eval(data, out, *flags):
    """Completions of the problems in `data`, by eval.py in this process."""
    import eval as evaluation

    sampling = ["--temperature", 0, "--samples", 1, "--max-new-tokens", 12, "--no-thinking"]
    argv = ["eval.py", *flags, "--data", data, "--out", out, *sampling]
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(word) for word in argv])
        evaluation.main()
    signal.signal(signal.SIGTERM, handler)
    return [json.loads(line)["completion"] for line in (out / "samples.jsonl").open()]


def family_here(*flags):
    """`python -m family` in this process."""
    from family import __main__ as lab

    train_here(*flags, entry=lab)


@pytest.fixture(scope="session")
def tiny_run(tiny_toy, tmp_path_factory):
    """The directory of a finished run of four steps, with evaluations."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    evaluated = {"eval-data": tiny_toy / "test.jsonl", "eval-samples": 1, "eval-top-p": 1.0}
    train_here(*train_arguments(tiny_toy, out, **evaluated))
    return out


def is_cheap(work, seconds):
    """Whether work() takes less of the processor's time in one of three tries: the first may meet a
    collection of all the garbage of the process."""

    def took():
        began = time.process_time()
        work()
        return time.process_time() - began

    return any(took() < seconds for _ in range(3))


def start(directory, main, *argv, environment=None, before=lambda: None, stdout=None):
    """main() with sys.argv in a process of its own, whose files stdout and stderr are in
    `directory`, where it works; returns its number. Quicker than a new interpreter, and able to
    change its limits and environment."""
    directory.mkdir(exist_ok=True)
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        sys.stdout = open(stdout or directory / "stdout", "w")
        sys.stderr = open(directory / "stderr", "w", buffering=1)
        os.environ.update(environment or {})
        os.chdir(directory)
        sys.argv = list(map(str, argv))
        for number in SIGNALS:
            signal.signal(
                number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            )
        before()
        main()
        code = 0
    except SystemExit as exit:
        code = exit.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.close()
        except OSError:
            code = 120  # as the interpreter at its end
        os._exit(code)


def exit_code(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def forked(directory, main, *argv, **keywords):
    """(exit code, stderr's lines without bars, stdout) of such a process."""
    code, out = exit_code(start(directory, main, *argv, **keywords)), directory / "stdout"
    lines = [
        line
        for line in (directory / "stderr").read_text().splitlines()
        if line.strip() and "%|" not in line
    ]
    return code, lines, out.read_text() if out.exists() else ""


def run_copy(here, *commands):
    """Programs of a copy of the repository that stands in `here`, one after the other, in one such
    process: its exit code. A command begins with a file, or with the name of a module. Only the
    libraries are those of this process."""

    def run():
        sys.path[:] = [str(here), *(place for place in sys.path if Path(place).resolve() != ROOT)]
        for name, module in list(sys.modules.items()):
            if ROOT in Path(getattr(module, "__file__", None) or "/").resolve().parents[:2]:
                del sys.modules[name]
        for sys.argv in [list(map(str, command)) for command in commands]:
            try:
                by_name = runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module
                by_name(sys.argv[0], run_name="__main__")
            except SystemExit as end:
                if end.code:
                    raise

    return exit_code(start(here, run))


def start_ranks(directory, main, *argv, world=2, nodes=1, **keywords):
    """Such processes with the environment that torchrun would give them; each works in rank<number>
    of `directory`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world // nodes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    found = []
    for rank in range(world):
        environment = shared | {"RANK": rank, "LOCAL_RANK": rank % (world // nodes)}
        found.append(
            start(
                directory / f"rank{rank}",
                main,
                *argv,
                environment={name: str(value) for name, value in environment.items()},
                **keywords,
            )
        )
    return found


def assert_ended_well(processes, directory):
    codes = [exit_code(process) for process in processes]
    assert not any(codes), [path.read_text() for path in sorted(directory.glob("rank*/stderr"))]
