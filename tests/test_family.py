"""family/ against plain loops in float64, its identities, and every method in a run."""

import doctest
import inspect
import json
import math
import shutil
from contextlib import nullcontext
from dataclasses import asdict, fields
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import (
    assert_ended_well,
    family_here,
    random_ids,
    run_copy,
    start_ranks,
    tiny_qwen3,
    train_arguments,
)
from test_train import (
    ROOT,
    adapter,
    assert_close_gradients,
    assert_help_is_whole,
    assert_same_run,
    metrics,
)
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import egrsd
import family
import lora
import rollout
import teacher
import train
from family import METHODS, asking, contexts, divergences, methods, neighbour
from family import __main__ as lab
from family.methods import Batch
from support import distributed
from support.data import InputError
from support.distributed import Ranks

LENGTHS = [7, 4, 1, 6]
V = 150  # above the largest k, 100


def make_batch(teacher_logits=None, student_logits=None, **changes):
    """Four completions over a vocabulary of 150, in float64, and all log-probs: (batch, log p_T,
    log p_S)."""
    generator = torch.Generator().manual_seed(3)
    B, T = len(LENGTHS), max(LENGTHS)
    if teacher_logits is None:
        teacher_logits, student_logits = 3 * torch.randn(
            2, B, T, V, generator=generator, dtype=torch.float64
        )
    log_t = teacher_logits.log_softmax(-1)
    log_s = student_logits.clone().requires_grad_().log_softmax(-1)
    tokens = torch.randint(V // 10, (B, T, 1), generator=generator) * 10
    mask = torch.arange(T) < torch.tensor(LENGTHS).unsqueeze(1)

    def pick(logs):
        return logs.gather(-1, tokens).squeeze(-1).masked_fill(~mask, 0.0)

    entropy = torch.special.entr(log_t.exp()).sum(-1) * mask
    batch = Batch(
        logp=pick(log_s),
        planned=pick(log_t),
        teacher_logp=pick(log_t),
        entropy=entropy,
        mask=mask,
        advantage=torch.tensor([1.3, -0.7, 0.0, 2.1], dtype=torch.float64),
        correct=torch.tensor([True, False, False, True]),
        is_reference=torch.tensor([False, False, False, True]),
        divergence=lambda f: f(log_t.flatten(0, 1), log_s.flatten(0, 1)).view(B, T) * mask,
        num_tokens=float(sum(LENGTHS)),
        num_completions=4.0,
        step=10,
        median_entropies=[0.5, 0.6, 0.4, 0.7, 0.5, 0.55],
        num_reference=11.0,
        success_rate=0.4,
        margin=torch.tensor([3.0, -20.0, 0.0, 1.0], dtype=torch.float64),
        marked=torch.rand(B, T, generator=generator) < 0.6,
        views=torch.randn(B, T, generator=generator, dtype=torch.float64),
        anchor=lambda f: f(log_t.flip(-1).flatten(0, 1), log_s.flatten(0, 1)).view(B, T) * mask,
        **changes,
    )
    batch.tokens = [ids[:n] for ids, n in zip(tokens[..., 0].tolist(), LENGTHS, strict=True)]
    return batch, log_t, log_s


def clip(x, low, high):
    return min(max(x, low), high)


def sign(x):
    return (x > 0) - (x < 0)


def top(logs, k):
    return sorted(range(len(logs)), key=lambda v: -logs[v])[:k]


def renormalised(logs, indices):
    total = sum(math.exp(logs[v]) for v in indices)
    return [math.exp(logs[v]) / total for v in indices]


def entropy_of(logs):
    return -sum(math.exp(x) * x for x in logs)


def position(t, T):  # t from 1
    return 0.25 + 0.75 / (1 + math.exp(-((t - 0.5) / T - 0.30) / 0.10))


def dual(p, q, n=20):
    """MSD's weight of a token."""
    P = renormalised(p, top(p, n))
    return (1 + sum(a * math.log(a) for a in P if a) / math.log(n)) * (
        1 - math.exp(q[top(p, 1)[0]])
    )


def tokens_of(
    log_t,
    log_s,
    ids,
    A,
    correct,
    is_reference=False,
    shown=True,
    step=10,
    per_completion=1.0,
    log_r=None,
    views=None,
    marked=None,
    **more,
):
    """All that the formulas below may use of each token of a completion, in plain numbers.

    log_t, log_s, log_r: log p_T, log p_S and those of the teacher without a text, over the
    vocabulary at every token; a probability of 0 counts as 2^-149.
    """
    log_t, log_s, log_r = (
        [[max(x, -149 * math.log(2)) for x in logs] for logs in rows]
        for rows in (log_t, log_s, log_r or log_t)
    )
    T = len(ids)
    duals = [dual(p, q) for p, q in zip(log_t, log_s, strict=True)]
    uncertain = sorted(range(T), key=lambda t: -entropy_of(log_s[t]))[: math.ceil(0.2 * T)]
    for t, (p, q, y) in enumerate(zip(log_t, log_s, ids, strict=True)):
        d = p[y] - q[y] if shown else 0.0
        yield SimpleNamespace(
            p=p,
            q=q,
            y=y,
            d=d,
            A=A,
            H=entropy_of(p) if shown else 0.0,
            correct=correct,
            is_reference=is_reference,
            w=clip(math.exp(sign(A) * d), 0.8, 1.2) if A else 1.0,
            step=step,
            shown=shown,
            uncertain=t in uncertain,
            w_reversed=clip(math.exp(-sign(A) * d), 0.8, 1.2) if A else 1.0,
            weight=position(t + 1, T) * per_completion,
            per_completion=per_completion,
            T=T,
            dual_share=duals[t] / sum(duals),
            r=log_r[t],
            z=views[t] if views else 0.0,
            marked=marked[t] if marked else False,
            **more,
        )


# Divergences: the value, and its slope by log p_S(v) for each v that it depends on.


def clipped_forward(k):
    terms = {v: math.exp(a) * (a - b) for v, (a, b) in enumerate(zip(k.p, k.q, strict=True))}
    return sum(min(x, 0.05) for x in terms.values()), {
        v: -math.exp(k.p[v]) for v, x in terms.items() if x < 0.05
    }


def reverse(k):
    return (
        sum(math.exp(b) * (b - a) for a, b in zip(k.p, k.q, strict=True)),
        {v: math.exp(b) * (b - a + 1) for v, (a, b) in enumerate(zip(k.p, k.q, strict=True))},
    )


def clipped_reverse_entries(k):
    terms = {v: math.exp(b) * (b - a) for v, (a, b) in enumerate(zip(k.p, k.q, strict=True))}
    slopes = {v: math.exp(k.q[v]) * (k.q[v] - k.p[v] + 1) for v, x in terms.items() if x < 0.05}
    return sum(min(x, 0.05) for x in terms.values()), slopes


def forward_top(k, n=16):
    indices = top(k.p, n)
    P = dict(zip(indices, renormalised(k.p, indices), strict=True))
    return sum(a * (math.log(a) - k.q[v]) for v, a in P.items() if a), {v: -a for v, a in P.items()}


def advantage_top(k, n=16):
    indices = top(k.q, n)
    advantage = {
        v: b * (k.p[v] - k.q[v]) for v, b in zip(indices, renormalised(k.q, indices), strict=True)
    }
    return -sum(a * k.q[v] for v, a in advantage.items()), {v: -a for v, a in advantage.items()}


def jensen_shannon(k, n=100):
    indices = top(k.q, n)
    P, Q = ([math.exp(x[v]) for v in indices] for x in (k.p, k.q))
    rests = [1 - sum(x) for x in (P, Q)]
    P, Q = (x + [max(rest, 1e-7)] for x, rest in zip((P, Q), rests, strict=True))
    value = (
        sum(
            a * math.log(2 * a / (a + b)) + b * math.log(2 * b / (a + b))
            for a, b in zip(P, Q, strict=True)
        )
        / 2
    )
    # where q of the rest is 1 - sum of q
    by_q = [math.log(2 * b / (a + b)) / 2 for a, b in zip(P, Q, strict=True)]
    return value, {
        v: b * (x - by_q[-1] * (rests[1] > 1e-7))
        for v, b, x in zip(indices, Q[:-1], by_q[:-1], strict=True)
    }


def clipped_reverse(k, n=100):
    indices = top(k.q, n)
    P, Q = ([math.exp(x[v]) for v in indices] for x in (k.p, k.q))
    rest = 1 - sum(Q)
    P, Q = (x + [max(1 - sum(x), 1e-7)] for x in (P, Q))
    by_q = [
        math.log(b) - max(math.log(a), math.log(0.2 * b)) if a else math.log(5)
        for a, b in zip(P, Q, strict=True)
    ]
    return sum(b * x for b, x in zip(Q, by_q, strict=True)), {
        v: b * (x + 1 - (by_q[-1] + 1) * (rest > 1e-7))
        for v, b, x in zip(indices, Q[:-1], by_q[:-1], strict=True)
    }


def forward(p):
    return lambda q: (
        sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)),
        {v: -math.exp(a) for v, a in enumerate(p)},
    )


def two_views(k):
    g = 0.05 + 0.95 / (1 + math.exp(-2 * k.z))
    near, far = times(g * k.shown, forward(k.p)(k.q)), times(0.2 * (1 - g), forward(k.r)(k.q))
    return near[0] + far[0], {v: near[1][v] + far[1][v] for v in far[1]}


def forward_top_as_it_is(k, n=16):
    indices = top(k.p, n)
    P = dict(zip(indices, renormalised(k.p, indices), strict=True))
    return sum(a * (k.p[v] - k.q[v]) for v, a in P.items()), {v: -a for v, a in P.items()}


def routed(k, on, divergence):
    lam = {10: 0.5, 25: 0.25}[k.step]
    return (
        (k.A * (1 - lam / 0.5), times(lam * k.shown * k.per_completion, divergence(k)))
        if on
        else policy(k.A)
    )


def solved_weight(k):  # mean 1 over s solved and 1 - s not
    return (
        (1 - k.s if k.correct else k.s) / (k.s * (1 - k.s) + (1 - k.s) * k.s)
        if 0 < k.s < 1
        else 1.0
    )


def policy(c):
    return c, (0.0, {})


def times(factor, divergence):
    return factor * divergence[0], {v: factor * slope for v, slope in divergence[1].items()}


BOUND = math.log(0.1) / 0.9
FORMULAS = {  # (coefficient, divergence) of a token: one formula of family.md each
    "sft": lambda k: policy(1.0),
    "grpo": lambda k: policy(k.A),
    "grpo-group": lambda k: policy(k.A),
    "rlsd": lambda k: policy(k.A * (1 - 0.5 * (1 - k.step / 50) + 0.5 * (1 - k.step / 50) * k.w)),
    "rlrt": lambda k: policy(k.A * (0.5 + 0.5 * k.w_reversed) if k.correct else k.A),
    # where g = 1
    "antisd": lambda k: policy(k.A - 0.25 * (math.log1p(math.exp(k.d)) - math.log(2))),
    "reopold": lambda k: policy(max(k.d, BOUND) if kept(k, "reopold") else 0.0),
    "vopd": lambda k: policy(k.d + k.shown * reverse(k)[0]),
    "eopd": lambda k: (k.d, times(k.H > 0.8, forward_top(k))),
    "stable-opd": lambda k: policy(0.1) if k.is_reference else (k.d, times(0.1, reverse(k))),
    "opsd": lambda k: (0.0, clipped_forward(k)),
    "pw-opsd": lambda k: (0.0, times(k.weight, clipped_forward(k))),
    "topk-opd": lambda k: (0.0, advantage_top(k)),
    "sdpo": lambda k: (0.0, times(k.shown, jensen_shannon(k))),
    "mopd": lambda k: (0.0, times(k.shown, jensen_shannon(k))),
    "msd": lambda k: (0.0, times(k.shown * k.dual_share * k.T * k.per_completion, reverse(k))),
    "rp-opsd": lambda k: (0.0, two_views(k)),
    "pbsd": lambda k: policy(
        (0.1 if k.is_reference else -0.1) / (1 + math.exp(0.1 * k.margin)) * k.T * k.per_completion
    ),
    "brts": lambda k: (
        0.0,
        times(10, forward_top_as_it_is(k)) if k.is_reference else advantage_top(k),
    ),
    "resd": lambda k: (0.0, times(solved_weight(k) * k.per_completion, clipped_reverse(k))),
    "trace": lambda k: routed(k, k.marked and k.correct, clipped_forward),
    "trace-errors": lambda k: routed(k, k.marked and not k.correct, clipped_reverse_entries),
    # sqrt(p_0 p_plan)
    "sort": lambda k: policy(math.exp(k.q[k.y] + k.d / 2) if k.is_reference else k.A),
    "atmanrl": lambda k: policy(k.A),
}
CASES = [*((name, 10) for name in METHODS), ("reopold", 50), ("trace", 25)]


def kept(k, name):
    """Whether the mean counts this token."""
    return name != "reopold" or (k.uncertain if k.step >= 50 else k.d > BOUND)


def tokens_of_batch(s, log_t, log_s):
    for i, length in enumerate(LENGTHS):
        tokens = tokens_of(
            log_t[i, :length].tolist(),
            log_s[i, :length].tolist(),
            s.tokens[i],
            s.advantage[i].item(),
            s.correct[i].item(),
            s.is_reference[i].item(),
            step=s.step,
            per_completion=(s.num_reference if s.is_reference[i] else s.num_tokens) / (4 * length),
            log_r=log_t[i, :length].flip(-1).tolist(),
            views=s.views[i].tolist(),
            s=s.success_rate,
            marked=s.marked[i].tolist(),
            margin=s.margin[i].item(),
        )
        for t, k in enumerate(tokens):
            yield i, t, k


def logits_with_zeros():
    """Teacher: of every ten tokens the first two are ruled out, the first of which the student
    samples. Student: the second and the third."""
    logits = 3 * torch.randn(
        2, 4, 7, V, generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )
    logits[0][..., 0::10] = logits[:, ..., 1::10] = logits[1][..., 2::10] = -math.inf
    return logits


@pytest.mark.parametrize("zeros", [False, True], ids=["", "with probabilities of zero"])
@pytest.mark.parametrize("name,step", CASES)
def test_every_method_equals_a_loop(name, step, zeros):
    """Values, and gradients by every log p_S: a probability taken for a constant changes what is
    learned, no value."""
    s, log_t, log_s = make_batch(*(logits_with_zeros() if zeros else ()), eps=0.7)
    s.step, keeps = step, METHODS[name].keeps
    if keeps:
        s.kept = keeps(s.d, torch.special.entr(log_s.exp()).sum(-1), s.mask, step)
    loss = METHODS[name].loss(s)
    assert loss.shape == s.mask.shape and torch.isfinite(loss).all()
    (slopes,) = torch.autograd.grad(loss.sum(), log_s)
    possible = log_s.isfinite()
    for i, t, k in tokens_of_batch(s, log_t, log_s):
        c, (divergence, slope) = FORMULAS[name](k)
        assert loss[i, t].item() == pytest.approx(divergence - c * k.q[k.y], rel=1e-6, abs=1e-12)
        expected = [
            slope.get(v, 0.0) - c * (v == k.y) if possible[i, t, v] else 0.0 for v in range(V)
        ]
        assert slopes[i, t].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert name != "reopold" or s.kept[i, t] == kept(k, name)


@pytest.mark.parametrize("name,step", CASES)
def test_a_step_equals_plain_logits(tiny_toy, tmp_path, monkeypatch, name, step):
    """Loss and gradient norm of metrics.jsonl, from the whole logits of one row at a time and the
    loops above: the mean is one over the micro-batches of the step, and over the tokens that the
    method keeps."""
    (tmp_path / "few.jsonl").write_text("".join((tiny_toy / "train.jsonl").open().readlines()[:20]))
    few = {"data": tmp_path / "few.jsonl", "micro-batch": 3} | (
        {} if METHODS[name].groups else {"prompts-per-step": 5}
    )
    s, *_ = lab.parse_arguments(
        list(map(str, arguments(tiny_toy, tmp_path, name, lr=0.0, seed=3, **few)))
    )
    t = train.Trainer(s, Ranks(), neighbour.Neighbour(s))
    t.log.bar = tqdm(disable=True)
    torch.manual_seed(0)
    for parameter in t.parameters:  # a student that is not the teacher
        torch.nn.init.normal_(parameter, std=0.1)
    rows, read, ask = [], t.objective.read_as_teacher, asking.ask
    t.objective.read_as_teacher = lambda t, some: rows.extend(some) or read(t, some)
    monkeypatch.setattr(contexts, "MOST_MARKED", 0.8)
    monkeypatch.setattr(
        contexts, "segments", lambda row, _: [range(3), range(3, len(row.token_ids))]
    )
    grade = every_other_one_is_correct(train.grade_rollouts, from_row=4 if name == "sort" else 0)
    monkeypatch.setattr(train, "grade_rollouts", grade)
    monkeypatch.setitem(
        neighbour.SALIENCY,
        "mask",
        lambda model, tokenizer, rows, check: [torch.rand(3) for _ in rows],
    )
    stop = t.tokenizer.eos_token
    marks = [t.tokenizer.encode(f"Segments: {i % 4 // 2}, 7. Kind: idea{stop}") for i in range(8)]
    monkeypatch.setattr(
        asking,
        "ask",
        lambda t, prompts, what, *more: (
            ask(t, prompts, what, *more)
            if (what != "marks")
            else [
                p and rollout.Completion(ids, [], True)
                for p, ids in zip(prompts, marks, strict=True)
            ]
        ),
    )
    # at most every median: g = 1
    t.step, t.objective.numbers["median_entropies"] = step, [0.0] * 5
    metrics = t.train_step()
    t.model.eval()
    # the student reads plans
    reader = nullcontext() if name == "sort" else t.objective.as_teacher(t)
    with torch.no_grad(), reader:
        log_ts = [
            whole_logits(t.model, prompt, row)
            for prompt, row in zip(t.objective.teacher_prompts(t, rows), rows, strict=True)
        ]
        log_rs = [whole_logits(t.model, row.prompt, row) for row in rows]
    num_tokens, num_reference = (
        sum(len(r.token_ids) for r in rows if r.is_reference == it) for it in (False, True)
    )
    n, margins = s.prompts_per_step * s.rollouts_per_prompt, [0.0] * len(rows)
    if name == "pbsd":
        with torch.no_grad():
            ratios = [
                (whole_logits(t.model, row.prompt, row) - log_t)[
                    range(len(row.token_ids)), row.token_ids
                ].sum()
                for row, log_t in zip(rows, log_ts, strict=True)
            ]
        margins = [(ratios[i + n] - ratios[i]).item() for i in range(n)] * 2
    views = [
        (log_t.exp() * (log_t - log_r)).sum(-1) for log_t, log_r in zip(log_ts, log_rs, strict=True)
    ]
    seen = torch.cat(
        [v for v, row in zip(views, rows, strict=True) if not row.is_reference] or [torch.zeros(2)]
    )
    views = [((v - seen.mean()) / (seen.std(correction=0) + 1e-6)).tolist() for v in views]
    solved = sum(row.correct for row in rows[:n]) / n
    sums, counts = [0.0, 0.0], [0, 0]  # of rollouts and of reference solutions
    for row, log_t, log_r, z, margin in zip(rows, log_ts, log_rs, views, margins, strict=True):
        log_s, T = whole_logits(t.model, row.prompt, row), len(row.token_ids)
        tokens = list(
            tokens_of(
                log_t.tolist(),
                log_s.tolist(),
                row.token_ids,
                row.advantage,
                row.correct,
                row.is_reference,
                step=step,
                shown=row.has_context or name == "sort",
                per_completion=(num_reference if row.is_reference else num_tokens) / (n * T),
                log_r=log_r.tolist(),
                views=z,
                s=solved,
                margin=margin,
                marked=row.marked.tolist() if name.startswith("trace") else None,
            )
        )
        weights = torch.zeros_like(log_s)
        for place, k in enumerate(tokens):
            c, (divergence, slope) = FORMULAS[name](k)
            weights[place, list(slope)] = torch.tensor(list(slope.values()), dtype=log_s.dtype)
            weights[place, k.y] -= c
            sums[row.is_reference] += divergence - c * k.q[k.y]
        linear = (weights * log_s).sum()  # its gradient is that of the loss, its value is not
        sums[row.is_reference] += linear - linear.item()
        counts[row.is_reference] += sum(kept(k, name) for k in tokens)
    loss = sum(total / count for total, count in zip(sums, counts, strict=True) if count)
    gradients = torch.autograd.grad(loss, t.parameters)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(
        torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-2
    )
    assert metrics["grad_norm"] > 0 and (name == "reopold") == (0 < counts[0] < num_tokens)
    if name.startswith("trace"):
        assert (
            0 < sum(row.marked.sum().item() for row in rows) < num_tokens
            and 0 < metrics["unmarked"] < 1
        )


def every_other_one_is_correct(grade, from_row=0):
    def graded(tokenizer, rows):
        for i, row in enumerate(grade(tokenizer, rows)):
            row.correct = i % 2 == 0 and i >= from_row
        return rows

    return graded


def whole_logits(model, prompt, row):
    """log-probs [T, V] over the vocabulary at the tokens of a completion, in float64."""
    logits = model(torch.tensor([[*prompt, *row.token_ids]])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


def test_the_table_of_methods_is_complete():
    """The lists of the issues that brought them, each with its source or what it is, and a grade,
    in the docstring."""
    assert set(METHODS) == {
        "sft",
        "grpo",
        "grpo-group",
        "rlsd",
        "opsd",
        "pw-opsd",
        "eopd",
        "reopold",
        "rlrt",
        "vopd",
        "antisd",
        "sdpo",
        "mopd",
        "topk-opd",
        "stable-opd",
        "msd",
        "rp-opsd",
        "pbsd",
        "brts",
        "resd",
        "trace",
        "trace-errors",
        "sort",
        "atmanrl",
    }
    for m in METHODS.values():
        assert "Grade " in " ".join(inspect.getdoc(m.loss).split()) and m.summary


@pytest.mark.parametrize("n", [1, 4, 10, 150, 200])
@pytest.mark.parametrize(
    "f, loop",
    [
        (methods.forward_kl_top, forward_top),
        (methods.policy_top, advantage_top),
        (methods.jensen_shannon_top, jensen_shannon),
    ],
)
def test_top_k_divergences(f, loop, n):
    s, log_t, log_s = make_batch()
    value = f(log_t.flatten(0, 1), log_s.flatten(0, 1), k=n).view(4, 7)
    for i, t, k in tokens_of_batch(s, log_t, log_s):
        assert value[i, t].item() == pytest.approx(loop(k, n)[0], abs=1e-9)


@pytest.mark.parametrize(
    "f",
    [
        methods.clipped_forward_kl,
        methods.reverse_kl,
        divergences.clipped_reverse_kl,
        partial(methods.forward_kl_top, k=4),
        partial(methods.jensen_shannon_top, k=4),
    ],
)
def test_divergences_carry_their_whole_gradient(f):
    """A probability that is taken for a constant changes no value, only what is learned."""
    generator = torch.Generator().manual_seed(2)
    teacher_logits, student_logits = torch.randn(2, 3, 8, generator=generator, dtype=torch.float64)
    log_t = teacher_logits.log_softmax(-1)
    assert torch.autograd.gradcheck(
        lambda x: f(log_t, x.log_softmax(-1)), student_logits.requires_grad_()
    )


@pytest.mark.parametrize(
    "f",
    [
        methods.clipped_forward_kl,
        methods.reverse_kl,
        divergences.clipped_reverse_kl,
        partial(methods.forward_kl_top, k=4),
        partial(methods.policy_top, k=4),
        partial(methods.jensen_shannon_top, k=4),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_of_zero_give_no_nan(f, dtype):
    """More tokens of the top k have no probability than have one: by the teacher, the student, or
    both."""
    out = -math.inf
    teacher_logits = torch.tensor(
        [[0, 1, out, out, out, 2], [0, out, out, out, out, 1]], dtype=dtype
    )
    student_logits = torch.tensor(
        [[0, out, 1, out, out, 2], [out, 0, out, out, out, 1]], dtype=dtype
    ).requires_grad_()
    value = f(teacher_logits.log_softmax(-1), student_logits.log_softmax(-1))
    value.sum().backward()
    assert value.isfinite().all() and student_logits.grad.isfinite().all()
    assert value.abs().max() < 1000


def test_rlsd_ends_as_grpo():
    s, _, _ = make_batch()
    s.step = 60
    assert torch.equal(methods.rlsd(s), methods.grpo(s))


@pytest.mark.parametrize(
    "medians,g",
    [
        ([0.5] * 5, 0),
        ([0.5] * 6, 1),
        ([0.5] * 5 + [0.49], 0),
        ([0.5] * 5 + [0.47, 0.49], 0),
        ([0.5] * 5 + [0.4, 0.5], 1),
        ([0.5] * 5 + [0.5, 0.47], 1),
        ([0.5] * 5 + [0.6, 0.46], 0),
        ([0.5] * 5 + [0.6, 0.46, 0.48], 0),
        ([0.5] * 5 + [0.6, 0.46, 0.5], 1),
        ([9, 0.1, 0.5, 0.5, 0.5, 0.5], 1),
    ],
)
def test_antisd_switch(medians, g):
    s, _, _ = make_batch()
    s.median_entropies = medians
    c = -torch.autograd.grad(methods.antisd(s).sum(), s.logp)[0]
    bonus = s.A - 0.25 * g * (torch.nn.functional.softplus(s.d) - math.log(2))
    torch.testing.assert_close(c * s.mask, bonus * s.mask)


# ---- identities


def test_rlsd_at_lam_1_is_egrsd_without_a_gate():
    s, _, _ = make_batch()
    s.step = -50  # twice the lam of step 0
    weights = egrsd.token_advantages(
        s.advantage, s.teacher_logp, s.logp, s.entropy, s.mask, gamma=0
    )
    assert torch.equal(
        methods.rlsd(s), egrsd.policy_loss(s.logp, weights, s.mask, reduction="none")
    )


def test_rlrt_on_correct_rollouts_is_rlsd_with_d_reversed():
    s, _, _ = make_batch()
    s.step, s.correct = 0, torch.ones(4, dtype=torch.bool)
    rlrt = torch.autograd.grad(methods.rlrt(s).sum(), s.logp)[0]
    s.teacher_logp = 2 * s.logp.detach() - s.teacher_logp
    torch.testing.assert_close(rlrt, torch.autograd.grad(methods.rlsd(s).sum(), s.logp)[0])


def expected_gradient(method, teacher_logits, student_logits, **keywords):
    """Gradient of E over y ~ p_S of the method's loss, one completion of one token for every y:
    exact, no sampling."""
    log_t, log_s = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    s, _, _ = make_batch()
    n = len(log_t)
    s.logp = log_s.unsqueeze(-1)
    s.teacher_logp = log_t.unsqueeze(-1)
    s.mask = torch.ones(n, 1, dtype=torch.bool)
    s.advantage = torch.zeros(n, dtype=torch.float64)
    s.divergence = lambda f: f(log_t.expand(n, n), log_s.expand(n, n)).unsqueeze(-1)
    loss = method(s, **keywords).squeeze(-1)
    return torch.autograd.grad((log_s.exp().detach() * loss).sum(), student_logits)[
        0
    ], -loss.detach() / log_s.detach()


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(5)
    teacher_logits, student_logits = 2 * torch.randn(2, V, generator=generator, dtype=torch.float64)
    return teacher_logits, student_logits.requires_grad_()


def test_vopd_is_the_reverse_kl_without_bias(logits):
    gradient, c = expected_gradient(methods.vopd, *logits)
    log_t, log_s = (x.log_softmax(-1) for x in logits)
    assert (log_s.exp() * c).sum().item() == pytest.approx(0, abs=1e-12)  # E c = 0
    torch.testing.assert_close(
        gradient, torch.autograd.grad(methods.reverse_kl(log_t, log_s), logits[1])[0]
    )


def test_antisd_ascends_the_jensen_shannon_divergence(logits):
    gradient, bonus = expected_gradient(methods.antisd, *logits)
    log_t, log_s = (x.log_softmax(-1) for x in logits)
    middle = torch.logaddexp(log_t, log_s) - math.log(2)
    jsd = ((log_t.exp() * (log_t - middle)).sum() + (log_s.exp() * (log_s - middle)).sum()) / 2
    torch.testing.assert_close(gradient, -0.5 * torch.autograd.grad(jsd, logits[1])[0])
    assert 0 < bonus.max() <= 0.25 * math.log(2)
    torch.testing.assert_close(
        methods.jensen_shannon_top(log_t[None], log_s[None], k=V)[0], jsd, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("name", [name for name, m in METHODS.items() if m.full_distributions])
def test_a_teacher_that_is_the_student_teaches_nothing(name):
    logits = 3 * torch.randn(
        4, 7, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    s, _, _ = make_batch(logits, logits)
    s.is_reference[:], s.advantage[:], s.anchor = False, 0.0, s.divergence
    expected = torch.zeros(4, 7, dtype=torch.float64)
    if name == "eopd":  # its student is not renormalised: what it gives to the top 16 should be all
        expected = (s.entropy > 0.8) * -logits.softmax(-1).topk(16).values.sum(-1).log()
    torch.testing.assert_close(METHODS[name].loss(s), expected, atol=1e-12, rtol=0)


def test_doctests():
    assert all(doctest.testmod(module).failed == 0 for module in (methods, contexts, divergences))


def test_position_weight():
    mask = torch.arange(1000) < torch.tensor([[1000], [10], [1]])
    weight = methods.position_weight(mask)
    assert weight[0].mean().item() == pytest.approx(0.77, abs=0.005)
    assert weight[1, :10].tolist() == pytest.approx([position(t, 10) for t in range(1, 11)])


# ---- full distributions through the chunked head


@pytest.mark.parametrize("chunk_logits", [2**25, 61 * 4 * 3])
def test_per_token_divergence_equals_whole_logits(chunk_logits, monkeypatch):
    monkeypatch.setattr(teacher, "CHUNK_LOGITS", chunk_logits)
    model = tiny_qwen3()
    prompts = random_ids([5, 9, 3])
    completions = random_ids([8, 2, 12], seed=1)
    with torch.no_grad():
        other = teacher.read(model, random_ids([7, 4, 6], seed=2), completions, hidden=True)
    model.requires_grad_(False)
    weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_()
    own = teacher.read(model, prompts, completions, hidden=True)
    values = divergences.per_token_divergence(
        model.lm_head, own.hidden, other.hidden, own.mask, methods.reverse_kl, 0.7
    )
    (gradient,) = torch.autograd.grad(values.sum(), weight)
    again = teacher.read(model, prompts, completions, hidden=True)
    log_s, log_t = (
        (model.lm_head(torch.cat(x.hidden)) / 0.7).log_softmax(-1) for x in (again, other)
    )
    expected = (log_s.exp() * (log_s - log_t)).sum(-1)
    torch.testing.assert_close(values[own.mask], expected)
    assert not values[~own.mask].any()
    torch.testing.assert_close(
        gradient, torch.autograd.grad(expected.sum(), weight)[0], atol=1e-5, rtol=1e-4
    )


def test_per_token_divergence_never_holds_whole_logits(monkeypatch):
    monkeypatch.setattr(teacher, "CHUNK_LOGITS", 61 * 4 * 5)
    seen = []

    def watched(log_t, log_s):
        seen.append(log_t.shape)
        return methods.reverse_kl(log_t, log_s)

    model, completions = tiny_qwen3(), random_ids([8, 9], seed=1)
    own = teacher.read(model, random_ids([5, 9]), completions, hidden=True)
    divergences.per_token_divergence(
        model.lm_head, own.hidden, own.hidden, own.mask, watched
    ).sum().backward()
    # 17 tokens in chunks of 5, forward and backward
    assert max(shape[0] for shape in seen) == 5 and len(seen) == 8


@pytest.mark.parametrize("scale, cap", [(0.25, None), (1.0, 2.0), (1.7, 3.0)])
def test_divergences_see_what_comes_after_the_head(monkeypatch, scale, cap):
    """Scaled and capped logits, as of Granite and Gemma, against float64 and plain autograd."""
    monkeypatch.setattr(teacher, "CHUNK_LOGITS", 5 * 61 * 4)
    torch.manual_seed(0)
    linear, weights = torch.nn.Linear(16, 61).requires_grad_(False), torch.randn(27)
    hidden, other = torch.randn(2, 27, 16)
    ours, plain = hidden.clone().requires_grad_(), hidden.double().requires_grad_()

    def exact(states):
        logits = scale * (states.double() @ linear.weight.double().T + linear.bias.double())
        return ((cap * (logits / cap).tanh() if cap else logits) / 0.7).log_softmax(-1)

    head, mask = teacher.Head(linear, scale, cap), torch.ones(1, 27, dtype=torch.bool)
    found = divergences.per_token_divergence(
        head, [ours], [other], mask, divergences.forward_kl, 0.7
    )[0]
    wanted = (exact(other).exp() * (exact(other) - exact(plain))).sum(-1)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=0)
    (found @ weights).backward()
    (wanted @ weights.double()).backward()
    torch.testing.assert_close(ours.grad.double(), plain.grad, atol=1e-5, rtol=0)


# ---- settings


def test_help_has_a_sentence_for_every_flag(capsys):
    assert_help_is_whole(capsys, lab, family.FamilySettings)


def settings(*flags):
    s, *_ = lab.parse_arguments(["--model", "m", "--data", "d", *map(str, flags)])
    return s


def test_methods_bring_their_settings():
    s = settings()
    assert (s.method, s.gate, s.window, s.teacher_context, s.rollouts_per_prompt) == (
        "cl-egrsd",
        "",
        3,
        "solution",
        1,
    )
    s = settings("--method", "rlsd")
    assert (s.advantage, s.teacher_context, s.teacher_schedule, s.teacher_every) == (
        "group",
        "answer",
        "copy",
        10,
    )
    # 32 completions, as without groups
    assert (s.prompts_per_step, s.rollouts_per_prompt) == (4, 8)
    assert settings("--method", "rlsd", "--teacher-schedule", "frozen").teacher_schedule == "frozen"
    assert settings("--method", "egrsd", "--gate", "position").gate == "position"
    assert settings("--preset", "paper-8b").gamma == 1.0
    egrsd_8b = settings("--preset", "paper-8b", "--method", "egrsd")
    assert (egrsd_8b.gamma, egrsd_8b.window) == (0.3, 0)


@pytest.mark.parametrize(
    "flags,name",
    [
        ([], "cl-egrsd"),
        (["--window", "5"], "cl-egrsd"),
        (["--window", "0"], "egrsd"),
        (["--gamma", "0"], "direction-aware"),
        (["--method", "egrsd"], "egrsd"),
        (["--method", "direction-aware"], "direction-aware"),
        (["--method", "egrsd", "--gamma", "1"], "egrsd"),
        (["--method", "egrsd", "--window", "0"], "egrsd"),
    ],
)
def test_names_of_gamma_and_window(flags, name):
    s = settings(*flags)
    assert s.method == name
    assert (s.gamma == 0) == (name == "direction-aware")
    assert (s.window == 0) <= (name != "cl-egrsd")


def test_groups_are_shared_by_all_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    s, *_ = lab.parse_arguments(["--model", "m", "--data", "d", "--method", "rlsd"])
    assert (s.prompts_per_step, s.rollouts_per_prompt) == (8, 8)


@pytest.mark.parametrize(
    "flags,complaint",
    [
        (["--method", "grpo-group", "--rollouts-per-prompt", "1"], "--rollouts-per-prompt"),
        (["--method", "grpo", "--advantage", "group"], "needs --advantage running"),
        (["--method", "cl-egrsd", "--gate", "none"], "--gate"),
        (
            ["--method", "egrsd", "--window", "3"],
            "--method egrsd with --gamma 0.3 and --window 3, which is cl-egrsd",
        ),
        (["--method", "cl-egrsd", "--window", "0"], "which is egrsd"),
        (["--method", "egrsd", "--gamma", "0"], "which is direction"),
        (["--method", "direction-aware", "--gamma", "1"], "which is cl-egrsd"),
        (["--gate", "position"], "use it with --method egrsd"),
        (["--advantage", "group"], "--advantage group .* compares completions"),
        (
            ["--method", "pbsd", "--teacher-context", "peer"],
            "peer compares completions of one problem, .* choose another",
        ),
        (["--teacher-context", "peer"], "--rollouts-per-prompt"),
        (
            ["--method", "stable-opd", "--teacher-context", "solution"],
            "needs --teacher-context none",
        ),
        (["--method", "pbsd", "--rollouts-per-prompt", "2"], "needs --rollouts-per-prompt 1"),
        (["--method", "rp-opsd", "--teacher-schedule", "ema"], "needs --teacher-schedule frozen"),
        (["--method", "trace", "--teacher-context", "solution"], "needs --teacher-context label"),
        (["--method", "brts", "--rows", "reference"], "use it with --method sft"),
        (["--rows", "teacher"], "use it with --method sft"),
        (
            ["--method", "sft", "--rows", "teacher", "--teacher-context", "reflection"],
            "is about rollouts",
        ),
        (
            ["--method", "sft", "--rows", "teacher", "--teacher-context", "peer"],
            "is about rollouts",
        ),
        (["--method", "pbsd", "--teacher-context", "label"], "needs a text for every problem"),
        (
            ["--method", "rp-opsd", "--teacher-context", "none"],
            "leaves no difference between the teacher's two views",
        ),
        (
            ["--method", "egrsd", "--gate", "two-view", "--teacher-context", "none"],
            "leaves no difference",
        ),
        (["--gate", "two-view"], "use it with --method egrsd"),
        (["--keep", "correct"], "use it with --method sft"),
        (["--method", "sort", "--saliency", "mask"], "use it with --method atmanrl"),
        (["--method", "sort", "--advantage", "running"], "needs --advantage group"),
        (["--method", "sort", "--teacher-thinking"], "needs --teacher-thinking None"),
        (["--method", "sort", "--teacher-context", "peer"], "is about rollouts"),
        (["--method", "sort", "--teacher-context", "reflection"], "is about rollouts"),
        (
            ["--method", "sft", "--rows", "teacher", "--teacher-context", "plan"],
            "is about rollouts",
        ),
        (
            ["--method", "sft", "--rows", "interleaved", "--teacher-context", "label"],
            "is about rollouts",
        ),
        (["--method", "egrds"], "--method"),
    ],
)
def test_contradictions_are_refused(flags, complaint):
    with pytest.raises(InputError, match=complaint) as error:
        settings(*flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "grpo", "--gamma", "0.5", "--teacher-context", "label"],
        ["--method", "sft", "--temperature", "0.5", "--rollouts-per-prompt", "8"],
        ["--method", "egrsd", "--gate", "dual", "--floor", "0.5", "--teacher-every", "5"],
    ],
)
def test_flags_without_effect_are_taken(flags):
    assert settings(*flags).method == flags[1]


@pytest.mark.parametrize(
    "flags",
    [
        ["--advantage", "group"],
        ["--teacher-context", "peers"],
        *(["--method", name] for name, m in METHODS.items() if m.groups),
    ],
)
def test_groups_of_one_are_refused(flags):
    with pytest.raises(InputError, match="set --rollouts-per-prompt to 2 or more"):
        settings(*flags, "--rollouts-per-prompt", "1")


# ---- runs


def arguments(tiny_toy, out, name, **changes):
    method = METHODS.get(name)
    groups = {"prompts-per-step": 2, "rollouts-per-prompt": 4} if method and method.groups else {}
    settings = {"method": name, "gradient-checkpointing": False, "lr": 1e-3} | groups | changes
    return train_arguments(tiny_toy, out, **settings)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[pytest.mark.slow] * (name not in ("sft", "sdpo", "stable-opd", "brts"))
        )
        for name in METHODS
    ],
)
def test_every_method_trains(tiny_toy, tmp_path, name):
    family_here(*arguments(tiny_toy, tmp_path / "run", name, steps=2))
    rows = metrics(tmp_path / "run")
    assert len(rows) == 2 and all(math.isfinite(value) for row in rows for value in row.values())
    # no peer is correct, or all rewards are alike
    assert rows[1]["grad_norm"] > 0 or METHODS[name].groups
    derived = json.loads((tmp_path / "run" / "config.json").read_text())["derived"]
    solutions = 2 if METHODS[name].groups else 8  # one for each problem
    assert derived["completions_per_step"] == (
        8 + solutions * bool(METHODS[name].rollouts and METHODS[name].rows)
    )


@pytest.mark.parametrize("name", ["pw-opsd", "reopold", "stable-opd"])
def test_micro_batches_change_nothing(tiny_toy, tmp_path, name):
    for out, micro_batch in (("whole", 16), ("parts", 2)):
        family_here(
            *arguments(tiny_toy, tmp_path / out, name, steps=2, **{"micro-batch": micro_batch})
        )
    assert_close_gradients(tmp_path / "parts", tmp_path / "whole", 2)


def test_a_teacher_with_nothing_to_be_shown_says_nothing(tiny_toy, tmp_path):
    """No rollout is correct, so no peer is: neither divergence nor entropy nor d may reach the
    loss."""
    rows = [
        json.loads(line) | {"answer": "-1", "solution": "A guess."}
        for line in (tiny_toy / "train.jsonl").read_text().splitlines()
    ]
    (tmp_path / "wrong.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("sdpo", "mopd", "rlrt"):
        family_here(
            *arguments(tiny_toy, tmp_path / name, name, steps=2, data=tmp_path / "wrong.jsonl")
        )
        for row in metrics(tmp_path / name):
            for key in ("accuracy", "loss", "grad_norm", "entropy", "delta", "max_entropy"):
                assert row[key] == 0, key


def test_no_solution_is_needed_where_none_is_shown(tiny_toy, tmp_path):
    rows = [json.loads(line) for line in (tiny_toy / "train.jsonl").read_text().splitlines()]
    bare = [json.dumps({"problem": row["problem"], "answer": row["answer"]}) + "\n" for row in rows]
    (tmp_path / "bare.jsonl").write_text("".join(bare))
    for out, flags in (("grpo", {}), ("egrsd", {"teacher-context": "answer"})):
        family_here(
            *arguments(
                tiny_toy, tmp_path / out, out, steps=1, data=tmp_path / "bare.jsonl", **flags
            )
        )
    with pytest.raises(InputError, match="field 'solution' is missing"):
        family_here(
            *arguments(tiny_toy, tmp_path / "sft", "sft", steps=1, data=tmp_path / "bare.jsonl")
        )


def by_two_processes(flags_of_runs, directory):
    """Several runs, one after the other."""

    def several():
        begin = dist.init_process_group
        # one group for all
        dist.init_process_group = lambda *a, **k: dist.is_initialized() or begin(*a, **k)
        for flags in flags_of_runs:
            train.train(*lab.parse_arguments(list(map(str, flags))))
        distributed.close()

    assert_ended_well(start_ranks(directory, several, "family"), directory)


# by one process and by two
TWICE = ("antisd", "reopold", "sdpo", "stable-opd", "sft", "brts", "resd", "rp-opsd")


def test_two_processes_change_nothing(tiny_toy, tmp_path):
    two = tmp_path / "two"
    by_two_processes([arguments(tiny_toy, two / name, name, steps=2) for name in TWICE], tmp_path)
    for name in TWICE:
        family_here(*arguments(tiny_toy, tmp_path / name, name, steps=2))
        assert_close_gradients(two / name, tmp_path / name, 2)
        for ours, theirs in zip(metrics(tmp_path / name), metrics(two / name), strict=True):
            for key in ("loss", "grad_norm"):  # before clipping
                assert theirs[key] == pytest.approx(ours[key], rel=1e-3, abs=1e-5), (name, key)
        medians = [
            json.loads((place / name / "checkpoints/step-000002/state.json").read_text())[
                "median_entropies"
            ]
            for place in (tmp_path, two)
        ]
        assert medians[0] == pytest.approx(medians[1], abs=1e-6) and len(medians[0]) == (
            0 if name == "sft" else 2
        )


@pytest.mark.slow
def test_every_method_trains_for_twenty_steps_on_one_and_two_processes(tiny_toy, tmp_path):
    by_two_processes(
        [arguments(tiny_toy, tmp_path / "two" / name, name, steps=20) for name in METHODS], tmp_path
    )
    for name in METHODS:
        family_here(*arguments(tiny_toy, tmp_path / "one" / name, name, steps=20))
        for place in ("one", "two"):
            rows = metrics(tmp_path / place / name)
            assert len(rows) == 20 and all(
                math.isfinite(value) for row in rows for value in row.values()
            )


def stored_adapter(tiny_toy, path):
    """The adapter's tensors in the order of lora_parameters."""
    model = AutoModelForCausalLM.from_pretrained(tiny_toy / "model")
    lora.load_adapter(model, path)
    return [parameter.detach() for parameter in lora.lora_parameters(model)]


@pytest.mark.parametrize("schedule", ["ema", "copy"])
def test_teacher_schedules_follow_the_student_and_survive_a_resume(tiny_toy, tmp_path, schedule):
    extra = {"teacher-schedule": schedule, "checkpoint-every": 1} | (
        {"teacher-every": 3} if schedule == "copy" else {"teacher-decay": 0.8}
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    family_here(*arguments(tiny_toy, whole, "antisd", **extra))
    family_here(*arguments(tiny_toy, parts, "antisd", steps=2, **extra))
    family_here("--out", parts, "--resume", "--steps", 4)
    assert_same_run(whole, parts)
    steps = [whole / "checkpoints" / f"step-{step:06d}" for step in (1, 2, 3, 4)]
    students = [stored_adapter(tiny_toy, step / "adapter") for step in steps]
    teachers = [torch.load(step / "state.pt", weights_only=True)["teacher"] for step in steps]
    for student, before, now in zip(students[1:], teachers[:-1], teachers[1:], strict=True):
        if schedule == "ema":
            expected = [0.8 * old + 0.2 * new for old, new in zip(before, student, strict=True)]
        else:
            expected = student if student is students[2] else before
        for a, b in zip(expected, now, strict=True):
            torch.testing.assert_close(a, b)
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(teachers[0], teachers[3], strict=True))


def test_a_teacher_copied_after_every_step_is_the_student_of_the_step_before(tiny_toy, tmp_path):
    """With the student's own prompt and weights there is no difference left for the teacher to
    make."""
    family_here(
        *arguments(
            tiny_toy,
            tmp_path / "run",
            "vopd",
            **{
                "teacher-schedule": "copy",
                "teacher-every": 1,
                "teacher-context": "none",
                "lr": 1e-1,
            },
        )
    )
    assert all(abs(row["delta"]) < 1e-5 for row in metrics(tmp_path / "run"))


def documented_example():
    text = (ROOT / "docs" / "family.md").read_text(encoding="utf-8")
    start = text.index("@method(")
    return text[start : text.index("```", start)]


def test_the_documented_new_method_trains(tiny_toy, tmp_path):
    """Adding a method is one function in one file: the example at the end of a copy of
    family/methods.py, trained with its name. A method that reads eps is reported with its
    magnitude."""
    here, example = tmp_path / "copy", documented_example()
    name = example.split('"')[1]
    assert len(example.strip().splitlines()) <= 15 and name not in METHODS
    for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.*"), *ROOT.glob("family/*.py")]:
        (here / path.relative_to(ROOT)).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(path, here / path.relative_to(ROOT))
    (here / "family" / "methods.py").open("a").write("\n\n" + example)
    command = ["family", *train_arguments(tiny_toy, here / "run", method=name, steps=2)]
    assert run_copy(here, command) == 0, (here / "stderr").read_text()
    rows = metrics(here / "run")
    assert len(rows) == 2 and all(0.8 <= row["magnitude"] <= 1.2 for row in rows)


# ---- small wrongs


def test_a_method_that_uses_the_gate_but_not_the_magnitude_reports_its_gate(
    tiny_toy, tmp_path, monkeypatch
):
    """Values in the order of names lose one where a name in the middle is missing."""
    loss = METHODS["grpo"].loss
    gate_only = methods.Method(loss, "for this test", uses=("advantage", "gamma", "floor"))
    monkeypatch.setitem(METHODS, "gate-only", gate_only)
    family_here(*arguments(tiny_toy, tmp_path / "run", "gate-only", steps=2, gamma=1.0))
    for row in metrics(tmp_path / "run"):
        assert 0.1 <= row["gate"] < 1 and "magnitude" not in row and row["entropy"] > 0


def test_group_advantage():
    group, std = neighbour.GroupAdvantage(2), math.sqrt(0.5)
    found = group.advantage(torch.tensor([1.0, 0.0, 1.0, 1.0])).tolist()
    assert found == pytest.approx([0.5 / (std + 1e-4), -0.5 / (std + 1e-4), 0, 0])
    assert GROUP_STATE <= group.state_dict().keys()


# what a checkpoint holds, whatever the baseline
GROUP_STATE = {"steps", "count", "mean", "sum_squares"}


def test_references_that_are_cut_are_counted_aloud(tiny_toy, tmp_path, capsys):
    family_here(*arguments(tiny_toy, tmp_path / "run", "sft", steps=1, **{"max-new-tokens": 3}))
    said = [line for line in capsys.readouterr().out.splitlines() if "reference solutions" in line]
    count = len((tiny_toy / "train.jsonl").read_text().splitlines())
    assert said == [
        f"--method sft: {count} of {count} reference solutions are longer than --max-new-tokens 3 "
        "and are cut there"
    ]


@pytest.mark.parametrize("name", ["cl-egrsd", "egrsd"])
def test_ablations_of_the_core_s_methods(tiny_toy, tmp_path, name):
    """The family's flags with EGRSD: the step is the core's but for what the flag says."""
    plain, same, other = (tmp_path / place for place in ("plain", "same", "other"))
    family_here(*arguments(tiny_toy, plain, name, steps=2))
    family_here(
        *arguments(
            tiny_toy, same, name, steps=2, **{"teacher-schedule": "copy", "teacher-every": 50}
        )
    )
    family_here(*arguments(tiny_toy, other, name, steps=2, **{"teacher-context": "answer"}))
    changed = adapter(other, 2)
    assert adapter(plain, 2).keys() == adapter(same, 2).keys() == changed.keys()
    assert not all(torch.equal(tensor, changed[key]) for key, tensor in adapter(plain, 2).items())
    # until it is copied for the first time the teacher is the untrained adapter, which is the base
    # model
    assert (
        metrics(same)[0]["loss"] == pytest.approx(metrics(plain)[0]["loss"])
        and len(metrics(same)) == 2
    )


@pytest.mark.parametrize("gate", ["two-view", "dual"])
def test_other_gates_are_one_without_context_and_keep_eps(tiny_toy, tmp_path, monkeypatch, gate):
    """The gate of rows whose teacher had nothing to be shown, and the magnitude beside a gate."""
    changes = {"gate": gate, "eps": 0.7, "teacher-context": "peer", "teacher-schedule": "copy"}
    changes |= {"rollouts-per-prompt": 4, "prompts-per-step": 2, "micro-batch": 16}
    s, _, objective = lab.parse_arguments(
        list(map(str, arguments(tiny_toy, tmp_path / "run", "egrsd", **changes)))
    )
    t = train.Trainer(s, Ranks(), objective)
    torch.manual_seed(0)
    for parameter in t.parameters:
        torch.nn.init.normal_(parameter, std=0.3)
    t.out.mkdir()
    t.log.bar, calls, real = tqdm(disable=True), [], egrsd.magnitude
    batches, gates, metrics = [], [], objective.token_metrics

    def watched(*arguments):
        calls.append(arguments[3])
        return real(*arguments)

    def noted(t, batch):
        batches.append(batch)
        gates.append(objective.gate)
        return metrics(t, batch)

    def first_is_correct(tokenizer, rows, grade=train.grade_rollouts):
        for i, row in enumerate(grade(tokenizer, rows)):
            row.correct = i % 4 == 0
        return rows

    monkeypatch.setattr(train, "grade_rollouts", first_is_correct)
    monkeypatch.setattr(egrsd, "magnitude", watched)
    objective.token_metrics = noted
    t.train_step()
    assert calls and set(calls) == {0.7}
    without = 0
    for batch, gate in zip(batches, gates, strict=True):
        for i, row in enumerate(batch.examples):
            own = gate[i, : len(row.token_ids)]
            without += not row.has_context
            assert (own == 1).all() != row.has_context
    assert without == 2  # the only correct rollout of each problem has no correct peer


def test_metrics_do_not_count_rows_that_are_no_rollouts(tiny_toy, tmp_path):
    s, _, objective = lab.parse_arguments(
        list(map(str, arguments(tiny_toy, tmp_path / "run", "brts", **{"micro-batch": 2})))
    )
    t = train.Trainer(s, Ranks(), objective)
    t.out.mkdir()
    t.log.bar, sums, tokens, metrics = tqdm(disable=True), [], [], objective.token_metrics

    def noted(t, batch):
        found = metrics(t, batch)
        for i, row in enumerate(batch.examples):
            sums.append((found["entropy"] * batch.by_student.mask)[i].sum().item())
            tokens.append(0 if row.is_reference else len(row.token_ids))
            assert not row.is_reference or sums[-1] == 0
        return found

    objective.token_metrics = noted
    step = t.train_step()
    assert step["entropy"] == pytest.approx(sum(sums) / sum(tokens), rel=1e-5) and 0 in tokens


def test_position_gate(tiny_toy, tmp_path):
    family_here(*arguments(tiny_toy, tmp_path / "run", "egrsd", steps=1, gate="position"))
    assert 0.25 < metrics(tmp_path / "run")[0]["gate"] < 1


# ---- resumed


def write_config(place, s, **changes):
    config = {"format": 3, "entry": s.ENTRY, "settings": asdict(s), "world_size": 1} | changes
    (place / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "rlsd"],
        ["--method", "egrsd"],
        ["--window", "0"],
        ["--method", "direction-aware"],
        ["--method", "sft"],
        ["--method", "antisd", "--rollouts-per-prompt", "4"],
        ["--gamma", "0", "--teacher-context", "answer"],
    ],
)
def test_the_command_that_started_a_run_resumes_it(tmp_path, flags):
    """Settings that the method or the preset brought must not count as changes."""
    command = ["--preset", "toy", "--out", str(tmp_path), *flags]
    started, *_ = lab.parse_arguments(command)
    write_config(tmp_path, started)
    for again in (command, ["--out", str(tmp_path), *flags]):
        for how in (["--resume"], ["--resume", "auto"]):
            resumed, resume, _ = lab.parse_arguments([*again, *how])
            assert resume and resumed == started
    with pytest.raises(InputError, match="--resume with changed settings .--seed was 0."):
        lab.parse_arguments([*command, "--resume", "--seed", "3"])


def stored(tmp_path, *flags, **changes):
    """config.json of a run started with these flags, with some settings changed by hand."""
    s, *_ = lab.parse_arguments(["--preset", "toy", "--out", str(tmp_path), *flags])
    write_config(tmp_path, s, settings=asdict(s) | changes)
    return s


def test_parts_of_the_command_are_compared_with_the_run_not_with_each_other(tmp_path):
    s = stored(tmp_path, "--method", "rlsd", "--teacher-schedule", "ema", "--teacher-decay", "0.9")
    command = ["--out", str(tmp_path), "--resume", "--method", "rlsd", "--teacher-decay", "0.9"]
    assert lab.parse_arguments(command)[0] == s
    stored(tmp_path, "--method", "egrsd")
    with pytest.raises(InputError, match="--method was egrsd"):
        lab.parse_arguments(["--out", str(tmp_path), "--resume", "--method", "cl-egrsd"])


@pytest.mark.parametrize(
    "entry, starts, other",
    [(lab, "python -m family", train), (train, "python train.py", lab)],
    ids=["family", "train"],
)
def test_a_run_is_resumed_by_the_command_that_started_it(tmp_path, entry, starts, other):
    """The other one may not know its flags, and would go on without them."""
    s, *_ = entry.parse_arguments(["--preset", "toy", "--out", str(tmp_path)])
    write_config(tmp_path, s)
    command = ["--out", str(tmp_path), "--resume"]
    assert entry.parse_arguments(command)[0] == s
    line = f"started with {starts}: go on with {starts} --out {tmp_path} --resume"
    with pytest.raises(InputError, match=line):
        other.parse_arguments(command)


def test_what_may_change_on_resume(tmp_path, monkeypatch):
    """Length of the run, checkpoints, graphs and the place of the directory, nothing else; of a
    directory that was moved the new place counts; as many processes as before, not fewer or more."""
    s, *_ = train.parse_arguments(["--preset", "toy", "--out", str(tmp_path)])
    write_config(tmp_path, s, settings=asdict(s) | {"out": "elsewhere"})
    command = ["--out", str(tmp_path), "--resume"]
    more = ["--steps", "99", "--checkpoint-every", "7", "--cuda-graphs"]
    resumed, _ = train.parse_arguments([*command, *more])
    changed = {"steps": 99, "checkpoint_every": 7, "cuda_graphs": True}
    assert asdict(resumed) == asdict(s) | changed and resumed.out == str(tmp_path)
    for f in fields(s):
        if f.name in {*changed, "out", "method", "model", "data", "eval_data"}:
            continue
        flag, value = f"--{f.name.replace('_', '-')}", getattr(s, f.name)
        flags = [flag, "0.77"] if isinstance(value, float) else [flag, "5"]
        if f.type is bool:
            flags = [f"--no-{flag[2:]}" if value else flag]
        if f.type is list:
            flags = [flag, "q_proj"]
        if f.name == "date":
            flags = [flag, "2026-03-05"]
        with pytest.raises(InputError, match=f"changed settings .*{flag} was"):
            train.parse_arguments([*command, *flags])
    for world in (1, 4):
        write_config(tmp_path, s, world_size=2)
        monkeypatch.setenv("WORLD_SIZE", str(world))
        with pytest.raises(InputError, match=f"started with 2 processes, this is {world}"):
            train.parse_arguments(command)


@pytest.mark.parametrize("version", [None, 2, 4, "3"])
def test_a_run_of_another_format_is_refused(tmp_path, version):
    s, *_ = train.parse_arguments(["--preset", "toy", "--out", str(tmp_path)])
    write_config(tmp_path, s, format=version)
    if version is None:  # before there was one
        (tmp_path / "config.json").write_text(json.dumps({"settings": asdict(s), "world_size": 1}))
    with pytest.raises(InputError, match="this version reads 3: .* start anew: python train.py"):
        train.parse_arguments(["--out", str(tmp_path), "--resume"])


def test_a_run_without_one_of_the_settings_does_not_get_its_default(tmp_path):
    s, *_ = train.parse_arguments(["--preset", "toy", "--out", str(tmp_path)])
    values = asdict(s)
    del values["eps"]
    write_config(tmp_path, s, settings=values)
    with pytest.raises(InputError, match="no run that can be resumed here .'eps'"):
        train.parse_arguments(["--out", str(tmp_path), "--resume"])


@pytest.mark.parametrize(
    "text", ['{"format": 3, "entry": "python -m family", "settings": []}', "[]", "half a fi"]
)
def test_a_damaged_config_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match="no run that can be resumed here"):
        lab.parse_arguments(["--out", str(tmp_path), "--resume"])
    stored(tmp_path, method="sdpoo")
    with pytest.raises(InputError, match="--method sdpoo: not known"):
        lab.parse_arguments(["--out", str(tmp_path), "--resume"])
