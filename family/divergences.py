r"""Functions of two next-token distributions. The losses of whole distributions are made of them.

Each takes log p_T and log p_S, [n, V], of the same n tokens and gives [n] in nats, with the gradient
by log p_S. Every row must be normalised: sum exp = 1. A k above V counts as V. p log p is 0 where
p = 0, and `finite` bounds what would be infinite. `per_token_divergence` applies such a function to
hidden states, a chunk of tokens at a time.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import teacher
from teacher import Head

MOST = 0.05  # nats, bound of one vocabulary entry in the clipped divergences


def per_token_divergence(
    head: Head | nn.Module,
    student: list[Tensor],
    theirs: list[Tensor],
    mask: Tensor,
    f: Callable[[Tensor, Tensor], Tensor],
    temperature: float = 1.0,
) -> Tensor:
    """f(log p_T [n, V], log p_S [n, V]) -> [n], applied to every completion token: float32 [B, T],
    0 outside the mask.

    student and theirs are the `hidden` of two readings of the same completions, mask [B, T] is
    theirs, and `head`, as in `score`, serves both. Gradients flow to `student` only. Logits are
    made for a chunk of tokens at a time, and made again in the backward pass.
    """
    head = head if isinstance(head, Head) else Head(head)

    def log_p(states):
        return (head(states) / temperature).log_softmax(-1)

    def apply(own, other):
        return f(log_p(other), log_p(own))

    # a chunk holds two distributions, and what f makes of them
    size = max(1, teacher.CHUNK_LOGITS // 4 // head.linear.out_features)
    own_chunks = torch.cat(student).split(size)
    other_chunks = torch.cat(theirs).detach().split(size)
    values = []
    for own, other in zip(own_chunks, other_chunks, strict=True):
        values.append(checkpoint(apply, own, other, use_reentrant=False, preserve_rng_state=False))
    values = torch.cat(values)
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def finite(logs: Tensor) -> Tensor:
    """Log-probs [...] in nats, with log 2^-149 = -103.3 for -inf. 2^-149 is the smallest float32;
    this bound is ours."""
    return logs.masked_fill(logs == -math.inf, -149 * math.log(2))


def _kl_terms(p, q):
    """p log(p / q) of every vocabulary entry, from the logs: [n, V] twice -> [n, V]."""
    return p.exp() * (finite(p) - finite(q))


def forward_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(p_T || p_S): [n, V] twice -> [n], nats, >= 0."""
    return _kl_terms(teacher, student).sum(-1)


def reverse_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(p_S || p_T): [n, V] twice -> [n], nats, >= 0."""
    return _kl_terms(student, teacher).sum(-1)


def clipped_forward_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """sum_v min(p_T log(p_T / p_S), 0.05): [n, V] twice -> [n], nats; may be negative. OPSD,
    2601.18734."""
    return _kl_terms(teacher, student).clamp(max=MOST).sum(-1)


def clipped_reverse_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """sum_v min(p_S log(p_S / p_T), 0.05): [n, V] twice -> [n], nats; may be negative. TRACE,
    2605.10194."""
    return _kl_terms(student, teacher).clamp(max=MOST).sum(-1)


def _top(logs, k):
    """The k likeliest tokens: [n, V] -> token ids [n, k]."""
    return logs.topk(min(k, logs.shape[-1])).indices


def _at(logs, tokens):
    """Log-probs of these tokens: [n, V], token ids [n, k] -> [n, k]."""
    return finite(logs.gather(-1, tokens))


def forward_kl_top(
    teacher: Tensor, student: Tensor, k: int = 16, renormalised: bool = True
) -> Tensor:
    """KL(p_T || p_S) on the teacher's k likeliest tokens, p_T renormalised there, p_S not: [n, V]
    twice -> [n], nats, >= 0.

    renormalised=False: the renormalised p_T is only the weight of log p_T - log p_S. The sum may
    then be negative.
    """
    top = _top(teacher, k)
    p = _at(teacher, top)
    weights = p.log_softmax(-1)
    if renormalised:
        p = weights
    return (weights.exp() * (p - _at(student, top))).sum(-1)


def policy_top(teacher: Tensor, student: Tensor, k: int = 16) -> Tensor:
    """-sum_v c log p_S on the student's k likeliest tokens: [n, V] twice -> [n], nats; may be
    negative. 2604.13016.

    c = q (log p_T - log p_S) is held constant. q is p_S renormalised there; the logs are not.
    """
    top = _top(student, k)
    log_s = _at(student, top)
    c = log_s.softmax(-1) * (_at(teacher, top) - log_s)
    return -(c.detach() * log_s).sum(-1)


def _with_rest(teacher, student, k):
    """Log-probs of the student's k likeliest tokens and of all others together: [n, k + 1] twice."""
    top = _top(student, k)
    found = []
    for logs in (teacher, student):
        chosen = _at(logs, top)
        rest = 1 - chosen.exp().sum(-1, keepdim=True)
        found.append(torch.cat([chosen, rest.clamp(min=1e-7).log()], -1))
    return found


def jensen_shannon_top(teacher: Tensor, student: Tensor, k: int = 100) -> Tensor:
    """JSD on the student's k likeliest tokens and one bucket for the rest: [n, V] twice -> [n],
    nats, in [0, log 2]. SDPO, 2601.20802."""
    p, q = _with_rest(teacher, student, k)
    middle = torch.logaddexp(p, q) - math.log(2)
    return (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(-1) / 2


def clipped_reverse_kl_top(teacher: Tensor, student: Tensor, k: int = 100) -> Tensor:
    """KL(p_S || p_T'), p_T' = max(p_T, 0.2 p_S) held constant, on the student's k likeliest tokens
    and one bucket for the rest: [n, V] twice -> [n], nats; may be negative. RESD, 2605.12741."""
    p, q = _with_rest(teacher, student, k)
    p = torch.maximum(p, q.detach() + math.log(0.2))
    return (q.exp() * (q - p)).sum(-1)


def dual_weight(teacher: Tensor, student: Tensor, k: int = 20) -> Tensor:
    """(1 - H / log k) (1 - p_S(y*)): [n, V] twice -> [n], in [0, 1]. MSD, 2605.02971.

    H is the entropy of p_T renormalised on its k likeliest tokens, y* the likeliest of them.
    """
    top = _top(teacher, k)
    p = _at(teacher, top).log_softmax(-1)
    sure = 1 + (p.exp() * p).sum(-1) / math.log(p.shape[-1])
    likeliest = student.gather(-1, top[:, :1]).squeeze(-1)  # log p_S(y*)
    return sure.clamp(min=0) * (1 - likeliest.exp())


def two_view_gate(views: Tensor) -> Tensor:
    """0.05 + 0.95 sigmoid(2 z). z [B, T] says how many deviations the KL of a token is above the
    mean. RP-OPSD, 2608.06347."""
    return 0.05 + 0.95 * torch.sigmoid(2 * views)


def position_weight(mask: Tensor) -> Tensor:
    """0.25 + 0.75 sigmoid(((t - 0.5) / T_i - 0.30) / 0.10): mask bool [B, T] -> [B, T]. PW-OPSD,
    2605.21606. Grade P.

    t counts from 1, T_i is the length. The weight is low at the start; its mean over a completion
    is 0.77, and it is not renormalised.
    """
    t = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    place = (t - 0.5) / mask.sum(1, keepdim=True)
    return 0.25 + 0.75 * torch.sigmoid((place - 0.30) / 0.10)
