"""Checkpoints as others write them: quantised ones, GGUF files, padded vocabularies, scaled
windows."""

import shutil

import pytest
import torch
from conftest import random_ids, tiny_qwen3
from transformers import (
    Gemma3TextConfig,
    Qwen2Config,
)

import rollout
from support import data
from support.data import load_model
from support.sampling import Sampling, sample


def load(path):
    return load_model(str(path), torch.float32, torch.device("cpu"))


@pytest.fixture
def copied(tiny_toy, tmp_path):
    return shutil.copytree(tiny_toy / "model", tmp_path / "model")


# ---- ids beyond the tokenizer


@pytest.mark.parametrize("how", [dict(temperature=0), dict(), dict(top_k=3), dict(top_p=0.5)])
def test_ids_without_a_token_are_never_drawn(how):
    """Padding of the vocabulary, and holes in it; such a token is lost in the text."""
    model = tiny_qwen3()
    with torch.no_grad():  # ids from 50 on, and 20, are what the model likes best
        model.lm_head.weight.mul_(0.1)
        model.lm_head.weight[[20, *range(50, 61)]] = model.lm_head.weight[7] * 30

    class Tokenizer:
        eos_token_id = 1

        @staticmethod
        def get_vocab():
            return {str(i): i for i in range(50) if i != 20}

    unused = rollout.unused_ids(model, Tokenizer)
    assert unused == [20, *range(50, 61)]
    settings = dict(max_new_tokens=15, stop_ids=[1], samples_per_prompt=4, seeds=range(12)) | how
    drawn = rollout.sample(model, random_ids([5, 2, 9], 50), unused=unused, **settings)
    ids = {i for completion in drawn for i in completion.token_ids}
    assert ids and not ids & {*unused}
    likes = rollout.sample(model, random_ids([5, 2, 9], 50), **settings)
    assert {i for completion in likes for i in completion.token_ids} & {*unused}


def test_a_stop_token_that_the_tokenizer_lacks_can_be_drawn(model):
    settings = dict(max_new_tokens=30, stop_ids=[8, 13, 40], temperature=0)
    stopped = rollout.sample(model, random_ids([5, 11]), unused=[8, 13, 40], **settings)
    assert stopped == rollout.sample(model, random_ids([5, 11]), **settings)
    assert any(completion.finished for completion in stopped)


def test_training_never_draws_from_a_padded_vocabulary(copied):
    model, tokenizer = load(copied)
    own = len(tokenizer)
    model.resize_token_embeddings(own + 30, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[own:] = model.get_output_embeddings().weight.mean() * 9
    model.save_pretrained(copied)
    model, tokenizer = load(copied)
    problem = data.Problem("What is 2+3?", "", "5", 1)
    for one in sample(model, tokenizer, [problem], Sampling(8, 12, top_p=1.0), seed=(0,)):
        assert max(one.token_ids) < own


# ---- scaled windows


def yarn(window, factor, original):
    own = dict(original_max_position_embeddings=original) if original else {}
    return dict(rope_type="yarn", rope_theta=1e4, factor=factor, **own), window


@pytest.mark.parametrize(
    "rope, written, window",
    [
        (*yarn(32_768, 4.0, 32_768), 131_072),  # Qwen2.5 as its page says
        (*yarn(32_768, 4.0, None), 131_072),
        (*yarn(40_960, 4.0, 32_768), 131_072),  # Qwen3
        (*yarn(131_072, 4.0, 32_768), 131_072),  # written by hand, counted twice by nobody
        (*yarn(163_840, 40, 4096), 163_840),  # DeepSeek
        (dict(rope_type="linear", rope_theta=1e4, factor=4.0), 4096, 16_384),
        (dict(rope_type="dynamic", rope_theta=1e4, factor=4.0), 4096, 4096),
        (
            dict(
                rope_type="llama3",
                rope_theta=5e5,
                factor=32.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            ),
            131_072,
            131_072,
        ),
    ],
)
def test_the_window_is_what_the_config_says_after_scaling(rope, written, window):
    class Model:
        config = Qwen2Config(rope_parameters=rope, max_position_embeddings=written)

    assert rollout.window(Model) == window


@pytest.mark.parametrize("kind, window", [("linear", 64), ("yarn", 512), ("longrope", 32)])
def test_windows_of_layers_with_their_own_scaling(kind, window):
    """Gemma 3 from 4B on: the window counts the linear scaling of its full attention."""
    full = dict(rope_type=kind, rope_theta=1e6, factor=8.0)
    if kind == "yarn":
        full["original_max_position_embeddings"] = 64
    if kind == "longrope":
        ones = [1.0] * 128
        full |= dict(original_max_position_embeddings=32, short_factor=ones, long_factor=ones)
    sliding = dict(rope_type="default", rope_theta=1e4)

    class Model:
        config = Gemma3TextConfig(
            max_position_embeddings=64,
            rope_parameters=dict(full_attention=full, sliding_attention=sliding),
        )

    assert rollout.window(Model) == window


def test_sampling_beyond_the_written_window_of_yarn_equals_a_full_forward():
    rope, written = yarn(32, 4.0, 32)
    model = tiny_qwen3(window=written, rope_parameters=rope)
    prompts = random_ids([40, 7])
    drawn = rollout.sample(model, prompts, max_new_tokens=60, stop_ids=[], seeds=[0, 1])
    for prompt, completion in zip(prompts, drawn, strict=True):
        ids = torch.tensor([prompt + completion.token_ids])
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        logp = logits.log_softmax(-1)[range(60), completion.token_ids]
        torch.testing.assert_close(torch.tensor(completion.logprobs), logp, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="window of 128"):
        rollout.sample(model, prompts, max_new_tokens=89, stop_ids=[])
