"""The paths that only a CUDA device takes: `pytest -m gpu`; skipped without one."""

import json

import pytest
import torch
from conftest import greedy_by_eval, random_ids, tiny_qwen3, train_arguments, train_here
from test_export import assert_export_is_adapter
from test_graphs import DRAWS, adapted, change, run

import lora
import rollout
import teacher
from support.distributed import Ranks
from support.graphs import Graphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = random_ids([5, 11, 1, 7, 23, 2])


@pytest.fixture(autouse=True, scope="module")
def attention_of_training():
    """It takes cuDNN's attention away."""
    Ranks.alone()


DTYPES = [torch.float32, torch.bfloat16]


def test_greedy_tokens_equal_generate():
    model = tiny_qwen3().cuda()
    ours = rollout.sample(model, PROMPTS, max_new_tokens=30, stop_ids=[1], temperature=0)
    for prompt, completion in zip(PROMPTS, ours, strict=True):
        theirs = model.generate(
            torch.tensor([prompt], device="cuda"), max_new_tokens=30, do_sample=False
        )
        assert completion.token_ids == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sampled_logprobs_equal_scored_logprobs(dtype):
    """Of an adapted model: sampling uses rounded copies of the adapter, which must be the same."""
    model = adapted(tiny_qwen3()).to("cuda", dtype)
    completions = rollout.sample(model, PROMPTS * 8, max_new_tokens=25, stop_ids=[1])
    with torch.no_grad():
        reading = teacher.read(model, PROMPTS * 8, [c.token_ids for c in completions])
    sampled = torch.cat([torch.tensor(c.logprobs) for c in completions])
    gaps = (sampled - reading.logp[reading.mask].cpu()).abs()
    mean, high, most = (x.item() for x in (gaps.mean(), gaps.quantile(0.99), gaps.max()))
    print(f"{dtype}: mean {mean:.2g}, 99 % below {high:.2g}, most {most:.2g} nats")
    if dtype == torch.float32:
        assert most < 1e-3
    else:
        assert mean < 0.05 and high < 0.3


def assert_near(found, wanted):
    """float32: every number; bfloat16, which rounds to 3 digits: on average."""
    gaps = (found - wanted).float().abs()
    mean, most = gaps.mean().item(), gaps.max().item()
    print(f"{found.dtype}: mean {mean:.2g}, most {most:.2g}")
    assert most < 1e-3 if wanted.dtype == torch.float32 else mean < 0.05


@pytest.mark.parametrize("dtype", DTYPES)
def test_prompts_of_unequal_lengths_are_finite_and_as_if_alone(dtype):
    """Prefill, and reading with its gradients: padding on the right, no mask in bfloat16."""
    model = adapted(tiny_qwen3()).to("cuda", dtype)
    model.activation_checkpointing_enable({"use_reentrant": False})
    teacher.reading_mode(model)
    completions = random_ids([9, 3, 17, 1, 6, 30], seed=1)
    reading = teacher.read(model, PROMPTS, completions)
    reading.logp.sum().backward()
    assert all(p.grad.isfinite().all() for p in lora.lora_parameters(model))
    model.eval()
    with torch.inference_mode():
        together = rollout.prefill(model, PROMPTS).logits
        alone = [rollout.prefill(model, [prompt]).logits[0] for prompt in PROMPTS]
        assert_near(together, torch.stack(alone))
        alone = [
            teacher.read(model, [prompt], [completion]).logp[0]
            for prompt, completion in zip(PROMPTS, completions, strict=True)
        ]
        assert_near(reading.logp[reading.mask].to(dtype), torch.cat(alone).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_states_without_a_mask_equal_those_with_one(dtype):
    """They take other attention kernels."""
    model = tiny_qwen3().to("cuda", dtype)
    rows = [torch.tensor(ids, device="cuda") for ids in PROMPTS]
    ids = teacher.pad(rows)
    mask = teacher.pad([torch.ones_like(row) for row in rows])
    with torch.no_grad():
        without, masked = (
            model.base_model(input_ids=ids, attention_mask=m, use_cache=False).last_hidden_state
            for m in (None, mask)
        )
    assert_near(without[mask.bool()], masked[mask.bool()])


@pytest.fixture(scope="module")
def trained(tiny_toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu") / "run"
    train_here(*train_arguments(tiny_toy, out))
    return out


def test_a_run_uses_bfloat16_and_gradient_checkpointing(trained):
    config = json.loads((trained / "config.json").read_text())
    assert config["derived"]["device"].startswith("cuda") and config["derived"]["bf16"]
    assert config["settings"]["gradient_checkpointing"]


def test_the_exported_model_is_the_one_that_was_evaluated(trained, tiny_toy, tmp_path):
    """Base and adapter, as the evaluation after training uses them."""
    base = tiny_toy / "model"
    assert_export_is_adapter(base, trained, 4)
    problems = tiny_toy / "test.jsonl"
    exported = greedy_by_eval(problems, tmp_path / "a", "--model", trained / "model")
    adapter = trained / "checkpoints" / "step-000004" / "adapter"
    adapted = greedy_by_eval(problems, tmp_path / "b", "--model", base, "--adapter", adapter)
    assert exported == adapted


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
    logp, _ = teacher.score(head, hidden, targets, 1.0)
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


# the last ones, as a capture that fails may spoil what follows
@pytest.mark.parametrize("settings", DRAWS)
def test_cuda_graphs_draw_the_tokens_that_eager_steps_draw(settings):
    """Slots are refilled, rows idle in their bucket, the adapter's weights change between calls, and
    a call with the adapter off follows."""
    model = adapted(tiny_qwen3()).cuda()
    graphs = Graphs()

    def assert_same_tokens(seed):
        how = settings | {"prompts": random_ids([5, 11, 1, 7, 23, 2] * 2, seed=2), "slots": 9}
        ours, theirs = (run(model, decoder, seed=seed, **how) for decoder in (graphs, None))
        for one, other in zip(ours, theirs, strict=True):
            assert one.token_ids == other.token_ids
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)

    for seed in range(2):
        change(model, seed)
        assert_same_tokens(seed)
    assert any(graphs.decoder.recordings.values())
    with lora.disabled(model):
        assert_same_tokens(seed)
