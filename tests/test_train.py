"""train.py as it is used: the command line, one process and several, killed and resumed, with
mistakes in the input."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    assert_ended_well,
    exit_code,
    random_ids,
    start,
    start_ranks,
    tiny_hybrid,
    tiny_qwen3,
    train_arguments,
    train_here,
)
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3ForCausalLM,
)

import lora
import rollout
import teacher
import toy
import train
from support import checkpoint, run, settings
from support.distributed import Ranks

ROOT = Path(train.__file__).parent


def adapter(run, step=4):
    return load_file(
        run / "checkpoints" / f"step-{step:06d}" / "adapter" / "adapter_model.safetensors"
    )


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def first_moments(run, step=4):
    """Of AdamW, by number of the tensor: sums of gradients. The adapter itself at first moves by
    the sign of the gradient, which rounding decides where that is nearly 0."""
    state = torch.load(run / "checkpoints" / f"step-{step:06d}" / "state.pt", weights_only=True)
    return {number: moments["exp_avg"] for number, moments in state["optimizer"]["state"].items()}


def assert_close_gradients(run, reference, step):
    """To 1e-4 of the largest element of all."""
    moments, expected = first_moments(run, step), first_moments(reference, step)
    largest = max(moment.abs().max() for moment in expected.values())
    for number, moment in expected.items():
        torch.testing.assert_close(moments[number], moment, atol=1e-4 * largest, rtol=0)


def without_seconds(rows):
    return [{k: v for k, v in row.items() if not k.endswith(("_s", "_gib"))} for row in rows]


def assert_same_run(a, b, step=4):
    """Bitwise: parameters, optimizer, running advantage, and what was logged."""
    one, other = adapter(a, step), adapter(b, step)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    states = [
        torch.load(run / "checkpoints" / f"step-{step:06d}" / "state.pt", weights_only=True)
        for run in (a, b)
    ]
    for index, moments in states[0]["optimizer"]["state"].items():
        assert all(
            torch.equal(value, states[1]["optimizer"]["state"][index][name])
            for name, value in moments.items()
        )
    assert [
        (run / "checkpoints" / f"step-{step:06d}" / "state.json").read_text() for run in (a, b)
    ].count((a / "checkpoints" / f"step-{step:06d}" / "state.json").read_text()) == 2
    assert without_seconds(metrics(a)) == without_seconds(metrics(b))
    assert (a / "samples.jsonl").read_text() == (b / "samples.jsonl").read_text()


# ---- one run, whole


def test_a_run_leaves_what_it_promises(tiny_run, tiny_toy):
    rows = metrics(tiny_run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    promised = {
        "loss",
        "grad_norm",
        "lr",
        "reward",
        "accuracy",
        "advantage",
        "length",
        "truncated",
        "no_answer",
        "entropy",
        "max_entropy",
        "gate",
        "clipped",
        "sampling_gap",
        "sampling_gap_max",
        "student_entropy",
        "repeated",
        "mentions",
        "tokens",
        "rollout_s",
        "teacher_s",
        "student_s",
        "step_s",
        "rollout_gib",
        "teacher_gib",
        "student_gib",
        "memory_gib",
    }
    assert promised <= rows[0].keys()
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[0]["lr"] == 1e-2 and 0 < sum(row["accuracy"] for row in rows) < 4
    # T = 1, no truncation: sampled and trained policy are one
    assert all(0 < row["sampling_gap"] < row["sampling_gap_max"] < 1e-4 for row in rows)
    assert len((tiny_run / "samples.jsonl").read_text().splitlines()) == 4 * run.SAMPLES_PER_STEP
    config = json.loads((tiny_run / "config.json").read_text())
    assert config["settings"]["lora_rank"] == 4 and config["world_size"] == 1
    assert config["derived"]["completions_per_step"] == 8
    assert config["adapter"].startswith("adapter: 21 of 21 linear layers (q_proj, ")
    assert config["thinking"].startswith("--no-thinking: prompts end in ")
    results = json.loads((tiny_run / "evaluation.json").read_text())
    assert 0 < results["before"]["accuracy"] < 1
    assert results["after"]["completions"] == results["before"]["completions"] > 50
    state = torch.load(tiny_run / "checkpoints/step-000004/state.pt", weights_only=True)
    optimizer_steps = {moments["step"].item() for moments in state["optimizer"]["state"].values()}
    assert optimizer_steps == {4.0}


def test_memory_is_that_of_each_phase(tmp_path, monkeypatch):
    """The peak since the phase began. A phase may come twice."""
    peaks = iter([9, 3, 1, 2, 2.5, 5, 4])
    monkeypatch.setattr(run, "peak_memory_gib", lambda: next(peaks))
    log = run.StepLog(SimpleNamespace(ranks=Ranks(), out=tmp_path))
    for phase in ("rollout", "grade", "teacher", "rollout", "student", "update"):
        log.begin(phase)
    assert log.peaks == {"first": 9, "rollout": 3, "grade": 1, "teacher": 2, "student": 5}
    metrics = log.finish_step(1, [], 0)
    assert [metrics[f"{phase}_gib"] for phase in ("rollout", "teacher", "student")] == [3, 2, 5]
    assert metrics["memory_gib"] == 9


def test_the_bar_ends_with_the_last_step(tiny_toy, tmp_path, capsys):
    """It showed the figures of the step before, beside 100 %."""
    train_here(*train_arguments(tiny_toy, tmp_path / "run", steps=3))
    form = "reward {reward:.2f}, accuracy {accuracy:.2f}, length {length:.0f}, "
    *_, earlier, last = (
        form.format(**json.loads(line))
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    )
    bar = [
        line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "3/3" in line
    ][-1]
    assert last in bar and earlier != last


def test_exported_model_is_an_ordinary_checkpoint(tiny_run, tiny_toy):
    exported = AutoModelForCausalLM.from_pretrained(tiny_run / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_run / "model")
    adapted = AutoModelForCausalLM.from_pretrained(tiny_toy / "model")
    base = [parameter.clone() for parameter in adapted.parameters()]
    lora.load_adapter(adapted, tiny_run / "checkpoints/step-000004/adapter")
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(base, exported.parameters(), strict=True))
    assert exported.generation_config.eos_token_id == [tokenizer.eos_token_id]
    prompts = [
        teacher.encode(tokenizer, teacher.student_messages(f"What is {n}?")) for n in (11, 58, 90)
    ]
    ours = rollout.sample(
        adapted, prompts, max_new_tokens=12, stop_ids=[tokenizer.eos_token_id], temperature=0
    )
    for prompt, completion in zip(prompts, ours, strict=True):
        theirs = exported.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[
            0, len(prompt) :
        ].tolist()
        assert theirs == completion.token_ids


def test_sampling_gap_shows_a_policy_that_is_not_the_sampled_one(tiny_toy, tmp_path):
    """Public trainers sample at T = 0.8 and score at T = 1 without saying so."""
    train_here(*train_arguments(tiny_toy, tmp_path / "run", steps=1, temperature=0.5))
    assert metrics(tmp_path / "run")[0]["sampling_gap"] > 0.01


# ---- the same step, cut in different ways


# A small step, so that what rounding makes of it in AdamW hardly reaches the next gradients.
COMPARED = {"gradient-checkpointing": False, "lr": 1e-3}


@pytest.fixture(scope="module")
def reference(tiny_toy, tmp_path_factory):
    """Four steps in one process with one micro-batch."""
    out = tmp_path_factory.mktemp("reference") / "run"
    train_here(*train_arguments(tiny_toy, out, **COMPARED))
    return out


def assert_close_run(run, reference):
    assert_close_gradients(run, reference, 4)
    states = [
        json.loads((place / "checkpoints/step-000004/state.json").read_text())
        for place in (run, reference)
    ]
    assert states[0]["running_advantage"] == pytest.approx(states[1]["running_advantage"])
    same = (
        "loss",
        "grad_norm",
        "reward",
        "accuracy",
        "entropy",
        "max_entropy",
        "gate",
        "clipped",
        "advantage",
        "tokens",
    )
    for a, b in zip(metrics(run), metrics(reference), strict=True):
        assert [a[name] for name in same] == pytest.approx([b[name] for name in same], abs=1e-5)


@pytest.mark.parametrize("micro_batch", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_micro_batches_change_nothing(tiny_toy, tmp_path, reference, micro_batch):
    train_here(
        *train_arguments(tiny_toy, tmp_path / "run", **COMPARED | {"micro-batch": micro_batch})
    )
    assert_close_run(tmp_path / "run", reference)


@pytest.mark.slow
def test_a_hybrid_model_is_trained_stopped_and_resumed(tiny_toy, tmp_path):
    """Linear attention, all layers adapted, and recomputed activations."""
    config = Qwen3_5TextConfig(
        **tiny_hybrid().config.to_dict() | {"vocab_size": len(toy.make_tokenizer())}
    )
    Qwen3_5ForCausalLM(config).save_pretrained(tmp_path / "model")
    toy.make_tokenizer().save_pretrained(tmp_path / "model")
    flags = train_arguments(
        tiny_toy,
        tmp_path / "run",
        model=tmp_path / "model",
        steps=2,
        **{"lora-targets": "all-linear", "gradient-checkpointing": True, "checkpoint-every": 1},
    )
    train_here(*flags)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (
        "31 of 31 linear layers" in config["adapter"]
        and "--no-thinking: prompts end in" in config["thinking"]
    )
    whole = without_seconds(metrics(tmp_path / "run"))
    assert all(row["sampling_gap"] < 1e-4 and row["grad_norm"] > 0 for row in whole)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000002")
    shutil.rmtree(tmp_path / "run" / "model")
    train_here("--out", tmp_path / "run", "--resume")
    assert (
        without_seconds(metrics(tmp_path / "run")) == whole
        and (tmp_path / "run" / "model").is_dir()
    )


def test_gradient_checkpointing_changes_nothing(tiny_toy, tmp_path, reference):
    train_here(
        *train_arguments(tiny_toy, tmp_path / "run", **COMPARED | {"gradient-checkpointing": True})
    )
    assert_close_run(tmp_path / "run", reference)


@pytest.fixture(scope="module")
def two_processes(tiny_toy, tmp_path_factory):
    """The same four steps by two processes with two micro-batches each, started by what torchrun
    calls."""
    out = tmp_path_factory.mktemp("two-processes")
    flags = train_arguments(tiny_toy, out / "run", **COMPARED | {"micro-batch": 2})
    config = LaunchConfig(
        1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", start_method="fork"
    )
    launched = start(out, lambda: elastic_launch(config, train.main)(), "train.py", *flags)
    assert exit_code(launched) == 0, (out / "stderr").read_text()
    return out / "run"


def test_two_processes_change_nothing(two_processes, reference):
    assert_close_run(two_processes, reference)


def test_two_nodes_change_nothing(tiny_toy, tmp_path, reference):
    flags = train_arguments(tiny_toy, tmp_path / "run", **COMPARED)
    assert_ended_well(start_ranks(tmp_path, train.main, "train.py", *flags, nodes=2), tmp_path)
    assert_close_run(tmp_path / "run", reference)


def gradients(bf16, checkpointing):
    """Gradients of a fixed loss on the adapter, as train.py computes them."""
    model = tiny_qwen3().to(torch.bfloat16 if bf16 else torch.float32).train()
    torch.manual_seed(1)
    lora.add_lora(model, 4, 8)
    for parameter in lora.lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        reading = teacher.read(model, random_ids([5, 9]), random_ids([8, 12], seed=1))
    reading.logp.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in lora.lora_parameters(model))
    return torch.cat([p.grad.flatten() for p in lora.lora_parameters(model)])


def test_bf16_and_checkpointing_give_the_gradients_of_float32():
    exact = gradients(False, False)
    torch.testing.assert_close(gradients(False, True), exact, atol=1e-5, rtol=1e-4)
    for checkpointing in (False, True):
        assert torch.cosine_similarity(gradients(True, checkpointing), exact, dim=0) > 0.99


def test_bf16_run(tiny_toy, tmp_path):
    train_here(
        *train_arguments(
            tiny_toy, tmp_path / "run", steps=2, bf16=True, **{"gradient-checkpointing": True}
        )
    )
    assert json.loads((tmp_path / "run" / "config.json").read_text())["derived"]["bf16"]
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype="auto").dtype
        == torch.float32
    )
    assert all(tensor.dtype == torch.float32 for tensor in adapter(tmp_path / "run", 2).values())
    assert 0 < metrics(tmp_path / "run")[0]["sampling_gap"] < 0.05


# ---- killed, stopped, resumed


def wait_for(condition):
    deadline = time.time() + 100
    while not condition() and time.time() < deadline:
        time.sleep(0.02)
    assert condition()


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_kill_and_resume_equals_never_stopping_bitwise(
    tiny_toy, tmp_path, reference, two_processes, world
):
    """Other trainers repeat a batch after a resume, or forget the optimizer or the random state."""
    whole, killed = two_processes if world == 2 else reference, tmp_path / "killed"
    flags = train_arguments(
        tiny_toy, killed, **COMPARED | {"steps": 1000, "micro-batch": 2 if world == 2 else 8}
    )
    processes = start_ranks(tmp_path, train.main, "train.py", *flags, world=world)
    wait_for((killed / "checkpoints" / "step-000002").exists)
    for process in processes:
        os.kill(process, signal.SIGKILL)
    # the other may say that it lost it
    assert -signal.SIGKILL in [exit_code(process) for process in processes]
    # the steps that it was faster than the kill
    for path in (killed / "checkpoints").glob("step-*"):
        if path.name != "step-000002":
            shutil.rmtree(path)
    resume = ["--out", killed, "--resume", "--steps", 4]
    assert_ended_well(start_ranks(tmp_path, train.main, "train.py", *resume, world=world), tmp_path)
    assert_same_run(whole, killed)


def test_kill_while_a_checkpoint_is_written_leaves_the_earlier_one(
    tiny_toy, tmp_path, tiny_run, monkeypatch
):
    """A checkpoint that is written in place is half a file after a crash."""
    flush = checkpoint._flush

    def kill(path):
        flush(path)
        if "step-000004.tmp" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_flush", kill)
        killed = start(
            tmp_path, train.main, "train.py", *train_arguments(tiny_toy, tmp_path / "run")
        )
    assert exit_code(killed) == -signal.SIGKILL
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-000002",
        "step-000004.tmp",
    ]
    train_here("--out", tmp_path / "run", "--resume")
    assert (tmp_path / "run" / "model").is_dir()
    assert without_seconds(metrics(tmp_path / "run")) == without_seconds(metrics(tiny_run))


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(tiny_toy, tmp_path):
    flags = train_arguments(tiny_toy, tmp_path / "run", steps=1000, **{"checkpoint-every": 1000})
    process = start(tmp_path, train.main, "train.py", *flags)
    log = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 2)
    os.kill(process, signal.SIGINT)
    code = exit_code(process)
    steps = len(metrics(tmp_path / "run"))
    error = (tmp_path / "stderr").read_text()
    assert (
        code == 128 + signal.SIGINT
        and "Traceback" not in error
        and f"--out {tmp_path / 'run'} --resume" in error
    )
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{steps:06d}"]


def test_stopping_in_the_middle_of_a_step_changes_nothing(
    tiny_toy, tmp_path, monkeypatch, tiny_run
):
    """The rollouts of the third step are cut short; resumed, the run is the one that was never
    stopped."""
    calls = []

    def sample(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    original = rollout.sample
    monkeypatch.setattr(rollout, "sample", sample)
    with pytest.raises(SystemExit) as exit:
        train_here(*train_arguments(tiny_toy, tmp_path / "run"))
    assert exit.value.code == 128 + signal.SIGTERM
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").name == "step-000002"
    train_here("--out", tmp_path / "run", "--resume")
    assert without_seconds(metrics(tmp_path / "run")) == without_seconds(metrics(tiny_run))


# ---- mistakes: one line, exit code not 0, nothing half-written


def main_fails(capsys, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    with pytest.raises(SystemExit) as exit:
        train.main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert exit.value.code == 1 and lines[-1].startswith("train.py: ")
    return lines[-1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data": "nothing.jsonl"}, "nothing.jsonl: no such data file"),
        ({"data": ""}, "--data is missing"),
        ({"eval-data": "nothing.jsonl"}, "nothing.jsonl: no such data file"),
        ({"model": "./nothing"}, "./nothing: no such model directory"),
        ({"model": "no/such/model"}, "no such model directory"),
        ({"model": "nobody/nothing"}, "nobody/nothing: cannot load the model"),
        ({"max-new-tokens": 5000}, "train.jsonl: line 1: field 'problem'"),
        ({"eps": 1.0}, "--eps must be below 1, got 1.0"),
        ({"floor": 0.0}, "--floor"),
        ({"steps": 0}, "--steps"),
        ({"gamma": "inf"}, "--gamma"),
        ({"gamma": "nan"}, "--gamma"),
        ({"lr": "fast"}, "--lr"),
        ({"preset": "large"}, "--preset"),
        ({"lora-targets": "up_proj"}, "the adapter would leave out all of the attention"),
        ({"method": "opsd"}, "direction-aware; neighbouring methods are run with python -m family"),
        ({"sed": 1}, "--sed"),
    ],
)
def test_mistakes_in_the_flags(tiny_toy, tmp_path, capsys, monkeypatch, changes, message):
    assert message in main_fails(
        capsys, monkeypatch, *train_arguments(tiny_toy, tmp_path / "run", **changes)
    )
    assert not (tmp_path / "run").exists()


def test_a_model_without_gradient_checkpointing_names_the_flag(
    tiny_toy, tmp_path, capsys, monkeypatch
):
    def refuse(*_):
        raise ValueError("CTRL does not support activation checkpointing.")

    monkeypatch.setattr(Qwen3ForCausalLM, "activation_checkpointing_enable", refuse)
    flags = train_arguments(tiny_toy, tmp_path / "run", **{"gradient-checkpointing": True})
    assert "--no-gradient-checkpointing" in main_fails(capsys, monkeypatch, *flags)


def test_prompts_that_cannot_be_shared_equally(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(train.InputError, match="multiple"):
        settings.Settings(data="d", prompts_per_step=8).check()


def test_tokenizer_without_chat_template(tiny_toy, tmp_path, capsys, monkeypatch):
    shutil.copytree(tiny_toy / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    flags = train_arguments(tiny_toy, tmp_path / "run", model=tmp_path / "model")
    assert "no chat template" in main_fails(capsys, monkeypatch, *flags)
    assert not (tmp_path / "run").exists()


def test_damaged_model_file(tiny_toy, tmp_path, capsys, monkeypatch):
    shutil.copytree(tiny_toy / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"half a fi")
    flags = train_arguments(tiny_toy, tmp_path / "run", model=tmp_path / "model")
    assert "cannot load the model" in main_fails(capsys, monkeypatch, *flags)


def test_output_is_a_file(tiny_toy, tmp_path, capsys, monkeypatch):
    (tmp_path / "run").write_text("mine")
    line = main_fails(capsys, monkeypatch, *train_arguments(tiny_toy, tmp_path / "run"))
    assert f"{tmp_path / 'run'}: " in line and "File exists" in line
    assert (tmp_path / "run").read_text() == "mine"


def test_output_directory_in_use(tiny_toy, tiny_run, tmp_path, capsys, monkeypatch):
    before = sorted(tiny_run.rglob("*"))
    assert "output directory in use" in main_fails(
        capsys, monkeypatch, *train_arguments(tiny_toy, tiny_run)
    )
    assert sorted(tiny_run.rglob("*")) == before


def test_resume_mistakes(tiny_toy, tiny_run, tmp_path, capsys, monkeypatch):
    assert "no run that can be resumed here" in main_fails(
        capsys, monkeypatch, "--out", tmp_path / "new", "--resume"
    )
    error = main_fails(
        capsys, monkeypatch, *train_arguments(tiny_toy, tiny_run, gamma=0.9, seed=4), "--resume"
    )
    assert (
        "--resume with changed settings (" in error
        and "--gamma was 0.3" in error
        and "--seed was 0" in error
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "started with 1 processes, this is 2" in main_fails(
        capsys, monkeypatch, "--out", tiny_run, "--resume"
    )


def test_damaged_checkpoint(tiny_run, tmp_path, capsys, monkeypatch):
    shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "run/checkpoints/step-000004/state.pt").write_bytes(b"half a fi")
    error = main_fails(capsys, monkeypatch, "--out", tmp_path / "run", "--resume")
    assert "step-000004: damaged checkpoint" in error and "remove this directory" in error


@pytest.mark.parametrize("where, flag", [("sample", "--slots"), ("read", "--micro-batch")])
def test_no_free_memory_names_the_flag_to_lower(
    tiny_toy, tmp_path, capsys, monkeypatch, where, flag
):
    def fail(*args, **kwargs):
        torch.empty(2**60)  # what the CPU allocator raises is a RuntimeError of its own

    monkeypatch.setattr(rollout if where == "sample" else teacher, where, fail)
    error = main_fails(capsys, monkeypatch, *train_arguments(tiny_toy, tmp_path / "run"))
    assert "no free memory" in error and flag in error


def test_loss_that_is_not_finite_stops_the_run(tiny_toy, tmp_path, capsys, monkeypatch):
    flags = train_arguments(tiny_toy, tmp_path / "run", lr=1e30, **{"checkpoint-every": 1})
    error = main_fails(capsys, monkeypatch, *flags)
    assert "not finite" in error and "--lr" in error and "step-00000" in error
    assert all(tensor.isfinite().all() for tensor in adapter(tmp_path / "run", 1).values())


def test_help_has_a_sentence_for_every_flag(capsys):
    assert_help_is_whole(capsys, train, settings.Settings)


def assert_help_is_whole(capsys, entry, kind):
    with pytest.raises(SystemExit) as exit:
        entry.parse_arguments(["--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0 and "python -m family" in text
    for field in fields(kind):
        assert (
            f"--{field.name.replace('_', '-')}" in text and len(field.metadata["help"].split()) >= 3
        )


def test_presets():
    assert settings.TARGETS == list(lora.TARGETS)
    assert (
        train.parse_arguments([])[0].model == "toy"
        and train.parse_arguments(["--steps", "3"])[0].steps == 3
    )
    paper = train.parse_arguments(["--model", "Qwen/Qwen3-4B", "--data", "d.jsonl"])[0]
    assert (paper.gamma, paper.window, paper.lr, paper.lora_rank, paper.prompts_per_step) == (
        0.3,
        3,
        5e-6,
        64,
        32,
    )
    larger = train.parse_arguments(["--preset", "paper-8b"])[0]
    assert (larger.gamma, larger.window) == (1.0, 5)
    own = train.parse_arguments(["--data", "mine.jsonl"])[0]
    # not the toy's held-out problems
    assert (own.model, own.data, own.eval_data) == ("toy", "mine.jsonl", "")
    both = train.parse_arguments(["--preset", "toy", "paper-8b", "--lr", "1"])[0]
    # later ones win
    assert (both.model, both.steps, both.gamma, both.lr) == ("Qwen/Qwen3-8B", 64, 1.0, 1.0)


@pytest.mark.parametrize(
    "program, flags, code, said",
    [
        ("train.py", ["--help"], 0, "--gamma"),
        ("train.py", ["--gama", "1"], 1, "unrecognized arguments: --gama"),
        ("train.py", ["--steps", "0"], 1, "--steps must be at least 1, got 0"),
        ("eval.py", ["--help"], 0, "--samples"),
        ("eval.py", ["--model", "toy"], 1, "--model and --data are needed"),
    ],
)
def test_help_and_mistakes_are_answered_without_torch(program, flags, code, said):
    """It took six seconds to import torch and transformers, before a misspelt flag was named."""
    without = (
        "import runpy, sys; sys.modules |= dict.fromkeys(('torch', 'transformers', 'numpy')); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", without, ROOT / program, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == code
        and said in done.stdout + done.stderr
        and "Traceback" not in done.stderr
    )


def test_a_start_says_what_is_trained_and_where_the_settings_are(tiny_toy, tmp_path, capsys):
    train_here(*train_arguments(tiny_toy, tmp_path / "run", steps=1))
    first, stops, second, *_, model, report = capsys.readouterr().out.splitlines()
    assert (
        first.startswith("cl-egrsd trains an adapter of ")
        and " on 96 problems: 1 steps of 8 " in first
    )
    assert stops == "completions stop at '<|im_end|>' (2, chat template)"
    assert f"{tmp_path / 'run' / 'config.json'}" in second and "--help" in second
    assert (
        model == f"the trained model is {tmp_path / 'run' / 'model'}"
        and report == f"open {tmp_path / 'run' / 'report.html'}"
    )
