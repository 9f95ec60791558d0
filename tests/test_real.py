"""SmolLM2-135M, a model that was really pretrained: `pytest -m real`, about two minutes and 4 GB.

experiments/smollm2.sh makes what is needed first of all; without it the tests are skipped.
"""

import json

import pytest
import torch
from conftest import ROOT, greedy_by_eval, train_arguments, train_here
from transformers import AutoModelForCausalLM

import teacher
from support.data import load_model

MODEL = ROOT / "runs/smollm2/model"
PROBLEMS = ROOT / "runs/smollm2/problems"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not (MODEL / "config.json").exists() or not (PROBLEMS / "test.jsonl").exists(),
        reason="made by: bash experiments/smollm2.sh",
    ),
]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Four problems."""
    path = tmp_path_factory.mktemp("real") / "few.jsonl"
    lines = (PROBLEMS / "test.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]))
    return path


def by_generate(model, tokenizer, few):
    """Greedy completions of 12 tokens by transformers, one prompt at a time."""
    found = []
    for line in few.open():
        prompt = teacher.encode(tokenizer, teacher.student_messages(json.loads(line)["problem"]))
        with torch.no_grad():
            ids = model.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=12, pad_token_id=2
            )
        found.append(tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True))
    return found


def test_it_is_a_language_model_that_stops():
    model, tokenizer = load_model(str(MODEL), torch.float32, CPU)
    assert model.generation_config.eos_token_id == [2]
    prompt = teacher.encode(
        tokenizer, [{"role": "user", "content": "What is the capital of France?"}]
    )
    with torch.no_grad():
        ids = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=24, pad_token_id=2
        )[0, len(prompt) :]
    assert "Paris" in tokenizer.decode(ids) and ids[-1] == 2


def test_sampled_greedily_as_generate_does(few, tmp_path):
    model, tokenizer = load_model(str(MODEL), torch.float32, CPU)
    expected = by_generate(model, tokenizer, few)
    assert len({*expected}) > 1
    assert greedy_by_eval(few, tmp_path / "greedy", "--model", MODEL) == expected


@pytest.mark.parametrize("dtype, within", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_read_as_whole_logits_are(few, dtype, within):
    """Log-probs and entropies, of completions of unequal length, against a float32 model that
    reads one at a time."""
    model, tokenizer = load_model(str(MODEL), dtype, CPU)
    prompts, completions = [], []
    for n, line in enumerate(few.open()):
        record = json.loads(line)
        prompts.append(teacher.encode(tokenizer, teacher.student_messages(record["problem"])))
        completions.append(tokenizer(record["solution"]).input_ids[: 12 + 6 * n])
    with torch.no_grad():
        got = teacher.read(model, prompts, completions)
        exact = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        for i, (prompt, ids) in enumerate(zip(prompts, completions, strict=True)):
            logits = exact(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            logp = logits.double().log_softmax(-1)
            n = len(ids)
            chosen = logp[torch.arange(n), torch.tensor(ids)]
            assert (got.logp[i, :n] - chosen).abs().mean() < within
            entropy = -(logp.exp() * logp).sum(-1)
            assert (got.entropy[i, :n] - entropy).abs().mean() < within
            assert entropy.max() > 1


def test_two_steps_export_and_load_again(few, tmp_path):
    run = tmp_path / "run"
    flags = {"model": MODEL, "data": PROBLEMS / "train.jsonl", "steps": 2, "prompts-per-step": 4}
    changes = flags | {"lr": 1e-3, "max-new-tokens": 24}
    train_here(*train_arguments(tmp_path, run, **changes))
    adapter = run / "checkpoints" / "step-000002" / "adapter"
    as_model = greedy_by_eval(few, tmp_path / "a", "--model", run / "model")
    with_adapter = ["--model", MODEL, "--adapter", adapter]
    assert greedy_by_eval(few, tmp_path / "b", *with_adapter) == as_model
    assert greedy_by_eval(few, tmp_path / "c", "--model", MODEL) != as_model
    exported, tokenizer = load_model(str(run / "model"), torch.float32, CPU)
    assert by_generate(exported, tokenizer, few) == as_model
