"""What is exported is what was evaluated, also if training runs in bfloat16."""

import shutil
from collections import namedtuple

import pytest
import torch
from conftest import greedy_by_eval, train_arguments, train_here
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import eval as evaluation
import lora
from support.data import load_adapter, load_model
from support.errors import InputError
from support.settings import EvaluationSettings


def load(folder, dtype=torch.float32, adapter=None):
    # eager: torch's other attention in bfloat16 needs a CPU with AVX
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    if adapter:
        lora.load_adapter(model, adapter)
    return model


@torch.no_grad()
def logprobs(model):
    ids = torch.randint(3, 40, (150, 64), generator=torch.Generator().manual_seed(0))
    logprobs = model(ids).logits.float().log_softmax(-1)
    return logprobs[:, :-1].gather(2, ids[:, 1:, None]).flatten()


def train(toy, folder, dtype, steps, *more):
    """(base model, directory of the run): `steps` steps in bfloat16 from files in this dtype."""
    if not (folder / "base").exists():
        shutil.copytree(toy / "model", folder / "base")
        load(toy / "model", dtype).save_pretrained(folder / "base")
    changes = {
        "model": folder / "base",
        "steps": steps,
        "prompts-per-step": 4,
        "micro-batch": 4,
        "lr": 5e-6,
        "lora-rank": 64,
        "lora-alpha": 128,
        "checkpoint-every": 100,
        "bf16": True,
        "gradient-checkpointing": False,
    }
    train_here(*train_arguments(toy, folder / "run", **changes), *more)
    return folder / "base", folder / "run"


def adapter_of(run, steps):
    return run / f"checkpoints/step-{steps:06d}/adapter"


def assert_export_is_adapter(base, run, steps):
    """In float32, from the files. The bound is 2 % of what was learned."""
    before = logprobs(load(base))
    adapter = logprobs(load(base, adapter=adapter_of(run, steps)))
    exported = logprobs(load(run / "model"))
    assert (exported - adapter).abs().mean() <= 0.02 * (adapter - before).abs().mean()
    assert AutoConfig.from_pretrained(run / "model").dtype == torch.float32


def slope(base, run, steps):
    """How much of what the exported model learned the adapter in bfloat16 does: about 1."""
    learned = logprobs(load(run / "model")) - logprobs(load(base))
    rounded = logprobs(load(base, torch.bfloat16, adapter_of(run, steps)))
    rounded -= logprobs(load(base, torch.bfloat16))
    return (learned @ rounded / (learned @ learned)).item()


@pytest.fixture(scope="module")
def four_steps(tiny_toy, tmp_path_factory):
    return train(tiny_toy, tmp_path_factory.mktemp("export"), torch.bfloat16, 4)


def test_after_four_steps(four_steps):
    assert_export_is_adapter(*four_steps, 4)
    assert slope(*four_steps, 4) == pytest.approx(1, abs=0.3)


def test_eval_py_samples_the_same_of_model_and_adapter(four_steps, tiny_toy, tmp_path):
    assert_same_completions(*four_steps, 4, tiny_toy, tmp_path)


@pytest.mark.slow
def test_after_a_hundred_steps(four_steps, tiny_toy, tmp_path):
    base, run = four_steps
    train_here("--out", run, "--steps", "100", "--resume")
    assert_export_is_adapter(base, run, 100)
    assert slope(base, run, 100) == pytest.approx(1, abs=0.05)
    assert_same_completions(base, run, 100, tiny_toy, tmp_path)


def assert_same_completions(base, run, steps, toy, out):
    adapter = adapter_of(run, steps)
    exported = greedy_by_eval(toy / "test.jsonl", out / "a", "--model", run / "model")
    assert exported == greedy_by_eval(
        toy / "test.jsonl", out / "b", "--model", base, "--adapter", adapter
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_that_training_rounds_are_exported_unrounded(tiny_toy, tmp_path, capsys, dtype):
    """So a second training keeps what the first one learned."""
    base, run = train(tiny_toy, tmp_path, dtype, 4)
    assert "its weights are rounded to bfloat16" in capsys.readouterr().err
    assert_export_is_adapter(base, run, 4)


def test_an_adapter_on_another_base_is_named(four_steps, tiny_toy, tmp_path, capsys):
    """As that of a second training, which began from the export of the first one."""
    base, run = four_steps
    said = f"step-000004/adapter: warning: trained on {base}, not on this model"
    for place, is_said in ((base, False), (run / "model", True)):
        model, _ = load_model(str(place), torch.float32, torch.device("cpu"))
        load_adapter(model, adapter_of(run, 4))
        assert (said in capsys.readouterr().err) == is_said


def test_a_full_disk_is_found_before_training(tiny_toy, tmp_path, monkeypatch):
    """4 bytes a weight, 12 a trained weight for each of the checkpoints to come."""
    weights = sum(p.numel() for p in load(tiny_toy / "model").parameters())
    usage = namedtuple("usage", "free")
    flags = {"lora-rank": 1, "steps": 5}
    model = load(tiny_toy / "model")
    lora.add_lora(model, 1)
    trained = sum(p.numel() for p in lora.lora_parameters(model))
    needed = 4 * (weights + trained) + 3 * 12 * trained
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed - 1))
    with pytest.raises(InputError, match="run: the run writes 0.00 GB .* 0.00 GB free"):
        train_here(*train_arguments(tiny_toy, tmp_path / "run", **flags))
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed + 1))
    train_here(*train_arguments(tiny_toy, tmp_path / "run", **flags))
    assert (tmp_path / "run/model/config.json").exists()


@pytest.mark.parametrize("device, dtype", [("cuda", "auto"), ("cpu", torch.float32)])
def test_eval_takes_float32_files_as_they_are(device, dtype, tiny_toy, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        evaluation, "load_model", lambda name, dtype, *_, **how: asked.append(dtype) or (None, None)
    )
    s = EvaluationSettings(max_new_tokens=12)
    evaluation.load(s, str(tiny_toy / "model"), None, [], torch.device(device))
    assert asked == [dtype]
    model, _ = load_model(str(tiny_toy / "model"), "auto", torch.device("cpu"))
    assert model.dtype == torch.float32
    model.bfloat16().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_toy / "model").save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), "auto", torch.device("cpu"))
    assert model.dtype == torch.bfloat16
