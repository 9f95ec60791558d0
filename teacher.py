r"""One completion read twice: by the student, who sees the problem, and by the teacher, who also
sees the solution.

Both are the same weights (arXiv 2605.13255); two things differ, the prompt (`student_messages`,
`teacher_messages`) and the adapter, which is on for the student and off for the teacher (lora.py).
Reading means: run prompt + completion through the model once and report, for every completion
token,

    logp     log p(y_t | prompt, y_<t)
    entropy  H_t = - sum_v p(v) log p(v) of the whole next-token distribution, in nats            eq. (4)

The logits of a whole batch would be B x T x V floats, 20 GB for 32 completions of 1,024 tokens and
Qwen3's vocabulary of 151,936. They never exist. The head is applied to completion positions only, a
chunk of tokens at a time. For a frozen head (LoRA) the backward pass is done on the spot: the
gradient of log p(y) with respect to the hidden state is W[y] - p W, and p is at hand. For a head
that is trained the chunk is recomputed in the backward pass instead of kept. Some models scale or
cap their logits after the head (`Head`): that is part of the distribution, and of its gradient.

Prompts and completions stay token ids from end to end; nothing is decoded and encoded again.

Copy this file: it needs torch, and a transformers model and tokenizer to work on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

INSTRUCTION = "Reason step by step and put the final answer in \\boxed{}."
# what configs call it
AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "lm_head_multiplier", "logits_scaling")
CHUNK_LOGITS = 2**25  # logits held at a time: 128 MiB in float32


@dataclass
class Reading:
    """What a model thinks of B completions of up to T tokens: float32, 0 outside the mask.

    logp [B, T] in nats; entropy [B, T] in nats, or None if it was not asked for; mask bool [B, T],
    from lengths; hidden, or None: for each completion the states [T_i, D] that predict its tokens,
    in the model's dtype.
    """

    logp: Tensor
    entropy: Tensor | None
    mask: Tensor
    hidden: list[Tensor] | None = None

    def select(self, indices: list[int], width: int) -> "Reading":
        """Some of the completions, the longest of which has `width` tokens."""
        hidden = [self.hidden[i] for i in indices] if self.hidden else None
        values = (x[indices, :width] for x in (self.logp, self.entropy, self.mask))
        return Reading(*values, hidden)


@dataclass(frozen=True)
class Head:
    """hidden states [n, D] -> logits [n, V], float32: x = scale * linear(hidden); with a cap, cap *
    tanh(x / cap)."""

    linear: nn.Module
    scale: float = 1.0
    cap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.linear(hidden).float()
        logits = logits if self.scale == 1 else logits * self.scale
        return self.cap * (logits / self.cap).tanh() if self.cap else logits


def output_head(model) -> Head:
    """How the model makes logits of its last hidden states, as its config says: scaled (Granite,
    Cohere, Falcon-H1) or capped (Gemma). `check_head` finds out whether there is more to it."""
    config = model.config.get_text_config()
    cap, scale, multiplier, divisor = (getattr(config, name, None) for name in AFTER_HEAD)
    scale = (scale or 1.0) * (multiplier or 1.0)
    if divisor:  # what all others divide by, HyperCLOVA X multiplies by
        scale = scale * divisor if config.model_type == "hyperclovax" else scale / divisor
    return Head(model.get_output_embeddings(), scale, cap)


def student_messages(problem: str) -> list[dict]:
    """The prompt that is trained, and asked at evaluation."""
    return [{"role": "user", "content": problem + "\n\n" + INSTRUCTION}]


def teacher_messages(problem: str, solution: str) -> list[dict]:
    """The privileged prompt: the problem, then the reference solution. Both texts go in as they
    are, braces and all."""
    return [
        {
            "role": "user",
            "content": problem
            + "\n\n[Reference solution]\n"
            + solution
            + "\n[End of reference solution]\n\nMake sure you understand the reference solution, "
            "then solve the problem anew in your own words. " + INSTRUCTION,
        }
    ]


def encode(
    tokenizer, messages: list[dict], thinking: bool = False, tokenize: bool = True
) -> list[int] | str:
    """Token ids, or the text, of `messages` through the chat template, up to where the assistant
    begins to speak.

    `thinking` goes to the template under both names that are in use; templates that do not know
    them ignore them. ValueError if the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template: take an instruction-tuned model, or set "
            "tokenizer.chat_template and save the tokenizer"
        )
    return tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=True,
        enable_thinking=thinking,
        thinking=thinking,
        tokenize=tokenize,
        return_dict=False,
    )


def read(
    model,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    hidden: bool = False,
) -> Reading:
    """Score completions[i] as the continuation of prompts[i]; token ids in, `Reading` out.

    log-probs and entropies are those of softmax(logits / temperature), in float32 whatever the
    model's dtype. `entropy` and `hidden` ask for these fields. Gradients flow iff they are enabled.
    Eq. (4), arXiv 2605.13255. The model must be one that `check_head` does not refuse. ValueError
    on an empty prompt or completion, and on a temperature <= 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if (
        len(prompts) != len(completions)
        or not prompts
        or not all(map(len, prompts))
        or not all(map(len, completions))
    ):
        raise ValueError(
            "prompts and completions must be equally many, at least one, and none of them empty"
        )

    device = model.device
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    width = max(map(len, rows))
    # padding goes on the right
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    column = torch.arange(width, device=device)
    starts = torch.tensor([[len(prompt)] for prompt in prompts], device=device)  # [B, 1]
    ends = torch.tensor([[len(row)] for row in rows], device=device)
    # No token sees the padding behind it: a mask changes nothing, and keeps CUDA from flash
    # attention. That one needs half precision; in float32 a mask keeps transformers from the plain
    # kernel, which is slow and large.
    is_half = model.dtype.itemsize == 2 or torch.is_autocast_enabled(device.type)
    states = model.base_model(
        input_ids=ids, attention_mask=None if is_half else (column < ends).long(), use_cache=False
    ).last_hidden_state
    # The state at column c predicts the token at c + 1. Prompt ab, completion CD, padding 0: row a
    # b C D 0, the states at b and C predict the targets C and D.
    predicts = (column >= starts - 1) & (column < ends - 1)
    # [N, D], [N]: completion tokens, row after row
    states, targets = states[predicts], ids.roll(-1, 1)[predicts]

    lengths = ends - starts  # [B, 1]
    mask = torch.arange(lengths.max(), device=device) < lengths  # [B, T]
    logp, entropies = score(output_head(model), states, targets, temperature, entropy)
    outside = torch.zeros(mask.shape, device=device)
    logp = outside.masked_scatter(mask, logp)  # [N] -> [B, T]
    entropies = outside.masked_scatter(mask, entropies) if entropy else None
    by_row = list(states.split(list(map(len, completions)))) if hidden else None
    return Reading(logp, entropies, mask, by_row)


def reading_mode(model) -> None:
    """Switch off what a model does in training only (dropout, noise in routers, kernels that pass
    adapters by): the student is read as it samples. Gradient checkpointing works in layers that are
    in training; nothing else is."""
    for module in model.modules():
        module.training = getattr(module, "gradient_checkpointing", False)


@torch.no_grad()
def check_head(model) -> None:
    """ValueError if the model does more after its last hidden states than `output_head` knows: its
    own logits of a few tokens differ. For a model in eval mode."""
    ids, head = torch.arange(4, device=model.device).unsqueeze(0), output_head(model)
    theirs = model(input_ids=ids, use_cache=False).logits.float()
    ours = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    tolerance = max(1e-4, 4 * torch.finfo(model.dtype).eps) * theirs.abs().max()
    if ours.shape != theirs.shape or (ours - theirs).abs().max() > tolerance:
        raise ValueError(
            f"the model's logits are not those of its head with a scale of {head.scale:.3g} and "
            f"a cap of {head.cap}, as {', '.join(AFTER_HEAD)} in its config say"
        )


@torch.no_grad()
def read_in_batches(
    model,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    most_tokens: int,
    *,
    temperature: float = 1.0,
    hidden: bool = False,
) -> Reading:
    """`read` with entropies and without gradients, for as many completions as you like:
    `micro_batches` of at most `most_tokens` tokens each, put together to one `Reading` of all B
    completions in their order."""
    # [B, T] each
    logp, entropy = torch.zeros(
        2, len(completions), max(map(len, completions)), device=model.device
    )
    mask, states = torch.zeros_like(logp, dtype=torch.bool), [None] * len(completions)
    rows = [
        len(prompt) + len(completion)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    for batch in micro_batches(rows, most_tokens):
        reading = read(
            model,
            [prompts[i] for i in batch],
            [completions[i] for i in batch],
            temperature=temperature,
            entropy=True,
            hidden=hidden,
        )
        width = reading.mask.shape[1]
        logp[batch, :width] = reading.logp
        entropy[batch, :width] = reading.entropy
        mask[batch, :width] = reading.mask
        for place, i in enumerate(batch if hidden else []):
            states[i] = reading.hidden[place]
    return Reading(logp, entropy, mask, states if hidden else None)


def micro_batches(
    lengths: Sequence[int], most_tokens: int, most_padding: float = 0.1
) -> list[list[int]]:
    """Deal rows of these lengths in tokens into batches: indices, longest rows first, every row
    once.

    A batch is padded to its longest row. It has at most `most_tokens` tokens with padding (a row
    that is longer is alone), of which at most the share `most_padding` is padding.

    >>> micro_batches([30, 100, 95, 31, 29], most_tokens=300)
    [[1, 2], [3, 0, 4]]
    """
    batches, tokens = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        tokens += lengths[i]
        padded = (len(batches[-1]) + 1) * lengths[batches[-1][0]] if batches else 0
        if not batches or padded > most_tokens or tokens < (1 - most_padding) * padded:
            batches.append([])
            tokens = lengths[i]
        batches[-1].append(i)
    return batches


def score(
    head: Head | nn.Module, hidden: Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """hidden [N, D], targets [N] -> log-probs [N] and entropies [N] (or None), with CHUNK_LOGITS
    logits at a time. `head` may be a linear layer, if nothing comes after it."""
    head = head if isinstance(head, Head) else Head(head)
    size = max(1, CHUNK_LOGITS // head.linear.out_features)
    if (
        hidden.requires_grad
        and not entropy
        and not any(p.requires_grad for p in head.linear.parameters())
    ):
        return _FrozenHead.apply(hidden, head, targets, temperature, size), None
    chunks = [
        checkpoint(
            _score_chunk,
            head,
            h,
            t,
            temperature,
            entropy,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for h, t in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    logp, entropies = zip(*chunks, strict=True)
    return torch.cat(logp), torch.cat(entropies) if entropy else None


def _score_chunk(head, hidden: Tensor, targets: Tensor, temperature: float, entropy: bool):
    logprobs = (head(hidden) / temperature).log_softmax(-1)  # [n, V]
    logp = logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    entropies = torch.special.entr(logprobs.exp()).sum(-1) if entropy else None  # (4)
    return logp, entropies


class _FrozenHead(torch.autograd.Function):
    """log p(y) [N] and, from the same logits, its derivative by the hidden state: (W[y] - p W) /
    temperature for a plain head; a scale is a factor of it, a cap one of each logit's share, 1 -
    (logit / cap)^2."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, head, targets: Tensor, temperature: float, size: int
    ) -> Tensor:
        logp, slopes = [], []
        for h, y in zip(hidden.split(size), targets.unsqueeze(-1).split(size), strict=True):
            logits = head(h)  # [n, V]
            logprobs = (logits / temperature).log_softmax(-1)
            logp.append(logprobs.gather(-1, y).squeeze(-1))
            # onehot(y) - p, in float32 before it is rounded to the head's dtype
            slope = logprobs.exp_().neg_()
            slope.scatter_add_(-1, y, torch.ones_like(y, dtype=slope.dtype))
            slope = slope * (1 - (logits / head.cap).square()) if head.cap else slope
            weight = head.linear.weight
            slopes.append(slope.to(weight.dtype) @ weight * head.scale / temperature)
        ctx.save_for_backward(torch.cat(slopes))  # [N, D]
        ctx.dtype = hidden.dtype
        return torch.cat(logp)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return (grad.unsqueeze(-1) * ctx.saved_tensors[0]).to(ctx.dtype), None, None, None, None
