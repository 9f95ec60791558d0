r"""EGRSD's neighbours. Each method is one short function over the same rollouts and the same teacher
pass.

    python -m family --method rlsd             python -m family --help lists the names

A method turns a micro-batch into a loss per token [B, T]. The step takes the mean over its tokens,
or over the tokens that a method keeps. Losses outside the mask are dropped. Two shapes occur, and
they add up:

    policy(batch, c)         -c_t log p_theta(y_t)           policy gradient with a coefficient c, a constant
    batch.divergence(f)      f(log p_T, log p_S) per token   a function of both full distributions, with its gradient

A_i is the advantage, d_t = log p_T(y_t) - log p_S(y_t) without gradient, H_t the teacher's entropy
in nats. t counts from 1. Where the teacher has nothing to be shown, d = H = 0 and divergences are 0.
`finite` bounds log 0.

Every docstring has a grade of evidence. P: read in the paper or in its authors' code. S: second-hand
notes that quote the equations. C: words only, so the method is reconstructed. What no source gives is
called ours. Optimizer, LoRA, sampling and length reward are those of the run, not of each source.
There is no importance ratio and no PPO clip: rollouts are used once, so the ratio is 1.
docs/family.md says what is left out.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

import egrsd
from family.divergences import (
    clipped_forward_kl,
    clipped_reverse_kl,
    clipped_reverse_kl_top,
    dual_weight,
    finite,
    forward_kl,
    forward_kl_top,
    jensen_shannon_top,
    policy_top,
    position_weight,
    reverse_kl,
    two_view_gate,
)


@dataclass
class Batch:
    """What a method may use: B completions of up to T tokens of a training step."""

    logp: Tensor  # [B, T] log p_theta, nats; carries the gradient
    teacher_logp: Tensor  # [B, T] nats; log p_theta where the teacher has nothing to be shown
    entropy: Tensor  # [B, T] H of the teacher, nats
    mask: Tensor  # bool [B, T]
    advantage: Tensor  # [B]
    correct: Tensor  # bool [B], the verifier's word
    # bool [B]: not a rollout, but the reference solution or what the teacher wrote
    is_reference: Tensor
    # f(log p_T [n, V], log p_S [n, V]) -> [n], at every token: [B, T]
    divergence: Callable
    num_tokens: float  # of the step's rollouts that its mean counts, over all ranks
    num_completions: float  # rollouts of the step, over all ranks
    step: int  # steps done before this one
    median_entropies: list[float]  # of H in every step so far, this one included
    eps: float = 0.2  # --eps
    num_reference: float = 0.0  # tokens of the step's other examples, over all ranks
    success_rate: float = 0.0  # share of the step's rollouts that are correct
    # [B, T]: a loss may leave its weights here; they are reported as `gate`
    weight: Tensor | None = None
    # only for methods that ask for them, see `Method`
    kept: Tensor | None = None  # bool [B, T]
    # [B]: log (p_S / p_T) of the teacher's solution minus that of the rollout, sums
    margin: Tensor | None = None
    marked: Tensor | None = None  # bool [B, T]: tokens of the segments that the student marked
    planned: Tensor | None = None  # [B, T] log p_S after problem and plan, nats; 0 on rollouts
    # [B, T]: KL(p_T || the teacher without a text), normalised by running mean and std
    views: Tensor | None = None
    anchor: Callable | None = None  # as `divergence`, with the teacher without a text for p_T

    @property
    def per_completion(self) -> Tensor:
        """[B, 1]: with this factor the step takes the mean over completions of sums over their
        tokens."""
        tokens = torch.where(self.is_reference, self.num_reference, self.num_tokens)
        return tokens.unsqueeze(-1) / self.num_completions

    @property
    def d(self) -> Tensor:  # [B, T] log p_T - log p_S, a constant
        return (finite(self.teacher_logp) - self.logp).detach()

    @property
    def A(self) -> Tensor:  # [B, 1]
        return self.advantage.unsqueeze(-1)


@dataclass
class Method:
    """A loss, and what the training step has to provide for it."""

    loss: Callable | None  # Batch -> [B, T]
    summary: str
    # settings that define the method: other values are refused
    needs: dict = field(default_factory=dict)
    recipe: dict = field(default_factory=dict)  # settings of its source: flags may change them
    # "eps": the formula has the magnitude, "gamma": the gate; both are then reported
    uses: tuple[str, ...] = ()
    teacher: bool = True  # the teacher's pass is made
    full_distributions: bool = False  # batch.divergence is available
    groups: bool = False  # several rollouts per problem
    rollouts: bool = True  # the student samples
    # every problem brings one more example: its solution in the data ("reference"), one of the
    # teacher's ("teacher"), or one written in turns ("interleaved")
    rows: str = ""
    # only problems whose rollouts all failed bring it. batch.planned is available: the student reads
    # it once more, after what --teacher-context says
    repairs: bool = False
    # the teacher's solution that is most like the student's own next tokens is taken
    overlap: bool = False
    margin: bool = False  # batch.margin is available: one more reading by the student
    # (d, entropy of the student, mask, step) -> bool [N, T], the tokens of rollouts that the mean
    # counts: batch.kept. One more reading by the student
    keeps: Callable | None = None
    marks: Callable | None = None  # (correct, step) -> bool: is a rollout marked? batch.marked
    # batch.views and batch.anchor are available: one more reading by the teacher
    views: bool = False
    saliency: bool = False  # of the reasoning of correct rollouts, is part of their reward


METHODS = {}  # name -> Method
# EGRSD with a flag of the family; its loss is that of train.EGRSD
EGRSD = Method(None, "EGRSD with a flag of the family", uses=("gamma", "eps"))


def method(name: str, summary: str, **declared):
    """Register the decorated function as `--method name`; `declared` are fields of `Method`."""

    def register(loss):
        METHODS[name] = Method(loss, summary, **declared)
        return loss

    return register


def policy(batch: Batch, c: Tensor) -> Tensor:
    """-c_t log p_theta(y_t): [B, T], 0 outside the mask. c, [B, T] or [B, 1], is held constant.
    2605.13255 eq. (7)."""
    return egrsd.policy_loss(batch.logp, c.expand_as(batch.logp), batch.mask, reduction="none")


def mean_of_completions(batch: Batch, losses: Tensor) -> Tensor:
    """[B, T] -> [B, T], scaled so that the step takes the mean per completion, then over
    completions."""
    return losses * batch.per_completion / batch.mask.sum(1, keepdim=True)


@method(
    "sft",
    "supervised: log-likelihood of solutions, no rollouts; with --rows interleaved TESSY, reconstructed",
    rollouts=False,
    rows="reference",
    teacher=False,
)
def sft(batch: Batch) -> Tensor:
    """-log p_theta(s*_t) on the reference solution s* and a stop token. Grade P. With --rows
    teacher, s* is what the teacher wrote when it was shown the solution (ours). With --rows
    interleaved, student and teacher wrote it in turns: TESSY, 2604.14164, grade P (code), but
    reconstructed, with a list of words for two classifiers (interleaved.py). Costs besides: a prefill
    for each piece. --keep correct, ours, leaves out what the verifier rejects."""
    return -batch.logp


@method(
    "grpo-group",
    "policy gradient with group advantages, no teacher",
    needs={"advantage": "group"},
    groups=True,
    teacher=False,
)
@method(
    "grpo",
    "policy gradient with the running baseline of the EGRSD paper, no teacher",
    needs={"advantage": "running"},
    teacher=False,
)
def grpo(batch: Batch) -> Tensor:
    """c = A. grpo: from the rewards of earlier steps, the EGRSD paper's baseline with one rollout,
    2605.13255. grpo-group: (r - mean) / (std + 1e-4) within a problem's rollouts, 2402.03300,
    without its KL term. Grade P."""
    return policy(batch, batch.A)


@method(
    "rlsd",
    "RLSD: magnitude mixed in at a weight that falls to 0, teacher sees the answer",
    groups=True,
    needs={"advantage": "group"},
    recipe={"teacher_context": "answer", "teacher_schedule": "copy", "teacher_every": 10},
)
def rlsd(batch: Batch) -> Tensor:
    """c = A * ((1 - lam) + lam * clip(exp(sign(A) d), 0.8, 1.2)), lam from 0.5 to 0 in 50
    steps, 2604.03128. Grade P.

    Equal to direction-aware, 2605.13255 eq. (3), at lam = 1.
    """
    lam = 0.5 * max(0.0, 1 - batch.step / 50)
    w = egrsd.magnitude(batch.teacher_logp, batch.logp, batch.advantage, 0.2)
    return policy(batch, batch.A * ((1 - lam) + lam * w))


@method(
    "rlrt",
    "RLRT: on correct rollouts, more weight where the teacher disagrees; teacher sees a "
    "correct peer",
    groups=True,
    needs={"advantage": "group"},
    recipe={"teacher_context": "peer", "beta_length": 0.0},
)
def rlrt(batch: Batch) -> Tensor:
    """Correct: c = A * (0.5 + 0.5 * clip(exp(-sign(A) d), 0.8, 1.2)); wrong: c = A; rewards 0 and 1.
    2605.10781. Grade S. Without a correct peer d = 0, so c = A."""
    # teacher and student change places: -d
    weight = egrsd.magnitude(batch.logp, batch.teacher_logp, batch.advantage, 0.2)
    weight = torch.where(batch.correct.unsqueeze(-1), 0.5 + 0.5 * weight, 1.0)
    return policy(batch, batch.A * weight)


@method(
    "antisd",
    "AntiSD: an advantage bonus that ascends the divergence from the teacher",
    groups=True,
    needs={"advantage": "group"},
    recipe={"teacher_context": "feedback"},
)
def antisd(batch: Batch) -> Tensor:
    """c = A - g * 0.25 * (softplus(d) - log 2), 2605.11609. Grade P. Its expectation ascends half
    the JSD.

    g, a Schmitt trigger, is 0 in the first 5 steps, the warm-up. After them it becomes 1 once the
    median of H reaches its warm-up value, and 0 again once the median is below 0.93 of that value.
    In between it stays as it is. Simplified: the warm-up value is the median over the warm-up steps,
    and the median of a step is the one over its completions' medians.
    """
    reference = statistics.median(batch.median_entropies[:5])
    g = 0.0
    for median in batch.median_entropies[5:]:
        if median >= reference:
            g = 1.0
        elif median < 0.93 * reference:
            g = 0.0
    bonus = torch.nn.functional.softplus(batch.d) - math.log(2)
    return policy(batch, batch.A - g * 0.25 * bonus)


REOPOLD_BOUND = math.log(0.1) / 0.9  # of d, nats


def keeps(d: Tensor, H: Tensor, mask: Tensor, step: int) -> Tensor:
    """Before step 50 the tokens with d above the bound. From then on the 20 % of each completion
    where the student's entropy H is highest. d, H, mask [N, T] -> bool [N, T]. 2603.11137."""
    if step < 50:
        return (d > REOPOLD_BOUND) & mask
    H = H.masked_fill(~mask, -math.inf)
    rank = H.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # 0: the most uncertain
    return (rank < (0.2 * mask.sum(1, keepdim=True)).ceil()) & mask


@method(
    "reopold",
    "REOPOLD: the log-ratio as the coefficient, floored, later on uncertain tokens only",
    keeps=keeps,
)
def reopold(batch: Batch) -> Tensor:
    """c = max(d, b), b = log(0.1) / 0.9, mean over the tokens that `keeps` keeps. 2603.11137. Grade
    P (code). Simplified: 20 % of a completion, not of the batch."""
    return policy(batch, batch.d.clamp(min=REOPOLD_BOUND) * batch.kept)


@method(
    "vopd",
    "vOPD: the log-ratio plus the KL as a baseline, same expected gradient, less variance",
    full_distributions=True,
)
def vopd(batch: Batch) -> Tensor:
    """c = d + KL(p_S || p_T), held constant: E over p_S of c is 0. 2605.07865. Grade P."""
    return policy(batch, batch.d + batch.divergence(reverse_kl))


@method(
    "eopd",
    "EOPD: the log-ratio, plus forward KL where the teacher is uncertain",
    full_distributions=True,
)
def eopd(batch: Batch) -> Tensor:
    """c = d, plus 1[H > 0.8] * KL(p_T || p_S) on the teacher's top 16, only p_T renormalised.
    2603.07079. Grade S."""
    return policy(batch, batch.d) + (batch.entropy > 0.8) * batch.divergence(forward_kl_top)


@method(
    "stable-opd",
    "StableOPD: the log-ratio, plus SFT, plus reverse KL to the base model; teacher sees no "
    "solution",
    full_distributions=True,
    rows="reference",
    needs={"teacher_context": "none", "teacher_schedule": "frozen"},
)
def stable_opd(batch: Batch) -> Tensor:
    """c = d, plus SFT on s*, plus reverse KL to the base model. 2604.08527. Grade S.

    The coefficients are not published: 0.1 and 0.1 are ours. The source's teacher is another, larger
    model. Here a teacher that sees no solution is the base model itself: only the SFT term teaches,
    and the other terms hold back.
    """
    on_rollouts = policy(batch, batch.d) + 0.1 * batch.divergence(reverse_kl)
    return torch.where(batch.is_reference.unsqueeze(-1), -0.1 * batch.logp, on_rollouts)


@method("opsd", "OPSD: clipped forward KL to the teacher", full_distributions=True)
def opsd(batch: Batch) -> Tensor:
    """sum_v min(p_T log(p_T / p_S), 0.05), 2601.18734. Grade P. Every vocabulary entry is clipped
    from above only, so that the sum can be negative."""
    return batch.divergence(clipped_forward_kl)


@method("pw-opsd", "PW-OPSD: OPSD's divergence, weighted by position", full_distributions=True)
def pw_opsd(batch: Batch) -> Tensor:
    """`clipped_forward_kl` times `position_weight`, mean per completion, then over completions.
    2605.21606. Grade P."""
    divergence = batch.divergence(clipped_forward_kl)
    return position_weight(batch.mask) * mean_of_completions(batch, divergence)


@method(
    "topk-opd",
    "top-k OPD: policy gradient on the student's 16 likeliest tokens",
    full_distributions=True,
)
def topk_opd(batch: Batch) -> Tensor:
    """-c log p_S on the student's top 16, c = q log(p_T / p_S), q = p_S renormalised. 2604.13016.
    Grade P (code)."""
    return batch.divergence(policy_top)


@method(
    "mopd",
    "MOPD: SDPO's divergence to a teacher that sees two correct peers and a failed one",
    full_distributions=True,
    groups=True,
    recipe={"teacher_context": "peers"},
)
@method(
    "sdpo",
    "SDPO: Jensen-Shannon divergence to a teacher that sees a correct peer",
    full_distributions=True,
    groups=True,
    recipe={"teacher_context": "peer"},
)
def sdpo(batch: Batch) -> Tensor:
    """JSD on the student's top 100 tokens and one bucket for the rest; nothing without a correct
    peer. Grade P. SDPO, 2601.20802, has two divergences, JSD and reverse KL; this is the first.
    MOPD, 2605.12652. Simplified: the mean is over all tokens of the step, also those left out."""
    return batch.divergence(jensen_shannon_top)


@method(
    "msd",
    "MSD: reverse KL where the teacher is sure and the student doubts; teacher sees another "
    "wording",
    full_distributions=True,
    recipe={"teacher_context": "restated"},
)
def msd(batch: Batch) -> Tensor:
    """Per completion sum_t w KL(p_S || p_T) / sum_t w, w = `dual_weight` held constant. 2605.02971.
    Grade S.

    Ours: K = 20, mathematics instead of safety, that w is constant, and a loss of 0 where all w of
    a completion are 0.
    """
    batch.weight = batch.divergence(dual_weight).detach()
    share = batch.weight / batch.weight.sum(1, keepdim=True).clamp(min=1e-30)
    return share * batch.per_completion * batch.divergence(reverse_kl)


@method(
    "rp-opsd",
    "RP-OPSD: forward KL to the teacher where the solution matters to it, to the base model "
    "elsewhere",
    full_distributions=True,
    views=True,
    needs={"teacher_schedule": "frozen"},
)
def rp_opsd(batch: Batch) -> Tensor:
    """g KL(q+ || p) + 0.2 (1 - g) KL(ref || p), g = `two_view_gate` of KL(q+ || q-), q+ and q- the
    model with and without the solution. 2608.06347. Grade S. Ours: q+ and q- are the frozen base
    model, not the current weights, so that q- and ref are one reading. Mean and deviation are those
    of all tokens so far, this step's included."""
    g = two_view_gate(batch.views)
    batch.weight = g
    return g * batch.divergence(forward_kl) + 0.2 * (1 - g) * batch.anchor(forward_kl)


@method(
    "pbsd",
    "PBSD: prefers the teacher's solution to the student's, whatever the verifier says",
    needs={"rollouts_per_prompt": 1, "teacher_rollouts": 1},
    rows="teacher",
    margin=True,
)
def pbsd(batch: Batch) -> Tensor:
    """-log sigma(m), m = beta (log [p_theta(y+) / p_T(y+)] - log [p_theta(y-) / p_T(y-)]), y+ the
    teacher's solution, y- the rollout, sums over tokens, mean over problems. 2605.05040. Grade S.
    Written as a policy gradient with the same gradient: c = beta sigma(-m) on y+, -beta sigma(-m)
    on y-. So `loss` is not -log sigma(m). Ours: beta = 0.1, and one pair for each problem."""
    c = 0.1 * torch.sigmoid(-0.1 * batch.margin)
    c = torch.where(batch.is_reference, c, -c)
    return policy(batch, c.unsqueeze(-1) * batch.per_completion)


@method(
    "brts",
    "BRTS: top-k OPD, plus forward KL on the best of the teacher's solutions",
    full_distributions=True,
    needs={"rollouts_per_prompt": 1},
    rows="teacher",
    overlap=True,
    recipe={"teacher_rollouts": 4, "ask_temperature": 0.7, "ask_top_p": 0.95},
)
def brts(batch: Batch) -> Tensor:
    """On the rollout `policy_top`. Its gradient is that of the code's PPO surrogate for KL(p_S ||
    p_T) on the student's top 16. On one of 4 solutions of the teacher's: 10 KL(p_T || p_S) on the
    teacher's top 16, weights softmax over the 16, log-probs not renormalised. Token means.
    2605.09725. Grade P (code; no script of the authors' switches the second term on).

    A correct solution is taken, if there is one. Among correct ones it is the one with the largest
    share of tokens that are among the student's top 16 at the same positions of its rollout (as far
    as both reach). If none is correct, a teacher that sees the answer writes one more. If that is
    wrong too, the most alike of the 4 is taken. Ours: the teacher is the same model, shown the
    solution."""
    on_solutions = 10 * batch.divergence(partial(forward_kl_top, renormalised=False))
    on_rollouts = batch.divergence(policy_top)
    return torch.where(batch.is_reference.unsqueeze(-1), on_solutions, on_rollouts)


@method(
    "resd",
    "RESD: clipped reverse KL to a teacher that sees the attempt and what the student says "
    "went wrong",
    full_distributions=True,
    recipe={"teacher_context": "reflection", "teacher_schedule": "ema", "teacher_decay": 0.9999},
)
def resd(batch: Batch) -> Tensor:
    """Per completion the mean of `clipped_reverse_kl_top`, times 1 - s if solved and s if not. s is
    the share of solved completions in the step; the weights are scaled to a mean of 1. 2605.12741.
    Grade P. Where all or none are solved the weight is 1, as the authors' clamp makes it. The paper
    sums over the tokens of a completion; this mean is that sum divided by the length. Ours: the
    wording. Left out: playbook, buffer of solutions, inner updates. The verifier says only right or
    wrong."""
    s = batch.success_rate
    weight = torch.ones_like(batch.advantage)
    if 0 < s < 1:
        weight = torch.where(batch.correct, 1 - s, s) / (2 * s * (1 - s))
    losses = mean_of_completions(batch, batch.divergence(clipped_reverse_kl_top))
    return weight.unsqueeze(-1) * losses


@method(
    "trace",
    "TRACE: group GRPO, at first clipped forward KL on the decisive segments of correct rollouts",
    full_distributions=True,
    groups=True,
    needs={"advantage": "group", "teacher_context": "label"},
    marks=lambda correct, step: correct and step < 40,
    recipe={"teacher_schedule": "copy", "teacher_every": 10},
)
def trace(batch: Batch, errors: bool = False) -> Tensor:
    """c = A, but (1 - lam / 0.5) A on the marked segments S of correct rollouts; plus lam
    `clipped_forward_kl`, summed over S, divided by the completion's length, mean over completions;
    lam = 0.5 for 10 steps, then to 0 in 30. 2605.10194. Grade S. Ours: the mean of c log p_theta is
    over tokens, as in grpo-group; the student itself marks (a variant of the source); wording,
    kinds and segments (contexts.py). Rollouts without marks are treated as in grpo-group."""
    lam = 0.5 * min(1.0, max(0.0, 1 - (batch.step - 10) / 30))
    marked = batch.marked & (batch.correct != errors).unsqueeze(-1)
    weight = torch.where(marked, 1 - lam / 0.5, 1.0)
    f = clipped_reverse_kl if errors else clipped_forward_kl
    kl = mean_of_completions(batch, batch.divergence(f))
    return policy(batch, batch.A * weight) + lam * marked * kl


@method(
    "trace-errors",
    "TRACE for weaker models: group GRPO, at first reverse KL on the mistakes of wrong rollouts",
    full_distributions=True,
    groups=True,
    needs={"advantage": "group", "teacher_context": "label"},
    marks=lambda correct, step: not correct and step < 40,
    recipe={"teacher_schedule": "copy", "teacher_every": 10},
)
def trace_errors(batch: Batch) -> Tensor:
    """`trace` with `clipped_reverse_kl` on the marked segments of wrong rollouts, a variant of the
    source. Grade S."""
    return trace(batch, errors=True)


@method(
    "sort",
    "SORT, reconstructed: group GRPO, plus the solutions of problems that all rollouts failed, "
    "weighted with a plan",
    groups=True,
    rows="reference",
    repairs=True,
    teacher=False,
    needs={"advantage": "group", "teacher_thinking": None},
    recipe={"teacher_context": "plan"},
)
def sort(batch: Batch) -> Tensor:
    """On rollouts c = A. On the reference solution s* of a problem whose rollouts all failed c =
    sqrt(p_0 p_plan), p_0 the student's probability of s*_t after the problem, p_plan after problem
    and plan; the mean is over the tokens of these solutions. 2605.11505. Grade C: words only, a
    "geometric-mean token weighting" that blends both probabilities.

    Ours: this c, its factor 1, the mean, and the plan. The base model writes it, shown the solution,
    in at most 5 lines without a box. Without a usable plan c = p_0; --teacher-context none does that
    everywhere. Without a failed group this is grpo-group."""
    on_solutions = ((finite(batch.planned) + finite(batch.logp)) / 2).exp()
    return policy(batch, torch.where(batch.is_reference.unsqueeze(-1), on_solutions, batch.A))


@method(
    "atmanrl",
    "AtManRL, reconstructed: group GRPO, correct rollouts get more whose answer rests on their reasoning",
    needs={"advantage": "group"},
    groups=True,
    teacher=False,
    saliency=True,
    recipe={"beta_length": 0.0},
)
def atmanrl(batch: Batch) -> Tensor:
    """c = A. The reward of a correct rollout is 1 plus half the mean saliency of the tokens before its
    box, from 0 to 1 (saliency.py). 2604.16158. Grade S for the mask, its optimizer and its constants,
    C for the rest.

    Ours: the saliency that its words mean, not the printed one; the mean, the weight 0.5, no saliency
    for wrong rollouts. --saliency steps, ours, is a control without a mask. Costs besides: for each
    correct rollout 200 forward and backward passes of the few tokens from its box on; with steps a
    pass for each of its sentences."""
    return policy(batch, batch.A)
