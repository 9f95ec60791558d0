"""eval.py: the figures against brute force, the command line against samples graded again."""

import doctest
import itertools
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_ended_well, start_ranks
from transformers import AutoTokenizer

import eval as evaluation
import reward
import rollout
import teacher
from support import memory, samples, settings


def test_pass_at_k_equals_counting_all_subsets():
    for n, correct in itertools.product(range(1, 7), range(7)):
        for k in range(1, n + 1):
            if correct <= n:
                subsets = list(
                    itertools.combinations([True] * correct + [False] * (n - correct), k)
                )
                assert evaluation.pass_at_k(n, correct, k) == pytest.approx(
                    sum(map(any, subsets)) / len(subsets)
                )


def test_majority_votes_over_equivalence_classes():
    """A vote on raw strings splits 1/2 and \\frac12, and lets "no answer" win nothing or
    everything."""
    assert evaluation.majority_accuracy(["1/2", "\\frac12", "3", "3", "0.5"], "0.5") == 1
    assert evaluation.majority_accuracy(["1/2", "\\frac12", "3", "3"], "0.5") == 0.5
    assert evaluation.majority_accuracy([None, None, "3"], "3") == 0
    assert evaluation.majority_accuracy([None, "3"], "3") == 0.5


def test_bootstrap_interval_covers_what_it_should():
    low, high = evaluation.bootstrap_interval([0.0] * 50 + [1.0] * 50)
    # 0.5 +- 1.96 * 0.05
    assert low == pytest.approx(0.40, abs=0.02) and high == pytest.approx(0.60, abs=0.02)
    assert evaluation.bootstrap_interval([1.0] * 5) == (1.0, 1.0)


def test_two_checkpoints_on_two_files(tiny_run, tiny_toy, tmp_path, monkeypatch, capsys):
    """The whole command: a table, and samples that grade again to the same figures. That the chat
    template would ask a teacher otherwise than the student is no matter here."""
    lines = (tiny_toy / "test.jsonl").read_text().splitlines()[:60]
    test, other, model = tmp_path / "test.jsonl", tmp_path / "other.jsonl", tmp_path / "model"
    shutil.copytree(tiny_toy / "model", model)
    with (model / "chat_template.jinja").open("a") as template:
        template.write("{% if messages[0].content | length > 900 %}<think>{% endif %}")
    question = {"question": "Is it \\frac{1}{2}?", "answer": "1"}
    test.write_text("\n".join(lines) + "\n")
    other.write_text(lines[0] + "\n" + json.dumps(question) + "\n")
    argv = [
        "eval.py",
        "--model",
        model,
        "--model",
        model,
        "--adapter",
        tiny_run / "checkpoints/step-000004/adapter",
        "--data",
        test,
        "--data",
        other,
        "--samples",
        3,
        "--max-new-tokens",
        12,
        "--no-thinking",
        "--out",
        tmp_path / "out",
    ]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    evaluation.main()
    table, said = capsys.readouterr()
    assert said.count("--no-thinking: prompts end in '<|im_end|>") == 2
    *_, first, second, third, fourth = [line.split() for line in table.splitlines()[:6]]
    assert [line[0] for line in (first, second)] == [str(test)] * 2
    assert [line[0] for line in (third, fourth)] == [str(other)] * 2
    adapter = str(tiny_run / "checkpoints/step-000004/adapter")
    assert [adapter in line for line in (first, second, third, fourth)] == [False, True] * 2
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 2 * 3 * (len(lines) + 2)
    assert all(
        row["correct"] == (row["finished"] and reward.grade(row["completion"], row["gold"]))
        for row in rows
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    first = results[0]["checkpoint"]
    mine = [row for row in rows if row["checkpoint"] == first and row["data"] == str(test)]
    assert results[0]["avg"] > 0 and results[0]["avg"] == pytest.approx(
        sum(row["correct"] for row in mine) / len(mine)
    )
    assert results[0]["length"] == pytest.approx(sum(row["tokens"] for row in mine) / len(mine))
    assert len(results) == 4


def test_two_processes_write_the_samples_of_one(tiny_toy, tmp_path, monkeypatch):
    lines = (tiny_toy / "test.jsonl").read_text().splitlines(keepends=True)[:9]
    (tmp_path / "nine.jsonl").write_text("".join(lines))
    flags = [
        "--model",
        tiny_toy / "model",
        "--data",
        tmp_path / "nine.jsonl",
        "--samples",
        2,
        "--max-new-tokens",
        12,
    ]
    two = start_ranks(tmp_path, evaluation.main, "eval.py", *flags, "--out", tmp_path / "two")
    assert_ended_well(two, tmp_path)
    call(monkeypatch, *flags, "--out", tmp_path / "one")
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "results.json",
        "samples.jsonl",
    ]
    assert (tmp_path / "one" / "samples.jsonl").read_text() == (
        tmp_path / "two" / "samples.jsonl"
    ).read_text()


@pytest.mark.parametrize(
    "change, message",
    [
        (["--data", "nothing.jsonl"], "nothing.jsonl: no such data file"),
        (["--model", "./nothing"], "./nothing: no such model"),
        (["--samples", "0"], "--samples"),
        (["--adapter", "a", "--adapter", "b"], "--adapter"),
        (["--adapter", "a"], "a/adapter_config.json: cannot be read"),
        (["--model", "toy", "--model", "./nothing"], "./nothing: no such model"),
        (["--max-new-tokens", "5000"], "line 1: field 'problem'"),
        (["--top-p", "2"], "--top-p"),
        (["--sampels", "2"], "--sampels"),
    ],
)
def test_mistakes_are_one_line(tiny_toy, tmp_path, monkeypatch, capsys, change, message):
    argv = ["eval.py", "--out", str(tmp_path / "out"), "--max-new-tokens", "4"]
    for name, value in (("--model", "model"), ("--data", "test.jsonl")):
        argv += [] if name in change else [name, str(tiny_toy / value)]
    monkeypatch.setattr(sys, "argv", argv + change)
    with pytest.raises(SystemExit) as exit:
        evaluation.main()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit.value.code == 1 and error.startswith("eval.py: ") and message in error
    assert not (tmp_path / "out").exists()


def call(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, argv)])
    evaluation.main()


def fails(monkeypatch, capsys, *argv):
    with pytest.raises(SystemExit) as exit:
        call(monkeypatch, *argv)
    assert exit.value.code not in (0, None)
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_one_model_has_one_accuracy(tiny_run, tiny_toy, tmp_path, monkeypatch):
    """What train.py reports of the trained model, eval.py finds without a flag of sampling: the
    same completions, from model/ and from the adapter."""
    reported = json.loads((tiny_run / "evaluation.json").read_text())["after"]
    theirs = (tiny_run / "held_out_after.jsonl").read_text().splitlines()
    adapter = tiny_run / "checkpoints" / "step-000004" / "adapter"
    for n, named in enumerate(
        [["--model", tiny_run / "model"], ["--model", tiny_toy / "model", "--adapter", adapter]]
    ):
        out = tmp_path / str(n)
        call(monkeypatch, *named, "--data", tiny_toy / "test.jsonl", "--out", out)
        result = json.loads((out / "results.json").read_text())["results"][0]
        assert (result["avg"], result["length"]) == (reported["accuracy"], reported["length"])
        ours = (out / "samples.jsonl").read_text().splitlines()
        for a, b in zip(ours, theirs, strict=True):
            assert json.loads(a).items() >= json.loads(b).items()


def test_the_defaults_are_those_of_the_run_or_the_paper(
    tiny_run, tiny_toy, tmp_path, monkeypatch, capsys
):
    how = settings.evaluation_of
    config = json.loads((tiny_run / "config.json").read_text())["settings"]
    of_run = how(str(tiny_run / "model"))
    assert of_run["max_new_tokens"] == config["max_new_tokens"] and of_run["samples"] == 1
    toy = settings.PRESETS["toy"]
    assert how("toy")["max_new_tokens"] == toy["max_new_tokens"]
    assert how("toy")["top_p"] == toy["eval_top_p"]
    # a checkpoint that no run made: K = 4, thinking, as much as its window leaves
    assert how(str(tiny_toy / "model")) == how("Qwen/Qwen3-4B") == {}
    out = tmp_path / "out"
    data = tmp_path / "one.jsonl"
    data.write_text((tiny_toy / "test.jsonl").read_text().splitlines()[0] + "\n")
    monkeypatch.setattr(rollout, "window", lambda model: 60)
    flags = ["--model", tiny_toy / "model", "--data", data, "--out", out]
    call(monkeypatch, *flags)
    used = json.loads((out / "results.json").read_text())["settings"]
    sampled = json.loads((out / "samples.jsonl").read_text().splitlines()[0])
    tokenizer = AutoTokenizer.from_pretrained(tiny_toy / "model")
    asked = teacher.student_messages(sampled["problem"])
    assert used["max_new_tokens"] == 60 - len(teacher.encode(tokenizer, asked, True, used["date"]))
    assert (used["samples"], used["top_p"], used["thinking"]) == (4, 0.95, True)
    call(monkeypatch, *flags, "--resume")
    monkeypatch.setattr(rollout, "window", lambda model: 8)
    flags[-1] = tmp_path / "too-small"
    assert "window of 8" in fails(monkeypatch, capsys, *flags)
    assert not flags[-1].exists()


def test_the_first_run_says_how_to_sample_unless_a_flag_does(tmp_path):
    for name, count in ("a", 1), ("b", 4):
        (tmp_path / name / "model").mkdir(parents=True)
        config = {"entry": "", "settings": vars(settings.Settings(eval_samples=count))}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    named = ["--model", "Qwen/Qwen3-4B", "--model", tmp_path / "b" / "model"]
    named += ["--model", tmp_path / "a" / "model", "--data", "toy"]
    parsed = settings.parse_evaluation(list(map(str, named)), "")
    assert (parsed.samples, parsed.max_new_tokens) == (4, settings.Settings.max_new_tokens)
    parsed = settings.parse_evaluation([*map(str, named), "--samples", "2"], "")
    assert parsed.samples == 2 and not parsed.thinking
    # the toy's preset is no run
    parsed = settings.parse_evaluation(["--model", "toy", *map(str, named)], "")
    assert parsed.samples == 4


def test_a_run_is_found_behind_any_path_and_nowhere_else(tiny_run, tmp_path, monkeypatch):
    how = settings.evaluation_of(str(tiny_run / "model"))
    (tmp_path / "link").symlink_to(tiny_run / "checkpoints" / "step-000004" / "adapter")
    assert settings.evaluation_of(str(tmp_path / "link")) == how
    monkeypatch.chdir(tiny_run / "model")
    assert settings.evaluation_of(".") == settings.evaluation_of("../model/") == how
    monkeypatch.chdir(tiny_run)
    assert settings.evaluation_of("Qwen/Qwen3-4B") == settings.evaluation_of("gpt2") == {}
    other = tmp_path / "other"
    (other / "model").mkdir(parents=True)
    (other / "config.json").write_text("[]")  # of other software
    assert settings.evaluation_of(str(other / "model")) == {}


@pytest.fixture
def small(tiny_toy, tmp_path):
    """Flags of an evaluation of 12 problems, twice each, six rows at a time."""
    data = tmp_path / "twelve.jsonl"
    data.write_text("".join((tiny_toy / "test.jsonl").read_text().splitlines(keepends=True)[:12]))
    return [
        "--model",
        tiny_toy / "model",
        "--data",
        data,
        "--samples",
        2,
        "--max-new-tokens",
        12,
        "--slots",
        6,
        "--no-thinking",
        "--temperature",
        1.4,
    ]


@pytest.fixture
def whole(small, tmp_path, monkeypatch):
    """What they leave."""
    call(monkeypatch, *small, "--out", tmp_path / "whole")
    return (tmp_path / "whole" / "samples.jsonl").read_text()


@pytest.fixture
def handlers():
    """Those of a command started from a shell; put back at the end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("ranks, number", [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_stopped_evaluation_goes_on(
    small, whole, tmp_path, monkeypatch, capsys, ranks, number, handlers
):
    """Samples are on disk as soon as they are graded; --resume keeps them and makes the others."""
    out, append, sample, made = tmp_path / "out", samples.append_jsonl, rollout.sample, []

    def stop_at_nine(path, rows):
        append(path, rows)
        made.extend(rows)
        if len(made) == 9:
            signal.raise_signal(number)

    monkeypatch.setattr(samples, "append_jsonl", stop_at_nine)
    assert f"--out {out} --resume" in fails(monkeypatch, capsys, *small, "--out", out)
    lines = (out / "samples.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 9 and set(lines) <= set(whole.splitlines(keepends=True))
    # as they came, from all slots, not chunk by chunk
    assert lines != sorted(lines, key=whole.index)
    if ranks == 2:  # as torchrun leaves them, one file cut off in a line
        (out / "samples.jsonl").unlink()
        (out / "samples.rank0.jsonl").write_text("".join(lines[:4]))
        (out / "samples.rank1.jsonl").write_text("".join(lines[4:8]) + lines[8][:30])
    again = []
    monkeypatch.setattr(
        rollout,
        "sample",
        lambda *args, **kwargs: (again.extend(kwargs["seeds"]), sample(*args, **kwargs))[1],
    )
    call(monkeypatch, *small, "--out", out, "--slots", 3, "--resume")
    assert len(again) == 24 - (9 if ranks == 1 else 8)
    assert (out / "samples.jsonl").read_text() == whole
    assert sorted(path.name for path in out.iterdir()) == ["results.json", "samples.jsonl"]
    table = capsys.readouterr().out
    # nothing is left to do: the table comes again
    call(monkeypatch, *small, "--out", out, "--resume")
    assert capsys.readouterr().out == table and len(again) == 24 - (9 if ranks == 1 else 8)


def test_a_user_s_copy_of_the_samples_is_not_read(small, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "whole"
    wrong = whole.replace('"correct": true', '"correct": false')
    (out / "samples.backup.jsonl").write_text(wrong)
    call(monkeypatch, *small, "--out", out, "--resume")
    assert wrong != whole == (out / "samples.jsonl").read_text()


def test_what_cannot_be_resumed_is_refused(small, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "whole"
    assert "--resume needs --out" in fails(monkeypatch, capsys, *small, "--resume")
    assert "output directory in use" in fails(monkeypatch, capsys, *small, "--out", out)
    assert "no evaluation" in fails(
        monkeypatch, capsys, *small, "--out", tmp_path / "new", "--resume"
    )
    assert not (tmp_path / "new").exists()
    error = fails(
        monkeypatch, capsys, *small, "--out", out, "--resume", "--samples", 3, "--seed", 1
    )
    assert "--samples was 2" in error and "--seed was 0" in error
    with (tmp_path / "twelve.jsonl").open("a") as data:
        data.write("\n")
    assert "twelve.jsonl: not what it was" in fails(
        monkeypatch, capsys, *small, "--out", out, "--resume"
    )
    assert json.loads((out / "results.json").read_text())["results"]  # what was found stays
    for damage in (
        "{}\n",
        whole.splitlines()[0].replace('"finished": ', '"finished": "no", "was": ') + "\n",
    ):
        (out / "samples.jsonl").write_text(damage + whole)
        assert "samples.jsonl: line 1: cannot be used" in fails(
            monkeypatch, capsys, *small, "--out", out, "--resume"
        )
        assert (out / "samples.jsonl").read_text() == damage + whole


def test_resume_auto_starts_an_evaluation_and_goes_on(small, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command = [*small, "--out", out, "--resume", "auto"]
    call(monkeypatch, *command)
    assert (out / "samples.jsonl").read_text() == whole
    (out / "samples.jsonl").write_text("".join(whole.splitlines(keepends=True)[:9]))
    call(monkeypatch, *command)
    assert (out / "samples.jsonl").read_text() == whole
    assert "--samples was 2" in fails(monkeypatch, capsys, *command, "--samples", 3)
    (out / "results.json").rename(out / "mine.json")
    assert "output directory in use" in fails(monkeypatch, capsys, *command)
    assert "--resume needs --out" in fails(monkeypatch, capsys, *small, "--resume", "auto")


def test_another_adapter_of_the_same_name_is_refused(
    small, tiny_run, tmp_path, monkeypatch, capsys
):
    """Its scale stands in adapter_config.json, not with its weights."""
    adapter = tmp_path / "adapter"
    flags = ["--adapter", tmp_path / "adapter", "--out", tmp_path / "out"]
    shutil.copytree(tiny_run / "checkpoints/step-000004/adapter", adapter)
    call(monkeypatch, *small, *flags)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"lora_alpha": 40 * config["lora_alpha"]})
    )
    assert "adapter_config.json: not what it was" in fails(
        monkeypatch, capsys, *small, *flags, "--resume"
    )


def test_what_a_kill_leaves_at_the_start_is_free(small, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json.tmp").write_text("{")
    call(monkeypatch, *small, "--out", tmp_path / "out")


@pytest.mark.parametrize("by", ["line", "problem"])
def test_completions_from_elsewhere(small, whole, tmp_path, monkeypatch, capsys, by):
    """Graded as our own are: the same table, without lengths if there are none."""
    rows, other = [json.loads(line) for line in whole.splitlines()], tmp_path / "other.jsonl"
    call(monkeypatch, *small, "--out", tmp_path / "whole", "--resume")
    table = capsys.readouterr().out.splitlines()[2].split()

    def grade(fields, text):
        other.write_text(
            "".join(
                json.dumps({name: row[name] for name in fields} | {text: row["completion"]}) + "\n"
                for row in rows[::-1]
            )
        )
        call(
            monkeypatch,
            "--from",
            other,
            "--data",
            tmp_path / "twelve.jsonl",
            "--out",
            tmp_path / text,
        )
        return capsys.readouterr().out.splitlines()[2].split()

    assert grade([by, "tokens", "finished"], "completion")[2:] == table[2:]
    without = grade([by, "finished"], "text")
    assert without[-4] == without[-1] == "-" and without[2:9] == table[2:9]
    kept = [
        json.loads(line)
        for line in (tmp_path / "completion" / "samples.jsonl").read_text().splitlines()
    ]
    same = ("line", "gold", "completion", "answer", "correct", "finished", "tokens")
    assert sorted(str([row[name] for name in same]) for row in kept) == sorted(
        str([row[name] for name in same]) for row in rows
    )


@pytest.mark.parametrize(
    "row, message",
    [
        ({"line": 1}, "completion must be text"),
        ({"text": "a"}, "has no such line, counted from 1, or no such problem"),
        ({"line": 99, "text": "a"}, "has no such line, counted from 1, or no such problem"),
        ("text", "cannot be used"),
        ({"line": 1, "text": "a", "finished": "yes"}, "finished true or false"),
        ({"line": 1, "text": "a", "tokens": 0}, "a whole number above 0"),
        ({"line": 1, "text": "a", "tokens": "9"}, "a whole number above 0"),
        (
            {"line": 1, "problem": "1+1?", "text": "a"},
            "has no such line, counted from 1, or no such problem",
        ),
        ({"line": 1, "text": "a"}, "0 completions of the problem in line 2"),
        (None, "no completion in this file"),
    ],
)
def test_completions_that_cannot_be_graded_are_named(
    small, tmp_path, monkeypatch, capsys, row, message
):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(row) + "\n" if row else "")
    error = fails(
        monkeypatch,
        capsys,
        "--from",
        other,
        "--data",
        tmp_path / "twelve.jsonl",
        "--out",
        tmp_path / "out",
    )
    assert (
        error.startswith(f"eval.py: {other}: ")
        and message in error
        and not (tmp_path / "out").exists()
    )
    assert "neither --model" in fails(monkeypatch, capsys, *small, "--from", other)


def test_completions_of_two_checkpoints_are_not_one(small, whole, tmp_path, monkeypatch, capsys):
    two = tmp_path / "two.jsonl"
    two.write_text(whole + whole.replace('"checkpoint": "', '"checkpoint": "other '))
    flags = ["--data", tmp_path / "twelve.jsonl", "--out", tmp_path / "out"]
    assert (
        "line 25" in (error := fails(monkeypatch, capsys, "--from", two, *flags))
        and "another checkpoint" in error
    )
    assert "utf-8" in fails(monkeypatch, capsys, "--from", utf16(two, whole), *flags)


def utf16(path, text):
    path.write_text(text, encoding="utf-16")
    return path


def test_completions_of_ungradable_rows_are_passed_over(
    small, whole, tmp_path, monkeypatch, capsys
):
    data = tmp_path / "twelve.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text(
        "".join(
            json.dumps(row | ({"answer": "proof"} if i == 3 else {})) + "\n"
            for i, row in enumerate(rows)
        )
    )
    other = tmp_path / "other.jsonl"
    other.write_text(whole.replace("\n", "\n\n", 1))  # blank lines do not count
    flags = ["--from", other, "--data", data, "--out", tmp_path / "out"]
    assert "--skip-ungradable" in fails(monkeypatch, capsys, *flags)
    call(monkeypatch, *flags, "--skip-ungradable")
    assert (
        json.loads((tmp_path / "out" / "results.json").read_text())["results"][0]["problems"] == 11
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_slots_that_fit_into_the_free_memory(small, whole, tmp_path, monkeypatch, capsys, device):
    """Keys and values in float32 at full length, by hand, against what the command says before the
    first token."""
    config = json.loads((Path(small[1]) / "config.json").read_text())
    token = 2 * 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    seen, sample = [], rollout.sample
    monkeypatch.setattr(
        rollout,
        "sample",
        lambda *args, **kwargs: (seen.append((args[1], kwargs["slots"])), sample(*args, **kwargs))[
            1
        ],
    )
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    free = 10**12
    call(monkeypatch, *small, "--out", tmp_path / "all")
    columns = max(map(len, seen[0][0])) + 12
    free = int(4 * columns * token / memory.MEMORY_SHARE) + 100
    call(monkeypatch, *small, "--out", tmp_path / "four")
    assert [slots for _, slots in seen] == [6, 4]
    said = capsys.readouterr().err
    assert f"6 rows of {columns} tokens" in said and "4 rows are decoded together" in said
    assert (tmp_path / "four" / "samples.jsonl").read_text() == whole
    monkeypatch.undo()
    if device == "cpu":
        assert 2**20 < memory.free_memory(torch.device("cpu")) < 2**50
    else:
        assert torch.cuda.is_available() or memory.free_memory(torch.device("cuda")) is None


def test_logits_that_are_not_finite_are_one_line(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        rollout,
        "draw_tokens",
        lambda logits, uniform, **how: (logits.argmax(-1), uniform.float() * torch.nan),
    )
    error = fails(monkeypatch, capsys, *small, "--out", tmp_path / "out")
    assert error.startswith("eval.py: token 1 of completion 0") and "not finite" in error


def test_no_free_memory_names_the_flag_to_lower(tiny_toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rollout, "sample", lambda *args, **kwargs: torch.empty(2**60))
    argv = [
        "eval.py",
        "--model",
        tiny_toy / "model",
        "--data",
        tiny_toy / "test.jsonl",
        "--max-new-tokens",
        4,
        "--out",
        tmp_path / "out",
    ]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    with pytest.raises(SystemExit) as exit:
        evaluation.main()
    assert exit.value.code == 1 and "--slots" in capsys.readouterr().err.splitlines()[-1]


def test_doctests():
    results = doctest.testmod(evaluation)
    assert results.attempted > 2 and results.failed == 0
