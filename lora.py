r"""LoRA: the adapter that makes the student differ from the teacher.

"LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685: every chosen linear layer W
becomes

    W x + (alpha / rank) * B A x        A [rank, in] random, B [out, rank] zero at the start, W frozen

so that a fresh student equals the base model. With the adapter on it is the student; inside
`disabled(model)` it is the base model again, which is EGRSD's frozen teacher (arXiv 2605.13255):
two models for the memory of one.

A and B are kept in float32 whatever the dtype of W: at a learning rate of 5e-6 most updates of a
bfloat16 weight would round to nothing. Under autocast the products still run in bfloat16. While
completions are sampled, thousands of tokens with the same weights, copies of A and B that are
rounded once take their place.

Adapters on disk are in PEFT's format; PEFT 0.21.2 was tried (tests/test_lora.py), vLLM, which reads
it too, was not. There is no dropout, no bias and no per-layer rank: a file that needs them is
refused. Embeddings, routers and experts stay frozen: which expert sees a token, and whether one
does, changes from batch to batch.

Copy this file: it needs torch and safetensors (which transformers brings).
"""

import json
import math
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TARGETS = (
    # Qwen, Llama, Mistral, Gemma
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    # several in one: Phi-3, GLM
    "qkv_proj",
    "gate_up_proj",
    # GPT-NeoX, GPT-2, Starcoder2
    "query_key_value",
    "c_attn",
    "c_fc",
    "c_proj",
)
# PEFT's name for every linear layer but the head; here routers and experts are no part of it
ALL_LINEAR = "all-linear"
# In names of modules: routers, experts, and a layer of Mamba of which the model takes the weight
# instead of calling it
FROZEN = re.compile(r"(^|\.)(gate|\w*router\w*|shared_expert_gate|experts|dt_proj)(\.|$)")


class LoRALinear(nn.Module):
    """base(x) + (alpha / rank) * B A x, with `base` frozen: x [..., in] -> [..., out] in the dtype
    of base(x)."""

    def __init__(self, base: nn.Module, rank: int, alpha: float):
        """base: nn.Linear, or GPT-2's Conv1D, which is one with its weight transposed."""
        super().__init__()
        weight = base.weight if isinstance(base, nn.Linear) else base.weight.T
        self.base, self.rank, self.alpha, self.enabled = base, rank, alpha, True
        # of A and (alpha / rank) B, in the dtype of the products
        self.copies, self.is_sampling = None, False
        self.out_features, in_features = weight.shape
        self.lora_A = nn.Parameter(weight.new_empty(rank, in_features, dtype=torch.float32))
        self.lora_B = nn.Parameter(weight.new_zeros(self.out_features, rank, dtype=torch.float32))
        # as in the authors' code: nn.Linear's own default
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.enabled:
            return y
        if self.is_sampling:  # two products and nothing else
            low = nn.functional.linear(x, self.copies[0])
            return y.flatten(0, -2).addmm_(low.flatten(0, -2), self.copies[1].T).view(y.shape)
        low = nn.functional.linear(x.to(self.lora_A.dtype), self.lora_A)  # [..., rank]
        return y + (self.alpha / self.rank * nn.functional.linear(low, self.lora_B)).to(y.dtype)

    def sampling(self, on: bool) -> None:
        """rollout.sample calls this when it begins and ends. The copies are kept in place, for CUDA
        graphs."""
        self.is_sampling, device = on, self.base.weight.device.type
        if on and self.enabled:
            dtype = (
                torch.get_autocast_dtype(device)
                if torch.is_autocast_enabled(device)
                else self.base.weight.dtype
            )
            if (
                self.copies is None
                or self.copies[0].dtype != dtype
                or self.copies[0].device != self.lora_A.device
            ):
                self.copies = [
                    torch.empty_like(weight, dtype=dtype) for weight in (self.lora_A, self.lora_B)
                ]
            self.copies[0].copy_(self.lora_A)
            self.copies[1].copy_(self.alpha / self.rank * self.lora_B)


def add_lora(
    model: nn.Module, rank: int = 64, alpha: float = 128, targets: tuple[str, ...] | str = TARGETS
) -> list[str]:
    """Freeze `model` and put an adapter on every linear layer whose name ends in one of `targets`,
    or on all of them.

    Returns the names of the adapted layers. A is drawn from torch's global random state. ValueError
    if the model has an adapter already, if rank < 1 or larger than the longest side of these
    layers, or if no layer has such a name.
    """
    if any(_adapted(model)):
        raise ValueError("model already has an adapter: merge it or load the base model again")
    model.requires_grad_(False)
    layers = linear_layers(model)
    if targets != ALL_LINEAR:
        targets = [targets] if isinstance(targets, str) else targets
        layers = {
            name: layer
            for name, layer in (layers | _untied_head(model)).items()
            if any(f".{name}".endswith(f".{target}") for target in targets)
        }
    if not layers:
        raise ValueError(f"targets: no linear layer of the model is named {' or '.join(targets)}")
    longest = max(max(layer.weight.shape) for layer in layers.values())
    if not 1 <= rank <= longest:
        raise ValueError(
            f"rank must be >= 1 and at most {longest}, the longest side of an adapted layer, "
            f"got {rank}"
        )
    for name, layer in layers.items():
        model.set_submodule(name, LoRALinear(layer, rank, alpha))
    return list(layers)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """By name, without the head, routers and experts, and the towers for images and sound that a
    model may have."""
    inside = set(getattr(model, "get_decoder", lambda: model)().modules())
    return {
        name: module
        for name, module in model.named_modules()
        if module in inside
        and not FROZEN.search(name)
        and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    }


def short_name(name: str) -> str:
    """How PEFT's files name a layer: by the last part of its name, up_proj; if that is a number, by
    two, adapters.0."""
    return re.search(r"[^.]*[^.\d][^.]*(\.\d+)*$", name)[0]


def _untied_head(model: nn.Module) -> dict[str, nn.Module]:
    """The head, which may be adapted if asked for by name, unless its weight is that of the
    embedding, too."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        name: module
        for name, module in model.named_modules()
        if module is head and head.weight is not model.get_input_embeddings().weight
    }


@contextmanager
def disabled(model: nn.Module):
    """Inside `with disabled(model):` the adapter is off: `model` is the base model, the teacher."""
    before = [(layer, layer.enabled) for _, layer in _adapted(model)]
    try:
        for layer, _ in before:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in before:
            layer.enabled = enabled


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every adapted layer, in the model's order: all that is trained."""
    return list(_by_peft_name(model).values())


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Write the adapter into the directory `path` in PEFT's format, in float32; ValueError if there
    is none."""
    layers = dict(_adapted(model))
    if not layers:
        raise ValueError("model has no adapter to save: call add_lora first")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    first = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        # as Conv1D has it
        "fan_in_fan_out": any(not isinstance(layer.base, nn.Linear) for layer in layers.values()),
        "target_modules": sorted(set(map(short_name, layers))),
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None),
    }
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in _by_peft_name(model).items()
    }
    save_file(tensors, path / "adapter_model.safetensors")  # with mode 0600, whatever the umask
    (path / "adapter_model.safetensors").chmod((path / "adapter_config.json").stat().st_mode)


def load_adapter(model: nn.Module, path: str | Path) -> None:
    """Read a PEFT LoRA directory into `model`, adding the adapter first if the model has none.
    ValueError if its files are unsupported, do not fit the model or are not finite,
    FileNotFoundError if one is missing."""
    path = Path(path)
    config = json.loads((path / "adapter_config.json").read_text())
    if problem := _unsupported(config):
        raise ValueError(f"{path}/adapter_config.json: {problem}")
    tensors = load_file(path / "adapter_model.safetensors")
    if not any(_adapted(model)):
        add_lora(model, config["r"], config["lora_alpha"], config["target_modules"])
    wanted = _by_peft_name(model)
    wrong = sorted(wanted.keys() ^ tensors.keys()) or [
        k for k in wanted if wanted[k].shape != tensors[k].shape
    ]
    if wrong:
        raise ValueError(
            f"{path}/adapter_model.safetensors does not fit the model: {len(wrong)} tensors are "
            f"missing, left over or of another shape, first {wrong[0]}"
        )
    if damaged := [name for name in wanted if not tensors[name].float().isfinite().all()]:
        raise ValueError(
            f"{path}/adapter_model.safetensors: {damaged[0]} has values that are not finite"
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])
    for _, layer in _adapted(model):
        layer.alpha = config["lora_alpha"]


def _unsupported(config: dict) -> str:
    """What in an adapter_config.json cannot be loaded, "" if nothing."""
    if config.get("peft_type") != "LORA":
        return f"peft_type must be LORA, got {config.get('peft_type')}"
    for feature in (
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "alora_invocation_tokens",
    ):
        if config.get(feature):
            return f"{feature} is not supported"
    if config.get("init_lora_weights", True) not in (
        True,
        False,
        None,
        "gaussian",
        "orthogonal",
        "eva",
    ):
        return (
            f"init_lora_weights {config['init_lora_weights']} is not supported: it changes the "
            "base weights"
        )
    if type(config.get("r")) is not int or type(config.get("lora_alpha")) not in (int, float):
        return "r and lora_alpha must be numbers"
    targets = config.get("target_modules")
    return (
        ""
        if isinstance(targets, list) or targets == ALL_LINEAR
        else "target_modules must be a list of layer names"
    )


def merge(model: nn.Module) -> None:
    """Fold the adapter into the base weights and take it off: an ordinary model is left. ValueError
    if not finite."""
    for name, layer in list(_adapted(model)):
        with torch.no_grad():
            weight = layer.base.weight if isinstance(layer.base, nn.Linear) else layer.base.weight.T
            # in float32, and rounded once
            weight.copy_(weight.float() + layer.alpha / layer.rank * layer.lora_B @ layer.lora_A)
            if not weight.isfinite().all():
                raise ValueError(f"the merged weights of {name} are not finite")
        model.set_submodule(name, layer.base)


def _adapted(model: nn.Module):
    return (
        (name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear)
    )


def _by_peft_name(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"base_model.model.{name}.lora_{part}.weight": getattr(layer, f"lora_{part}")
        for name, layer in _adapted(model)
        for part in "AB"
    }
