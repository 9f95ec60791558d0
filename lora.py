r"""LoRA: the adapter that makes the student differ from the teacher.

"LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685: every chosen linear layer W
becomes

    W x + (alpha / rank) * B A x        A [rank, in] random, B [out, rank] zero at the start, W frozen

so that a fresh student equals the base model. With the adapter on, the model is the student. Inside
`disabled(model)` it is the base model, which is EGRSD's frozen teacher (arXiv 2605.13255): two
models for the memory of one.

A and B are float32, also where W is bfloat16: at a learning rate of 5e-6 most updates of a bfloat16
weight would round to nothing. The products run in the dtype of W, or of autocast. The adapter's part
is small beside W x: added to a finished W x it would mostly be lost in rounding. So W x is added to
it, inside one matrix product, and the sum is rounded once. Sampling draws thousands of tokens with
the same weights: it keeps the rounded copies of A and B.

Adapters on disk are in PEFT's format. PEFT 0.21.2 was tried (tests/test_lora.py). vLLM reads the
same format, but was not tried. There is no dropout, no bias and no rank per layer: a file that
needs them is refused. The embedding, the head, routers and experts stay frozen. Experts stay frozen
because a token may go to others in another batch.

Copy this file: it needs torch and safetensors (which transformers brings).
"""

import json
import math
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import linear

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
# PEFT's name for every linear layer but the head. Here it leaves out routers and experts, too.
ALL_LINEAR = "all-linear"
# In names of modules: routers, experts, and dt_proj of Mamba. The model reads the weight of dt_proj
# and never calls the layer, so an adapter would have no effect.
FROZEN = re.compile(r"(^|\.)(gate|\w*router\w*|shared_expert_gate|experts|dt_proj)(\.|$)")
# These fields of an adapter_config.json can change what an adapter computes, and its tensors would
# not show it: the scale, tokens without the adapter, other base weights. Only these values are
# accepted. They change nothing.
HARMLESS = {
    "use_rslora": (None, False),
    "alpha_pattern": (None, {}),
    "alora_invocation_tokens": (None, []),
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
}


class LoRALinear(nn.Module):
    """base(x) + (alpha / rank) * B A x, with `base` frozen: x [..., in] -> [..., out] in the dtype
    of base(x)."""

    def __init__(self, base: nn.Module, rank: int, alpha: float):
        """base: nn.Linear, or GPT-2's Conv1D, which is one with its weight transposed."""
        super().__init__()
        self.base = base
        self.rank = rank
        self.alpha = alpha
        self.enabled = True
        self.is_sampling = False
        self.copies = None  # for sampling: A and (alpha / rank) B, in the dtype of the products
        self.kind = None  # dtype and device of the copies
        # W x + bias and nothing else; other subclasses of nn.Linear may do more
        self.is_plain = type(base) is nn.Linear or type(base).__name__ in ("Conv1D", "FalconLinear")
        weight = _weight(base)
        out_features, in_features = weight.shape
        self.lora_A = nn.Parameter(weight.new_empty(rank, in_features, dtype=torch.float32))
        self.lora_B = nn.Parameter(weight.new_zeros(out_features, rank, dtype=torch.float32))
        # as in the authors' code: nn.Linear's own default
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(x)
        A, B = self.copies if self.is_sampling else self.rounded()
        rows = x.reshape(-1, x.shape[-1]).to(A.dtype)
        y = linear(linear(rows, A), B)  # the adapter's part, [n, out]
        if self.is_plain:
            # W x is summed on top of it in float32. The sum is rounded once.
            y.addmm_(rows, _weight(self.base).T.to(A.dtype))
            if self.base.bias is not None:
                y += self.base.bias
        else:
            y += self.base(x).view(y.shape)
        return y.view(*x.shape[:-1], -1)

    def sampling(self, on: bool) -> None:
        """rollout.sample calls this when it begins and ends. CUDA graphs read the copies, so they
        stay where they are."""
        self.is_sampling = on
        if not on or not self.enabled:
            return
        parts = self.rounded()
        kind = (parts[0].dtype, parts[0].device)
        if self.kind != kind:
            self.kind = kind
            self.copies = [torch.empty_like(part) for part in parts]
        for copy, part in zip(self.copies, parts, strict=True):
            copy.copy_(part)

    def rounded(self) -> list[Tensor]:
        """A and (alpha / rank) B in the dtype of the products."""
        weight = self.base.weight
        dtype = weight.dtype
        if torch.is_autocast_enabled(weight.device.type):
            dtype = torch.get_autocast_dtype(weight.device.type)
        return [self.lora_A.to(dtype), (self.alpha / self.rank * self.lora_B).to(dtype)]


def add_lora(
    model: nn.Module, rank: int = 64, alpha: float = 128, targets: tuple[str, ...] | str = TARGETS
) -> list[str]:
    """Freeze `model` and put an adapter on every linear layer whose name ends in one of `targets`;
    ALL_LINEAR adapts all of them.

    Returns the names of the adapted layers. A is drawn from torch's global random state. ValueError
    if the model has an adapter already, if rank < 1 or larger than the longest side of these
    layers, or if no layer has such a name.
    """
    if _adapted(model):
        raise ValueError("model already has an adapter: merge it or load the base model again")
    model.requires_grad_(False)
    layers = linear_layers(model)
    targets = [targets] if isinstance(targets, str) else targets
    if ALL_LINEAR not in targets:
        ends = tuple(f".{target}" for target in targets)
        layers = {name: layer for name, layer in layers.items() if f".{name}".endswith(ends)}
    if not layers:
        raise ValueError(f"targets: no linear layer of the model has such a name: {targets}")
    longest = max(max(layer.weight.shape) for layer in layers.values())
    if not 1 <= rank <= longest:
        raise ValueError(f"rank must be from 1 to {longest}, a layer's longest side, got {rank}")
    for name, layer in layers.items():
        model.set_submodule(name, LoRALinear(layer, rank, alpha))
    return list(layers)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that can be adapted, by name: not the head, not routers and experts, and not the
    towers for images and sound that a model may have."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = set(decoder.modules())
    layers = {}
    for name, module in model.named_modules():
        is_linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if is_linear and module in inside and not FROZEN.search(name):
            layers[name] = module
    return layers


def short_name(name: str) -> str:
    """How PEFT's files name a layer: by the last part of its name, as up_proj. A number needs the
    part before it, too: adapters.0."""
    return re.search(r"[^.]*[^.\d][^.]*(\.\d+)*$", name)[0]


@contextmanager
def disabled(model: nn.Module):
    """Inside `with disabled(model):` the adapter is off: `model` is the base model, the teacher."""
    layers = [layer for layer in _adapted(model).values() if layer.enabled]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every adapted layer, in the model's order: all that is trained."""
    return list(_by_peft_name(model).values())


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Write the adapter into the directory `path` in PEFT's format, in float32; ValueError if there
    is none."""
    layers = _adapted(model)
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
        "fan_in_fan_out": not isinstance(first.base, nn.Linear),
        "target_modules": sorted(set(map(short_name, layers))),
        "base_model_name_or_path": getattr(model, "name_or_path", None),
    }
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    # safetensors' own save_file would give the file mode 0600, whatever the umask
    (path / "adapter_model.safetensors").write_bytes(save(_by_peft_name(model)))


@torch.no_grad()
def load_adapter(model: nn.Module, path: str | Path) -> str | None:
    """Read a PEFT LoRA directory into `model`, adding the adapter first if the model has none. Returns
    the name of the base model that it was trained on, if the directory has it.
    ValueError if its files are unsupported, do not fit the model or are not finite,
    FileNotFoundError if one is missing."""
    path = Path(path)
    config = json.loads((path / "adapter_config.json").read_text())
    for feature, harmless in HARMLESS.items():
        if config.get(feature) not in harmless:
            raise ValueError(f"adapter_config.json: {feature} is not supported")
    tensors = load_file(path / "adapter_model.safetensors")
    if not _adapted(model):
        add_lora(model, config["r"], config["lora_alpha"], config["target_modules"])
    wanted = _by_peft_name(model)
    wrong = sorted(wanted.keys() ^ tensors.keys())
    if not wrong:
        wrong = [name for name in wanted if wanted[name].shape != tensors[name].shape]
    if wrong:
        raise ValueError(
            f"adapter_model.safetensors does not fit the model: {len(wrong)} tensors are "
            f"missing, left over or of another shape, first {wrong[0]}"
        )
    for name, parameter in wanted.items():
        parameter.copy_(tensors[name])
    for name, layer in _adapted(model).items():
        layer.alpha = config["lora_alpha"]
        if not all(part.isfinite().all() for part in layer.rounded()):
            raise ValueError(f"A or (alpha / rank) B of {name} is not finite")
    return config.get("base_model_name_or_path")


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add the adapter to the base weights and take it off: an ordinary model is left, in float32.

    Rounded to bfloat16, W + dW would lose most of dW: at a learning rate of 5e-6 dW is smaller than
    half the distance of two bfloat16 numbers at W.
    """
    model.float()
    for name, layer in _adapted(model).items():
        weight = _weight(layer.base)
        weight += layer.alpha / layer.rank * layer.lora_B @ layer.lora_A
        model.set_submodule(name, layer.base)


def _weight(layer):
    """W [out, in]; Conv1D stores it transposed."""
    return layer.weight if isinstance(layer, nn.Linear) else layer.weight.T


def _adapted(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def _by_peft_name(model):
    parameters = {}
    for name, layer in _adapted(model).items():
        parameters[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A
        parameters[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B
    return parameters
