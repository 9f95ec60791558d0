"""What a run refuses, in one line; what it warns of; and that nothing of the user's is lost or
silently wrong."""

import doctest
import gzip
import json
import os
import re
import resource
import shutil
import signal
import stat
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import (
    assert_ended_well,
    forked,
    start_ranks,
    tiny_qwen3,
    train_arguments,
    train_here,
)
from safetensors.torch import load_file, save_file

import eval as evaluation
import lora
import toy
import train
from experiments import bench, compare, diagnostics, plot, report
from support import checkpoint, run
from support.data import InputError, load_adapter, load_model, load_problems
from support.distributed import Ranks
from support.report import HIDDEN

CPU = torch.device("cpu")


def one_line(result, *parts):
    """The command ended with code 1 and one line on stderr that has these parts."""
    code, lines, _ = result
    assert code == 1 and len(lines) == 1, result
    assert all(part in lines[0] for part in parts), lines
    return lines[0]


def run_train(tmp_path, *flags, **keywords):
    return forked(tmp_path, train.main, "train.py", *flags, **keywords)


def files_of(path):
    return {
        entry.relative_to(path): entry.read_bytes() for entry in path.rglob("*") if entry.is_file()
    }


@pytest.fixture(scope="module")
def few(tiny_toy, tmp_path_factory):
    """A data file of 24 problems."""
    path = tmp_path_factory.mktemp("few") / "few.jsonl"
    path.write_text("".join((tiny_toy / "train.jsonl").read_text().splitlines(keepends=True)[:24]))
    return path


@pytest.fixture
def flags(tiny_toy, few):
    """Flags of a run of two steps; changes win."""

    def flags(out, **changes):
        return train_arguments(
            tiny_toy, out, **{"data": few, "steps": 2, "prompts-per-step": 4} | changes
        )

    return flags


@pytest.fixture(scope="module")
def finished(tiny_toy, few, tmp_path_factory):
    """A run of two steps with evaluations, finished."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train_here(
        *train_arguments(
            tiny_toy,
            out,
            data=few,
            steps=2,
            **{"prompts-per-step": 4, "checkpoint-every": 1, "eval-data": few, "eval-samples": 1},
        )
    )
    return out


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "copied"))


# ---- the output directory


COMMANDS = {
    "train": (train.main, []),
    "eval": (evaluation.main, ["--model", "m", "--data", "d"]),
    "diagnostics": (diagnostics.main, ["--model", "m", "--data", "d"]),
    "plot": (plot.main, []),
    "compare": (compare.main, []),
    "bench": (bench.main, ["--rows", "3", "--repeats", "1"]),
    "tokens": (report.main, ["tokens.jsonl"]),
    "report": (report.main, ["run"]),
}


@pytest.mark.parametrize(
    "command, flag", [*((name, "--out") for name in COMMANDS), ("compare", "--work")]
)
def test_an_empty_name_is_refused_and_nothing_is_touched(tmp_path, command, flag):
    """An unset variable of a script: the files of the current directory would be written over."""
    main, argv = COMMANDS[command]
    (tmp_path / "cwd").mkdir()
    (tmp_path / "cwd" / "config.json").write_text("mine")
    code, lines, _ = forked(
        tmp_path, main, "program", *argv, flag, "", before=lambda: os.chdir("cwd")
    )
    assert code in (1, 2) and f"{flag}: it is empty" in lines[-1]
    assert files_of(tmp_path / "cwd") == {Path("config.json"): b"mine"}


@pytest.mark.parametrize("flag", ["--model", "--adapter"])
def test_an_empty_model_or_adapter_is_refused(tmp_path, flag):
    argv = ["eval.py", "--model", "m", "--data", "d", flag, ""]
    one_line(forked(tmp_path, evaluation.main, *argv), f"{flag}: it is empty")


def test_what_a_kill_before_config_json_leaves_is_no_dead_end(flags, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").touch()
    (tmp_path / "run" / "config.json.tmp").write_text('{"settings": {')
    one_line(run_train(tmp_path, "--out", "run", "--resume"), "leave --resume out")
    assert run_train(tmp_path, *flags("run"))[0] == 0
    assert (tmp_path / "run" / "model").is_dir() and not (tmp_path / "run" / "lock").exists()


@pytest.mark.parametrize(
    "name, part",
    [
        ("/dev/null", "File exists"),
        ("x" * 300, "File name too long"),
        ("mine/x", "Not a directory"),
    ],
)
def test_a_name_that_cannot_be_a_directory_is_refused_before_the_model_is_loaded(
    flags, tmp_path, name, part
):
    (tmp_path / "mine").write_text("mine")
    before = sorted(tmp_path.iterdir())
    result = run_train(tmp_path, *flags(name, model="no-model"))
    one_line(result, name, part)
    assert set(tmp_path.iterdir()) - set(before) <= {tmp_path / "stdout", tmp_path / "stderr"}


def test_data_that_compare_would_write_over_is_refused(few, tmp_path):
    shutil.copy(few, tmp_path / "train.jsonl")
    argv = ["--data", "train.jsonl", "--work", ".", "--validation", "8", "--only", "grpo"]
    one_line(forked(tmp_path, compare.main, "compare", *argv), "train.jsonl: would be overwritten")
    assert (tmp_path / "train.jsonl").read_bytes() == few.read_bytes()


@pytest.mark.parametrize(
    "main", [compare.main, lambda: diagnostics.diagnose(diagnostics.DiagnosticsSettings(out="d"))]
)
def test_commands_of_one_process_refuse_several(tmp_path, monkeypatch, main):
    monkeypatch.setattr(Ranks, "__init__", lambda self: setattr(self, "world", 2))
    with pytest.raises((InputError, SystemExit)):
        monkeypatch.setattr(sys, "argv", ["compare", "--work", str(tmp_path / "work")])
        main()
    assert not (tmp_path / "work").exists()


def test_an_error_of_one_rank_is_raised_by_all():
    ranks = Ranks()
    ranks.gather_lists = lambda problems: ["of rank 1: no such file"]  # what the other rank found
    with pytest.raises(InputError, match="of rank 1"):
        ranks.together(lambda: "fine here")


def test_a_directory_that_cannot_be_written(flags, tmp_path, monkeypatch):
    def mkdir(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    one_line(
        run_train(
            tmp_path, *flags("run"), before=lambda: monkeypatch.setattr(Path, "mkdir", mkdir)
        ),
        "run: cannot be read or written",
        "Permission denied",
    )


def test_a_second_start_is_refused_from_the_first_moment(flags, tmp_path):
    """Also while the first one still loads its model: else two seeds would be mixed in one
    directory."""
    with run.hold(tmp_path / "run", Ranks()):
        one_line(run_train(tmp_path, *flags("run")), "in use by a process that is still running")
        argv = ["eval.py", "--model", "m", "--data", "d", "--out", "run"]
        one_line(
            forked(tmp_path, evaluation.main, *argv), "in use by a process that is still running"
        )
    assert not (tmp_path / "run").exists()  # nothing was written into it


def test_only_one_of_many_starts_at_the_same_moment_gets_the_directory(tmp_path):
    def attempt():
        barrier.wait()
        try:
            with run.hold(tmp_path / "run", Ranks()):
                (tmp_path / "run" / "config.json").write_text("{}")
                won.append(1)
        except InputError:
            pass

    for _ in range(20):
        barrier, won = threading.Barrier(4), []
        threads = [threading.Thread(target=attempt) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won == [1]
        shutil.rmtree(tmp_path / "run")


# ---- several processes


@pytest.mark.parametrize(
    "environment, part",
    [
        ({"WORLD_SIZE": "4"}, "no RANK"),
        ({"RANK": "0"}, "no WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
    ],
)
def test_half_an_environment_of_torchrun_is_refused(flags, tmp_path, environment, part):
    """WORLD_SIZE alone, usual in SLURM scripts, trained on a fraction of each step."""
    one_line(run_train(tmp_path, *flags("run"), environment=environment), part)
    assert not (tmp_path / "run").exists()


# ---- resume: the same inputs, whole files


@pytest.mark.parametrize("which", ["--data", "--eval-data", "--model"])
def test_changed_inputs_are_refused_on_resume(flags, tiny_toy, few, tmp_path, which):
    inputs = {
        "--data": tmp_path / "data.jsonl",
        "--eval-data": tmp_path / "held.jsonl",
        "--model": tmp_path / "model",
    }
    shutil.copy(few, inputs["--data"])
    shutil.copy(few, inputs["--eval-data"])
    shutil.copytree(tiny_toy / "model", inputs["--model"])
    named = {flag.removeprefix("--"): path for flag, path in inputs.items()} | {
        "eval-samples": 1,
        "eval-before": False,
    }
    train_here(*flags(tmp_path / "run", **named))
    changed = inputs[which]
    if which == "--model":
        tensors = load_file(changed / "model.safetensors")
        save_file(
            {name: tensor * 1.01 for name, tensor in tensors.items()},
            changed / "model.safetensors",
            metadata={"format": "pt"},
        )
    else:
        changed.write_text("".join(changed.read_text().splitlines(keepends=True)[:1]))
    before = files_of(tmp_path / "run")
    one_line(
        run_train(tmp_path, "--out", "run", "--resume", "--steps", 3),
        f"{changed}: not what {which} named",
        "put that back",
    )
    assert files_of(tmp_path / "run") == before


def test_a_run_does_not_go_on_in_another_precision(copied, tmp_path):
    """Without a flag the device decides, and a resume may find itself on another one."""
    config = json.loads((copied / "config.json").read_text())
    config["derived"]["bf16"] = True  # as on a GPU
    (copied / "config.json").write_text(json.dumps(config))
    code, lines, _ = run_train(tmp_path, "--out", copied, "--resume", "--steps", 3)
    assert code == 1 and len(lines) == 1 and "began with bfloat16, here it would go on" in lines[0]


@pytest.mark.parametrize(
    "name, place",
    [
        ("state.pt", 0.3),
        ("state.pt", 0.95),
        ("adapter/adapter_model.safetensors", 0.6),
        ("adapter/adapter_config.json", 0.4),
    ],
)
def test_a_flipped_bit_in_a_checkpoint_is_refused(copied, tmp_path, name, place):
    path = copied / "checkpoints" / "step-000002" / name
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)
    one_line(
        run_train(tmp_path, "--out", copied, "--resume", "--steps", 3),
        "step-000002: damaged checkpoint",
        name,
        "remove this directory",
    )
    if place == 0.95:
        shutil.rmtree(copied / "checkpoints" / "step-000002")
        assert run_train(tmp_path, "--out", copied, "--resume", "--steps", 3)[0] == 0


def replace_in(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


DAMAGE = {
    "state.json": lambda p: replace_in(
        p / "checkpoints/step-000002/state.json", '"step": 2', '"step": 3'
    ),
    "state.json is a list": lambda p: (p / "checkpoints/step-000002/state.json").write_text("[]"),
    "metrics.jsonl": lambda p: replace_in(p / "metrics.jsonl", '{"step"', '{step"'),
    "metrics.jsonl is of lists": lambda p: (p / "metrics.jsonl").write_text("[1]\n[2]\n"),
    "samples.jsonl": lambda p: replace_in(p / "samples.jsonl", '"step": 1', '"step": "one"'),
    "config.json": lambda p: (p / "config.json").write_text("{"),
    "config.json is a list": lambda p: (p / "config.json").write_text("[]"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_content_is_one_line_with_the_file(copied, tmp_path, what):
    DAMAGE[what](copied)
    file = "step-000002: damaged checkpoint" if "state" in what else what.split()[0]
    one_line(run_train(tmp_path, "--out", copied, "--resume", "--steps", 3), file)


def test_checkpoints_whose_disk_is_not_there_stop_a_resume(copied, tmp_path):
    """The run would start again at step 1, and drop what is in the logs."""
    shutil.rmtree(copied / "checkpoints")
    (copied / "checkpoints").symlink_to("/nowhere/disk")
    before = (copied / "metrics.jsonl").read_bytes()
    one_line(run_train(tmp_path, "--out", copied, "--resume", "--steps", 3), "mount it")
    assert (copied / "metrics.jsonl").read_bytes() == before


def test_a_copy_beside_the_checkpoints_is_passed_over(copied, tmp_path):
    shutil.copytree(copied / "checkpoints/step-000001", copied / "checkpoints/step-000003-copy")
    assert checkpoint.latest(copied / "checkpoints").name == "step-000002"


def test_a_run_without_its_checkpoints_says_that_it_starts_again(copied, tmp_path):
    shutil.rmtree(copied / "checkpoints")
    code, lines, _ = run_train(tmp_path, "--out", copied, "--resume", "--steps", 2)
    assert (
        code == 0 and len(lines) == 1 and "no checkpoint is here, the run starts again" in lines[0]
    )


def test_an_edited_config_is_not_taken_for_damage_alone(copied, tmp_path):
    """Whoever follows the message would remove one good checkpoint after the other."""
    replace_in(copied / "config.json", '"lora_rank": 4', '"lora_rank": 8')
    result = run_train(tmp_path, "--out", copied, "--resume", "--steps", 3)
    one_line(result, "or config.json was edited", "put that back")


def test_a_copied_run_goes_on_in_its_own_directory(copied, finished, tmp_path):
    before = files_of(finished)
    assert run_train(tmp_path, "--out", copied, "--resume", "--steps", 3)[0] == 0
    assert files_of(finished) == before and (copied / "checkpoints/step-000003").is_dir()


def test_nothing_to_do(copied, tmp_path):
    before = files_of(copied)
    code, lines, out = run_train(tmp_path, "--out", copied, "--resume", "--steps", 2)
    assert code == 0 and lines == [] and "all 2 steps are done, there is nothing to do" in out
    assert files_of(copied) == before
    shutil.rmtree(copied / "model")
    code, lines, out = run_train(tmp_path, "--out", copied, "--resume")
    assert code == 0 and "nothing to do" not in out and (copied / "model").is_dir()


def test_resume_auto_starts_and_goes_on_with_the_same_command(flags, tmp_path):
    """As a requeued job does, after a kill that left a lock, at a step, and when all is done."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").touch()
    command = [*flags("run"), "--checkpoint-every", 1, "--resume", "auto"]
    assert run_train(tmp_path, *command)[0] == 0
    whole = files_of(tmp_path / "run")
    assert "all 2 steps are done" in run_train(tmp_path, *command)[2]
    assert files_of(tmp_path / "run") == whole

    shutil.rmtree(tmp_path / "run/model")
    shutil.rmtree(tmp_path / "run/checkpoints/step-000002")
    assert run_train(tmp_path, *command)[0] == 0
    shutil.rmtree(tmp_path / "run/checkpoints")  # a kill before the first checkpoint
    code, lines, _ = run_train(tmp_path, *command)
    assert code == 0 and "no checkpoint is here, the run starts again" in lines[0]
    for name in ("model/model.safetensors", "checkpoints/step-000002/state.json"):
        assert files_of(tmp_path / "run")[Path(name)] == whole[Path(name)]
    one_line(run_train(tmp_path, *command, "--lr", 0.5), "changed settings (--lr was 0.01)")


def test_resume_auto_leaves_the_files_of_others_alone(flags, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    one_line(run_train(tmp_path, *flags("run"), "--resume", "auto"), "output directory in use")
    one_line(run_train(tmp_path, *flags("run"), "--resume", "maybe"), "--resume", "auto")
    assert files_of(tmp_path / "run") == {Path("notes.txt"): b"mine"}


def test_all_ranks_find_the_same_with_resume_auto(flags, tmp_path):
    for steps in (1, 2):
        command = ["train.py", *flags(tmp_path / "run", steps=steps), "--resume", "auto"]
        assert_ended_well(start_ranks(tmp_path, train.main, *command), tmp_path)
    metrics = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [1, 2]


# ---- broken weights, tokenizers, adapters


def tensors_of(path, change):
    save_file(
        change(load_file(path / "model.safetensors")),
        path / "model.safetensors",
        metadata={"format": "pt"},
    )


def with_nan(tensors):
    tensors["model.norm.weight"][3] = torch.nan
    return tensors


def with_config(path, name, **changes):
    config = json.loads((path / name).read_text())
    (path / name).write_text(json.dumps(config | changes))


def with_code(path):
    (path / "code.py").write_text(f"open({str(path / 'ran')!r}, 'w')\n")
    with_config(
        path,
        "config.json",
        model_type="mine",
        auto_map={"AutoConfig": "code.A", "AutoModelForCausalLM": "code.B"},
    )


BROKEN = {
    "a layer is missing": (
        lambda p: tensors_of(p, lambda t: {k: v for k, v in t.items() if ".1." not in k}),
        ["11 weights are missing", "model.layers.1."],
    ),
    "another shape": (
        lambda p: tensors_of(p, lambda t: t | {"model.norm.weight": torch.ones(7)}),
        ["1 weights are missing, of another shape", "model.norm.weight"],
    ),
    "not finite": (lambda p: tensors_of(p, with_nan), ["not finite", "model.norm.weight"]),
    "no tokenizer.json": (lambda p: (p / "tokenizer.json").unlink(), ["cannot load the model"]),
    "no tokenizer at all": (
        lambda p: [(p / f"tokenizer{part}.json").unlink() for part in ("", "_config")],
        ["files of the tokenizer are missing"],
    ),
    "broken template": (
        lambda p: (p / "chat_template.jinja").write_text("{% for m in messages %}{{ m"),
        ["chat template does not work", "correct chat_template.jinja"],
    ),
    "template that refuses": (
        lambda p: (p / "chat_template.jinja").write_text("{{ raise_exception('no') }}"),
        ["chat template does not work (TemplateError: no)"],
    ),
    "template without messages": (
        lambda p: (p / "chat_template.jinja").write_text("hello"),
        ["does not depend on the problem"],
    ),
    "another's tokenizer": (
        lambda p: (
            with_config(p, "config.json", vocab_size=40),
            tensors_of(
                p, lambda t: {k: v[:40].clone() if "embed" in k else v for k, v in t.items()}
            ),
        ),
        ["the model 40 embeddings"],
    ),
    "no end": (
        lambda p: (
            with_config(p, "config.json", eos_token_id=None),
            with_config(p, "generation_config.json", eos_token_id=None),
            with_config(p, "tokenizer_config.json", eos_token=None),
            (p / "chat_template.jinja").write_text(
                "{% for m in messages %}{{ m.content }}{% endfor %}"
            ),
        ),
        ["eos_token_id"],
    ),
    "no number for the end": (
        lambda p: with_config(p, "generation_config.json", eos_token_id="x"),
        ["choose another"],
    ),
    "template without thinking": (
        lambda p: (p / "chat_template.jinja").write_text(
            "{% if enable_thinking %}{{ messages[0].content }}{% endif %}"
        ),
        ["does not depend on the problem"],
    ),
    "code of its own": (with_code, ["cannot load the model", "code"]),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_model_is_refused_in_one_line(flags, tiny_toy, tmp_path, what):
    path = tmp_path / "model"
    shutil.copytree(tiny_toy / "model", path)
    break_it, parts = BROKEN[what]
    break_it(path)
    one_line(run_train(tmp_path, *flags("run", model=path)), str(path), *parts)
    assert not (path / "ran").exists() and not (tmp_path / "run").exists()


def test_weights_without_a_place_are_said(tiny_toy, tmp_path, capsys):
    path = Path(shutil.copytree(tiny_toy / "model", tmp_path / "model"))
    config = json.loads((path / "config.json").read_text())
    with_config(path, "config.json", num_hidden_layers=2, layer_types=config["layer_types"][:2])
    load_model(str(path), torch.float32, CPU)
    assert (
        "warning: 11 weights of the checkpoint have no place in the model, first model.layers.2."
        in (capsys.readouterr().err)
    )


def test_code_that_comes_with_a_known_model_is_not_run_and_nobody_is_asked(tiny_toy, tmp_path):
    path = Path(shutil.copytree(tiny_toy / "model", tmp_path / "model"))
    with_code(path)
    with_config(path, "config.json", model_type="qwen3")
    load_model(str(path), torch.float32, CPU)
    assert not (path / "ran").exists()


def test_every_load_forbids_remote_code():
    root = Path(train.__file__).parent
    calls = [
        call
        for file in root.rglob("*.py")
        if not {".venv", "tests"} & set(file.parts) and file.name != "minimal.py"
        for call in re.findall(
            r"Auto\w+\.from_pretrained\((?:[^()]|\n)*\)", file.read_text(encoding="utf-8")
        )
    ]
    assert len(calls) >= 2 and all("trust_remote_code=False" in call for call in calls), calls


@pytest.fixture
def adapter(finished, tmp_path):
    return Path(shutil.copytree(finished / "checkpoints/step-000002/adapter", tmp_path / "adapter"))


def adapter_with_nan(path):
    tensors = load_file(path / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, path / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "break_it, part",
    [
        (adapter_with_nan, "not finite"),
        (lambda p: with_config(p, "adapter_config.json", r="4"), "cannot load"),
        (lambda p: with_config(p, "adapter_config.json", lora_alpha="8"), "cannot load"),
        (lambda p: with_config(p, "adapter_config.json", lora_alpha=None), "cannot load"),
        (
            lambda p: with_config(p, "adapter_config.json", lora_alpha=1e300),
            "B of .* is not finite",
        ),
        (
            lambda p: with_config(p, "adapter_config.json", lora_alpha=float("nan")),
            "B of .* is not finite",
        ),
        (lambda p: (p / "adapter_config.json").write_text("[]"), "cannot load"),
    ],
)
def test_a_broken_adapter_is_refused(adapter, tiny_toy, break_it, part):
    """With a NaN it evaluated to 0.00."""
    model = load_model(str(tiny_toy / "model"), torch.float32, CPU)[0]
    break_it(adapter)
    with pytest.raises(InputError, match=part) as error:
        load_adapter(model, adapter)
    assert "\n" not in str(error.value)


# ---- flags and data


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"lora-rank": 1_000_000_000}, "change --lora-rank"),
        ({"lr": -1}, "--lr must be at least 0, got -1.0"),
        ({"weight-decay": "inf"}, "--weight-decay must be below inf"),
        ({"prompts-per-step": 0}, "--prompts-per-step must be at least 1"),
        ({"seed": 2**70}, "--seed must be at most"),
        ({"temperature": 0}, "--temperature must be at least 0.01"),
        ({"score-temperature": 1e-320}, "--score-temperature must be at least 0.01"),
    ],
)
def test_values_that_cannot_work(flags, tmp_path, changes, part):
    one_line(run_train(tmp_path, *flags("run", **changes)), part)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flag, value", [("--temperature", "inf"), ("--temperature", "nan"), ("--seed", 2**70)]
)
def test_values_that_cannot_work_in_evaluation(tmp_path, flag, value):
    one_line(
        forked(tmp_path, evaluation.main, "eval.py", "--model", "m", "--data", "d", flag, value),
        f"{flag} must",
    )


@pytest.mark.parametrize(
    "main, argv",
    [
        (train.main, ["--temperatur", "1"]),
        (evaluation.main, ["--temperatur", "1"]),
        (diagnostics.main, ["--gam", "1"]),
        (compare.main, ["--step", "1"]),
        (plot.main, ["--result", "r"]),
        (report.main, ["t", "--colou", "gate"]),
        (bench.main, ["--row", "3"]),
        (report.main, ["run", "--ou", "x"]),
    ],
)
def test_abbreviated_flags_are_refused(tmp_path, main, argv):
    code, lines, _ = forked(tmp_path, main, "program", *argv)
    assert code in (1, 2) and "unrecognized arguments: --" in lines[-1]


ROW = {"problem": "What is 2+3?", "solution": "2+3=5. \\boxed{5}", "answer": "5"}


@pytest.mark.parametrize(
    "content, part",
    [
        (json.dumps(ROW).encode("utf-16"), "line 1: not valid JSON in UTF-8"),
        (gzip.compress(json.dumps(ROW).encode(), mtime=0), "line 1: not valid JSON in UTF-8"),
        (
            b'{"problem": "p", "solution": "s", "answer": 1e400}',
            "line 1: field 'answer': 1 gold answers",
        ),
        (
            b'{"problem": "p", "solution": "s", "answer": Infinity}',
            "line 1: field 'answer': 1 gold answers",
        ),
        (
            b'{"problem": "p", "solution": "s", "answer": NaN}',
            "line 1: field 'answer': 1 gold answers",
        ),
    ],
)
def test_data_that_cannot_be_used_is_named(tmp_path, content, part):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(part)) as error:
        load_problems(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_byte_order_mark_of_utf8_is_no_mistake(tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps(ROW), encoding="utf-8-sig")
    assert load_problems(tmp_path / "data.jsonl")[0][0].answer == "5"


def test_an_answer_of_hundreds_of_digits(tmp_path):
    (tmp_path / "data.jsonl").write_text(
        '{"problem": "p", "solution": "s", "answer": 1%s}' % ("0" * 400)
    )
    assert load_problems(tmp_path / "data.jsonl")[0][0].answer == "1" + "0" * 400


def test_unreadable_data(tmp_path, monkeypatch, capsys):
    def read_bytes(self):
        raise PermissionError(13, "Permission denied", str(self))

    with pytest.raises(InputError, match="no such data file.*check the path"):
        load_problems(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="no such data file.*check the path"):
        load_problems(tmp_path / "pipe")
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    (tmp_path / "data.jsonl").write_text("{}")
    with pytest.raises(SystemExit), run.one_line_errors("train.py", ""):
        load_problems(tmp_path / "data.jsonl")
    line = capsys.readouterr().err
    assert f"{tmp_path / 'data.jsonl'}: cannot be read" in line and "Permission denied" in line


# ---- disks that are full, directories that go, readers that leave


@pytest.mark.parametrize("limit", [1000, 4000, 8000, 30_000, 200_000, 1_384_000])
def test_a_full_disk_is_one_line_and_what_was_complete_stays(flags, tmp_path, limit):
    """Files cannot grow beyond `limit` bytes: config, logs, adapter, optimizer and model fail in
    turn, and the three libraries that write them raise three types of error."""

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    own = flags("run", **{"lora-rank": 8})
    one_line(run_train(tmp_path, *own, before=full), "run/", "cannot be written", "free space")
    assert not list(tmp_path.glob("run/**/*.tmp/*"))
    resume = ["--out", "run", "--resume"] if (tmp_path / "run/config.json").exists() else own
    assert run_train(tmp_path, *resume)[0] == 0
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [1, 2] and (tmp_path / "run/model").is_dir()


def test_the_output_directory_is_removed_during_the_run(flags, tmp_path):
    def remove():
        finish = run.StepLog.finish_step

        def finish_step(*args, **kwargs):
            metrics = finish(*args, **kwargs)
            shutil.rmtree("run")
            return metrics

        run.StepLog.finish_step = finish_step

    one_line(
        run_train(tmp_path, *flags("run"), before=remove), "run/metrics.jsonl: cannot be written"
    )


def test_sighup_leaves_a_checkpoint_as_sigterm_does(flags, tmp_path):
    """A terminal that closes."""

    def hang_up():
        save = checkpoint.append_jsonl

        def append_jsonl(path, rows):
            save(path, rows)
            if path.name == "metrics.jsonl":
                os.kill(os.getpid(), signal.SIGHUP)

        checkpoint.append_jsonl = append_jsonl

    code, lines, _ = run_train(
        tmp_path, *flags("run", steps=50, **{"checkpoint-every": 50}), before=hang_up
    )
    assert (
        code == 128 + signal.SIGHUP
        and "stopped after step 1" in lines[-1]
        and "--resume" in lines[-1]
    )

    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        hang_up()

    assert run_train(tmp_path, *flags("nohup"), before=ignore)[0] == 0


# ---- permissions


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_everything_follows_the_umask(flags, tmp_path, monkeypatch, mask):
    """safetensors writes files that only their owner can read."""
    monkeypatch.setattr(toy, "_warm_up", lambda *args: None)
    before = os.umask(mask)
    try:
        train_here(*flags(tmp_path / "run"))
        model = tiny_qwen3()
        lora.add_lora(model, 4, 8)
        lora.save_adapter(model, tmp_path / "adapter")
        toy.build(tmp_path / "toy")
        toy.problem_file("test.jsonl", tmp_path / "problems")
    finally:
        os.umask(before)
    made = [tmp_path / name for name in ("run", "adapter", "toy", "problems")]
    entries = [path for place in made for path in [place, *place.rglob("*")]]
    assert len(entries) > 20
    for path in entries:
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


# ---- runs that learn nothing


@pytest.mark.parametrize(
    "changes, parts",
    [
        (
            {"max-new-tokens": 3},
            [
                "no completion finished: look at --max-new-tokens",
                "no completion had a boxed answer",
                "all rewards of a step were equal",
            ],
        ),
        ({"lr": 0}, ["the adapter's weights did not move: look at --lr"]),
    ],
)
def test_a_run_that_learns_nothing_says_so_once(flags, tmp_path, changes, parts):
    code, lines, _ = run_train(
        tmp_path, *flags("run", steps=12, **{"checkpoint-every": 12} | changes)
    )
    assert code == 0 and all(line.startswith("warning: for 5 steps ") for line in lines)
    assert all(sum(part in line for line in lines) == 1 for part in parts), lines


def test_a_run_that_learns_says_nothing(flags, tmp_path):
    assert run_train(tmp_path, *flags("run", steps=8, **{"prompts-per-step": 12}))[:2] == (0, [])


def test_the_five_steps_must_be_in_a_row():
    parameters = [torch.zeros(3)]
    watch, found = run.Watch(parameters), []
    for truncated in [1, 1, 1, 1, 0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]:
        parameters[0] += 1e-6
        found.append(
            watch.warnings({"truncated": truncated, "no_answer": 0.0, "reward_range": 0.5})
        )
    assert [len(lines) for lines in found] == [0] * 9 + [1] + [0] * 6


@pytest.mark.parametrize(
    "name, sound, sign, words",
    [
        ("repeated", 0.5, 0.51, "more than half of the 4-grams were repetitions"),
        ("student_entropy", 0.01, 0.009, "the student's entropy was below 0.01 nats"),
    ],
)
def test_a_collapse_is_told_once(name, sound, sign, words):
    parameters = [torch.zeros(3)]
    watch, found = run.Watch(parameters), []
    for value in [sign] * 4 + [sound] + [sign] * 7:
        parameters[0] += 1e-6
        found += watch.warnings({name: value})
    assert len(found) == 1 and words in found[0]


def test_signs_of_texts():
    assert doctest.testmod(run).failed == 0
    words = ["so", "it", "is", "so", "it", "is", "so", "it"]  # 5 4-grams, 3 of them different
    ids = [sorted(set(words)).index(word) for word in words]
    assert run.repeated(ids) == pytest.approx(2 / 5)
    assert run.repeated([7] * 100) == pytest.approx(1 - 1 / 97)


def test_config_json_shows_the_first_problem_s_two_prompts(finished, few):
    prompts = json.loads((finished / "config.json").read_text())["first_prompts"]
    first = json.loads(few.read_text().splitlines()[0])
    assert first["problem"] in prompts["student"] and first["solution"] not in prompts["student"]
    assert first["problem"] in prompts["teacher"] and first["solution"] in prompts["teacher"]


# ---- token_view


TOKENS = {
    "problem": "p\u202e",
    "prompt": "\x00",
    "solution": "s",
    "answer": "1",
    "correct": True,
    "reward": 1.0,
    "A": 0.5,
    "tokens": ["a\u202eb", "\x00", "\u2066x", "\ud83d", "é", "line\n"],
    "kind": [0] * 6,
    **{name: [0.5] * 6 for name in ("entropy", "lookahead", "gate", "delta", "advantage")},
}


def test_token_view_shows_what_would_garble_the_page(tmp_path):
    (tmp_path / "tokens.jsonl").write_text(json.dumps(TOKENS) + "\n")
    code, lines, _ = forked(tmp_path, report.main, "report", "tokens.jsonl")
    page = (tmp_path / "token_view.html").read_text(encoding="utf-8")
    assert code == 0 and not HIDDEN.search(page) and "\\u202e" not in page and "\\u0000" not in page
    assert (
        "a[U+202E]b" in page
        and "[U+0000]" in page
        and "[U+D83D]" in page
        and "é" in page
        and "line↵" in page
    )


@pytest.mark.parametrize(
    "content, argv, part",
    [
        ("", [], "no lines"),
        (json.dumps(TOKENS), ["--count", "0"], "--count is below 1"),
        ("[]", [], "not a tokens.jsonl"),
        (json.dumps(TOKENS), ["--out", "tokens.jsonl"], "a page is needed here"),
        ("[" * 200_000, [], "not a tokens.jsonl"),
        (json.dumps(TOKENS), ["--out", "."], "a page is needed here"),
        (json.dumps(TOKENS), ["--out", "/dev/null/x.html"], "cannot be read or written"),
    ],
)
def test_token_view_mistakes_are_one_line(tmp_path, content, argv, part):
    (tmp_path / "tokens.jsonl").write_text(content)
    one_line(forked(tmp_path, report.main, "report", "tokens.jsonl", *argv), part)
