"""rollout.py against transformers' generate, against exact probabilities, and against sampling
without a cache."""

import doctest
import gc
from contextlib import contextmanager

import pytest
import torch
from conftest import random_ids, tiny_hybrid, tiny_qwen3
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
)

import rollout
import teacher


def naive_greedy(model, prompt, max_new_tokens, stop):
    """What sampling means: the whole sequence through the model for every token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + max_new_tokens and not (
        len(ids) > len(prompt) and ids[-1] in stop
    ):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


@contextmanager
def input_shapes(model):
    """A list of (rows, width), one for each time that `model` runs inside."""
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    hook.remove()


PROMPTS = random_ids([5, 11, 1, 7, 23, 2])


@pytest.mark.parametrize("slots", [None, 1, 4])
def test_greedy_equals_naive_and_generate(model, slots):
    stop = [1, 8, 13, 40]
    ours = rollout.sample(
        model, PROMPTS, max_new_tokens=30, stop_ids=stop, temperature=0, slots=slots
    )
    assert {c.finished for c in ours} == {True, False}  # both ways to end are covered
    config = GenerationConfig(max_new_tokens=30, do_sample=False, eos_token_id=stop, pad_token_id=0)
    for prompt, completion in zip(PROMPTS, ours, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            generation_config=config,
        )
        assert (
            completion.token_ids
            == theirs[0, len(prompt) :].tolist()
            == naive_greedy(model, prompt, 30, stop)
        )
        assert (
            completion.finished == (completion.token_ids[-1] in stop)
            and len(set(completion.logprobs)) == 1
        )


def test_sampled_logprobs_equal_scored_logprobs(model):
    """At temperature 1 without truncation the distribution sampled from is the one that is
    trained."""
    completions = rollout.sample(
        model, PROMPTS, max_new_tokens=25, stop_ids=[1, 9, 17], samples_per_prompt=3
    )
    reading = teacher.read(
        model, [p for p in PROMPTS for _ in range(3)], [c.token_ids for c in completions]
    )
    for i, completion in enumerate(completions):
        scored = reading.logp[i, : len(completion.token_ids)]
        torch.testing.assert_close(torch.tensor(completion.logprobs), scored, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(temperature=0.6),
        dict(temperature=1.7, top_k=5),
        dict(top_p=0.7),
        dict(temperature=1.3, top_k=6, top_p=0.8),
    ],
)
def test_frequencies_equal_exact_probabilities(settings):
    """Chi-square of 20,000 first tokens against probabilities computed by sorting and looping."""
    model, prompt, draws = tiny_qwen3(vocab_size=12), random_ids([6], vocab_size=12)[0], 20_000
    logits = model(torch.tensor([prompt])).logits[0, -1].double() / settings.get("temperature", 1.0)
    probs = logits.softmax(-1).tolist()
    ranked = sorted(range(12), key=lambda v: -probs[v])[: settings.get("top_k", 12)]
    kept, mass = [], 0.0
    for v in ranked:
        if mass < settings.get("top_p", 1.0) * sum(probs[r] for r in ranked):
            kept.append(v)
            mass += probs[v]
    expected = {v: probs[v] / mass for v in kept}
    completions = rollout.sample(
        model,
        [prompt],
        max_new_tokens=1,
        stop_ids=[],
        samples_per_prompt=draws,
        generator=torch.Generator().manual_seed(7),
        **settings,
    )
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in completions]), minlength=12)
    assert {v for v in range(12) if counts[v]} <= expected.keys()
    for c in completions[:200]:
        assert c.logprobs[0] == pytest.approx(
            torch.tensor(expected[c.token_ids[0]]).log().item(), abs=1e-4
        )
    chi_square = sum((counts[v].item() - draws * p) ** 2 / (draws * p) for v, p in expected.items())
    freedom = max(1, len(expected) - 1)
    # beyond the 0.1 % quantile for every freedom <= 11
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5 + 6


def test_completions_depend_neither_on_slots_nor_on_the_split_over_processes(model):
    settings = dict(max_new_tokens=20, stop_ids=[1, 2, 3, 4], temperature=1.1, top_p=0.95, top_k=20)

    def run(prompts, first_row=0, slots=None):
        generator = rollout.generator_for_rows((3, 5), first_row)
        return [
            c.token_ids
            for c in rollout.sample(
                model, prompts, samples_per_prompt=2, generator=generator, slots=slots, **settings
            )
        ]

    whole = run(PROMPTS)
    assert whole == run(PROMPTS, slots=5) == run(PROMPTS[:3]) + run(PROMPTS[3:], first_row=6)
    assert whole[0] != whole[1]  # two samples of one prompt have streams of their own


def test_every_prompt_is_prefilled_once_and_decoding_uses_the_cache(model):
    """Gradient checkpointing in train mode switches transformers' cache off silently; eval mode has
    to prevent it."""
    model.train()
    model.gradient_checkpointing_enable()
    with input_shapes(model) as shapes:
        rollout.sample(model, PROMPTS, max_new_tokens=6, stop_ids=[], samples_per_prompt=4)
    assert shapes == [(6, 23)] + [(24, 1)] * 5
    assert model.training


def test_finished_rows_leave_the_batch(model):
    with input_shapes(model) as shapes:
        completions = rollout.sample(model, PROMPTS * 4, max_new_tokens=64, stop_ids=range(1, 12))
    sizes, lengths = [rows for rows, _ in shapes], [len(c.token_ids) for c in completions]
    assert sizes[-1] < len(lengths) / 2 and len(sizes) <= max(lengths) + rollout.POLL_EVERY
    assert sum(sizes) <= sum(lengths) + rollout.POLL_EVERY * len(lengths)


def test_greedy_depends_neither_on_slots_nor_on_the_order_of_prompts(model):
    prompts = random_ids([5, 11, 1, 7, 23, 2] * 6, seed=3)

    def run(prompts, slots):
        return [
            c.token_ids
            for c in rollout.sample(
                model, prompts, max_new_tokens=25, stop_ids=range(1, 9), temperature=0, slots=slots
            )
        ]

    alone = [run([prompt], None)[0] for prompt in prompts]
    assert run(prompts, 1) == run(prompts, 5) == run(prompts, 64) == alone
    assert run(prompts[::-1], 5) == alone[::-1]


def test_a_used_slot_gives_the_logprobs_of_a_fresh_one(model):
    """Prompts of all lengths follow each other in three slots; each has the tokens and log-probs
    that it has alone."""
    prompts = random_ids([40, 3, 17, 1, 29, 8] * 4, seed=4)
    settings = dict(max_new_tokens=30, stop_ids=range(1, 5))
    together = rollout.sample(
        model, prompts, slots=3, generator=rollout.generator_for_rows((9,), 0), **settings
    )
    for row, (prompt, completion) in enumerate(zip(prompts, together, strict=True)):
        alone = rollout.sample(
            model, [prompt], generator=rollout.generator_for_rows((9,), row), **settings
        )[0]
        assert completion.token_ids == alone.token_ids
        assert completion.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


@pytest.mark.parametrize("slots, samples", [(2, 3), (5, 4), (3, 1)])
def test_no_prompt_is_prefilled_twice(model, slots, samples):
    with input_shapes(model) as shapes:
        rollout.sample(
            model,
            PROMPTS[:2] + PROMPTS[3:],
            max_new_tokens=9,
            stop_ids=range(1, 9),
            slots=slots,
            samples_per_prompt=samples,
        )
    assert sum(rows for rows, width in shapes if width > 1) == 5


def test_prefill_is_bounded(model, monkeypatch):
    monkeypatch.setattr(rollout, "PREFILL_TOKENS", 40)
    with input_shapes(model) as shapes:
        rollout.sample(model, PROMPTS, max_new_tokens=2, stop_ids=[])
    assert [shape for shape in shapes if shape[1] > 1] == [(3, 11), (1, 7), (1, 23), (1, 2)]


@pytest.mark.slow
def test_thousands_of_refills_do_not_grow_memory(model):
    """All tensors alive, measured every 500 completions: their storage is that of the slots and
    does not grow."""
    sizes, done = [], 0

    def count(tokens, finished):
        nonlocal done
        done += finished
        if done // 500 > len(sizes):
            storages = [t.untyped_storage() for t in gc.get_objects() if type(t) is torch.Tensor]
            sizes.append(
                sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
            )

    rollout.sample(
        model,
        random_ids([3, 9, 5] * 1000),
        max_new_tokens=8,
        stop_ids=range(1, 30),
        slots=16,
        progress=count,
    )
    assert len(sizes) == 6 and max(sizes[1:]) <= sizes[0] + 10_000


class Waits(TorchDispatchMode):
    """Lists the operations that make the host wait for a CUDA device, because they need a value or
    a size from it."""

    # isin calls unique; tolist and numpy begin with resolve_neg
    WAITING = (
        "item",
        "_local_scalar_dense",
        "nonzero",
        "is_nonzero",
        "masked_select",
        "unique",
        "isin",
        "resolve_neg",
    )

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__.rstrip("_")
        by_mask = name in ("index", "index_put") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        # x[i] = 1.0 makes a tensor of the number on the CPU, which is copied at once
        by_number = name == "index_put" and args[2].dim() == 0
        if name in self.WAITING or by_mask or by_number:
            self.operations.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [dict(), dict(temperature=0), dict(top_k=5, top_p=0.9)])
def test_nothing_waits_for_the_device_between_polls(model, monkeypatch, settings):
    waits, calls = Waits(), []
    decode_until_poll = rollout._Batch.decode_until_poll

    def watched(batch):
        with waits:
            decode_until_poll(batch)
        calls.append(batch)

    monkeypatch.setattr(rollout._Batch, "decode_until_poll", watched)
    rollout.sample(model, PROMPTS, max_new_tokens=12, stop_ids=range(1, 40), slots=4, **settings)
    assert calls and waits.operations == []
    with torch.inference_mode(), waits:  # the detector does detect
        x = torch.ones(3)
        _ = x.max().item(), x.tolist(), x[x > 2], torch.isin(x, x), bool(x[0])
        x[torch.tensor([0])] = 1.0
    assert len(waits.operations) == 6


def test_a_look_waits_twice_and_closing_gaps_copies_one_list(model, monkeypatch):
    """A look is one copy of what has ended, and one of all that was drawn, if anything has; slots
    move by one list."""
    host, made = [], []
    for name in ("cpu", "tolist"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda t, *args, original=original, name=name: (
                host.append((name, t.device.type)),
                original(t, *args),
            )[1],
        )
    take_finished, tensor = rollout._Batch.take_finished, torch.tensor

    def looked(batch):
        host.clear()
        finished = take_finished(batch)
        reads = len(host) - 2 * len(finished)  # two lists of each are made of what has been copied
        assert reads == (2 if finished else 1)
        return finished

    monkeypatch.setattr(rollout._Batch, "take_finished", looked)
    move = rollout.Decoder.move

    def moved(*args):
        monkeypatch.setattr(torch, "tensor", lambda *a, **k: (made.append(1), tensor(*a, **k))[1])
        move(*args)
        monkeypatch.setattr(torch, "tensor", tensor)
        made.append(0)

    monkeypatch.setattr(rollout.Decoder, "move", moved)
    rollout.sample(model, PROMPTS * 3, max_new_tokens=30, stop_ids=range(1, 9), slots=12)
    assert 0 in made and made.count(1) == made.count(0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_that_gives_nan_for_dead_rows_changes_nothing(monkeypatch, implementation):
    """Some kernels return nan for a query that may see no key: so no query may be of that kind."""
    model = tiny_qwen3(attn_implementation=implementation)
    settings = dict(max_new_tokens=20, stop_ids=[1, 5], slots=3)
    plain = rollout.sample(model, PROMPTS, generator=torch.Generator().manual_seed(0), **settings)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    softmax = torch.nn.functional.softmax
    masks = []

    def dead(mask):
        masks.append(mask)
        return (
            torch.zeros(())
            if mask is None
            else (~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min).all(
                -1, keepdim=True
            )
        )

    def strict_sdpa(q, k, v, attn_mask=None, **rest):
        return sdpa(q, k, v, attn_mask, **rest).masked_fill(dead(attn_mask).bool(), torch.nan)

    def strict_softmax(scores, *args, **kwargs):
        return softmax(scores, *args, **kwargs).masked_fill(
            (scores <= torch.finfo(scores.dtype).min / 2).all(-1, keepdim=True), torch.nan
        )

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", strict_sdpa)
    monkeypatch.setattr(torch.nn.functional, "softmax", strict_softmax)
    assert (
        rollout.sample(model, PROMPTS, generator=torch.Generator().manual_seed(0), **settings)
        == plain
    )
    assert implementation == "eager" or None in masks and any(mask is not None for mask in masks)


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logprobs_that_are_not_finite_stop_the_sampling(model, temperature, bad):
    """At whichever token it happens; here at the third of one row."""
    steps = 0

    def spoil(module, args, output):
        nonlocal steps
        steps += 1
        if steps == 3:
            output[1] = bad

    model.lm_head.register_forward_hook(spoil)
    with pytest.raises(FloatingPointError, match="token 3 of completion 1 has the log-prob nan"):
        rollout.sample(model, PROMPTS[:3], max_new_tokens=30, stop_ids=[], temperature=temperature)
    assert steps < 8


def test_every_completion_is_reported_once_and_seeds_are_per_row(model):
    seen, settings = {}, dict(max_new_tokens=15, stop_ids=[1, 5, 9], slots=4)
    seeds = rollout.row_seeds(rollout.generator_for_rows((3,), 0), 12)
    whole = rollout.sample(
        model,
        PROMPTS,
        samples_per_prompt=2,
        generator=rollout.generator_for_rows((3,), 0),
        on_completion=lambda i, c: seen.setdefault(i, []).append(c),
        **settings,
    )
    assert [seen[i] for i in range(12)] == [[c] for c in whole] and list(seen) != sorted(seen)
    some = [7, 2, 11]
    part = rollout.sample(
        model, [PROMPTS[i // 2] for i in some], seeds=[seeds[i] for i in some], **settings
    )
    assert [c.token_ids for c in part] == [whole[i].token_ids for i in some]


def test_decode_can_be_captured(model):
    """What a CUDA graph needs: more rows and columns than are in use do not change the logits of
    the rows in use, and the storage does not move."""
    with torch.inference_mode():
        prefilled = rollout.prefill(model, PROMPTS[:4])
        cache = rollout.SlotCache(8, prefilled.cache, 64)
        wide = rollout.SlotCache(8, prefilled.cache, 64)
        for slots in (cache, wide):
            slots.load(torch.tensor([1, 0, 2]), prefilled, torch.tensor([0, 1, 3]))
            slots.reserve(64)
        addresses = [layer.keys.data_ptr() for layer in wide.layers]
        token, position = torch.tensor([9, 8, 7, 0, 0, 0]), torch.tensor([11, 5, 7, 0, 0, 0])
        for _ in range(5):
            exact = rollout.decode(model, cache, token[:3], position[:3], int(position.max()) + 1)
            padded = rollout.decode(model, wide, token, position, 64)
            torch.testing.assert_close(padded[:3], exact, atol=1e-5, rtol=0)
            token, position = padded.argmax(-1), position + 1
    assert [layer.keys.data_ptr() for layer in wide.layers] == addresses


@pytest.mark.parametrize(
    "kind, windows",
    [
        (LlamaConfig, {}),
        (MistralConfig, dict(sliding_window=6)),
        (Qwen2Config, dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
        (Olmo3Config, dict(sliding_window=7, layer_types=["sliding_attention", "full_attention"])),
    ],
)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_models(kind, windows, implementation):
    """Greedy tokens of models with sliding windows, which `decode` has to mask itself, equal those
    of `generate`."""
    torch.manual_seed(0)
    config = kind(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        initializer_range=0.3,
        **windows,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    ours = rollout.sample(model, PROMPTS, max_new_tokens=20, stop_ids=[1], temperature=0, slots=3)
    for prompt, completion in zip(PROMPTS, ours, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=20,
            do_sample=False,
        )
        assert completion.token_ids == theirs[0, len(prompt) :].tolist()


def test_models_that_decode_cannot_serve_are_refused(model):
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2'"):
        rollout.sample(model, PROMPTS, max_new_tokens=4, stop_ids=[1])
    model.config._attn_implementation = "sdpa"
    model.config.layer_types = ["chunked_attention", "full_attention"]
    with pytest.raises(ValueError, match="chunked_attention"):
        rollout.sample(model, PROMPTS, max_new_tokens=4, stop_ids=[1])
    model.config.layer_types, model.config.attention_layers = None, ["global", "local"]  # GPT-Neo
    with pytest.raises(ValueError, match="local"):
        rollout.sample(model, PROMPTS, max_new_tokens=4, stop_ids=[1])


@pytest.mark.parametrize(
    "slots", [3, *(pytest.param(slots, marks=pytest.mark.slow) for slots in (1, 7))]
)
def test_states_follow_their_rows(monkeypatch, slots):
    """Rows leave, others take their slots, gaps close: each row is what it is alone. No state sees
    padding, and prompts of the same length are prefilled together."""
    model, settings = tiny_hybrid(), dict(max_new_tokens=30, stop_ids=[1, 5, 9])
    prompts, batches = [*PROMPTS, PROMPTS[0][::-1]], []
    alone = [rollout.sample(model, [prompts[i // 2]], seeds=[i], **settings)[0] for i in range(14)]
    prefill = rollout.prefill
    monkeypatch.setattr(
        rollout, "prefill", lambda m, chosen: batches.append(chosen) or prefill(m, chosen)
    )
    together = rollout.sample(
        model, prompts, samples_per_prompt=2, seeds=range(14), slots=slots, **settings
    )
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert len({len(c.token_ids) for c in alone}) > 4
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)
    assert sorted(sum(batches, [])) == sorted(prompts) and all(
        len(set(map(len, batch))) == 1 for batch in batches
    )
    assert slots < 7 or max(map(len, batches)) == 2


def test_a_model_that_a_cache_changes_is_refused(monkeypatch):
    """As it would be if its layers remembered what nobody keeps; here, if states were not
    loaded."""
    rollout.check_model(tiny_qwen3())
    rollout.check_model(tiny_qwen3(use_sliding_window=True, sliding_window=20, max_window_layers=1))
    ignores_it = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            initializer_range=0.3,
            sliding_window=20,
        )
    ).eval()
    with pytest.raises(ValueError, match="another distribution"):
        rollout.check_model(ignores_it)
    assert ignores_it.config.sliding_window == 20
    model = tiny_hybrid()
    rollout.check_model(model)
    monkeypatch.setattr(
        rollout.SlotCache, "load", lambda self, slots, prefilled, prompts: self.reserve(6)
    )
    with pytest.raises(ValueError, match="another distribution"):
        rollout.check_model(model)


def test_row_size_is_what_the_cache_takes():
    model = tiny_hybrid()
    column, states = rollout.row_size(model)
    decoder = rollout.Decoder(model, 3, 20, 5, [1])
    before = sum(t.nbytes for t in decoder.memory())
    with torch.inference_mode():
        decoder.start([0], rollout.prefill(model, [[2] * 15]), [0], [0])
        decoder.cache.reserve(20)
    assert sum(t.nbytes for t in decoder.memory()) - before == 3 * (20 * column + states)
    assert column == 4 * 2 * 2 * 8 and states > 0  # float32, keys and values, heads, dim


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(implementation, dtype):
    """Under autocast keys, values and weights of a layer may differ in dtype, and a prefill's from
    a decode step's."""
    model = tiny_qwen3(attn_implementation=implementation).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        completions = rollout.sample(model, PROMPTS, max_new_tokens=12, stop_ids=[1], slots=4)
        reading = teacher.read(model, PROMPTS, [c.token_ids for c in completions])
    for completion, scored in zip(completions, reading.logp, strict=True):
        logprobs = torch.tensor(completion.logprobs)
        torch.testing.assert_close(logprobs, scored[: len(logprobs)], atol=0.2, rtol=0)


def test_no_token_of_probability_zero_is_drawn():
    """Where sums in float32 and float64 differ, and at the last uniform below 1: the largest that
    there is."""
    logits = torch.randn(300, 4096, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, ::256] -= 200  # the first token of each block of the two-stage search
    logits[:, -40:] = -torch.inf
    for settings in (dict(), dict(top_p=0.9), dict(top_k=50)):
        for uniform in (0.0, 0.5761644704592663, 1 - 2**-53):
            token, logprob = rollout.draw_tokens(
                logits, torch.full((300,), uniform, dtype=torch.double), **settings
            )
            assert logprob.isfinite().all() and (token < 4056).all()


def test_window_of_nested_and_of_extended_configs():
    class Nested:
        config = Phi3Config(
            rope_parameters=dict(
                rope_type="longrope",
                rope_theta=1e4,
                short_factor=[1.0] * 48,
                long_factor=[2.0] * 48,
                original_max_position_embeddings=4096,
            ),
            max_position_embeddings=131_072,
        )

    assert rollout.window(Nested) == 4096
    Nested.config = Gemma3Config(text_config=dict(max_position_embeddings=64))
    assert rollout.window(Nested) == 64


def test_progress_counts_every_token_once(model):
    seen = []
    completions = rollout.sample(
        model,
        PROMPTS,
        max_new_tokens=21,
        stop_ids=[1, 5, 9, 30],
        slots=4,
        progress=lambda tokens, finished: seen.append((tokens, finished)),
    )
    assert sum(t for t, _ in seen) == sum(len(c.token_ids) for c in completions)
    assert sum(f for _, f in seen) == len(completions)


def test_mode_is_restored_whatever_happens(model):
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]

    def stop(tokens, finished):
        assert not model.training and not torch.is_grad_enabled()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rollout.sample(model, PROMPTS, max_new_tokens=8, stop_ids=[], progress=stop)
    assert [module.training for module in model.modules()] == before and torch.is_grad_enabled()


def test_generation_config_does_not_leak_in(model):
    """A checkpoint's generation_config (top_k = 20 in Qwen3's) silently truncates the rollouts of
    other trainers."""

    def run():
        generator = torch.Generator().manual_seed(0)
        return rollout.sample(model, PROMPTS, max_new_tokens=9, stop_ids=[1], generator=generator)

    plain = run()
    model.generation_config.update(top_k=1, temperature=0.1, do_sample=False)
    assert run() == plain


def test_stop_ids_are_the_union(model):
    """Qwen3's base checkpoints disagree: the tokenizer says <|im_end|>, the config says
    <|endoftext|>."""

    class Tokenizer:
        eos_token_id = 7

    model.config.eos_token_id, model.generation_config.eos_token_id = 3, [3, 5]
    assert rollout.stop_ids(model, Tokenizer) == [3, 5, 7]
    Tokenizer.eos_token_id = model.config.eos_token_id = model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="eos_token_id"):
        rollout.stop_ids(model, Tokenizer)


@pytest.mark.parametrize(
    "name, change",
    [
        ("max_new_tokens", 0),
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("max_new_tokens", 250),
    ],
)
def test_bad_arguments_are_named(model, name, change):
    with pytest.raises(ValueError, match=name):
        rollout.sample(model, PROMPTS, **(dict(max_new_tokens=4, stop_ids=[1]) | {name: change}))
    with pytest.raises(ValueError, match="seeds must be 6"):
        rollout.sample(model, PROMPTS, max_new_tokens=4, stop_ids=[1], seeds=[0, 1])


def test_empty_prompts_and_no_prompts(model):
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        rollout.sample(model, [[3], []], max_new_tokens=4, stop_ids=[1])
    assert rollout.sample(model, [], max_new_tokens=4, stop_ids=[1]) == []


def test_doctests():
    results = doctest.testmod(rollout)
    assert results.attempted > 3 and results.failed == 0
