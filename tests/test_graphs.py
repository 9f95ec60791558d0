"""support/graphs.py without a GPU: torch.fx records a step and replays it, as a CUDA graph would.

A recording repeats operations on the same memory with the same shapes; nothing that Python would
decide happens again. What it cannot show: kernels, streams, and the memory of graphs.
"""

import doctest

import pytest
import torch
from conftest import random_ids, tiny_hybrid, tiny_qwen3
from test_rollout import PROMPTS, Waits
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoModelForCausalLM, MistralConfig

import lora
import rollout
from support import graphs
from support.errors import InputError


class FxDecoder(graphs.RecordedDecoder):
    """Records with make_fx. Tracing runs a step, which is undone, as a capture would not run it."""

    def warm_up(self, rows, width):
        self.step(rows, width)

    def record(self, rows, width):
        before = [tensor.clone() for tensor in self.memory()]
        recording = make_fx(lambda: self.step(rows, width))()
        for tensor, old in zip(self.memory(), before, strict=True):
            tensor.copy_(old)
        return recording


class Fx(graphs.Graphs):
    kind = FxDecoder


class PlainDecoder(FxDecoder):
    """Records nothing, where a test is about what is kept: make_fx takes a third of a second."""

    def record(self, rows, width):
        return lambda: self.step(rows, width)


class Plain(graphs.Graphs):
    kind = PlainDecoder


def adapted(model, seed=0):
    lora.add_lora(model, rank=4, alpha=8)
    change(model, seed)
    return model


def change(model, seed):
    torch.manual_seed(seed)
    for parameter in lora.lora_parameters(model):
        parameter.data.copy_(torch.randn_like(parameter) * 0.1)


def run(model, make_decoder=None, prompts=PROMPTS, seed=0, **settings):
    settings = dict(max_new_tokens=70, stop_ids=[1, 9], slots=4) | settings
    return rollout.sample(
        model,
        prompts,
        generator=torch.Generator().manual_seed(seed),
        make_decoder=make_decoder,
        **settings,
    )


def assert_same(ours, theirs):
    assert [c.token_ids for c in ours] == [c.token_ids for c in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert (
            one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
            and one.finished == other.finished
        )


DRAWS = (dict(), dict(temperature=0), dict(top_k=9, top_p=0.9, temperature=1.1))


@pytest.mark.parametrize(
    "adapter, settings",
    [
        (True, DRAWS[2]),
        *(
            pytest.param(adapter, DRAWS[i], marks=pytest.mark.slow)
            for adapter, i in ((1, 0), (1, 1), (0, 0), (0, 1), (0, 2))
        ),
    ],
)
def test_sixty_replayed_steps_equal_sixty_steps(model, adapter, settings):
    """Slot by slot: 5 rows in a bucket of 6 slots, of which one is idle, over two buckets of
    width."""
    model = adapted(model) if adapter else model
    with torch.inference_mode(), rollout._sampling_mode(model):
        plain, replayed = (FxDecoder(model, 6, 128, 90, [1], **settings) for _ in range(2))
        prefilled, places = rollout.prefill(model, PROMPTS), [0, 1, 2, 3, 5]
        for decoder in (plain, replayed):
            decoder.start(range(5), prefilled, places, seeds=range(5))
            decoder.cache.reserve(128)
        recordings = {}
        addresses = [tensor.data_ptr() for tensor in replayed.memory()]
        for width in (64, 96):
            recordings[width] = replayed.record(6, width)
        for i in range(60):
            width = 64 if i < 40 else 96
            plain.step(6, width)
            with Waits() as waits:
                recordings[width]()
            assert waits.operations == []
        for name in ("token", "position", "age", "alive", "token_ids", "logprobs"):
            assert torch.equal(getattr(plain, name), getattr(replayed, name)), name
        assert [tensor.data_ptr() for tensor in replayed.memory()] == addresses
    assert plain.age[:5].max() == 61 and plain.age[5] == 0


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_qwen3, tiny_hybrid])
def test_recorded_sampling_equals_plain_sampling(make):
    """Whole calls: slots are refilled, gaps closed, rows idle in their bucket. The recordings
    outlive a call, and see the adapter's new weights."""
    model = adapted(make())
    prompts, fx = random_ids([5, 11, 1, 7, 23, 2] * 2, seed=2), Fx()
    kept = None
    for seed in range(2):
        change(model, seed)
        assert_same(
            run(model, fx, prompts, seed, slots=9), run(model, None, prompts, seed, slots=9)
        )
        made = {shape: recording for shape, recording in fx.decoder.recordings.items() if recording}
        assert kept is None or kept[0] is fx.decoder and kept[1].items() <= made.items()
        kept = fx.decoder, made
    assert len({rows for rows, _ in made}) > 3 and len({width for _, width in made}) > 1


def test_what_a_recording_cannot_follow_is_made_anew(model):
    kept, model = Plain(), adapted(model)
    run(model, kept)
    first = kept.decoder
    run(model, kept, PROMPTS[:5])
    assert kept.decoder is first
    for settings in (
        dict(temperature=0.5),
        dict(stop_ids=[1]),
        dict(max_new_tokens=71),
        dict(slots=3),
    ):
        assert_same(run(model, kept, **settings), run(model, **settings))
        assert kept.decoder is not first
    run(model, kept)
    with lora.disabled(model):
        assert_same(run(model, kept), run(model))
    # more columns
    assert_same(run(model, kept, random_ids([150])), run(model, None, random_ids([150])))


def test_an_aborted_call_leaves_no_row_behind(model):
    kept = Plain()

    def stop(tokens, finished):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, kept, progress=stop)
    assert_same(run(model, kept), run(model))


def test_old_recordings_go(model, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    kept, prompts = Plain(), random_ids([3, 40, 90] * 4)
    assert_same(run(model, kept, prompts), run(model, None, prompts))
    assert len(kept.decoder.recordings) == 2


def test_buckets_lie_a_quarter_apart():
    sizes = sorted({graphs.bucket(n, 32) for n in range(1, 40_000)})
    assert all(size % 32 == 0 for size in sizes) and len(sizes) < 40
    assert all(
        large - small <= max(32, small / 4) for small, large in zip(sizes, sizes[1:], strict=False)
    )
    assert all(graphs.bucket(n, 1) >= n for n in range(1, 300))


def test_the_flag_needs_a_gpu():
    assert graphs.choose(False, torch.device("cpu")) is None
    assert isinstance(graphs.choose(True, torch.device("cuda")), graphs.Graphs)
    with pytest.raises(InputError, match="--cuda-graphs"):
        graphs.choose(True, torch.device("cpu"))


def test_doctests():
    results = doctest.testmod(graphs)
    assert results.attempted and not results.failed


def test_the_recorder_does_record():
    """A tiny model's step as a recording has the operations of attention, and writes in place."""
    model = tiny_qwen3()
    with torch.inference_mode():
        decoder = FxDecoder(model, 2, 64, 8, [1], temperature=1.0)
        decoder.start([0, 1], rollout.prefill(model, PROMPTS[:2]), [0, 1], seeds=[0, 1])
        decoder.cache.reserve(64)
        age = decoder.age.clone()
        recording = decoder.record(2, 64)
        assert torch.equal(decoder.age, age)
        names = [str(node.target) for node in recording.graph.nodes]
        assert any("attention" in name for name in names) and any(
            "index_put_" in name for name in names
        )
        recording()
        assert torch.equal(decoder.age, age + 1)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_idle_rows_see_a_column_under_sliding_windows(implementation):
    """A slot that stands still far to the right must not become a row without a column to see: nan
    would stay there."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        pad_token_id=0,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        sliding_window=8,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.3,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    kept = Plain()
    prompts = random_ids([3, 100, 5, 4, 60, 7])
    settings = dict(slots=6, max_new_tokens=30, stop_ids=[1, 9, 20, 33])
    assert_same(run(model, kept, prompts, **settings), run(model, None, prompts, **settings))
    with torch.inference_mode():
        decoder = PlainDecoder(model, 2, 128, 60, [1])
        decoder.start([0, 1], rollout.prefill(model, prompts[:2]), [0, 1], seeds=[0, 1])
        decoder.alive[1] = False
        for _ in range(3):
            decoder.step(2, 32)  # as wide as the row that is alive needs it
        assert all(tensor.isfinite().all() for tensor in decoder.memory())


def test_nothing_of_a_failed_call_is_left(model):
    """Not in the cache either, where columns that no row sees count 0 times their value."""
    kept, norm = Plain(), model.model.layers[0].input_layernorm.weight
    before = norm.clone()
    norm.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError):
        run(model, kept, random_ids([100, 90]), slots=2)
    norm.data.copy_(before)
    assert_same(run(model, kept, PROMPTS[:2], slots=2), run(model, None, PROMPTS[:2], slots=2))


@pytest.mark.parametrize(
    "change_model",
    [
        lambda model: (lora.merge(model), adapted(model, seed=5)),
        lambda model: model.load_state_dict(
            {k: v * 0.9 for k, v in model.state_dict().items()}, assign=True
        ),
        lambda model: model.bfloat16().float(),
        lambda model: model.set_attn_implementation("eager"),
    ],
)
def test_weights_in_another_place_are_recorded_anew(model, change_model):
    kept, model = Plain(), adapted(model)
    run(model, kept)
    first = kept.decoder
    change_model(model)
    assert_same(run(model, kept), run(model))
    assert kept.decoder is not first
