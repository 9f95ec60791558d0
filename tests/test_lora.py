"""lora.py: the adapter off is the base model, merging changes nothing, and the files are PEFT's."""

import json

import pytest
import torch
from conftest import random_ids, tiny_qwen3
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import lora
import rollout

IDS = torch.tensor(random_ids([12]))


def adapted(rank=4, alpha=8):
    """A model with an adapter that does something, and the logits of its base model."""
    model = tiny_qwen3()
    base = model(IDS).logits
    lora.add_lora(model, rank, alpha)
    assert torch.equal(model(IDS).logits, base)  # B = 0: a fresh adapter is the identity
    for parameter in lora.lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    assert (model(IDS).logits - base).abs().max() > 0.1
    return model, base


def test_only_the_adapter_is_trained_and_in_float32():
    model = tiny_qwen3().bfloat16()
    names = lora.add_lora(model, rank=4)
    assert len(names) == 2 * 7 and "model.layers.1.mlp.down_proj" in names
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in lora.lora_parameters(model)} and len(
        trained
    ) == 28
    assert all(p.dtype == torch.float32 for p in trained)
    model(IDS).logits.float().sum().backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_forward_equals_the_formula():
    model, _ = adapted()
    layer, x = model.model.layers[0].mlp.up_proj, torch.randn(3, 32)
    torch.testing.assert_close(
        layer(x), x @ (layer.base.weight + 8 / 4 * layer.lora_B @ layer.lora_A).T
    )


def test_disabled_is_the_base_model_and_ends_whatever_happens():
    model, base = adapted()
    student = model(IDS).logits
    with pytest.raises(KeyboardInterrupt), lora.disabled(model):
        assert torch.equal(model(IDS).logits, base)
        with lora.disabled(model):
            pass
        # leaving the inner block does not switch the outer one off
        assert torch.equal(model(IDS).logits, base)
        raise KeyboardInterrupt
    assert torch.equal(model(IDS).logits, student)


def test_merge_gives_an_ordinary_model_with_the_same_logits():
    model, _ = adapted()
    student = model(IDS).logits
    lora.merge(model)
    assert not any(isinstance(m, lora.LoRALinear) for m in model.modules())
    assert model.state_dict().keys() == tiny_qwen3().state_dict().keys()
    torch.testing.assert_close(model(IDS).logits, student, atol=1e-4, rtol=1e-4)


def test_round_trip_through_files(tmp_path):
    model, _ = adapted()
    lora.save_adapter(model, tmp_path)
    fresh = tiny_qwen3()
    lora.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)
    for parameter in lora.lora_parameters(fresh):
        torch.nn.init.zeros_(parameter)
    lora.load_adapter(fresh, tmp_path)  # into an adapter that is there
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)


def test_peft_reads_our_files_and_we_read_peft_s(tmp_path):
    peft = pytest.importorskip("peft")
    model, _ = adapted()
    lora.save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny_qwen3(), tmp_path / "ours")
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    fresh = tiny_qwen3()
    lora.load_adapter(fresh, tmp_path / "theirs")
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)


def test_what_does_not_fit_is_refused(tmp_path):
    model, _ = adapted()
    with pytest.raises(ValueError, match="already has an adapter"):
        lora.add_lora(model)
    for targets in (("query",), "proj"):
        with pytest.raises(ValueError, match="targets"):
            lora.add_lora(tiny_qwen3(), targets=targets)
    with pytest.raises(ValueError, match="rank"):
        lora.add_lora(tiny_qwen3(), rank=0)
    with pytest.raises(ValueError, match="no adapter"):
        lora.save_adapter(tiny_qwen3(), tmp_path)
    lora.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="does not fit"):
        lora.load_adapter(tiny_qwen3(layers=3), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for change in (
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 3}},
        {"init_lora_weights": "pissa_niter_4"},
        {"alora_invocation_tokens": [1]},
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=next(iter(change))):
            lora.load_adapter(tiny_qwen3(), tmp_path)


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "name, tensor",
    [
        # DoRA, lora_bias, modules_to_save, a bias of the base model, an adapted head
        (f"{LAYER}.lora_magnitude_vector", torch.ones(32)),
        (f"{LAYER}.lora_B.bias", torch.ones(32)),
        ("base_model.model.lm_head.weight", torch.ones(61, 32)),
        (f"{LAYER}.base_layer.bias", torch.ones(32)),
        ("base_model.model.lm_head.lora_A.weight", torch.ones(4, 32)),
        (f"{LAYER}.lora_A.weight", torch.ones(8, 32)),  # rank_pattern
        (f"{LAYER}.lora_A.weight", torch.ones(1, 32)),  # torch would broadcast it
    ],
)
def test_files_with_more_than_a_plain_adapter_are_refused_by_their_tensors(tmp_path, name, tensor):
    model, _ = adapted()
    lora.save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | {name: tensor}, file)
    with pytest.raises(ValueError, match=f"does not fit the model: 1 tensors .* first {name}"):
        lora.load_adapter(tiny_qwen3(), tmp_path)


@pytest.mark.parametrize(
    "change", [{"r": "4"}, {"r": 4.0}, {"lora_alpha": "16"}, {"lora_alpha": None}]
)
def test_numbers_of_another_type_fail_before_any_figure(tmp_path, change):
    model, _ = adapted()
    lora.save_adapter(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    fresh = tiny_qwen3()
    with pytest.raises(TypeError):
        lora.load_adapter(fresh, tmp_path)
        lora.merge(fresh)


def test_paths_and_all_linear_in_the_files_of_others(tmp_path):
    model, _ = adapted()
    lora.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for targets in (
        "all-linear",
        ["self_attn.q_proj", *lora.TARGETS[1:7]],
        [*lora.linear_layers(tiny_qwen3())],
    ):
        (tmp_path / "adapter_config.json").write_text(
            json.dumps(config | {"target_modules": targets})
        )
        fresh = tiny_qwen3()
        lora.load_adapter(fresh, tmp_path)
        assert torch.equal(fresh(IDS).logits, model(IDS).logits)


def test_the_head_is_not_adapted():
    """It may share its weight with the embedding: merged, an adapter would change the input."""
    with pytest.raises(ValueError, match="no linear layer of the model has such a name: .*lm_head"):
        lora.add_lora(tiny_qwen3(), 4, 8, ("lm_head",))


class Launches(TorchDispatchMode):
    """Names of the operations that are no views."""

    VIEWS = ("view", "_unsafe_view", "permute", "t", "transpose", "unsqueeze", "detach", "alias")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if function.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self:  # in inference mode these arrive whole
                return function.decompose(*args, **(kwargs or {}))
        self.names += [name] if name not in self.VIEWS else []
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "base, autocast",
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, True), (torch.float32, True)],
)
def test_while_sampling_an_adapter_is_two_products(base, autocast):
    model, _ = adapted()
    layer = model.to(base).model.layers[0].mlp.up_proj
    for parameter in (layer.lora_A, layer.lora_B):
        parameter.data = 2 * parameter.data.float()
    x = torch.randn(3, 1, 32, dtype=torch.bfloat16 if autocast else base)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bool(autocast)):
        plain = layer(x)
        layer.sampling(True)
        with Launches() as launches:
            fast = layer(x)
        addresses = [copy.data_ptr() for copy in layer.copies]
        layer.sampling(False)
        assert torch.equal(layer(x), plain)
        layer.lora_B.mul_(3)
        layer.sampling(True)  # the new weights, in the same place
        assert [copy.data_ptr() for copy in layer.copies] == addresses
        rounding = 2 * torch.finfo(plain.dtype).eps * plain.abs().max().item()
        torch.testing.assert_close(
            layer(x) - layer.base(x), 3 * (fast - layer.base(x)), rtol=0, atol=2 * rounding
        )
        layer.sampling(False)
    assert fast.dtype == plain.dtype
    torch.testing.assert_close(fast, plain, rtol=0, atol=rounding)
    # of float32 base weights, at every call
    casts = [] if base == torch.bfloat16 or not autocast else ["_to_copy"]
    assert launches.names == ["mm", "mm", *casts, "addmm_"]


def layer_of(kind, bias=False):
    """An adapted layer in bfloat16, whose adapter is as small as after a few steps at lr 5e-6."""
    torch.manual_seed(0)
    base = Conv1D(96, 128) if kind == "Conv1D" else torch.nn.Linear(128, 96, bias=bias)
    if kind == "subclass":
        base.__class__ = Doubled
    layer = lora.LoRALinear(base.bfloat16().requires_grad_(False), 16, 32)
    torch.nn.init.normal_(layer.lora_B, std=2e-5)
    return layer


class Doubled(torch.nn.Linear):
    """A linear layer that does something of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind, bias", [("Linear", False), ("Linear", True), ("Conv1D", True)])
def test_a_small_adapter_is_not_lost_in_bfloat16(kind, bias, autocast, sampling):
    """Rounded twice, y + part keeps a fifth of it."""
    layer = layer_of(kind, bias)
    if bias:
        torch.nn.init.normal_(layer.base.bias, std=0.5)
    x = torch.randn(2000, 1, 128, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        layer.sampling(sampling)
        change = (layer(x) - layer.base(x)).float()
    wanted = 2 * x.float() @ layer.lora_A.T @ layer.lora_B.T
    share = (change * wanted).sum() / wanted.square().sum()
    assert share.item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("kind, bias", [("Linear", False), ("Linear", True), ("Conv1D", True)])
def test_gradients_are_those_of_the_formula(kind, bias):
    """In float32: of A, B and x."""
    layer = layer_of(kind, bias).float()
    weight = lora._weight(layer.base) + 2 * layer.lora_B @ layer.lora_A
    x = torch.randn(3, 5, 128, requires_grad=True)
    leaves = (x, layer.lora_A, layer.lora_B)
    ours, theirs = layer(x), torch.nn.functional.linear(x, weight, layer.base.bias)
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(
        torch.autograd.grad(ours.square().sum(), leaves),
        torch.autograd.grad(theirs.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_layer_with_a_forward_of_its_own_keeps_it():
    layer = layer_of("subclass").float()
    x = torch.randn(3, 5, 128)
    wanted = layer.base(x) + 2 * x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer(x), wanted)
    assert layer(x[0, 0]).shape == (96,)


def test_merging_makes_the_model_float32():
    """In bfloat16 W + dW would be W, for nearly all weights."""
    model, _ = adapted()
    for parameter in lora.lora_parameters(model)[1::2]:  # the B
        parameter.data *= 1e-4
    before = model.bfloat16().model.layers[0].mlp.up_proj.base.weight.float()
    for parameter in lora.lora_parameters(model):
        parameter.data = parameter.data.float()
    layer = model.model.layers[0].mlp.up_proj
    change = 8 / 4 * layer.lora_B @ layer.lora_A
    lora.merge(model)
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())
    merged = model.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(merged - before, change, rtol=0, atol=1e-7)


@pytest.mark.parametrize("change", [lambda model: None, lambda model: model.train()])
def test_sampling_sees_the_weights_of_its_beginning(change):
    """Whatever has happened to the adapter since the call before."""
    model, _ = adapted()
    prompts, settings = random_ids([5, 9]), dict(max_new_tokens=12, stop_ids=[], temperature=0)

    def tokens():
        return [c.token_ids for c in rollout.sample(model, prompts, **settings)]

    first, other = tokens(), [torch.randn_like(p) * 0.3 for p in lora.lora_parameters(model)]
    change(model)
    own = [parameter.data for parameter in lora.lora_parameters(model)]
    for parameter, tensor in zip(lora.lora_parameters(model), other, strict=True):
        parameter.data = tensor
    second = tokens()
    for tensor in other[1::2]:  # the B
        tensor.mul_(-1)
    assert tokens() != second != first
    for parameter, tensor in zip(lora.lora_parameters(model), own, strict=True):
        parameter.data = tensor
    with lora.disabled(model):
        base = tokens()
    assert tokens() == first != base
    lora.merge(model)
    assert tokens() == first


def test_any_module_will_do():
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.ModuleDict({"up_proj": torch.nn.Linear(8, 4)})
    )
    assert lora.add_lora(model, 2, 4, ("up_proj",)) == ["1.up_proj"]


def test_short_names():
    assert [
        lora.short_name(name)
        for name in (
            "lm_head",
            "model.layers.3.mlp.up_proj",
            "model.altup_projections.0",
            "layers.1.adapters.0.0",
        )
    ] == ["lm_head", "up_proj", "altup_projections.0", "adapters.0.0"]
