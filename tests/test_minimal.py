"""minimal.py and the core are the same method: same prompts, verdicts and rewards, and from the same
completions the same loss and gradients."""

import ast
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SIGNALS, tiny_qwen3
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import egrsd
import lora
import minimal
import train
from support.distributed import Ranks


def test_it_imports_three_packages_and_the_toy_inside_a_function():
    tree = ast.parse((ROOT / "minimal.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {
        (getattr(node, "module", None) or node.names[0].name).split(".")[0]: node in tree.body
        for node in imports
    }
    assert not names.pop("toy")
    assert set(names) - sys.stdlib_module_names == {"torch", "tqdm", "transformers"}
    assert all(names.values())


def test_it_is_short():
    text = (ROOT / "minimal.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 340
    assert sum(1 for _ in ast.walk(ast.parse(text))) <= 2300


EARLIER = torch.rand(10, 12, generator=torch.Generator().manual_seed(0))  # rewards of ten steps


@pytest.fixture
def trainer(tmp_path):
    """Makes the core's trainer on the shipped toy, its adapter far from zero, after ten steps."""

    def make(**changes):
        settings = {"eval-data": "", "prompts-per-step": 12, "out": tmp_path / "run"} | changes
        flags = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
        t = train.Trainer(train.parse_arguments(flags)[0], Ranks())
        (tmp_path / "run").mkdir()
        t.log.bar = tqdm(disable=True)
        torch.manual_seed(1)
        for parameter in t.parameters:
            torch.nn.init.normal_(parameter, std=0.03)
        for rewards in EARLIER:
            t.baseline.update(rewards)
        return t

    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield make
    for number, handler in handlers.items():
        signal.signal(number, handler)


def minimal_model(t):
    """The same model with minimal.py's adapter, which has the same weights."""
    model = AutoModelForCausalLM.from_pretrained(t.files["--model"], dtype=torch.float32).eval()
    parameters = minimal.add_lora(model, t.s.lora_rank, t.s.lora_alpha)
    for own, theirs in zip(parameters, t.parameters, strict=True):
        own.data.copy_(theirs.detach())
    return model, parameters


@pytest.mark.parametrize("micro_batch", [3, 12])
@pytest.mark.parametrize(
    "weights",
    [
        {},
        {"window": 0},
        {"gamma": 3.0, "window": 5, "eps": 0.8},
    ],
    ids=["CL-EGRSD", "EGRSD", "gamma 3, W 5, eps 0.8"],
)
def test_the_same_completions_give_the_same_gradients(trainer, monkeypatch, weights, micro_batch):
    t = trainer(**weights, **{"micro-batch": micro_batch})
    problems = t.next_problems()
    rows = t.make_rollouts(problems)  # train_step draws the same ones again
    seen, clip = [], torch.nn.utils.clip_grad_norm_

    def watched(parameters, *args):
        seen.extend(parameter.grad.clone() for parameter in parameters)
        return clip(parameters, *args)

    baseline = minimal.RunningAdvantage()
    for rewards in EARLIER:
        baseline.update(rewards)
    model, parameters = minimal_model(t)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    loss = t.train_step()["loss"]

    prompts = [minimal.student_prompt(t.tokenizer, p.problem) for p in problems]
    shown = [minimal.teacher_prompt(t.tokenizer, p.problem, p.solution) for p in problems]
    assert prompts == [row.prompt for row in rows]
    assert shown == [t.teacher_prompt(p, p.solution) for p in problems]
    texts = [t.tokenizer.decode(row.token_ids, skip_special_tokens=True) for row in rows]
    correct = [
        row.finished and minimal.is_correct(text, row.problem.answer)
        for row, text in zip(rows, texts, strict=True)
    ]
    assert correct == [row.correct for row in rows] and 0 < sum(correct) < 12
    rewards = [
        minimal.shaped_reward(right, len(row.token_ids), t.s.max_new_tokens)
        for right, row in zip(correct, rows, strict=True)
    ]
    assert rewards == [row.reward for row in rows]

    A = baseline.advantage(torch.tensor(rewards))
    args = SimpleNamespace(
        gamma=t.s.gamma, window=t.s.window, eps=t.s.eps, floor=t.s.floor, micro_batch=micro_batch
    )
    completions = [row.token_ids for row in rows]
    ours = minimal.backward(model, prompts, shown, completions, A, args)
    assert ours == pytest.approx(loss, abs=1e-6)
    for own, theirs in zip(parameters, seen, strict=True):
        assert theirs.abs().max() > 1e-4
        torch.testing.assert_close(own.grad, theirs, atol=1e-6, rtol=0)


def cut_one(rows):
    """The first correct rollout, without its stop token: a box, but not finished."""
    row = next(row for row in rows if row.correct)
    row.token_ids, row.logprobs = row.token_ids[:-1], row.logprobs[:-1]
    row.finished, row.correct, row.reward = False, False, 0.0
    return rows


class Watch:
    """Notes what clips gradients and what updates weights."""

    def __init__(self, monkeypatch):
        self.limits, self.gradients, self.optimizers = [], [], []
        self.real = torch.nn.utils.clip_grad_norm_, torch.optim.AdamW
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", self.clip)
        monkeypatch.setattr(torch.optim, "AdamW", self.adamw)

    def clip(self, parameters, limit):
        self.limits.append(limit)
        self.gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        return self.real[0](parameters, limit)

    def adamw(self, *arguments, **how):
        self.optimizers.append(self.real[1](*arguments, **how))
        return self.optimizers[-1]


class Warm(minimal.RunningAdvantage):
    """After ten steps."""

    def __init__(self):
        super().__init__()
        for rewards in EARLIER:
            self.update(rewards)


def test_two_steps_of_main_are_those_of_the_core(trainer, tmp_path, monkeypatch):
    """With the same problems, completions and adapter, and no flag at its default: prompts, verdicts,
    rewards, advantages, gradients, the update and its limits."""
    flags = {"lr": 3e-3, "gamma": 1.5, "window": 2, "eps": 0.4, "floor": 0.3}
    flags |= {"micro-batch": 5, "max-new-tokens": 60, "temperature": 0.9, "top-p": 0.9, "top-k": 40}
    watch, steps = Watch(monkeypatch), []
    t = trainer(**flags, **{"lora-rank": 8, "lora-alpha": 8.0})
    start, make = [parameter.detach().clone() for parameter in t.parameters], t.make_rollouts
    t.make_rollouts = lambda problems: steps.append(cut_one(make(problems))) or steps[-1]
    t.train_step()
    t.train_step()

    drawn = iter([[vars(row.problem) for row in rows] for rows in steps])
    sampled = iter([[row.token_ids for row in rows] for rows in steps])
    settings, add_lora = [], minimal.add_lora

    def add_the_same(*arguments):
        parameters = add_lora(*arguments)
        for own, theirs in zip(parameters, start, strict=True):
            own.data.copy_(theirs)
        return parameters

    def sample(model, prompts):
        settings.append(model.generation_config)
        return next(sampled)

    monkeypatch.setattr(minimal, "add_lora", add_the_same)
    monkeypatch.setattr(minimal, "sample", sample)
    monkeypatch.setattr(minimal, "RunningAdvantage", Warm)
    monkeypatch.setattr(minimal.random, "sample", lambda problems, n: next(drawn))
    flags |= {"rank": 8, "alpha": 8.0, "prompts": 12, "steps": 2, "out": tmp_path / "out"}
    argv = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["minimal.py", *argv])
    minimal.main()

    how = settings[0]
    assert (how.temperature, how.top_p, how.top_k, how.max_new_tokens) == (0.9, 0.9, 40, 60)
    assert how.do_sample and watch.limits == [0.1] * 4
    (theirs,), (ours,) = (optimizer.param_groups for optimizer in watch.optimizers)
    for name in ("lr", "betas", "eps", "weight_decay"):
        assert ours[name] == theirs[name]
    assert ours["lr"] == 3e-3
    for theirs, ours in zip(watch.gradients[:2], watch.gradients[2:], strict=True):
        assert (ours - theirs).norm() < 1e-3 * theirs.norm()


def test_the_advantage_is_the_core_s_in_and_after_the_warm_up():
    ours, theirs = minimal.RunningAdvantage(), egrsd.RunningAdvantage()
    for step in range(14):
        rewards = torch.rand(5) if step != 12 else torch.full((5,), 0.5)
        torch.testing.assert_close(ours.advantage(rewards), theirs.advantage(rewards))
        ours.update(rewards)
        theirs.update(rewards)
    same, core = minimal.RunningAdvantage(), egrsd.RunningAdvantage()
    for _ in range(11):  # all rewards are equal: the warm-up goes on
        same.update(torch.ones(2))
        core.update(torch.ones(2))
    assert same.advantage(torch.ones(2)).tolist() == core.advantage(torch.ones(2)).tolist()


def test_the_loss_is_the_core_s_and_padding_has_no_gradient():
    """Also where the gate is off, and a masked entropy of infinity times 0 would be nan."""
    torch.manual_seed(0)
    mask = torch.arange(6) < torch.tensor([[6], [2], [1]])
    logp, teacher_logp, H = -torch.rand(3, 3, 6)
    A = torch.tensor([1.5, -0.5, 0.0])
    for gamma, window, eps, most in ((0.0, 0, 0.2, 4.0), (0.3, 3, 0.2, 1.5), (3.0, 9, 0.8, 0.5)):
        ours, theirs = (logp.clone().requires_grad_() for _ in range(2))
        loss = minimal.egrsd_loss(
            ours, teacher_logp, -3 * H, mask, A, most, 11, gamma, window, eps, 0.1
        )
        weights = egrsd.token_advantages(
            A,
            teacher_logp,
            theirs,
            -3 * H,
            mask,
            gamma=gamma,
            window=window,
            eps=eps,
            max_entropy=most,
        )
        expected = egrsd.policy_loss(theirs, weights, mask, 11)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
        assert not ours.grad[~mask].any() and ours.grad[mask].any()


@pytest.mark.parametrize(
    "text, answer, correct",
    [
        (r"\boxed{7}", "7", True),
        (r"\boxed{6}, no: \boxed{ 7 }.", "7", True),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
        (r"\boxed{7} and \boxed{6", "7", False),
        ("7}", "7", False),
        (r"\boxed{7", "7", False),
        (r"\boxed{7}", "17", False),
    ],
)
def test_the_verifier_compares_the_last_box(text, answer, correct):
    assert minimal.is_correct(text, answer) == correct


def test_the_toy_learns_from_the_data_that_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["minimal.py", "--data", str(tmp_path / "own.jsonl")])
    args = minimal.arguments()
    assert args.data == str(tmp_path / "own.jsonl") and args.model != "toy"
    monkeypatch.setattr(sys, "argv", ["minimal.py"])
    assert minimal.arguments().data.endswith("train.jsonl")


def test_a_sample_is_cut_behind_its_stop_token_and_does_not_see_its_padding():
    """Greedy: as one prompt alone."""
    model, prompts = tiny_qwen3(), [[5, 9, 11, 30], [7], [44, 3]]

    def sample(stop_ids, prompts):
        model.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=12, eos_token_id=stop_ids, pad_token_id=0
        )
        return minimal.sample(model, prompts)

    whole = sample([60], prompts)
    stop = whole[0][5]
    expected = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in whole]
    together = sample([60, stop], prompts)
    assert together == expected and len(together[0]) <= 6 and together[0][-1] == stop
    assert together == [sample([60, stop], [prompt])[0] for prompt in prompts]


def test_two_steps_of_main(tiny_toy, tmp_path, monkeypatch):
    """The toy of the tests as a checkpoint of its own, with a penalty that must not be sampled with;
    what is exported is the trained model."""
    place = tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(tiny_toy / "model")
    model.generation_config.repetition_penalty = 2.5
    model.generation_config.eos_token_id = [3, 4]
    model.save_pretrained(place)
    AutoTokenizer.from_pretrained(tiny_toy / "model").save_pretrained(place)
    flags = {"model": place, "data": tiny_toy / "train.jsonl", "out": tmp_path / "out", "steps": 2}
    flags |= {"prompts": 4, "max-new-tokens": 12, "lr": 1e-2}
    argv = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["minimal.py", *argv])
    sample, merge, logits = minimal.sample, minimal.merge, []
    ids = torch.arange(8).unsqueeze(0)

    def sampled(model, prompts):
        assert model.generation_config.repetition_penalty in (None, 1.0)
        stop_ids = set(model.generation_config.eos_token_id)
        assert stop_ids == {3, 4, AutoTokenizer.from_pretrained(place).eos_token_id}
        return sample(model, prompts)

    def merged(model):
        with torch.no_grad():
            logits.append(model(ids).logits)
        merge(model)

    monkeypatch.setattr(minimal, "sample", sampled)
    monkeypatch.setattr(minimal, "merge", merged)
    minimal.main()
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert trained.generation_config.repetition_penalty == 2.5
    with torch.no_grad():
        torch.testing.assert_close(trained(ids).logits, logits[0], atol=1e-4, rtol=1e-4)
        assert (trained(ids).logits - model(ids).logits).abs().max() > 1e-3
    assert not any(isinstance(module, lora.LoRALinear) for module in trained.modules())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
