r"""EGRSD and CL-EGRSD: the objective, as pure functions on tensors.

"Respecting Self-Uncertainty in On-Policy Self-Distillation for Efficient LLM Reasoning", arXiv
2605.13255. Equation numbers below are that paper's. One completion y_i of T_i tokens was sampled
from the student p_S; the teacher p_T is the same weights shown the reference solution. Three
signals make the weight of a token, A_i * w_it * omega_it:

    direction   D_i  = sign(A_i)                                        is the completion better than earlier ones?
    magnitude   w_it = clip((p_T(y_it) / p_S(y_it)) ^ D_i, 1-eps, 1+eps)   does the teacher agree?      (2)
    gate        omega_it = clip(1 - gamma * H_it / max(1, max H), floor, 1)    is the teacher sure?  (5), (6)

    L = - (1 / sum m) * sum_it m_it * A_i * w_it * omega_it * log p_theta(y_it)                           (7)

window = 0 is EGRSD, window > 0 is CL-EGRSD (8). gamma = 0 switches the gate off, eps = 0 the
magnitude. There is no importance ratio, no PPO clip and no KL term: every batch of rollouts gets one
optimizer step. The paper leaves three things open. Here the maximum in (5) is of the raw entropies,
also under (8). The std of (9) is the population's. While all earlier rewards are equal, the
advantage is r_i - 0.5, as in the first steps.

Letters: B completions, T tokens of the longest one. A mask is a bool tensor [B, T], True on the
tokens of a completion and on its stop token. Values outside the mask are never read. Entropies are
in nats. Copy this file: it needs only torch.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Kinds of tokens. At a lock the teacher is sure. At a pivot it is unsure, but soon sure again. At a
# fork it stays unsure.
KINDS = ("lock", "pivot", "fork")
HIGH = 0.5  # nats: the teacher is unsure of a token from this entropy on
LOW = 0.2  # nats: the teacher is sure again below this entropy
SOON = 3  # tokens: how far ahead a pivot looks


class RunningAdvantage:
    """A_i = (r_i - mean) / std over all rewards of earlier steps; eq. (9), arXiv 2605.13255.

    In the first `warmup_steps` steps, and while all earlier rewards are equal (std = 0), it is
    r_i - `warmup_baseline`. Warm-up rewards count in mean and std. Call `update` once a step, after the
    optimizer step, with the rewards of all ranks. Mean and std are kept by Welford's method in
    float64. ValueError if `warmup_steps` < 0.

    >>> running = RunningAdvantage(warmup_steps=1)
    >>> running.advantage(torch.tensor([1.0, 0.0])).tolist()    # warm-up: r - 0.5
    [0.5, -0.5]
    >>> running.update(torch.tensor([1.0, 0.0]))                 # mean 0.5, population std 0.5
    >>> running.advantage(torch.tensor([1.0, 0.0])).tolist()
    [1.0, -1.0]
    """

    def __init__(self, warmup_steps: int = 10, warmup_baseline: float = 0.5):
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be >= 0, got {warmup_steps}")
        self.warmup_steps = warmup_steps
        self.warmup_baseline = warmup_baseline
        self.steps = 0
        self.count = 0
        self.mean = 0.0
        self.sum_squares = 0.0  # of the differences from the mean

    @property
    def std(self) -> float:
        """Population standard deviation of the rewards seen so far; 0 before the first."""
        return math.sqrt(self.sum_squares / max(1, self.count))

    def advantage(self, rewards: Tensor) -> Tensor:
        """rewards [B] -> advantages [B]. Mean and std are those of earlier steps."""
        if self.steps < self.warmup_steps or self.std == 0:
            return rewards - self.warmup_baseline
        return (rewards - self.mean) / self.std  # (9)

    def update(self, rewards: Tensor) -> None:
        """Count one finished step with these rewards [B]. ValueError if one is not finite."""
        if not rewards.isfinite().all():
            raise ValueError(f"rewards must be finite, got {rewards.tolist()}")
        for reward in rewards.tolist():
            self.count += 1
            difference = reward - self.mean
            self.mean += difference / self.count
            self.sum_squares += difference * (reward - self.mean)
        self.steps += 1

    def state_dict(self) -> dict:
        """Plain numbers, exact through JSON."""
        return {
            "steps": self.steps,
            "count": self.count,
            "mean": self.mean,
            "sum_squares": self.sum_squares,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` gave; KeyError if a number is missing."""
        self.steps = state["steps"]
        self.count = state["count"]
        self.mean = state["mean"]
        self.sum_squares = state["sum_squares"]


def magnitude(
    teacher_logp: Tensor, student_logp: Tensor, advantage: Tensor, eps: float = 0.2
) -> Tensor:
    """w = clip(exp(D * (log p_T - log p_S)), 1 - eps, 1 + eps), D = sign(A); eq. (2), arXiv
    2605.13255.

    teacher_logp, student_logp [B, T] in nats, advantage [B] -> [B, T], detached; w = 1 where A = 0.
    ValueError if `eps` is not in [0, 1), or for another shape. If A < 0, a token that the teacher
    likes is punished less, a token that it dislikes is punished more:

    >>> teacher, student = torch.tensor([[0.5, 0.1]]).log(), torch.tensor([[0.4, 0.4]]).log()
    >>> magnitude(teacher, student, torch.tensor([1.0]))         # ratios 1.25 and 0.25
    tensor([[1.2000, 0.8000]])
    >>> magnitude(teacher, student, torch.tensor([-1.0]))        # inverted: 0.8 and 4
    tensor([[0.8000, 1.2000]])
    """
    if not 0 <= eps < 1:
        raise ValueError(f"eps must be in [0, 1), got {eps}")
    _require_one_shape(teacher_logp=teacher_logp, student_logp=student_logp)
    if advantage.shape != teacher_logp.shape[:1]:
        raise ValueError(f"advantage must be of shape [B], got {list(advantage.shape)}")
    direction = advantage.detach().sign().unsqueeze(1)  # [B, 1]
    delta = (teacher_logp - student_logp).detach()  # [B, T]
    ratio = torch.exp(direction * delta).clamp(1 - eps, 1 + eps)  # (2)
    # A token may be impossible for the teacher: delta is -inf, and 0 * -inf would be nan.
    return torch.where(direction == 0, 1.0, ratio)


def lookahead_min(entropy: Tensor, mask: Tensor, window: int) -> Tensor:
    """min of H_ij over j in [t, min(t + window, T_i)], 0 outside the mask; eq. (8), arXiv
    2605.13255.

    entropy [B, T] in nats, mask bool [B, T], window in tokens -> [B, T] in nats, a new tensor.
    ValueError if `window` is not an integer >= 0, or if the shapes differ. A pivot (uncertain now,
    certain soon) falls to the entropy of its continuation. A fork (uncertain for longer than the
    window) stays high:

    >>> H = torch.tensor([[2.0, 0.5, 3.0, 3.0, 9.0]])
    >>> lookahead_min(H, torch.tensor([[True, True, True, True, False]]), window=1).tolist()
    [[0.5, 0.5, 3.0, 3.0, 0.0]]
    """
    if window < 0 or window != int(window):
        raise ValueError(f"window must be an integer >= 0, got {window}")
    _require_one_shape(entropy=entropy, mask=mask)
    window = min(int(window), entropy.shape[1] - 1)
    inside = entropy.masked_fill(~mask, math.inf)
    ahead = torch.nn.functional.pad(inside, (0, window), value=math.inf)  # [B, T + window]
    least = ahead.unfold(1, window + 1, 1).amin(2)  # [B, T, window + 1] -> [B, T]
    return least.masked_fill(~mask, 0.0)


def confidence_gate(
    entropy: Tensor,
    mask: Tensor,
    gamma: float,
    window: int = 0,
    floor: float = 0.1,
    max_entropy: Tensor | float | None = None,
) -> Tensor:
    """omega = clip(1 - gamma * Hhat, floor, 1), 0 outside the mask; eq. (5), (6) and (8), arXiv
    2605.13255.

    entropy [B, T] is the teacher's, in nats; -> [B, T]. Hhat = lookahead_min(H) / max(1 nat,
    max_entropy). The one nat is for a batch where the teacher is sure of every token: without it
    the gate would follow noise. `max_entropy` is the largest raw entropy of the whole step, over all
    its micro-batches and ranks; None takes the largest of this batch. ValueError if `gamma` is not
    in [0, inf) or `floor` not in (0, 1], and as in `lookahead_min`.

    >>> H, mask = torch.tensor([[0.0, 1.0, 4.0]]), torch.ones(1, 3, dtype=torch.bool)
    >>> confidence_gate(H, mask, gamma=1.0)
    tensor([[1.0000, 0.7500, 0.1000]])
    >>> confidence_gate(H, mask, gamma=0.5, window=1)            # Hhat = 0, 0.25, 1
    tensor([[1.0000, 0.8750, 0.5000]])
    """
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma must be in [0, inf), got {gamma}")
    if not 0 < floor <= 1:
        raise ValueError(f"floor must be in (0, 1], got {floor}")
    least = lookahead_min(entropy, mask, window)  # (8); with window 0 it is H
    if max_entropy is None:
        max_entropy = entropy.masked_fill(~mask, 0.0).max()
    scale = torch.as_tensor(max_entropy, dtype=entropy.dtype, device=entropy.device).clamp(min=1.0)
    gate = (1 - gamma * least / scale).clamp(floor, 1)  # (5): Hhat = least / scale; (6)
    return gate.masked_fill(~mask, 0.0)


class Signals(NamedTuple):
    """What is known of every token: [B, T] each, without gradient. The loss uses `advantage` only."""

    magnitude: Tensor  # w, (2)
    gate: Tensor  # omega, (5) and (6); 0 outside the mask
    advantage: Tensor  # A-hat = A * w * omega, in (7); 0 outside the mask
    least_entropy: Tensor  # nats: the least of the token and the next `soon` tokens
    kind: Tensor  # long: an index into KINDS


def token_signals(
    advantage: Tensor,
    teacher_logp: Tensor,
    student_logp: Tensor,
    entropy: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    window: int = 0,
    eps: float = 0.2,
    floor: float = 0.1,
    max_entropy: Tensor | float | None = None,
    high: float = HIGH,
    low: float = LOW,
    soon: int = SOON,
) -> Signals:
    """All signals of the tokens; arXiv 2605.13255.

    advantage [B]; teacher_logp, student_logp, entropy [B, T] in nats; mask bool [B, T]. The kind is
    for people, the loss does not use it. A lock has H < high. A pivot has H >= high, and one of the
    next `soon` tokens has H < low. All others are forks. ValueError as in `magnitude` and
    `confidence_gate`, or if shapes differ.

    >>> one, H = torch.ones(1, 3), torch.tensor([[2.0, 0.0, 2.0]])
    >>> found = token_signals(torch.tensor([-2.0]), -one, -one, H, one.bool(), gamma=0.5)
    >>> found.advantage.tolist(), [KINDS[k] for k in found.kind[0]]
    ([[-1.0, -2.0, -1.0]], ['pivot', 'lock', 'fork'])
    """
    _require_one_shape(student_logp=student_logp, entropy=entropy)
    entropy = entropy.detach()
    weight = magnitude(teacher_logp, student_logp, advantage, eps)
    gate = confidence_gate(entropy, mask, gamma, window, floor, max_entropy)
    product = advantage.detach().unsqueeze(1) * weight * gate
    token_advantage = torch.where(mask, product, 0.0)
    least = lookahead_min(entropy, mask, soon)  # the gate looks `window` tokens ahead instead
    pivot_or_fork = torch.where(least < low, 1, 2)
    kind = torch.where(entropy < high, 0, pivot_or_fork)
    return Signals(weight, gate, token_advantage, least, kind)


def token_advantages(
    advantage: Tensor,
    teacher_logp: Tensor,
    student_logp: Tensor,
    entropy: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    window: int = 0,
    eps: float = 0.2,
    floor: float = 0.1,
    max_entropy: Tensor | float | None = None,
) -> Tensor:
    """Ahat = A * w * omega, the weight of a token in eq. (7), from (2), (5), (6) and (8); arXiv
    2605.13255.

    Arguments and errors are those of `token_signals`. -> [B, T], detached, 0 outside the mask, with
    A's sign: the teacher never turns a reward into a punishment.

    >>> one, H = torch.ones(1, 2), torch.tensor([[0.0, 2.0]])
    >>> token_advantages(torch.tensor([-2.0]), -one, -one, H, one.bool(), gamma=0.5).tolist()
    [[-2.0, -1.0]]
    """
    return token_signals(
        advantage,
        teacher_logp,
        student_logp,
        entropy,
        mask,
        gamma=gamma,
        window=window,
        eps=eps,
        floor=floor,
        max_entropy=max_entropy,
    ).advantage


def policy_loss(
    student_logp: Tensor,
    token_advantages: Tensor,
    mask: Tensor,
    num_tokens: Tensor | float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """L = - sum_it m_it * Ahat_it * log p_theta(y_it) / num_tokens, a scalar; eq. (7), arXiv
    2605.13255.

    student_logp [B, T] in nats carries the gradient, token_advantages [B, T] are constants.
    `num_tokens` counts the completion tokens of the whole step, so that the losses of its
    micro-batches and ranks add up. None counts the tokens of this batch. If no token is in the
    mask, L is exactly 0, and backward() still works. reduction="none" gives the terms of the sum, [B, T],
    undivided. ValueError if the shapes differ, if a number `num_tokens` is not > 0, or if
    `reduction` is unknown.

    >>> logp = torch.tensor([[-1.0, -2.0, -7.0]], requires_grad=True)
    >>> loss = policy_loss(logp, torch.tensor([[1.0, 0.5, 9.0]]), torch.tensor([[True, True, False]]))
    >>> loss.item()                                              # -(1 * -1 + 0.5 * -2) / 2
    1.0
    >>> loss.backward(); logp.grad.tolist()
    [[-0.5, -0.25, 0.0]]
    """
    _require_one_shape(student_logp=student_logp, token_advantages=token_advantages, mask=mask)
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be mean or none, got {reduction}")
    if num_tokens is None:
        num_tokens = mask.sum().clamp(min=1)
    elif not isinstance(num_tokens, Tensor) and not num_tokens > 0:
        raise ValueError(f"num_tokens must be > 0, got {num_tokens}")
    # Both factors are masked before the product: a nan on padding times 0 would stay a nan.
    logp = torch.where(mask, student_logp, 0.0)
    weights = torch.where(mask, token_advantages.detach(), 0.0)
    losses = -weights * logp  # (7), with the mean below
    if reduction == "none":
        return losses
    return losses.sum() / num_tokens


def _require_one_shape(**tensors):
    """Torch would broadcast a tensor of another shape, and the numbers would be wrong."""
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    first, *others = shapes.values()
    if len(first) != 2 or any(shape != first for shape in others):
        raise ValueError(f"these must be of one shape [B, T], got {shapes}")
