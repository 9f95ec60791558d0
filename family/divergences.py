r"""Functions of two next-token distributions, through the head chunk by chunk: what the losses of
whole distributions are made of.

log p_T and log p_S [n, V] of the same n tokens -> [n] in nats, with the gradient by log p_S. Rows
must be normalised: sum exp = 1. k is cut to V. Where a probability is 0, p log p is 0 and an
infinite value large.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import teacher
from teacher import Head


def per_token_divergence(
    head: Head | nn.Module,
    student: Sequence[Tensor],
    theirs: Sequence[Tensor],
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
    # two distributions, and what f makes of them
    size = max(1, teacher.CHUNK_LOGITS // 4 // head.linear.out_features)
    chunks = zip(
        torch.cat(list(student)).split(size),
        torch.cat(list(theirs)).detach().split(size),
        strict=True,
    )
    values = [
        checkpoint(
            _divergence_chunk,
            head,
            s,
            t,
            f,
            temperature,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for s, t in chunks
    ]
    values = torch.cat(values)
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def _divergence_chunk(head, student: Tensor, theirs: Tensor, f, temperature: float) -> Tensor:
    log_p_student, log_p_teacher = (
        (head(h) / temperature).log_softmax(-1) for h in (student, theirs)
    )
    return f(log_p_teacher, log_p_student)


def finite(logs: Tensor) -> Tensor:
    """Log-probs [...] in nats, -inf replaced by log 2^-149 = -103.3, of the smallest float32; this
    bound is ours."""
    return logs.masked_fill(logs == -math.inf, -149 * math.log(2))


def clipped_forward_kl(teacher: Tensor, student: Tensor, most: float = 0.05) -> Tensor:
    """sum_v min(p_T log(p_T / p_S), most): [n, V] twice -> [n], nats; may be negative. OPSD,
    2601.18734."""
    return (teacher.exp() * (finite(teacher) - finite(student))).clamp(max=most).sum(-1)


def reverse_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(p_S || p_T): [n, V] twice -> [n], nats, >= 0. Where p_T = 0 < p_S it is infinite: `finite`
    bounds it."""
    return (student.exp() * (finite(student) - finite(teacher))).sum(-1)


def clipped_reverse_kl(teacher: Tensor, student: Tensor, most: float = 0.05) -> Tensor:
    """sum_v min(p_S log(p_S / p_T), most): [n, V] twice -> [n], nats; may be negative. TRACE,
    2605.10194."""
    return (student.exp() * (finite(student) - finite(teacher))).clamp(max=most).sum(-1)


def forward_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(p_T || p_S): [n, V] twice -> [n], nats, >= 0."""
    return (teacher.exp() * (finite(teacher) - finite(student))).sum(-1)


def forward_kl_top(teacher: Tensor, student: Tensor, k: int, renormalised: bool = True) -> Tensor:
    """KL(p_T || p_S) on the teacher's k likeliest tokens, p_T renormalised, p_S not: [n, V] twice
    -> [n], nats, >= 0. renormalised=False: only as the weight of log p_T - log p_S, which may be
    negative then."""
    top = teacher.topk(min(k, teacher.shape[-1])).indices
    p, q = finite(teacher.gather(-1, top)), finite(student.gather(-1, top))
    weights = p.log_softmax(-1)
    return (weights.exp() * ((weights if renormalised else p) - q)).sum(-1)


def policy_top(teacher: Tensor, student: Tensor, k: int) -> Tensor:
    """-sum_v c log p_S on the student's k likeliest tokens, c = q (log p_T - log p_S) held
    constant, q being p_S renormalised there, the logs not: [n, V] twice -> [n], nats; may be
    negative. 2604.13016."""
    top = student.topk(min(k, student.shape[-1])).indices
    log_s, log_t = finite(student.gather(-1, top)), finite(teacher.gather(-1, top))
    return -((log_s.softmax(-1) * (log_t - log_s)).detach() * log_s).sum(-1)


def jensen_shannon_top(teacher: Tensor, student: Tensor, k: int) -> Tensor:
    """JSD on the student's k likeliest tokens and one bucket for the rest: [n, V] twice -> [n],
    nats, in [0, log 2]. 2601.20802."""
    p, q = _with_rest(teacher, student, k)
    middle = torch.logaddexp(p, q) - math.log(2)
    return (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(-1) / 2


def clipped_reverse_kl_top(teacher: Tensor, student: Tensor, k: int) -> Tensor:
    """KL(p_S || p_T'), p_T' = max(p_T, 0.2 p_S) held constant, on the student's k likeliest tokens
    and one bucket for the rest: [n, V] twice -> [n], nats; may be negative. 2605.12741."""
    p, q = _with_rest(teacher, student, k)
    return (q.exp() * (q - torch.maximum(p, q.detach() + math.log(0.2)))).sum(-1)


# log-probs [n, k + 1] each
def _with_rest(teacher: Tensor, student: Tensor, k: int) -> list[Tensor]:
    top = student.topk(min(k, student.shape[-1])).indices
    tops = [finite(x.gather(-1, top)) for x in (teacher, student)]
    return [
        torch.cat([x, (1 - x.exp().sum(-1, keepdim=True)).clamp(min=1e-7).log()], -1) for x in tops
    ]


def dual_weight(teacher: Tensor, student: Tensor, k: int = 20) -> Tensor:
    """(1 - H / log k) (1 - p_S(y*)), H the entropy of p_T renormalised on its k likeliest tokens,
    y* the likeliest: [n, V] twice -> [n], in [0, 1]. MSD, 2605.02971."""
    values, top = teacher.topk(min(k, teacher.shape[-1]))
    p = finite(values).log_softmax(-1)
    sure = 1 + (p.exp() * p).sum(-1) / math.log(p.shape[-1])
    return sure.clamp(min=0) * (1 - student.gather(-1, top[:, :1]).squeeze(-1).exp())


def two_view_gate(views: Tensor) -> Tensor:
    """0.05 + 0.95 sigmoid(2 z), z [B, T] how far a token's KL is above the mean, in deviations.
    RP-OPSD, 2608.06347."""
    return 0.05 + 0.95 * torch.sigmoid(2 * views)


def position_weight(
    mask: Tensor, least: float = 0.25, middle: float = 0.30, width: float = 0.10
) -> Tensor:
    """least + (1 - least) * sigmoid(((t - 0.5) / T_i - middle) / width), low at the start; PW-OPSD,
    2605.21606.

    Grade P. mask bool [B, T] -> [B, T]. Its mean over a completion is 0.77, and it is not
    renormalised.
    """
    t = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    place = (t - 0.5) / mask.sum(1, keepdim=True)
    return least + (1 - least) * torch.sigmoid((place - middle) / width)
