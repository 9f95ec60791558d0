"""What the tests share: tiny random models, so that every comparison runs in seconds and offline."""

import os
import subprocess
import sys
from contextlib import contextmanager

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in the processes that the tests start
if "gpu" not in sys.argv:  # `pytest -m gpu` runs what needs a GPU; everything else compares runs on the CPU, bit by bit
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig, Qwen3Config, Qwen3ForCausalLM

torch.set_num_threads(1)  # as in the processes that the tests start, which they are compared with bit by bit


def tiny_qwen3(vocab_size=61, layers=2, seed=0, window=256, **settings):
    """A random Qwen3 whose next-token distributions are neither flat nor certain."""
    torch.manual_seed(seed)
    config = Qwen3Config(vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=window,
                         eos_token_id=1, pad_token_id=1, bos_token_id=None, initializer_range=0.3, **settings)
    return Qwen3ForCausalLM(config).eval()


def tiny_hybrid():
    """Three layers of linear attention, which keep states of fixed size for each row, and one of attention."""
    torch.manual_seed(0)
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
        linear_num_value_heads=4, max_position_embeddings=256, eos_token_id=1, pad_token_id=1,
        initializer_range=0.3)).eval()


def random_ids(lengths, vocab_size=61, seed=0):
    """One list of token ids per length, without the stop token 1."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocab_size, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture
def model():
    return tiny_qwen3()


def make_tiny_toy(root, problems):
    """A toy that is made in seconds: the problems have one number, the traces are its box.

    It is half learned, so that some answers are right. Every run reads and grades all `problems` of its training data.
    """
    import toy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "make_problem", lambda rng: rng.integers(100, 1000, size=1).tolist())
        patch.setattr(toy, "UPDATES", 45)
        path = toy.build(root=root)
    rows = (path / "train.jsonl").read_text().splitlines(keepends=True)
    (path / "train.jsonl").write_text("".join(rows[:problems]))
    return path


@pytest.fixture(scope="session")
def tiny_toy(tmp_path_factory):
    return make_tiny_toy(tmp_path_factory.mktemp("toy"), problems=96)


@contextmanager
def in_background(command, log, **keywords):
    """A process that works while other tests run, its output in the file `log`; the test that needs it waits."""
    with open(log, "w") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file, **keywords)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=60)


def train_arguments(tiny_toy, out, **changes):
    """Flags of a run of a few seconds on `tiny_toy`."""
    settings = {"model": tiny_toy / "model", "data": tiny_toy / "train.jsonl", "out": out, "steps": 4,
                "prompts-per-step": 8, "micro-batch": 8, "max-new-tokens": 12, "temperature": 1.0, "top-p": 1.0,
                "top-k": 0, "lr": 1e-2, "lora-rank": 4, "lora-alpha": 8, "checkpoint-every": 2, "eval-data": "",
                "preset": "paper-4b"} | changes
    flags = []
    for name, value in settings.items():
        flags += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return flags


def train_here(*flags):
    """train.py in this process; the signal handlers that it sets are taken off again."""
    import signal

    import train
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        train.train(*train.parse_arguments([str(flag) for flag in flags]))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_run(tiny_toy, tmp_path_factory):
    """The directory of a finished run of four steps, with evaluations."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    evaluated = {"eval-data": tiny_toy / "test.jsonl", "eval-samples": 1, "eval-top-p": 1.0}
    train_here(*train_arguments(tiny_toy, out, **evaluated))
    return out


def forked(tmp_path, main, *argv, environment=None, before=lambda: None, stdout=None):
    """(exit code, stderr's lines without bars, stdout) of main() with sys.argv, in a process of its own: quicker than
    starting one, and able to change its limits, environment and directory."""
    out, error = tmp_path / "stdout", tmp_path / "stderr"
    process = os.fork()
    if process == 0:
        code = 99
        try:
            sys.stdout, sys.stderr = open(stdout or out, "w"), open(error, "w", buffering=1)
            os.environ.update(environment or {})
            os.chdir(tmp_path)
            sys.argv = list(map(str, argv))
            before()
            main()
            code = 0
        except SystemExit as exit:
            code = exit.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            try:
                sys.stdout.close()
            except OSError:
                code = 120  # as the interpreter at its end
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    lines = [line for line in error.read_text().splitlines() if line.strip() and "%|" not in line]
    return code, lines, out.read_text() if out.exists() else ""
