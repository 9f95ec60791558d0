"""The paths that only a CUDA device takes: `pytest -m gpu`; skipped without one."""

import json

import pytest
import torch
from conftest import random_ids, tiny_qwen3, train_arguments, train_here

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
