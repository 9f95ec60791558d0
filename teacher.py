r"""One completion read twice: by the student, who sees the problem, and by the teacher, who also
sees the solution.

Both are the same weights (arXiv 2605.13255); two things differ, the prompt (`student_messages`,
`teacher_messages`) and the adapter, which is on for the student and off for the teacher (lora.py).
Reading means: run prompt + completion through the model once and report, for every completion
token,

    logp     log p(y_t | prompt, y_<t)
    entropy  H_t = - sum_v p(v) log p(v) of the whole next-token distribution, in nats            eq. (4)

The logits of a whole batch would be B x T x V floats: 20 GB for 32 completions of 1,024 tokens and
Qwen3's vocabulary of 151,936. They never exist. The head, the last layer, makes the logits of a
chunk of completion tokens at a time. If the head is frozen (LoRA), the gradient is made at once:
that of log p(y) with respect to the hidden state is W[y] - p W, where W are the head's weights, and
the probabilities p are at hand. For a head that is trained the chunk is computed again in the
backward pass. Some models scale or cap their logits after the head (`Head`): this is part of the
distribution, and of its gradient. Entropies have no gradient.

Prompts and completions stay token ids from end to end; nothing is decoded and encoded again.

Copy this file: it needs torch, and a model and tokenizer of transformers 5.23. Older versions may ignore
`sanitize_control_tokens`, and make control tokens of a problem that spells them.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from functools import cache, partial
from string import ascii_letters

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

INSTRUCTION = "Reason step by step and put the final answer in \\boxed{}."
# how configs name the cap, two factors, and a divisor of the logits
AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "lm_head_multiplier", "logits_scaling")
CHUNK_LOGITS = 2**25  # logits of a chunk: 128 MiB in float32

# tensors of different lengths -> one tensor [B, longest, ...], with 0 on the right
pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
TokenLists = Sequence[Sequence[int]]  # token ids, one list for each row


@dataclass
class Reading:
    """What a model thinks of B completions of up to T tokens: float32, 0 outside the mask.

    logp and entropy [B, T] in nats; mask bool [B, T], from lengths; hidden, or None: for each
    completion the states [T_i, D] that predict its tokens, in the model's dtype.
    """

    logp: Tensor
    entropy: Tensor
    mask: Tensor
    hidden: list[Tensor] | None = None

    def select(self, indices: list[int], width: int) -> "Reading":
        """Some of the completions; `width` is the length of the longest of them."""
        tensors = [x[indices, :width] for x in (self.logp, self.entropy, self.mask)]
        hidden = [self.hidden[i] for i in indices] if self.hidden else None
        return Reading(*tensors, hidden)


@dataclass(frozen=True)
class Head:
    """hidden states [n, D] -> logits [n, V], float32: x = scale * linear(hidden); with a cap, cap *
    tanh(x / cap)."""

    linear: nn.Module
    scale: float = 1.0
    cap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = _product(self.linear, hidden)
        if self.scale != 1:
            logits = logits * self.scale
        if self.cap:
            logits = self.cap * (logits / self.cap).tanh()
        return logits


def _product(linear, hidden):
    """hidden [n, D] -> float32 [n, V]. Sums of bfloat16 products stay float32 where torch can do it:
    on CUDA, without a derivative. Elsewhere they are rounded to bfloat16 first."""
    weight = linear.weight
    is_half = hidden.dtype == weight.dtype and weight.dtype.itemsize == 2
    if is_half and linear.bias is None and not torch.is_grad_enabled():
        with suppress(NotImplementedError):
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return linear(hidden).float()


def output_head(model) -> Head:
    """How the model makes logits of its last hidden states, according to its config: scaled
    (Granite, Cohere, Falcon-H1) or capped (Gemma). `check_head` finds out whether it does more."""
    config = model.config.get_text_config()
    cap, scale, multiplier, divisor = (getattr(config, name, None) for name in AFTER_HEAD)
    scale = (scale or 1.0) * (multiplier or 1.0)
    if divisor:  # all models divide by it, but HyperCLOVA X multiplies
        scale = scale * divisor if config.model_type == "hyperclovax" else scale / divisor
    return Head(model.get_output_embeddings(), scale, cap)


def student_messages(problem: str) -> list[dict]:
    """The student's prompt, the same in training and in evaluation."""
    return [{"role": "user", "content": problem + "\n\n" + INSTRUCTION}]


def teacher_messages(problem: str, solution: str) -> list[dict]:
    """The privileged prompt: the problem, then the reference solution. Both texts go in as they
    are, braces and all."""
    content = (
        f"{problem}\n\n[Reference solution]\n{solution}\n[End of reference solution]\n\n"
        "Make sure you understand the reference solution, then solve the problem anew in your own "
        f"words. {INSTRUCTION}"
    )
    return [{"role": "user", "content": content}]


def encode(
    tokenizer, messages: list[dict], thinking: bool = False, day: str = "", tokenize: bool = True
) -> list[int] | str:
    """Token ids, or the text, of `messages` through the chat template, up to where the assistant
    begins to speak.

    `thinking` goes to the template under both names that are in use; templates that do not know
    them ignore them. `day` (YYYY-MM-DD) is the date that a template is told when it asks for it; ""
    is the real one. Control tokens that a message spells, such as <|im_end|>, stay ordinary text:
    only the template writes control tokens. ValueError if the tokenizer has no chat template, or
    cannot keep such a text apart from the token.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template: take an instruction-tuned model, or set "
            "tokenizer.chat_template and save the tokenizer"
        )
    return tokenizer.apply_chat_template(
        messages,
        chat_template=_on_day(tokenizer.get_chat_template(), day),
        add_generation_prompt=True,
        enable_thinking=thinking,
        thinking=thinking,
        tokenize=tokenize,
        sanitize_control_tokens=tokenize,  # the text has no tokens yet
        return_dict=False,
    )


@cache
def _on_day(template, day):
    """The chat template with a clock of its own, which stands still: strftime_now("%d %b %Y") gives
    the parts of `day`."""
    if not day or "strftime_now" not in template:
        return template
    text = "format"
    for letter in ascii_letters:
        for code in (f"%{letter}", f"%-{letter}"):
            part = date.fromisoformat(day).strftime(code)
            text += f" | replace({json.dumps(code)}, {json.dumps(part)})"
    return f"{{% macro strftime_now(format) %}}{{{{ {text} }}}}{{% endmacro %}}\n{template}"


def prompt_end(tokenizer, thinking: bool = False, day: str = "") -> str:
    """What prompts end in after the instruction. It may open a thought, or open and close one."""
    text = encode(tokenizer, student_messages("1?"), thinking, day, tokenize=False)
    return text.rpartition(INSTRUCTION)[2]


def assistant_turn(tokenizer, *after: dict) -> tuple[str, str, str]:
    """What the chat template writes around an assistant's turn, before the messages `after`: from
    the instruction to the thought, from the thought to the words, and from the words on. Empty
    texts if it refuses such a turn."""
    said = {
        "role": "assistant",
        "content": "It is 2.",
        "reasoning_content": "I add.",  # templates have one of these names, or none
        "reasoning": "I add.",
        "thinking": "I add.",
    }
    messages = [*student_messages("1?"), said, *after]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=True)
    except Exception:  # templates raise what they like
        text = ""
    before, _, rest = text.partition("It is 2.")
    opening, _, closing = before.rpartition(INSTRUCTION)[2].partition("I add.")
    return opening, closing, rest.strip()


def turn_end(tokenizer) -> int | None:
    """The control token that follows the assistant's words in the chat template, if need be that of
    the next turn; None if there is none, or if it also ends thoughts."""
    _, closing, rest = assistant_turn(tokenizer)
    rest = rest or assistant_turn(tokenizer, {"role": "user", "content": "3?"})[2]
    for first in tokenizer.encode(rest, add_special_tokens=False)[:1]:
        token = tokenizer.added_tokens_decoder.get(first)
        if token and token.content not in closing:
            return first
    return None


def read(
    model,
    prompts: TokenLists,
    completions: TokenLists,
    *,
    temperature: float = 1.0,
    hidden: bool = False,
) -> Reading:
    """Score completions[i] as the continuation of prompts[i]; token ids in, `Reading` out.

    log-probs and entropies are those of softmax(logits / temperature), in float32 whatever the
    model's dtype. `hidden` asks for the states. Where gradients are enabled, they flow through the
    log-probs, never through the entropies. Eq. (4), arXiv 2605.13255. The model must be one that
    `check_head` does not refuse. ValueError on an empty prompt or completion, and on a temperature
    <= 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if not all([prompts, *prompts, *completions]):
        raise ValueError("prompts and completions: at least one, and none of them empty")

    device = model.device
    rows = [torch.tensor([*p, *c]) for p, c in zip(prompts, completions, strict=True)]
    ids = pad(rows).to(device)  # [B, width]
    lengths = list(map(len, completions))
    starts = torch.tensor([[len(prompt)] for prompt in prompts], device=device)  # [B, 1]
    ends = starts + torch.tensor(lengths, device=device).unsqueeze(1)
    column = torch.arange(ids.shape[1], device=device)
    # Padding is on the right, so no mask is needed. In bfloat16 a mask would turn flash attention
    # off. In float32 we pass one, to avoid a slow kernel.
    attention_mask = None
    if model.dtype.itemsize > 2 and not torch.is_autocast_enabled(device.type):
        attention_mask = (column < ends).long()
    output = model.base_model(input_ids=ids, attention_mask=attention_mask, use_cache=False)
    # The state at column c predicts the token at c + 1. Prompt ab, completion CD, padding 0: row a
    # b C D 0, the states at b and C predict the targets C and D.
    predicts = (column >= starts - 1) & (column < ends - 1)
    states = output.last_hidden_state[predicts]  # [N, D]: completion tokens, row after row
    targets = ids.roll(-1, 1)[predicts]  # [N]
    scores = score(output_head(model), states, targets, temperature)
    logp, entropies = (pad(x.split(lengths)) for x in scores)  # [N] -> [B, T]
    mask = torch.arange(max(lengths), device=device) < ends - starts
    return Reading(logp, entropies, mask, list(states.split(lengths)) if hidden else None)


def reading_mode(model) -> None:
    """Switch off what a model does in training only (dropout, noise in routers, kernels that leave
    adapters out): so scoring uses the same network
    as sampling. Only layers with gradient checkpointing stay
    in training mode, because checkpointing works in this mode only."""
    for module in model.modules():
        module.training = getattr(module, "gradient_checkpointing", False)


@torch.no_grad()
def check_head(model) -> None:
    """ValueError if the model does more after its last hidden states than `output_head` knows: then
    its own logits of a few tokens differ. For a model in eval mode."""
    ids = torch.arange(4, device=model.device).unsqueeze(0)
    theirs = model(input_ids=ids, use_cache=False).logits[0].float()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    ours = output_head(model)(hidden)
    tolerance = max(1e-4, 4 * torch.finfo(model.dtype).eps) * theirs.abs().max()
    if (ours - theirs).abs().max() > tolerance:
        raise ValueError(
            "the model's logits are not those of its head with the scale and the cap that "
            f"{', '.join(AFTER_HEAD)} in its config say"
        )


@torch.no_grad()
def read_in_batches(
    model,
    prompts: TokenLists,
    completions: TokenLists,
    most_tokens: int,
    *,
    temperature: float = 1.0,
    hidden: bool = False,
) -> Reading:
    """`read` without gradients, for as many completions as you like:
    `micro_batches` of at most `most_tokens` tokens each, put together to one `Reading` of all B
    completions in their order."""
    # rows of all batches, in the order of the batches
    logp = []
    entropy = []
    mask = []
    states = []
    order = []
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    for batch in micro_batches(lengths, most_tokens):
        reading = read(
            model,
            [prompts[i] for i in batch],
            [completions[i] for i in batch],
            temperature=temperature,
            hidden=hidden,
        )
        logp += reading.logp
        entropy += reading.entropy
        mask += reading.mask
        states += reading.hidden or []
        order += batch
    whole = Reading(pad(logp), pad(entropy), pad(mask), states)
    return whole.select(torch.tensor(order).argsort().tolist(), max(map(len, completions)))


def micro_batches(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Deal rows of these lengths in tokens into batches: indices, longest rows first, every row
    once.

    A batch is padded to its longest row. It has at most `most_tokens` tokens with padding (a row
    that is longer is alone), and at most a tenth of them is padding.

    >>> micro_batches([30, 100, 95, 31, 29], most_tokens=300)
    [[1, 2], [3, 0, 4]]
    """
    batches = []
    tokens = 0  # of the last batch, without padding
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches:
            batch = batches[-1]
            padded = (len(batch) + 1) * lengths[batch[0]]
            tokens += lengths[i]
            if padded <= most_tokens and tokens >= 0.9 * padded:
                batch.append(i)
                continue
        batches.append([i])
        tokens = lengths[i]
    return batches


def score(
    head: Head | nn.Module, hidden: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """hidden [N, D], targets [N] -> log-probs [N] and entropies [N], float32, the entropies without
    a gradient. There are CHUNK_LOGITS logits at a time. `head` may be a linear layer, if nothing
    comes after it."""
    if not isinstance(head, Head):
        head = Head(head)
    size = max(1, CHUNK_LOGITS // head.linear.out_features)
    is_trained = any(parameter.requires_grad for parameter in head.linear.parameters())
    if hidden.requires_grad and not is_trained:
        return _FrozenHead.apply(hidden, head, targets, temperature, size)
    # The backward pass needs the logits of a chunk. They are not kept, but computed again.
    recomputed = partial(
        checkpoint,
        _score_chunk,
        head,
        temperature,
        use_reentrant=False,
        preserve_rng_state=False,
    )
    logp, entropies = _by_chunks(recomputed, hidden, targets, size)
    return torch.cat(logp), torch.cat(entropies)


def _by_chunks(function, hidden, targets, size):
    """function(hidden, targets) -> (a, b, ...) of `size` tokens at a time; returns all a, all b, ..."""
    chunks = zip(hidden.split(size), targets.split(size), strict=True)
    return zip(*[function(*chunk) for chunk in chunks], strict=True)


def _score_chunk(head, temperature, hidden, targets):
    logprobs = (head(hidden) / temperature).log_softmax(1)  # [n, V]
    logp = logprobs.gather(1, targets.unsqueeze(1)).squeeze(1)
    return logp, torch.special.entr(logprobs.detach().exp()).sum(1)  # (4)


class _FrozenHead(torch.autograd.Function):
    """log p(y) and H [N] and, from the same logits, the derivative of log p(y) by the hidden states."""

    @staticmethod
    def forward(ctx, hidden, head, targets, temperature, size):
        function = partial(_score_and_differentiate, head, temperature)
        logp, entropies, slopes = _by_chunks(function, hidden, targets, size)
        ctx.save_for_backward(torch.cat(slopes))  # [N, D]
        entropies = torch.cat(entropies)
        ctx.mark_non_differentiable(entropies)
        return torch.cat(logp), entropies

    @staticmethod
    def backward(ctx, grad, _):
        (slopes,) = ctx.saved_tensors
        # torch casts the product to the dtype of hidden
        return grad.unsqueeze(1) * slopes, None, None, None, None


def _score_and_differentiate(head, temperature, hidden, targets):
    """hidden [n, D], targets [n] -> log p(y) [n], H [n], and the derivative of log p(y) by the hidden
    state [n, D].

    The derivative is (W[y] - p W) / temperature for a plain head. A scale is one more factor. A cap
    multiplies the part of each logit by 1 - (logit / cap)^2, the derivative of cap * tanh(x / cap).
    Tensors [n, V] are large: what can be done in place is done in place, so that there are never
    more than two, or three with a cap.
    """
    logits = head(hidden)
    cap_slope = 1 - (logits / head.cap).square() if head.cap else None
    logprobs = logits.div_(temperature).log_softmax(1)
    y = targets.unsqueeze(1)
    logp = logprobs.gather(1, y).squeeze(1)
    p = torch.exp(logprobs, out=logits)
    entropies = torch.special.entr(p, out=logprobs).sum(1)  # (4)
    del logprobs  # frees the chunk
    # onehot(y) - p, in float32 before it is rounded to the head's dtype
    slope = p.neg_()
    slope.scatter_add_(1, y, torch.ones_like(y, dtype=slope.dtype))
    if head.cap:
        slope.mul_(cap_slope)
    weight = head.linear.weight
    return logp, entropies, slope.to(weight.dtype) @ weight * head.scale / temperature
