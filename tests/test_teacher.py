"""teacher.py against one-by-one scoring with plain logits, and the prompts against what a solution
may contain."""

import doctest
from types import SimpleNamespace

import pytest
import torch
from conftest import random_ids, tiny_qwen3
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma3Config

import teacher

PROMPTS, COMPLETIONS = random_ids([5, 11, 1, 7]), random_ids([9, 1, 14, 3], seed=1)


def plain(model, prompt, completion, temperature=1.0):
    """Log-probs and entropies of one completion from the full logits, in float64."""
    logits = (
        model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double()
        / temperature
    )
    logp = logits.log_softmax(-1)
    return logp[range(len(completion)), completion], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ragged_batch_equals_one_by_one(model, temperature):
    """Right-padded prompts with the completion behind the pads, and no position ids, are off by 0.1
    to 0.3 nats."""
    reading = teacher.read(model, PROMPTS, COMPLETIONS, temperature=temperature)
    assert reading.mask.dtype == torch.bool and reading.mask.sum(1).tolist() == [9, 1, 14, 3]
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        logp, entropy = plain(model, prompt, completion, temperature)
        torch.testing.assert_close(
            reading.logp[i, : len(completion)].double(), logp, atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            reading.entropy[i, : len(completion)].double(), entropy, atol=1e-5, rtol=0
        )
        assert (
            reading.logp[i, len(completion) :].abs().sum()
            == reading.entropy[i, len(completion) :].abs().sum()
            == 0
        )


@pytest.mark.parametrize(
    "dtype, autocast, masked",
    [
        (torch.float32, False, True),
        (torch.bfloat16, False, False),
        (torch.float32, True, False),
        (torch.bfloat16, True, False),
    ],
)
def test_half_precision_is_read_without_a_mask(dtype, autocast, masked):
    """So that flash attention may serve: a mask makes no difference, and none reaches a layer with
    full attention."""
    model = tiny_qwen3().to(dtype)
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(*args, attn_mask=None, **keywords):
        seen.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **keywords)

    with (
        pytest.MonkeyPatch.context() as patch,
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        reading = teacher.read(model, PROMPTS, COMPLETIONS)
        assert len(seen) == 2 and all((mask is not None) == masked for mask in seen)
        forward = model.model.forward
        ends = torch.tensor([len(p) + len(c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
        patch.setattr(
            model.model,
            "forward",
            lambda input_ids, attention_mask, **keywords: forward(
                input_ids=input_ids,
                attention_mask=torch.arange(input_ids.shape[1]) < ends[:, None],
                **keywords,
            ),
        )
        other = teacher.read(model, PROMPTS, COMPLETIONS)
    tolerance = 1e-6 if masked else 0.1
    torch.testing.assert_close(reading.logp, other.logp, atol=tolerance, rtol=0)
    torch.testing.assert_close(reading.entropy, other.entropy, atol=tolerance, rtol=0)


def test_padding_changes_nothing(model):
    alone = teacher.read(model, PROMPTS[:1], COMPLETIONS[:1])
    beside_a_long_row = teacher.read(
        model,
        [PROMPTS[0], random_ids([90])[0]],
        [COMPLETIONS[0], random_ids([60])[0]],
    )
    for a, b in ((alone.logp, beside_a_long_row.logp), (alone.entropy, beside_a_long_row.entropy)):
        torch.testing.assert_close(a[0], b[0, :9], atol=1e-5, rtol=0)


def test_pad_id_equal_to_stop_id_changes_nothing(model):
    """A mask made from `token != pad_id` hides the sampled stop token where pad and eos are one id
    (Qwen2.5 base)."""
    completions = [completion + [1] for completion in COMPLETIONS]
    model.config.pad_token_id = 1
    same = teacher.read(model, PROMPTS, completions)
    model.config.pad_token_id = 0
    other = teacher.read(model, PROMPTS, completions)
    assert same.mask.sum(1).tolist() == [10, 2, 15, 4]
    assert torch.equal(same.logp, other.logp) and (same.logp[same.mask] != 0).all()


@pytest.mark.parametrize("chunk_tokens", [1, 4, 1000])
def test_chunked_head_equals_plain_in_values_and_gradients(model, monkeypatch, chunk_tokens):
    monkeypatch.setattr(teacher, "CHUNK_LOGITS", chunk_tokens * 61)
    reading = teacher.read(model, PROMPTS, COMPLETIONS)
    weights = torch.linspace(-1, 1, reading.logp.numel()).view_as(reading.logp)
    (reading.logp * weights)[reading.mask].sum().backward()
    chunked = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    rows = zip(PROMPTS, COMPLETIONS, weights, strict=True)
    sum(
        (plain(model, prompt, completion)[0] * w[: len(completion)]).sum()
        for prompt, completion, w in rows
    ).backward()
    for ours, parameter in zip(chunked, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, atol=2e-4, rtol=1e-4)


def test_whole_logits_never_exist(model, monkeypatch):
    """The largest tensor that the head makes, forward and backward, is one chunk."""
    monkeypatch.setattr(teacher, "CHUNK_LOGITS", 4 * 61)
    sizes = []
    model.lm_head.register_forward_hook(lambda _, args, out: sizes.append(out.shape))
    teacher.read(model, PROMPTS, COMPLETIONS).logp.sum().backward()
    # 27 tokens, twice each
    assert all(size == (4, 61) or size == (3, 61) for size in sizes) and len(sizes) == 2 * 7


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("chunk_tokens, temperature", [(1, 1.0), (4, 0.7), (1000, 1.3)])
def test_frozen_head_runs_once_per_chunk(monkeypatch, chunk_tokens, temperature, dtype, tolerance):
    """Forward and backward together, with the values and gradients of autograd through the whole
    float64 logits."""
    monkeypatch.setattr(teacher, "CHUNK_LOGITS", chunk_tokens * 61)
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 61, bias=False).requires_grad_(False).to(dtype)
    hidden = torch.randn(27, 16).to(dtype)
    targets = torch.randint(61, (27,))
    upstream = torch.randn(27)
    runs = []
    head.register_forward_hook(lambda *_: runs.append(1))
    ours, plain_hidden = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    logp, _ = teacher.score(head, ours, targets, temperature)
    (logp * upstream).sum().backward()
    exact = (plain_hidden @ head.weight.double().T / temperature).log_softmax(-1)[
        range(27), targets
    ]
    (exact * upstream).sum().backward()
    assert (
        len(runs) == -(-27 // chunk_tokens)
        and logp.dtype == torch.float32
        and ours.grad.dtype == dtype
    )
    torch.testing.assert_close(logp.double(), exact, atol=tolerance, rtol=0)
    torch.testing.assert_close(ours.grad.double(), plain_hidden.grad, atol=tolerance, rtol=0)


class LiveBytes(TorchDispatchMode):
    """Watches the memory of the tensors that operations inside make: `peak` is the most bytes that
    were alive after an operation."""

    def __init__(self):
        super().__init__()
        self.sizes = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves(args) if torch.is_tensor(t)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self.sizes[StorageWeakRef(storage)] = storage.nbytes()
        self.sizes = {ref: size for ref, size in self.sizes.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("cap, chunks", [(None, 2), (3.0, 3)])
def test_a_frozen_head_keeps_two_chunks_of_logits_or_three_with_a_cap(
    monkeypatch, dtype, temperature, cap, chunks
):
    """Chunks in float32, whatever the dtype of the head; beside them there are only tensors without
    a side of V."""
    vocabulary, tokens = 4096, 64
    monkeypatch.setattr(teacher, "CHUNK_LOGITS", tokens * vocabulary)
    linear = torch.nn.Linear(4, vocabulary, bias=False, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(4 * tokens, 4, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocabulary, (len(hidden),))
    with LiveBytes() as live:
        head = teacher.Head(linear, cap=cap)
        logp, _ = teacher.score(head, hidden, targets, temperature)
        logp.sum().backward()
    assert chunks - 0.5 < live.peak / (4 * tokens * vocabulary) < chunks + 0.1


def test_frozen_and_trained_head_give_the_adapter_the_same_gradient(model):
    model.requires_grad_(False)
    adapter = model.model.layers[1].mlp.down_proj.weight.requires_grad_()
    gradients = []
    for trained in (False, True):
        model.lm_head.weight.requires_grad_(trained)
        teacher.read(model, PROMPTS, COMPLETIONS, temperature=0.9).logp.square().sum().backward()
        gradients.append(adapter.grad.clone())
        model.zero_grad()
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "rows, mean, budget", [(4, 600, 10**9), (32, 64, 2000), (128, 64, 10**9), (512, 1000, 8192)]
)
def test_micro_batches_waste_little_on_geometric_lengths(rows, mean, budget):
    generator = torch.Generator().manual_seed(rows)
    lengths = (
        torch.empty(rows).geometric_(1 / mean, generator=generator).long().clamp(max=4096).tolist()
    )
    batches = teacher.micro_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(rows))
    padded = [len(batch) * max(lengths[i] for i in batch) for batch in batches]
    assert all(
        size <= budget or len(batch) == 1 for size, batch in zip(padded, batches, strict=True)
    )
    assert 1 - sum(lengths) / sum(padded) <= 0.1
    assert rows < 100 or len(batches) < rows / 3  # one row at a time would waste nothing either


def test_micro_batches_of_equal_and_of_too_long_rows():
    assert [len(batch) for batch in teacher.micro_batches([50] * 10, 200)] == [4, 4, 2]
    assert teacher.micro_batches([900, 10, 10], 100) == [[0], [1, 2]]
    assert teacher.micro_batches([10, 8], 100) == [[0, 1]]  # exactly a tenth is padding
    assert teacher.micro_batches([100, 79], 1000) == [[0], [1]]


@pytest.mark.parametrize("most_tokens", [1, 20, 35, 10**6])
@pytest.mark.parametrize("hidden", [False, True])
def test_read_in_batches_equals_read(model, most_tokens, hidden):
    """Nine ragged rows; the batches are narrower and change their order. With most_tokens = 1 every
    row is alone."""
    prompts = random_ids([5, 11, 1, 7, 3, 19, 2, 8, 4])
    completions = random_ids([9, 1, 14, 3, 6, 2, 25, 5, 1], seed=1)
    with torch.no_grad():
        whole = teacher.read(model, prompts, completions, temperature=0.8, hidden=hidden)
    reading = teacher.read_in_batches(
        model, prompts, completions, most_tokens, temperature=0.8, hidden=hidden
    )
    assert torch.equal(reading.mask, whole.mask) and not reading.logp.requires_grad
    for ours, theirs in ((reading.logp, whole.logp), (reading.entropy, whole.entropy)):
        assert ours.dtype == torch.float32 and (ours[~whole.mask] == 0).all()
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    if hidden:
        assert [len(states) for states in reading.hidden] == list(map(len, completions))
        torch.testing.assert_close(reading.hidden, whole.hidden, atol=1e-5, rtol=1e-5)
    else:
        assert reading.hidden is None


def test_hidden_states_are_kept_only_if_asked_for_and_give_the_logp(model):
    assert teacher.read(model, PROMPTS, COMPLETIONS).hidden is None
    reading = teacher.read(model, PROMPTS, COMPLETIONS, hidden=True)
    for states, completion, logp in zip(reading.hidden, COMPLETIONS, reading.logp, strict=True):
        exact = model.lm_head(states).log_softmax(-1)[range(len(completion)), completion]
        torch.testing.assert_close(logp[: len(completion)], exact, atol=1e-5, rtol=0)


def test_gradients_flow_iff_enabled(model):
    assert teacher.read(model, PROMPTS, COMPLETIONS).logp.requires_grad
    with torch.no_grad():
        assert not teacher.read(model, PROMPTS, COMPLETIONS).logp.requires_grad


def test_softmax_is_float32_behind_a_bfloat16_head():
    model = tiny_qwen3().bfloat16()
    reading = teacher.read(model, PROMPTS, COMPLETIONS)
    assert reading.logp.dtype == reading.entropy.dtype == torch.float32
    hidden = model.model(torch.tensor([PROMPTS[0] + COMPLETIONS[0]])).last_hidden_state[0, 4:-1]
    exact = model.lm_head(hidden).double().log_softmax(-1)[range(9), COMPLETIONS[0]]
    batch_of_one = teacher.read(model, PROMPTS[:1], COMPLETIONS[:1])
    torch.testing.assert_close(batch_of_one.logp[0].double(), exact, atol=1e-5, rtol=0)


def test_bad_arguments(model):
    for prompts, completions in (([[2]], [[]]), ([[]], [[2]]), ([], [])):
        with pytest.raises(ValueError, match="prompts and completions"):
            teacher.read(model, prompts, completions)
    with pytest.raises(ValueError, match="longer"):
        teacher.read(model, [[2]], [[2], [3]])
    with pytest.raises(ValueError, match="temperature"):
        teacher.read(model, PROMPTS, COMPLETIONS, temperature=0)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("scale, cap", [(0.25, None), (1.0, 2.0), (1.7, 3.0)])
def test_scaled_and_capped_logits_equal_plain_in_values_and_gradients(
    monkeypatch, scale, cap, trained
):
    """Granite, Cohere and Gemma: what comes after the head, against float64 and autograd through
    the whole logits."""
    monkeypatch.setattr(teacher, "CHUNK_LOGITS", 5 * 61)
    torch.manual_seed(0)
    linear = torch.nn.Linear(16, 61).requires_grad_(trained)
    hidden, targets, weights = torch.randn(27, 16), torch.randint(61, (27,)), torch.randn(27)
    head, ours = teacher.Head(linear, scale, cap), hidden.clone().requires_grad_()
    plain = hidden.double().requires_grad_()
    logits = scale * (plain @ linear.weight.double().T + linear.bias.double())
    want = ((cap * (logits / cap).tanh() if cap else logits) / 0.7).log_softmax(-1)
    logp, entropy = teacher.score(head, ours, targets, 0.7)
    torch.testing.assert_close(logp.double(), want[range(27), targets], atol=1e-5, rtol=0)
    assert logp.requires_grad and not entropy.requires_grad
    without_gradient = teacher.score(head, hidden, targets, 0.7)[1]
    for found in (entropy, without_gradient):
        torch.testing.assert_close(found.double(), -(want.exp() * want).sum(-1), atol=1e-5, rtol=0)
    variables = [ours, linear.weight] if trained else [ours]
    found = torch.autograd.grad((logp * weights).sum(), variables, retain_graph=True)
    variables = [plain, linear.weight] if trained else [plain]
    wanted = torch.autograd.grad((want[range(27), targets] * weights).sum(), variables)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=1e-5, rtol=1e-5)


def test_what_comes_after_the_head_is_found_in_the_config_of_the_text():
    # text and images
    nested = SimpleNamespace(config=Gemma3Config(), get_output_embeddings=lambda: None)
    assert teacher.output_head(nested) == teacher.Head(None, 1.0, None)
    vars(nested.config.text_config).update(final_logit_softcapping=30.0, logits_scaling=8.0)
    assert teacher.output_head(nested) == teacher.Head(None, 0.125, 30.0)


@pytest.mark.parametrize("option", ["final_logit_softcapping", "logit_scale", "logits_scaling"])
def test_a_model_whose_logits_are_not_those_of_its_head_is_refused(model, option):
    """Qwen3 has no such option: a config that sets one says what the model does not do."""
    teacher.check_head(model)
    setattr(model.config, option, 3.0)
    with pytest.raises(ValueError, match=option):
        teacher.check_head(model)
    setattr(model.config, option, None)
    forward = model.forward

    def shifted(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits + torch.arange(61) / 61
        return output

    model.forward = shifted
    with pytest.raises(ValueError, match="not those of its head"):
        teacher.check_head(model)


def test_reading_mode_leaves_only_checkpointed_layers_in_training():
    model = tiny_qwen3(attention_dropout=0.5)
    model.train()
    teacher.reading_mode(model)
    assert not any(module.training for module in model.modules())
    model.activation_checkpointing_enable({"use_reentrant": False})
    teacher.reading_mode(model)
    assert all(layer.training and not layer.self_attn.training for layer in model.model.layers)
    assert torch.equal(
        teacher.read(model, PROMPTS, COMPLETIONS).logp,
        teacher.read(model, PROMPTS, COMPLETIONS).logp,
    )


def test_latex_and_braces_survive_in_the_prompts():
    """str.format on a template with a solution in it fails on the first \\frac{1}{2}."""
    problem, solution = r"Find {x} in \frac{1}{2}", r"\boxed{\frac{1}{2}} {0} {name} %s $1"
    text = teacher.teacher_messages(problem, solution)[0]["content"]
    assert problem in text and solution in text and text.endswith(teacher.INSTRUCTION)
    assert solution not in teacher.student_messages(problem)[0]["content"]


def test_doctests():
    results = doctest.testmod(teacher)
    assert results.attempted == 1 and results.failed == 0


@pytest.mark.parametrize(
    "changes, product",
    [
        ({}, "mm.dtype"),
        (dict(hidden=torch.float32, weight=torch.float32), "mm.default"),
        (dict(bias=True), "addmm.default"),
        (dict(grad=True), "mm.default"),
    ],
)
def test_logits_are_float32_products_where_torch_has_them(changes, product, monkeypatch):
    """On a CUDA device that torch only pretends to have."""
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda linear: None)
    how = dict(hidden=torch.bfloat16, weight=torch.bfloat16, bias=False, grad=False) | changes
    with FakeTensorMode(), torch.set_grad_enabled(how["grad"]):
        linear = torch.nn.Linear(8, 9, how["bias"], "cuda", how["weight"])
        hidden = torch.empty(4, 8, dtype=how["hidden"], device="cuda")
        linear.requires_grad_(False)
        with Products() as products:
            logits = teacher.Head(linear)(hidden)
    assert products.names == [product]
    assert logits.dtype == torch.float32 and logits.shape == (4, 9)


@torch.no_grad()
def test_where_torch_has_no_such_product_logits_are_rounded():
    linear = torch.nn.Linear(8, 9, bias=False, dtype=torch.bfloat16)
    hidden = torch.randn(4, 8, dtype=torch.bfloat16)
    assert torch.equal(teacher.Head(linear)(hidden), linear(hidden).float())


class Products(TorchDispatchMode):
    """The matrix products that were made."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        self.names += [name] if "mm" in name else []
        return function(*args, **(kwargs or {}))
