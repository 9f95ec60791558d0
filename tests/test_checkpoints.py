"""Checkpoints as others write them: quantised ones, GGUF files, padded vocabularies, scaled
windows."""

import json
import shutil
import sys

import pytest
import torch
from conftest import random_ids, tiny_qwen3
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
)

import lora
import rollout
import train
from support import data, quantised
from support.data import InputError, load_model, model_digest
from support.sampling import Sampling, sample

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load(path):
    return load_model(str(path), torch.float32, torch.device("cpu"))


@pytest.fixture
def copied(tiny_toy, tmp_path):
    return shutil.copytree(tiny_toy / "model", tmp_path / "model")


# ---- quantised bases


@pytest.mark.parametrize(
    "how, method",
    [
        (dict(quant_method="fp8", weight_block_size=[128, 128]), "fp8"),
        (dict(quant_method="bitsandbytes", load_in_4bit=True), "bitsandbytes"),
        (dict(quant_method="gptq", bits=4), "gptq"),
        (dict(quant_method="compressed-tensors", config_groups={}), "compressed-tensors"),
        (dict(quant_method="mxfp4"), "mxfp4"),
        (dict(quant_method="exl3", bits=3), "exl3"),  # transformers ignores what it does not know
        (dict(load_in_8bit=True), "without a name"),
    ],
)
def test_a_quantised_base_is_refused_before_its_weights_are_read(copied, how, method):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    (copied / "model.safetensors").unlink()
    with pytest.raises(InputError, match=f"quantised .*{method}.: train the checkpoint that it"):
        load(copied)


def test_a_config_that_says_null_is_no_quantised_base(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    load(copied)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_scales_that_have_no_place_are_named(copied, dtype, capsys):
    """A quantised checkpoint whose config does not say so."""
    tensors = load_file(copied / "model.safetensors")
    for name in [name for name in tensors if "up_proj" in name]:
        scale = tensors[name].abs().amax(1, keepdim=True) / 100
        tensors[name] = (tensors[name] / scale).to(dtype)
        tensors[name + "_scale"] = scale
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    load(copied)
    assert "weights of the checkpoint have no place in the model, first model.layers.0.mlp" in (
        capsys.readouterr().err
    )


# ---- GGUF


def test_what_is_wrong_with_gguf_files_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="b.gguf needs two more packages: pip install gguf acc"):
        load(tmp_path)
    with pytest.raises(InputError, match="name the directory that holds this file"):
        load(tmp_path / "b.gguf")
    (tmp_path / "a.gguf").touch()
    with pytest.raises(InputError, match=r"several .gguf files .a.gguf, b.gguf."):
        load(tmp_path)


def test_a_checkpoint_with_a_gguf_file_beside_it_is_read_as_before(copied):
    (copied / "q4.gguf").touch()
    (copied / "q8.gguf").touch()
    load(copied)


def permuted(weight, heads):
    """Rows of q_proj and k_proj in llama.cpp's order."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(folder, change=lambda writer: None):
    """A tiny llama in Q8_0 in `folder`; returns the model that it stands for."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet()), "ab", "<|im_start|>", "<|im_end|>"]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=4096,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(4096)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(8)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(258)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        values = permuted(values, heads) if heads else values
        place = names.get_name(name, try_suffixes=(".weight",))
        if tensor.dim() == 1:
            writer.add_tensor(place, values)
            continue
        packed = gguf.quantize(values, kind)
        writer.add_tensor(place, packed, raw_dtype=kind)
        read = torch.from_numpy(gguf.dequantize(packed, kind))
        if heads:
            read = read.reshape(heads, 4, 2, -1).transpose(1, 2).reshape(read.shape)
        tensor.copy_(read)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def greedy(model, tokenizer):
    prompt = tokenizer("What is 2+3?").input_ids
    (completion,) = rollout.sample(
        model,
        [prompt],
        max_new_tokens=20,
        stop_ids=rollout.stop_ids(model, tokenizer),
        temperature=0,
    )
    return completion.token_ids


def test_a_gguf_file_is_trained_and_exported_as_an_ordinary_checkpoint(
    tmp_path, tiny_toy, monkeypatch
):
    base = tmp_path / "base"
    base.mkdir()
    written = write_gguf(base)
    model, tokenizer = load(base)
    for name, tensor in written.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert not hasattr(model.config, "quantization_config")
    problem = data.load_problems(tiny_toy / "train.jsonl")[0][0]
    prompt = sample(model, tokenizer, [problem], Sampling(1, 1), seed=(0,))[0].prompt
    assert tokenizer.decode(prompt).startswith("<|im_start|>user\n")

    before = model_digest(str(base))
    arguments = f"--model {base} --data {tiny_toy}/train.jsonl --out {tmp_path}/run --lr 0.1"
    arguments += " --steps 1 --prompts-per-step 2 --max-new-tokens 8 --lora-rank 2"
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments.split()])
    train.main()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model", dtype=torch.float32)
    again = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    ours, _ = load(base)
    data.load_adapter(ours, tmp_path / "run/checkpoints/step-000001/adapter")
    lora.merge(ours)
    assert greedy(exported, again) == greedy(ours, tokenizer)
    assert again.chat_template == tokenizer.chat_template
    text = "<|im_start|>user\nWhat is 12+30?\u00b2<|im_end|>"
    assert again(text).input_ids == tokenizer(text).input_ids

    with (base / "tiny.gguf").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    assert model_digest(str(base)) != before


@pytest.mark.parametrize(
    "change, part",
    [
        (lambda w: w.add_rope_scaling_type(sys.modules["gguf"].RopeScalingType.YARN), "= yarn"),
        (lambda w: w.add_sliding_window(7), "llama.attention.sliding_window = 7"),
        (lambda w: w.add_tensor("rope_freqs.weight", torch.ones(4).numpy()), "4 weights"),
        (lambda w: w.add_tensor("blk.0.attn_q.bias", torch.ones(32).numpy()), "32 weights"),
    ],
)
def test_what_transformers_leaves_out_of_a_gguf_file_is_named(tmp_path, change, part):
    write_gguf(tmp_path, change)
    with pytest.raises(InputError, match=f"leaves out a part of this GGUF file.*{part}"):
        load(tmp_path)


def test_a_gguf_file_without_some_weights_is_refused(tmp_path):
    write_gguf(tmp_path, lambda w: w.tensors[0].pop("output_norm.weight"))
    with pytest.raises(InputError, match="1 weights are missing"):
        load(tmp_path)


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
    problem = data.Problem("What is 2+3?", "", "5", 1)
    liked = sample(model, tokenizer, [problem], Sampling(1, 1, 0.0), seed=(0,))[0].token_ids[0]
    own = len(tokenizer)
    model.resize_token_embeddings(own + 30, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[own:] = model.get_output_embeddings().weight[liked] * 3
    model.save_pretrained(copied)
    model, tokenizer = load(copied)
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
