"""The paths that only a CUDA device takes: `pytest -m gpu`; skipped without one."""

import json

import pytest
import torch
from conftest import random_ids, tiny_qwen3, train_arguments, train_here

import lora
import rollout
import teacher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = random_ids([5, 11, 1, 7, 23, 2])


def test_greedy_tokens_equal_generate():
    model = tiny_qwen3().cuda()
    ours = rollout.sample(model, PROMPTS, max_new_tokens=30, stop_ids=[1], temperature=0)
    for prompt, completion in zip(PROMPTS, ours, strict=True):
        theirs = model.generate(
            torch.tensor([prompt], device="cuda"), max_new_tokens=30, do_sample=False
        )
        assert completion.token_ids == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 0.5)])
def test_sampled_logprobs_equal_scored_logprobs(dtype, tolerance):
    model = tiny_qwen3().to("cuda", dtype)
    completions = rollout.sample(model, PROMPTS, max_new_tokens=25, stop_ids=[1])
    with torch.no_grad():
        reading = teacher.read(model, PROMPTS, [c.token_ids for c in completions])
    for c, scored in zip(completions, reading.logp.cpu(), strict=True):
        torch.testing.assert_close(
            torch.tensor(c.logprobs), scored[: len(c.logprobs)], atol=tolerance, rtol=0
        )


def test_a_run_uses_bfloat16_and_gradient_checkpointing(tiny_toy, tmp_path):
    train_here(*train_arguments(tiny_toy, tmp_path / "run"))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["derived"]["device"].startswith("cuda") and config["derived"]["bf16"]
    assert config["settings"]["gradient_checkpointing"]


def test_logits_of_reading_are_not_rounded_to_bfloat16():
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 1000, bias=False).to("cuda", torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(64, 256).to("cuda", torch.bfloat16)
    head = teacher.Head(linear)
    exact = hidden.float() @ linear.weight.float().T
    with torch.no_grad():
        torch.testing.assert_close(head(hidden), exact, rtol=1e-5, atol=1e-4)
    targets = torch.arange(64, device="cuda")
    hidden.requires_grad_()  # the frozen head differentiates by itself
    logp, _ = teacher.score(head, hidden, targets, 1.0, False)
    wanted = exact.log_softmax(1)[targets, targets]
    torch.testing.assert_close(logp, wanted, rtol=1e-5, atol=1e-4)
    logp.sum().backward()
    assert hidden.grad.isfinite().all()


def test_a_small_adapter_is_not_lost_in_bfloat16():
    """W x is summed on top of the adapter's part inside one product, as on the CPU."""
    torch.manual_seed(0)
    base = torch.nn.Linear(1024, 512, bias=False).to("cuda", torch.bfloat16)
    layer = lora.LoRALinear(base.requires_grad_(False), 64, 128)
    torch.nn.init.normal_(layer.lora_B, std=2e-5)
    x = torch.randn(1000, 1024).to("cuda", torch.bfloat16)
    with torch.no_grad():
        change = (layer(x) - layer.base(x)).float()
        wanted = 2 * x.float() @ layer.lora_A.T @ layer.lora_B.T
    share = (change * wanted).sum() / wanted.square().sum()
    assert share.item() == pytest.approx(1, abs=0.1)
