"""egrsd.py against loops over plain Python floats, one per equation of arXiv 2605.13255."""

import doctest
import json
import math
import statistics

import pytest
import torch

import egrsd


def loop_step(A, teacher, student, H, lengths, gamma, window, eps, floor, max_entropy=None):
    """Ahat and the loss of eq. (2) to (8), token by token in float64."""
    raw = (
        max(H[i][t] for i in range(len(A)) for t in range(lengths[i]))
        if max_entropy is None
        else max_entropy
    )
    Ahat, loss = [[0.0] * len(H[0]) for _ in A], 0.0
    for i, a in enumerate(A):
        direction = (a > 0) - (a < 0)
        for t in range(lengths[i]):
            w = min(max(math.exp(direction * (teacher[i][t] - student[i][t])), 1 - eps), 1 + eps)
            low = min(H[i][j] for j in range(t, min(t + window, lengths[i] - 1) + 1))
            omega = min(max(1 - gamma * low / max(1.0, raw), floor), 1.0)
            Ahat[i][t] = a * w * omega
            loss -= Ahat[i][t] * student[i][t] / sum(lengths)
    return Ahat, loss


def random_step(seed, B=5, T=9):
    g = torch.Generator().manual_seed(seed)
    lengths = [T, 1, *torch.randint(1, T + 1, (B - 2,), generator=g).tolist()]
    student, teacher = (torch.randn(B, T, generator=g, dtype=torch.float64) - 2 for _ in range(2))
    # seed 0: no entropy at all
    H = torch.rand(B, T, generator=g, dtype=torch.float64) * 4 * (seed % 3)
    A = torch.randn(B, generator=g, dtype=torch.float64)
    A[2] = 0.0
    mask = torch.arange(T) < torch.tensor(lengths).unsqueeze(1)
    return A, teacher, student, H, mask, lengths


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "gamma, window, eps, floor",
    [
        (0.0, 0, 0.2, 0.1),
        (0.3, 0, 0.2, 0.1),
        (0.3, 3, 0.2, 0.1),
        (1.0, 5, 0.2, 0.1),
        (7.0, 100, 0.0, 0.5),
        (0.3, 2, 0.9, 1.0),
    ],
)
def test_every_equation_equals_the_loop(seed, gamma, window, eps, floor):
    A, teacher, student, H, mask, lengths = random_step(seed)
    settings = dict(gamma=gamma, window=window, eps=eps, floor=floor)
    expected, loss = loop_step(
        A.tolist(), teacher.tolist(), student.tolist(), H.tolist(), lengths, **settings
    )
    garbage = torch.where(mask, 0.0, torch.nan)  # whatever stands on padding must not matter
    Ahat = egrsd.token_advantages(
        A, teacher + garbage, student + garbage, H + garbage, mask, **settings
    )
    torch.testing.assert_close(Ahat, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)
    assert egrsd.policy_loss(student + garbage, Ahat, mask).item() == pytest.approx(loss, abs=1e-9)
    single = [x.float() for x in (A, teacher, student, H)]
    torch.testing.assert_close(
        egrsd.token_advantages(*single, mask, **settings).double(), Ahat, atol=1e-6, rtol=1e-6
    )


def test_maximum_is_of_the_raw_entropy_not_of_the_window_minimum():
    """Algorithm 1 of the paper overwrites H before the maximum is taken; eq. (8) does not, and eq.
    (8) is meant."""
    H, mask = torch.tensor([[4.0, 2.0, 4.0, 2.0]]), torch.ones(1, 4, dtype=torch.bool)
    assert egrsd.confidence_gate(H, mask, gamma=1.0, window=1).tolist() == [[0.5, 0.5, 0.5, 0.5]]


def test_proposition_1_holds_with_eq_8_and_not_with_algorithm_1_as_printed():
    """CL-EGRSD gives no token less weight than EGRSD if both divide by the maximum of the raw H. If
    the lookahead's values overwrite H before its maximum is taken, most completions have one."""
    generator, less = torch.Generator().manual_seed(0), 0
    for _ in range(500):
        H = 3 * torch.rand(1, 20, generator=generator) ** 2
        mask = torch.ones_like(H, dtype=torch.bool)
        egrsd_gate = egrsd.confidence_gate(H, mask, gamma=1.0)
        assert (egrsd.confidence_gate(H, mask, gamma=1.0, window=3) >= egrsd_gate).all()
        low = egrsd.lookahead_min(H, mask, window=3)
        as_printed = egrsd.confidence_gate(low, mask, gamma=1.0)  # its maximum is that of `low`
        less += bool((as_printed < egrsd_gate - 1e-6).any())
    assert less > 400


def test_gate_is_zero_outside_the_mask():
    H, mask = torch.ones(2, 4), torch.tensor([[True] * 4, [True, False, False, False]])
    gate = egrsd.confidence_gate(H, mask, gamma=0.3, window=1)
    assert not gate[~mask].any() and gate[mask].all()
    signals = egrsd.token_signals(torch.ones(2), -H, -H, H, mask, gamma=0.3)
    assert not signals.gate[~mask].any() and not signals.advantage[~mask].any()


def test_signals_are_one_definition():
    """token_advantages are those of token_signals; the kinds against a loop."""
    for seed in range(20):
        A, teacher, student, H, mask, _ = random_step(seed)
        how = {"gamma": 1.0, "window": 2, "eps": 0.3, "floor": 0.2, "max_entropy": 5.0}
        signals = egrsd.token_signals(A, teacher, student, H, mask, **how, soon=2)
        advantages = egrsd.token_advantages(A, teacher, student, H, mask, **how)
        assert torch.equal(signals.advantage, advantages)
        for i, length in enumerate(mask.sum(1).tolist()):
            for t in range(length):
                h, ahead = H[i, t].item(), H[i, t : min(t + 3, length)].min().item()
                kind = "lock" if h < 0.5 else "pivot" if ahead < 0.2 else "fork"
                assert egrsd.KINDS[signals.kind[i, t]] == kind
                assert signals.least_entropy[i, t].item() == ahead


def test_gradient_equals_finite_differences():
    A, teacher, student, H, mask, _ = random_step(4)
    student.requires_grad_()
    Ahat = egrsd.token_advantages(A, teacher, student, H, mask, gamma=0.3, window=2)
    assert not Ahat.requires_grad
    assert torch.autograd.gradcheck(lambda logp: egrsd.policy_loss(logp, Ahat, mask), student)
    egrsd.policy_loss(student, Ahat, mask).backward()
    torch.testing.assert_close(student.grad, -Ahat / mask.sum())


def test_terms_without_reduction_add_up_to_the_loss_and_carry_the_gradient():
    A, teacher, student, H, mask, _ = random_step(4)
    student.requires_grad_()
    Ahat = egrsd.token_advantages(A, teacher, student, H, mask, gamma=0.3, window=2)
    garbage = torch.where(mask, 0.0, torch.nan)
    terms = egrsd.policy_loss(
        student + garbage, Ahat + garbage, mask, num_tokens=7, reduction="none"
    )
    assert terms.shape == mask.shape and (terms[~mask] == 0).all() and (terms[mask] != 0).any()
    torch.testing.assert_close(
        terms.sum(), 7 * egrsd.policy_loss(student, Ahat, mask, num_tokens=7)
    )
    torch.testing.assert_close(terms.sum() / mask.sum(), egrsd.policy_loss(student, Ahat, mask))
    weights = torch.rand_like(terms)  # as a method that weighs single tokens would
    (terms * weights).sum().backward()
    torch.testing.assert_close(student.grad, -Ahat * weights)


def test_micro_batches_add_up_and_padding_changes_nothing():
    """Six public trainers divide per micro-batch: a mean of means, 0.5 instead of 0.2 in a toy."""
    A, teacher, student, H, mask, lengths = random_step(5)
    settings = dict(gamma=0.3, window=2, max_entropy=H[mask].max())
    whole = egrsd.policy_loss(
        student, egrsd.token_advantages(A, teacher, student, H, mask, **settings), mask
    )
    parts = 0.0
    for rows in ([0, 1], [2], [3, 4]):
        T = max(lengths[i] for i in rows)
        part = [x[rows, :T] for x in (teacher, student, H, mask)]
        Ahat = egrsd.token_advantages(A[rows], *part, **settings)
        parts += egrsd.policy_loss(part[1], Ahat, part[3], num_tokens=mask.sum())
    torch.testing.assert_close(parts, whole)
    wider = [torch.nn.functional.pad(x, (0, 3)) for x in (teacher, student, H, mask)]
    Ahat = egrsd.token_advantages(A, *wider, **settings)
    torch.testing.assert_close(egrsd.policy_loss(wider[1], Ahat, wider[3]), whole)


def test_arguments_are_not_written_to():
    A, teacher, student, H, mask, _ = random_step(1)
    before = [x.clone() for x in (A, teacher, student, H, mask)]
    egrsd.policy_loss(
        student, egrsd.token_advantages(A, teacher, student, H, mask, gamma=0.3, window=3), mask
    )
    assert all(
        torch.equal(x, y) for x, y in zip(before, (A, teacher, student, H, mask), strict=True)
    )


def test_masked_rows_and_batches():
    A, teacher, student, H, mask, _ = random_step(2)
    mask[1] = False
    Ahat = egrsd.token_advantages(A, teacher, student, H, mask, gamma=0.3, window=3)
    assert Ahat[1].abs().sum() == 0 and Ahat.isfinite().all()
    empty = torch.zeros_like(mask)
    student.requires_grad_()
    loss = egrsd.policy_loss(
        student, egrsd.token_advantages(A, teacher, student, H, empty, gamma=0.3), empty
    )
    loss.backward()
    assert loss.item() == 0 and student.grad.abs().sum() == 0


def test_teacher_that_rules_a_token_out_gives_no_nan():
    impossible, student, one = torch.tensor([[-math.inf]]), torch.tensor([[-1.0]]), torch.ones(1)
    assert [
        egrsd.magnitude(impossible, student, a * one).item() for a in (1, 0, -1)
    ] == pytest.approx([0.8, 1.0, 1.2])


def test_running_advantage_equals_statistics():
    running, seen = egrsd.RunningAdvantage(), []
    g = torch.Generator().manual_seed(0)
    for step in range(14):
        rewards = torch.rand(4, generator=g, dtype=torch.float64)
        expected = rewards - 0.5
        if step >= 10:
            expected = (rewards - statistics.fmean(seen)) / statistics.pstdev(seen)
        torch.testing.assert_close(running.advantage(rewards), expected)
        running.update(rewards)
        seen += rewards.tolist()
    copy = egrsd.RunningAdvantage()
    copy.load_state_dict(json.loads(json.dumps(running.state_dict())))
    assert torch.equal(copy.advantage(rewards), running.advantage(rewards))


def test_warm_up_lasts_until_the_rewards_differ():
    running = egrsd.RunningAdvantage(warmup_steps=2)
    for _ in range(5):
        running.update(torch.full((3,), 1.3))
        assert running.std == 0 and running.advantage(torch.tensor([1.3])).item() == pytest.approx(
            0.8
        )
    running.update(torch.tensor([0.0]))
    assert running.advantage(torch.tensor([1.3])).item() != pytest.approx(0.8)


@pytest.mark.parametrize(
    "name, change",
    [
        ("gamma", dict(gamma=-0.1)),
        ("gamma", dict(gamma=math.inf)),
        ("gamma", dict(gamma=math.nan)),
        ("window", dict(window=-1)),
        ("window", dict(window=1.5)),
        ("floor", dict(floor=0.0)),
        ("floor", dict(floor=1.1)),
        ("eps", dict(eps=1.0)),
        ("eps", dict(eps=-0.1)),
        ("advantage", dict(advantage=torch.ones(2, 1))),
        ("advantage", dict(advantage=torch.ones(3))),
        ("advantage", dict(advantage=torch.ones(1))),
        ("entropy", dict(entropy=torch.ones(2, 4))),
        ("entropy", dict(entropy=torch.ones(1, 3))),
        ("student_logp", dict(student_logp=torch.ones(3, 3))),
        ("teacher_logp", dict(teacher_logp=torch.ones(1, 3))),
        ("mask", dict(mask=torch.ones(2, 1).bool())),
    ],
)
def test_bad_arguments_are_named(name, change):
    arguments = dict(
        advantage=torch.ones(2),
        teacher_logp=torch.ones(2, 3),
        student_logp=torch.ones(2, 3),
        entropy=torch.ones(2, 3),
        mask=torch.ones(2, 3, dtype=torch.bool),
        gamma=0.3,
    )
    with pytest.raises(ValueError, match=name):
        egrsd.token_advantages(**(arguments | change))


def test_tensors_without_a_dimension_for_rows_are_refused():
    """With T = B, [T, 1] * [T] would be a matrix."""
    one = torch.ones(3)
    with pytest.raises(ValueError, match="one shape"):
        egrsd.token_advantages(one, one, one, one, one.bool(), gamma=0.3)
    with pytest.raises(ValueError, match="one shape"):
        egrsd.policy_loss(torch.ones(2, 3), torch.ones(2, 3), torch.ones(1, 3).bool())


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_torch_itself_refuses_a_mask_that_is_not_bool(dtype):
    one, mask = torch.ones(2, 3), torch.ones(2, 3, dtype=dtype)
    with pytest.raises((TypeError, RuntimeError)):
        egrsd.token_advantages(torch.ones(2), one, one, one, mask, gamma=0.3)
    with pytest.raises((TypeError, RuntimeError)):
        egrsd.policy_loss(one, one, mask)


def test_bad_rewards_counts_and_reductions_are_named():
    with pytest.raises(ValueError, match="rewards"):
        egrsd.RunningAdvantage().update(torch.tensor([math.nan]))
    with pytest.raises(ValueError, match="warmup_steps"):
        egrsd.RunningAdvantage(warmup_steps=-1)
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match="num_tokens"):
        egrsd.policy_loss(one, one, one.bool(), num_tokens=0)
    with pytest.raises(ValueError, match="reduction .* got sum"):
        egrsd.policy_loss(one, one, one.bool(), reduction="sum")


def test_doctests():
    results = doctest.testmod(egrsd)
    assert results.attempted > 10 and results.failed == 0
