"""The models that work, one tiny random model of each kind: docs/models.md is made of it, by

python -m tests.test_models > docs/models.md                 a few minutes; `pytest -m slow` tests the same rows
"""

import importlib
import re
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import lora
import rollout
import teacher
import toy
from support.data import ATTENTION, add_adapter, load_model
from support.errors import InputError

DOCS = Path(__file__).parents[1] / "docs" / "models.md"
BASE = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    eos_token_id=1,
    pad_token_id=0,
    bos_token_id=None,
    initializer_range=0.3,
    init_std=0.3,
    tie_word_embeddings=False,
    dropout=0.0,
)  # support.data.load_model sets it to 0, too
WINDOW = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
DELTA = dict(
    num_hidden_layers=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
)  # three layers of gated delta net, one of attention
EXPERTS = dict(
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    n_shared_experts=1,
)
SHARED = EXPERTS | dict(shared_expert_intermediate_size=16)
LATENT = dict(
    kv_lora_rank=8,
    q_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    num_key_value_heads=4,
)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1)
# GPT-2's names
OLD = dict(n_embd=32, n_layer=2, n_head=4, n_positions=256, n_inner=48, rotary_dim=4)

MODELS = {  # model_type of config.json: (what people call it, settings of the tiny one)
    "qwen2": ("Qwen2, Qwen2.5, R1-Distill-Qwen", {}),
    "qwen2_moe": ("Qwen1.5-MoE, Qwen2-57B-A14B", SHARED),
    "qwen3": ("Qwen3", {}),
    "qwen3_moe": ("Qwen3-30B-A3B", EXPERTS),
    "qwen3_5_text": ("Qwen3.5, without images", DELTA),
    "qwen3_5_moe_text": ("Qwen3.5-35B-A3B and larger, without images", DELTA | SHARED),
    "qwen3_next": ("Qwen3-Next", DELTA | SHARED),
    "llama": ("Llama 2, 3, R1-Distill-Llama, Yi, SmolLM2", {}),
    "mistral": ("Mistral 7B", dict(sliding_window=8)),
    "ministral": ("Ministral 8B", WINDOW),
    "ministral3": ("Ministral 3, without images", {}),
    "mixtral": ("Mixtral", EXPERTS),
    "gemma": ("Gemma", {}),
    "gemma2": (
        "Gemma 2",
        dict(final_logit_softcapping=2.0, sliding_window=8, query_pre_attn_scalar=8),
    ),
    "gemma3_text": ("Gemma 3 1B", WINDOW | dict(query_pre_attn_scalar=8)),
    "gemma3n_text": (
        "Gemma 3n, without images and sound",
        WINDOW
        | dict(
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=61,
            laurel_rank=4,
            num_kv_shared_layers=0,
            intermediate_size=[48, 48],
            activation_sparsity_pattern=[0.0, 0.0],
            final_logit_softcapping=2.0,
        ),
    ),
    "gemma4_text": (
        "Gemma 4, without images and sound",
        WINDOW
        | dict(
            final_logit_softcapping=2.0,
            hidden_size_per_layer_input=0,
            global_head_dim=8,
            num_global_key_value_heads=2,
            num_kv_shared_layers=0,
            enable_moe_block=False,
        ),
    ),
    "vaultgemma": (
        "VaultGemma",
        dict(final_logit_softcapping=2.0, sliding_window=8, query_pre_attn_scalar=8),
    ),
    "phi": ("Phi-1.5, Phi-2", {}),
    "phi3": ("Phi-3, Phi-4, Phi-4-mini", {}),
    "phimoe": ("Phi-3.5-MoE", EXPERTS),
    "gpt_oss": ("gpt-oss", EXPERTS | WINDOW),
    "glm": ("GLM-4 9B", {}),
    "glm4": ("GLM-4-0414, GLM-Z1", {}),
    "glm4_moe": ("GLM-4.5, GLM-4.6", EXPERTS),
    "glm4_moe_lite": ("GLM-4.7-Flash", EXPERTS | LATENT),
    "deepseek_v2": ("DeepSeek-V2-Lite", EXPERTS | LATENT | dict(topk_method="greedy")),
    "deepseek_v3": ("DeepSeek-V3, R1", EXPERTS | LATENT),
    "kimi_linear": (
        "Kimi-Linear",
        EXPERTS
        | LATENT
        | dict(
            head_dim=16,
            num_experts_per_token=2,
            layer_types=["linear_attention", "full_attention"],
            linear_attn_config=dict(
                num_heads=4,
                head_dim=8,
                short_conv_kernel_size=4,
                kda_layers=[1],
                full_attn_layers=[2],
            ),
        ),
    ),
    "minimax_m2": ("MiniMax-M2", EXPERTS),
    "granite": ("Granite 3", dict(logits_scaling=4.0)),
    "granitemoe": ("Granite 3 MoE", EXPERTS | dict(logits_scaling=4.0)),
    "granitemoehybrid": (
        "Granite 4",
        MAMBA
        | dict(
            layer_types=["mamba", "attention"],
            shared_intermediate_size=48,
            num_local_experts=0,
            logits_scaling=4.0,
            position_embedding_type="rope",
        ),
    ),
    "cohere": ("Command-R", dict(logit_scale=0.5)),
    "cohere2": ("Command-R7B, Command-A", WINDOW | dict(logit_scale=0.5)),
    "olmo2": ("OLMo 2", {}),
    "olmo3": ("OLMo 3", WINDOW),
    "olmoe": ("OLMoE", EXPERTS),
    "olmo_hybrid": (
        "OLMo Hybrid",
        dict(
            layer_types=["linear_attention", "full_attention"],
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=4,
            linear_num_value_heads=4,
        ),
    ),
    "smollm3": ("SmolLM3", {}),
    "lfm2": ("LFM2", dict(layer_types=["conv", "full_attention"])),
    "lfm2_moe": (
        "LFM2-8B-A1B",
        EXPERTS | dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    ),
    "lfm3": (
        "LFM3",
        WINDOW
        | dict(num_hidden_layers=3, layer_types=["conv", "full_attention", "sliding_attention"]),
    ),
    "falcon": ("Falcon 7B, 40B", dict(new_decoder_architecture=True, num_kv_heads=2)),
    "falcon_h1": (
        "Falcon-H1",
        dict(
            mamba_d_ssm=32,
            mamba_n_heads=4,
            mamba_d_head=8,
            mamba_d_state=8,
            mamba_n_groups=1,
            lm_head_multiplier=0.5,
        ),
    ),
    "bamba": ("Bamba", MAMBA | dict(attn_layer_indices=[1])),
    "jamba": (
        "Jamba",
        EXPERTS
        | dict(
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            mamba_d_state=8,
            mamba_dt_rank=4,
        ),
    ),
    "nemotron": ("Nemotron-4, Minitron", {}),
    "nemotron_h": (
        "Nemotron-H, Nemotron Nano 2 and 3",
        EXPERTS
        | dict(
            num_hidden_layers=4,
            layers_block_type=["linear_attention", "full_attention", "mlp", "moe"],
            mamba_num_heads=8,
            mamba_head_dim=8,
            ssm_state_size=8,
            n_groups=1,
            moe_shared_expert_intermediate_size=16,
        ),
    ),
    "zamba2": (
        "Zamba2",
        dict(
            layers_block_type=["linear_attention", "hybrid"],
            mamba_d_state=8,
            n_mamba_heads=8,
            mamba_headdim=8,
            mamba_ngroups=1,
            use_mem_rope=True,
            num_mem_blocks=1,
        ),
    ),
    "exaone4": ("EXAONE 4", WINDOW),
    "hunyuan_v1_dense": ("Hunyuan 0.5B to 7B", {}),
    "hunyuan_v1_moe": ("Hunyuan-A13B", EXPERTS | dict(moe_topk=2)),
    "hyperclovax": ("HyperCLOVA X SEED", dict(logits_scaling=0.5)),
    "ernie4_5": ("ERNIE 4.5 0.3B", {}),
    "ernie4_5_moe": (
        "ERNIE 4.5 21B-A3B",
        EXPERTS
        | dict(moe_num_experts=4, moe_k=2, moe_layer_start_index=1, moe_num_shared_experts=1),
    ),
    "seed_oss": ("Seed-OSS", {}),
    "minicpm3": ("MiniCPM3", LATENT | dict(head_dim=16)),
    "apertus": ("Apertus", {}),
    "arcee": ("AFM-4.5B", {}),
    "helium": ("Helium", {}),
    "stablelm": ("StableLM 2", {}),
    "starcoder2": ("StarCoder2", {}),
    "nanochat": ("nanochat", dict(final_logit_softcapping=2.0)),
    "gpt_neox": ("Pythia, GPT-NeoX", {}),
    "gptj": ("GPT-J", OLD),
    "gpt2": ("GPT-2", OLD),
    "opt": ("OPT", dict(ffn_dim=48, word_embed_proj_dim=32)),
    "mpt": ("MPT", dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=256)),
}
REFUSED = {  # model_type: (what people call it, settings, a part of the error, why)
    "minimax": (
        "MiniMax-M1",
        EXPERTS,
        "uses cache of its own",
        "takes only a cache class of its own",
    ),
    "mamba": (
        "Mamba",
        dict(state_size=8),
        "",
        "has no keys and values",
    ),
    "mamba2": (
        "Mamba-2, Codestral Mamba",
        dict(state_size=8, num_heads=8, n_groups=1),
        "",
        "as Mamba",
    ),
    "recurrent_gemma": (
        "RecurrentGemma",
        dict(num_hidden_layers=3, attention_window_size=8, lru_width=32),
        "",
        "keeps its state in the model",
    ),
    "rwkv": ("RWKV-4", dict(attention_hidden_size=32), "", "names its cache otherwise"),
    "llama4_text": (
        "Llama 4",
        EXPERTS | dict(intermediate_size_mlp=48, attention_chunk_size=8),
        "chunked_attention",
        "chunked attention",
    ),
    "gpt_neo": (
        "GPT-Neo",
        dict(attention_types=[[["global", "local"], 1]], num_layers=2, num_heads=4, window_size=8),
        "local",
        "local attention under another name",
    ),
    "bloom": (
        "BLOOM",
        dict(n_layer=2, n_head=4),
        "",
        "makes positions (ALiBi) of the mask",
    ),
    "modernbert-decoder": (
        "Ettin decoders",
        dict(
            bos_token_id=2,
            cls_token_id=2,
            sep_token_id=1,
            global_attn_every_n_layers=2,
            local_attention=8,
        ),
        "not those of its head",
        "a layer before the head",
    ),
    "blenderbot": (
        "Blenderbot",
        dict(
            d_model=32,
            decoder_layers=2,
            decoder_attention_heads=4,
            decoder_ffn_dim=48,
            encoder_layers=1,
            encoder_attention_heads=4,
            encoder_ffn_dim=48,
        ),
        "another distribution",
        "counts positions by the cache",
    ),
    "deepseek_v32": (
        "DeepSeek-V3.2",
        EXPERTS | LATENT | dict(index_n_heads=2, index_head_dim=8, index_topk=4),
        "indexed_attention",
        "sparse attention",
    ),
}
EXPERTS_IN_PEFT = "merge for PEFT"
OUT_PROJ_IN_PEFT = "PEFT refuses adapters of `out_proj`"
CLAMPED = "the cache changes log-probs by 0.01 to 0.2 nats"
REMARKS = dict.fromkeys(
    [
        "qwen3_next",
        "glm4_moe",
        "glm4_moe_lite",
        "deepseek_v2",
        "deepseek_v3",
        "hunyuan_v1_moe",
        "ernie4_5_moe",
    ],
    EXPERTS_IN_PEFT,
) | {
    "falcon_h1": OUT_PROJ_IN_PEFT,
    "qwen3_5_text": "loaded and exported without images",
    "gemma3_text": "`gemma3` loads with its image part, unused",
    "gemma4_text": "`gemma4` likewise",
    "nemotron_h": f"{CLAMPED}; {OUT_PROJ_IN_PEFT}",
    "zamba2": CLAMPED,
    "gpt2": "Conv1D layers",
}
TOLERANCE = {"nemotron_h": 0.03, "zamba2": 0.03}  # nats
QUICK = ["qwen3_5_text", "falcon_h1", "lfm3", "gemma2", "granite", "gpt2", "phi3", "gpt_oss"]


def random_ids(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 61, (length,), generator=generator).tolist() for length in lengths]


PROMPTS = random_ids([5, 9, 3, 5, 12], seed=0)


def make(kind, settings):
    torch.manual_seed(0)
    base = {key: value for key, value in BASE.items() if (kind, key) != ("falcon", "head_dim")}
    config = AutoConfig.for_model(kind, **base | settings)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def assert_greedy(model, tolerance):
    """Every token is the likeliest by the model without a cache, or as likely to `tolerance` nats:
    the same on every CPU, where the tokens themselves are not."""
    for prompt, completion in zip(PROMPTS, draw(model, temperature=0), strict=True):
        ids = completion.token_ids
        logits = (
            model(torch.tensor([prompt + ids]), use_cache=False)
            .logits[0, len(prompt) - 1 : -1]
            .float()
        )
        chosen = logits[range(len(ids)), ids]
        assert (
            (logits.amax(-1) - chosen).max() < tolerance
            and (len(ids) == 10 or ids[-1] == 1)
            and 1 not in ids[:-1]
        )


def whole_logits(model, completions):
    """Log-probs of all tokens, a list per row, from the model's own logits."""
    logp = []
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        logits = model(torch.tensor([prompt + completion]), use_cache=False).logits[
            0, len(prompt) - 1 : -1
        ]
        logp.append(logits.float().log_softmax(-1)[range(len(completion)), completion])
    return torch.cat(logp)


def read(model, completions):
    reading = teacher.read(model, PROMPTS, completions)
    return reading.logp[reading.mask]


def draw(model, **settings):
    return rollout.sample(
        model, PROMPTS, max_new_tokens=10, stop_ids=[1], slots=2, seeds=range(5), **settings
    )


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in lora.lora_parameters(model)])


def check(kind, folder):
    """Everything that docs/models.md says of a kind is true of the tiny model; its line there."""
    name, settings = MODELS[kind]
    model, tolerance = make(kind, settings), TOLERANCE.get(kind, 1e-4)
    rollout.check_model(model)
    teacher.check_head(model)
    assert_greedy(model, tolerance)

    completions = [c.token_ids for c in draw(model)]
    with torch.no_grad():
        base = read(model, completions)
    default = adapter_note(make(kind, settings))
    lora.add_lora(model, 4, 8, lora.ALL_LINEAR)
    for layer in model.modules():
        if isinstance(layer, lora.LoRALinear):
            torch.nn.init.normal_(layer.lora_B, std=0.05)
    ours, theirs = read(model, completions), whole_logits(model, completions)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    weights = torch.randn(len(ours), generator=torch.Generator().manual_seed(0))
    ours, theirs = (gradients(model, (logp * weights).sum()) for logp in (ours, theirs))
    torch.testing.assert_close(ours, theirs, atol=1e-3 * theirs.abs().max().item(), rtol=0)
    with lora.disabled(model), torch.no_grad():
        torch.testing.assert_close(read(model, completions), base, atol=1e-5, rtol=0)

    before = read(model, completions).detach()
    model.activation_checkpointing_enable({"use_reentrant": False})
    teacher.reading_mode(model)  # as train.py does
    torch.testing.assert_close(
        gradients(model, (read(model, completions) * weights).sum()),
        ours,
        atol=1e-4 * ours.abs().max().item(),
        rtol=0,
    )
    model.activation_checkpointing_disable()
    model.eval()
    torch.optim.SGD(lora.lora_parameters(model), lr=0.01 / ours.abs().max().item()).step()
    drawn = draw(model)
    with torch.no_grad():
        assert (read(model, completions) - before).abs().max() > 1e-5
        scored = read(model, [c.token_ids for c in drawn])
    torch.testing.assert_close(
        torch.tensor(sum((c.logprobs for c in drawn), [])), scored, atol=tolerance, rtol=0
    )

    student = whole_logits(model, completions).detach()
    lora.save_adapter(model, folder)
    fresh = make(kind, settings)
    lora.load_adapter(fresh, folder)
    assert torch.equal(whole_logits(fresh, completions), student)
    lora.merge(fresh)
    torch.testing.assert_close(whole_logits(fresh, completions), student, atol=1e-3, rtol=0)
    if peft := optional("peft"):
        try:
            theirs = whole_logits(
                peft.PeftModel.from_pretrained(make(kind, settings), folder), completions
            )
        except ValueError as error:
            assert "'out_proj' is incompatible" in str(error) and OUT_PROJ_IN_PEFT in REMARKS[kind]
        else:
            assert ((theirs - student).abs().max() < 1e-3) != (
                EXPERTS_IN_PEFT in REMARKS.get(kind, "")
            )

    notes = "; ".join(filter(None, [*notes_on_reading(model), default, REMARKS.get(kind, "")]))
    return f"| `{kind}` | {name} ({notes}) |" if notes else f"| `{kind}` | {name} |"


def notes_on_reading(model):
    head = teacher.output_head(model)
    if rollout.has_states(model):
        yield "states"
    if head.cap:
        yield "capped logits"
    elif head.scale != 1:
        yield "scaled logits"


def optional(package):
    try:
        return importlib.import_module(package)
    except ImportError:
        return None


def adapter_note(model):
    """What the default adapter covers; empty: all linear layers."""
    try:
        line = add_adapter(model, 4, 8)
    except InputError as error:
        names = re.search("leave out all of the .*: say --lora-targets (.*), or", str(error))[1]
        return f"`--lora-targets {names}`"
    rest = line.split(")", 1)[1]
    experts = any(name.endswith("experts") for name, _ in model.named_modules())
    if all(map(ATTENTION.search, lora.linear_layers(model))) and experts:
        return "attention only"
    left_out = rest.removeprefix("; left out: ").split(", ") if rest else []
    notes = [f"all but {len(left_out)}"] if left_out else []
    if experts:
        notes.append("no experts")
    return ", ".join(notes)


def refuse(kind):
    """What is not in the table is refused with a line, not sampled wrongly. The kind's line in the
    second table."""
    name, settings, part, why = REFUSED[kind]
    model = make(kind, settings)
    # support.data.load_model makes an InputError of it
    with pytest.raises(Exception, match=part or None):
        rollout.check_model(model)
        teacher.check_head(model)
    return f"| `{kind}` | {name} | {why} |"


def document():
    """The text of docs/models.md."""
    rows = []
    for kind in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(check(kind, folder))
        print(rows[-1], file=sys.stderr)
    return "\n".join(
        [
            *HEADER.format(version=transformers.__version__).splitlines(),
            *rows,
            *BETWEEN.splitlines(),
            *map(refuse, REFUSED),
            "",
        ]
    )


HEADER = """\
# Models that work

Of each type a tiny random model was built with transformers 5.23.0 and tested: sampling with a cache, log-probs,
gradients, and an adapter that goes through files, PEFT 0.21.2 and merging. **One real checkpoint was trained here**, a
`llama` ([real.md](real.md)). A model also needs a chat template. Other models may work: every model is tried when it is
loaded. Quantised checkpoints are refused, GGUF files are dequantised: [running.md](running.md#your-own-model).

Without a note: a cache of keys and values, plain logits, a default adapter on all linear layers but the head.

- *states*: the cache also holds states. These layers are slow without kernels (flash-linear-attention, causal-conv1d,
  mamba-ssm), which never ran here.
- *all but N*: the default adapter leaves out N kinds of linear layers; `adapter` in `config.json` names them.
  *Attention only*, *no experts*: experts are never adapted.
- `--lora-targets`: needed; the default adapter would miss all attention or all ordinary MLPs, and the run stops.
- *merge for PEFT*: PEFT takes the MLPs in our adapter for experts. Use the merged model.

Made by `python -m tests.test_models > docs/models.md`; `pytest -m slow` tests all rows.
See [lora.py](../lora.py).

| type in config.json | known as (notes) |
|---|---|
"""

BETWEEN = """\

Refused, and why:

| type | known as | why |
|---|---|---|
"""


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in MODELS]
)
def test_a_model_of_the_table(kind, tmp_path):
    assert check(kind, tmp_path) in DOCS.read_text().splitlines()


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            kind,
            marks=()
            if kind in ("minimax", "recurrent_gemma", "modernbert-decoder")
            else pytest.mark.slow,
        )
        for kind in REFUSED
    ],
)
def test_what_does_not_work_is_refused(kind):
    assert refuse(kind) in DOCS.read_text().splitlines()


def test_the_page_has_all_rows_and_no_other():
    listed = [
        line.split("`")[1] for line in DOCS.read_text().splitlines() if line.startswith("| `")
    ]
    assert listed == [*MODELS, *REFUSED]


VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
WITH_IMAGES = {  # (settings of the vision tower, of the whole)
    "qwen3_5": (
        dict(
            depth=1,
            hidden_size=16,
            intermediate_size=16,
            num_heads=2,
            out_hidden_size=32,
            num_position_embeddings=16,
        ),
        {},
    ),
    "gemma3": (
        VISION | dict(image_size=16, patch_size=8, model_type="siglip_vision_model"),
        dict(mm_tokens_per_image=1, image_token_index=60, boi_token_index=59, eoi_token_index=58),
    ),
    "gemma4": (
        VISION | dict(head_dim=8, num_key_value_heads=2),
        dict(audio_config=None, image_token_id=60),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", WITH_IMAGES)
def test_a_checkpoint_with_images_is_trained_on_text(kind, tmp_path):
    """What the remarks say: loaded, only the text's layers adapted, exported, and loaded again."""
    vision, whole = WITH_IMAGES[kind]
    tokenizer, text = toy.make_tokenizer(), f"{kind}_text"
    size = dict(vocab_size=len(tokenizer), model_type=text, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(
            kind, text_config=BASE | MODELS[text][1] | size, vision_config=vision, **whole
        )
    ).save_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "a")
    model, _ = load_model(str(tmp_path / "a"), torch.float32, torch.device("cpu"))
    lora.add_lora(model, 4, 8, lora.ALL_LINEAR)
    assert lora.lora_parameters(model) and not any(
        "vision" in name for name, p in model.named_parameters() if p.requires_grad
    )
    completions = [c.token_ids for c in draw(model)]
    teacher.reading_mode(model)
    gradients(model, read(model, completions).sum())
    torch.optim.SGD(lora.lora_parameters(model), lr=1e-3).step()
    model.eval()
    student = whole_logits(model, completions).detach()
    lora.merge(model)
    model.save_pretrained(tmp_path / "b")
    tokenizer.save_pretrained(tmp_path / "b")
    model, _ = load_model(str(tmp_path / "b"), torch.float32, torch.device("cpu"))
    torch.testing.assert_close(
        whole_logits(model, completions).detach(), student, atol=1e-3, rtol=0
    )


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(document(), end="")
