r"""EGRSD and CL-EGRSD: the objective, as pure functions on tensors.

"Respecting Self-Uncertainty in On-Policy Self-Distillation for Efficient LLM Reasoning", arXiv
2605.13255. Equation numbers below are that paper's. One completion y_i of T_i tokens was sampled
from the student p_S; the teacher p_T is the same weights shown the reference solution. Three
signals make the weight of a token, A_i * w_it * omega_it:

    direction   D_i  = sign(A_i)                                        did the verifier like the completion?
    magnitude   w_it = clip((p_T(y_it) / p_S(y_it)) ^ D_i, 1-eps, 1+eps)   does the teacher agree?      (2)
    gate        omega_it = clip(1 - gamma * H_it / max(1, max H), floor, 1)    is the teacher sure?  (5), (6)

    L = - (1 / sum m) * sum_it m_it * A_i * w_it * omega_it * log p_theta(y_it)                           (7)

gamma = 0 switches the gate off, eps = 0 the magnitude, window = 0 is EGRSD and window > 0 is
CL-EGRSD (8). There is no importance ratio, no PPO clip and no KL term: one optimizer step is taken
per batch of rollouts. What the paper leaves open, as decided here: the maximum in (5) is of the raw
entropies, also under (8); the std of (9) is the population's; while all earlier rewards are equal,
A_i = r_i - 0.5 as in the first steps.

Letters: B completions, T tokens of the longest one. A mask [B, T] is True on completion tokens, the
stop token included; what stands outside the mask is never read. Entropies are in nats. Copy this
file: it needs only torch.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# of tokens: the teacher is sure here; not here, but soon again; not soon either
KINDS = ("lock", "pivot", "fork")
HIGH, LOW = 0.5, 0.2  # nats: from HIGH on a token is no lock; below LOW, soon, it is a pivot
SOON = 3  # tokens


class RunningAdvantage:
    """A_i = (r_i - mean) / std over all rewards of earlier steps; eq. (9), arXiv 2605.13255.

    In the first `warmup_steps` steps, and while all earlier rewards are equal (std = 0), A_i = r_i
    - `warmup_baseline`. Warm-up rewards count in mean and std. A step is one call of `update`,
    after the optimizer step, with the rewards of all ranks. Mean and std are kept by Welford's
    method in float64. ValueError if `warmup_steps` < 0.

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
        self.warmup_steps, self.warmup_baseline = warmup_steps, warmup_baseline
        self.steps, self.count, self.mean, self.sum_squares = 0, 0, 0.0, 0.0

    @property
    def std(self) -> float:
        """Population standard deviation of the rewards seen so far; 0 before the first."""
        return math.sqrt(self.sum_squares / self.count) if self.count else 0.0

    def advantage(self, rewards: Tensor) -> Tensor:
        """rewards [B] -> advantages [B], from earlier steps only: these do not count yet.
        ValueError if no vector."""
        _require_vector("rewards", rewards)
        if self.steps < self.warmup_steps or self.std == 0:
            return rewards - self.warmup_baseline
        return (rewards - self.mean) / self.std  # (9)

    def update(self, rewards: Tensor) -> None:
        """Count one finished step with these rewards [B]; ValueError if one is not finite or they
        are no vector."""
        _require_vector("rewards", rewards)
        values = rewards.tolist()
        if not all(map(math.isfinite, values)):
            raise ValueError(f"rewards must be finite, got {values}")
        for reward in values:
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
        self.steps, self.count = int(state["steps"]), int(state["count"])
        self.mean, self.sum_squares = float(state["mean"]), float(state["sum_squares"])


def magnitude(
    teacher_logp: Tensor, student_logp: Tensor, advantage: Tensor, eps: float = 0.2
) -> Tensor:
    """w = clip(exp(D * (log p_T - log p_S)), 1 - eps, 1 + eps), D = sign(A); eq. (2), arXiv
    2605.13255.

    teacher_logp, student_logp [B, T] in nats, advantage [B] -> [B, T], detached; w = 1 where A = 0.
    ValueError if `eps` is not in [0, 1) or the shapes differ. If A < 0, a token the teacher likes
    is punished less, one it dislikes more:

    >>> teacher, student = torch.tensor([[0.5, 0.1]]).log(), torch.tensor([[0.4, 0.4]]).log()
    >>> magnitude(teacher, student, torch.tensor([1.0]))         # ratios 1.25 and 0.25
    tensor([[1.2000, 0.8000]])
    >>> magnitude(teacher, student, torch.tensor([-1.0]))        # inverted: 0.8 and 4
    tensor([[0.8000, 1.2000]])
    """
    if not 0 <= eps < 1:
        raise ValueError(f"eps must be in [0, 1), got {eps}")
    _require_matrices(teacher_logp=teacher_logp, student_logp=student_logp)
    _require_vector("advantage", advantage, len(teacher_logp))
    direction = advantage.detach().sign().unsqueeze(-1)  # [B, 1]
    delta = (teacher_logp - student_logp).detach()  # [B, T]
    ratio = torch.exp(direction * delta).clamp(1 - eps, 1 + eps)  # (2)
    # 0 * inf would be nan where the teacher rules a token out
    return torch.where(direction == 0, 1.0, ratio)


def lookahead_min(entropy: Tensor, mask: Tensor, window: int) -> Tensor:
    """min of H_ij over j in [t, min(t + window, T_i)], 0 outside the mask; eq. (8), arXiv
    2605.13255.

    entropy [B, T] in nats, mask bool [B, T], window in tokens -> [B, T] in nats, a new tensor.
    ValueError if `window` is not an integer >= 0, if the shapes differ, or if the mask is not bool.
    A pivot (uncertain now, certain soon) falls to the entropy of its continuation, a fork
    (uncertain for longer than the window) stays high:

    >>> H = torch.tensor([[2.0, 0.5, 3.0, 3.0, 9.0]])
    >>> lookahead_min(H, torch.tensor([[True, True, True, True, False]]), window=1).tolist()
    [[0.5, 0.5, 3.0, 3.0, 0.0]]
    """
    if window < 0 or window != int(window):
        raise ValueError(f"window must be an integer >= 0, got {window}")
    _require_matrices(entropy=entropy, mask=mask)
    window = min(int(window), entropy.shape[1] - 1)
    inside = entropy.masked_fill(~mask, math.inf)
    ahead = torch.nn.functional.pad(inside, (0, window), value=math.inf)  # [B, T + window]
    # [B, T, window + 1] -> [B, T]
    return ahead.unfold(1, window + 1, 1).amin(-1).masked_fill(~mask, 0.0)


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

    entropy [B, T] is the teacher's, in nats. Hhat = lookahead_min(H) / max(1 nat, max_entropy): at
    least one nat, so that a batch of which the teacher is sure everywhere is not gated on its
    noise. `max_entropy` is the largest raw entropy of the whole step, over all its micro-batches
    and ranks; None takes that of this batch. -> [B, T]. ValueError if `gamma` is not in [0, inf) or
    `floor` not in (0, 1], and where `lookahead_min` raises it.

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
    """What the loss is made of, for every token: [B, T] each, constants."""

    magnitude: Tensor  # w, (2)
    gate: Tensor  # omega, (5) and (6); 0 outside the mask
    advantage: Tensor  # A-hat = A * w * omega, in (7); 0 outside the mask
    least_entropy: Tensor  # nats: of the token and the next `soon` ones, which tells its kind
    kind: Tensor  # long: its place in KINDS


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
    """All signals of the tokens; `token_advantages` are one of them. arXiv 2605.13255.

    advantage [B]; teacher_logp, student_logp, entropy [B, T] in nats; mask bool [B, T]. The kind is
    for people, the loss does not use it: a lock has H < high; a pivot has H >= high, and H < low at
    one of the next `soon` tokens; all others are forks. ValueError as in `magnitude` and
    `confidence_gate`, or if shapes differ.

    >>> one, H = torch.ones(1, 3), torch.tensor([[2.0, 0.0, 2.0]])
    >>> found = token_signals(torch.tensor([-2.0]), -one, -one, H, one.bool(), gamma=0.5)
    >>> found.advantage.tolist(), [KINDS[k] for k in found.kind[0]]
    ([[-1.0, -2.0, -1.0]], ['pivot', 'lock', 'fork'])
    """
    _require_matrices(
        teacher_logp=teacher_logp, student_logp=student_logp, entropy=entropy, mask=mask
    )
    entropy = entropy.detach()
    weight = magnitude(teacher_logp, student_logp, advantage, eps)
    gate = confidence_gate(entropy, mask, gamma, window, floor, max_entropy)
    token_advantage = torch.where(mask, advantage.detach().unsqueeze(-1) * weight * gate, 0.0)
    least = lookahead_min(entropy, mask, soon)  # the gate's own one looks `window` tokens ahead
    kind = torch.where(entropy < high, 0, torch.where(least < low, 1, 2))
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
    """Ahat = A * w * omega, the weight in eq. (7), of (2), (5), (6) and (8): detached, 0 outside the
    mask; arXiv 2605.13255.

    Arguments and errors are those of `token_signals`. -> [B, T] with A's sign: the teacher never
    turns reward into punishment.

    >>> one, H = torch.ones(1, 2), torch.tensor([[0.0, 2.0]])
    >>> token_advantages(torch.tensor([-2.0]), -one, -one, H, one.bool(), gamma=0.5).tolist()
    [[-2.0, -1.0]]
    """
    how = {"gamma": gamma, "window": window, "eps": eps, "floor": floor}
    readings = (teacher_logp, student_logp, entropy, mask)
    return token_signals(advantage, *readings, **how, max_entropy=max_entropy).advantage


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
    micro-batches and ranks add up; None: this batch's. If all is masked, L is an exact 0 with a
    graph. reduction="none" gives the terms of the sum, [B, T], undivided. ValueError if the shapes
    differ, the mask is not bool, a number `num_tokens` is not > 0, or `reduction` is unknown.

    >>> logp = torch.tensor([[-1.0, -2.0, -7.0]], requires_grad=True)
    >>> loss = policy_loss(logp, torch.tensor([[1.0, 0.5, 9.0]]), torch.tensor([[True, True, False]]))
    >>> loss.item()                                              # -(1 * -1 + 0.5 * -2) / 2
    1.0
    >>> loss.backward(); logp.grad.tolist()
    [[-0.5, -0.25, 0.0]]
    """
    _require_matrices(student_logp=student_logp, token_advantages=token_advantages, mask=mask)
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be mean or none, got {reduction}")
    if num_tokens is None:
        num_tokens = mask.sum().clamp(min=1)
    elif not isinstance(num_tokens, Tensor) and not num_tokens > 0:
        raise ValueError(f"num_tokens must be > 0, got {num_tokens}")
    # before the product: a nan on padding times 0 would stay a nan
    logp = torch.where(mask, student_logp, 0.0)
    losses = -torch.where(mask, token_advantages.detach(), 0.0) * logp  # (7), with the mean below
    return losses if reduction == "none" else losses.sum() / num_tokens


def _require_vector(name: str, tensor: Tensor, length: int | None = None) -> None:
    if tensor.ndim != 1 or (length is not None and len(tensor) != length):
        wanted = "B" if length is None else length
        raise ValueError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")


def _require_matrices(**tensors: Tensor) -> None:
    (first, reference), *others = tensors.items()
    if reference.ndim != 2 or reference.shape[1] == 0:
        raise ValueError(f"{first} must have shape [B, T] with T >= 1, got {list(reference.shape)}")
    for name, tensor in others:
        if tensor.shape != reference.shape:
            raise ValueError(
                f"{name} must have shape {list(reference.shape)} like {first}, got "
                f"{list(tensor.shape)}"
            )
    if "mask" in tensors and tensors["mask"].dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {tensors['mask'].dtype}")
