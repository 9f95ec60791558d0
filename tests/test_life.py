"""A checkpoint through its whole life: loaded, trained in bfloat16, exported, loaded again by
transformers and by PEFT, and evaluated as a model and as an adapter.

It comes as real ones come: in bfloat16, with an eos that does not end a turn, a padded
vocabulary, a template that prints the date, and golds with #### before them.
"""

import json
import shutil

import pytest
import torch
from conftest import greedy_by_eval, train_arguments, train_here
from transformers import AutoModelForCausalLM, AutoTokenizer

import teacher
from support.data import load_model, load_problems

DAY = "2026-03-05"


def base_model(toy, place):
    shutil.copytree(toy / "model", place)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        written = json.loads((place / name).read_text())
        end = {"eos_token": "<|endoftext|>"} if "tokenizer" in name else {"eos_token_id": 0}
        (place / name).write_text(json.dumps(written | end))
    template = place / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}\n" + template.read_text())
    model = AutoModelForCausalLM.from_pretrained(place)
    model.resize_token_embeddings(model.config.vocab_size + 7)
    model.bfloat16().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def run(tiny_toy, tmp_path_factory):
    """The directory of the run, the base model beside it."""
    folder = tmp_path_factory.mktemp("life")
    base = base_model(tiny_toy, folder / "base")
    lines = (tiny_toy / "train.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    written = [json.dumps(r | {"answer": f"#### {r['answer']}"}) + "\n" for r in records]
    (folder / "data.jsonl").write_text("".join(written))
    changes = {"model": base, "data": folder / "data.jsonl", "bf16": True, "lr": 1e-3, "date": DAY}
    train_here(*train_arguments(tiny_toy, folder / "run", **changes))
    return folder / "run"


def adapter_of(run):
    return run / "checkpoints" / "step-000004" / "adapter"


def by_generate(model, tokenizer, problems):
    """Greedy completions by transformers, without the stop token; generation_config says where they
    stop."""
    found = []
    for problem in problems:
        messages = teacher.student_messages(problem.problem)
        prompt = torch.tensor([teacher.encode(tokenizer, messages, day=DAY)])
        with torch.no_grad():
            ids = model.generate(
                input_ids=prompt, do_sample=False, max_new_tokens=12, pad_token_id=0
            )[0, prompt.shape[1] :].tolist()
        stops = model.generation_config.eos_token_id
        found.append(tokenizer.decode(ids[:-1] if ids[-1] in stops else ids))
    return found


@pytest.fixture(scope="module")
def few(tiny_toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    lines = (tiny_toy / "test.jsonl").read_text().splitlines(keepends=True)[:16]
    (folder / "few.jsonl").write_text("".join(lines))
    return folder


def test_one_policy_in_every_form(run, few, tmp_path, capfd):
    base = run.parent / "base"
    problems, _ = load_problems(few / "few.jsonl", False)
    exported = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert exported.dtype == torch.float32
    expected = by_generate(exported, tokenizer, problems)
    assert len({*expected}) > 8
    assert (
        greedy_by_eval(few / "few.jsonl", tmp_path / "a", "--date", DAY, "--model", run / "model")
        == expected
    )
    adapter = ["--model", base, "--adapter", adapter_of(run)]
    assert greedy_by_eval(few / "few.jsonl", tmp_path / "b", "--date", DAY, *adapter) == expected
    assert (
        greedy_by_eval(few / "few.jsonl", tmp_path / "c", "--date", DAY, "--model", base)
        != expected
    )
    lines = capfd.readouterr().err.splitlines()
    stops = [line for line in lines if line.startswith("completions stop at")]
    assert len(stops) == 3 and all("(2, chat template)" in line for line in stops)

    assert exported.generation_config.eos_token_id == [0, 2]
    _, first = load_model(str(base), torch.float32, torch.device("cpu"))
    for problem in problems:
        messages = teacher.student_messages(problem.problem)
        prompts = [teacher.encode(one, messages, day=DAY) for one in (first, tokenizer)]
        assert prompts[0] == prompts[1]
    samples = [json.loads(line) for line in (run / "samples.jsonl").open()]
    assert sum(record["finished"] for record in samples) > len(samples) / 2
    assert all(record["gold"].isdigit() for record in samples)


def test_peft_reads_the_same_policy(run, few):
    peft = pytest.importorskip("peft")
    problems, _ = load_problems(few / "few.jsonl", False)
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    exported = AutoModelForCausalLM.from_pretrained(run / "model")
    base = AutoModelForCausalLM.from_pretrained(run.parent / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, adapter_of(run))
    theirs.generation_config = exported.generation_config
    assert by_generate(theirs, tokenizer, problems) == by_generate(exported, tokenizer, problems)
