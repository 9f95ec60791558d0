"""On which tokens of its reasoning does an answer rest? A number from 0 to 1 for every token before
the box of a correct rollout, --saliency:

    mask    Every token of the reasoning has a number h, at first START. 10 h is added to the attention scores with
            which the answer looks at the token. AdamW changes h, never above 0, to raise the probability of the
            answer. 1 - h / START: how far the token came back, 0 if it did not. AtManRL, arXiv 2604.16158
    steps   the share of the answer's probability that is lost if the token's sentence or line is left out. Ours

The mask nearly removes the reasoning at first: exp(-4) = 0.02. The answer is the box and all behind
it. Its first token is given: it only says that an answer follows.

The source prints h / START, which is 1 for a token that stays suppressed; its words say the opposite,
and so do we. Notes on it give START, the factor, the optimizer and the number of updates. Ours: all
layers and heads have the same mask, and only the answer sees it.

Nothing before the answer can see the mask. So its keys and values are computed once, and an update
runs the few tokens of the answer through the model, not the rollout.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import reward
import rollout
import teacher
from family.contexts import segments
from support.errors import InputError
from support.sampling import Rollout

START = -0.4
FACTOR = 10
UPDATES = 200
ADAMW = {"lr": 1e-3, "betas": (0.6, 0.9999), "weight_decay": 0.05}
TOGETHER = 32  # rollouts
FAR = 2**30  # behind all other places


def box_of(tokenizer, one: Rollout) -> int:
    """The number of tokens before the one with which a correct rollout's last box begins."""
    start = list(reward.BOX.finditer(one.said))[-1].start()
    ids = one.token_ids
    # the last such number: the bytes of an unfinished character may count as several characters
    return max(n for n in range(len(ids)) if len(tokenizer.decode(ids[:n])) <= start)


def by_mask(
    model, tokenizer, rollouts: list[Rollout], check: Callable = lambda: None
) -> list[Tensor]:
    """Of every rollout 1 - h / START after the updates, float32 [tokens before the box]. `check` is
    called before every update; an exception from it ends the work."""
    if rollout.has_states(model):
        raise InputError(
            "--saliency mask: layers of this model carry the reasoning past the mask in their states: "
            "say steps, or take another model"
        )
    found = []
    for start in range(0, len(rollouts), TOGETHER):
        answers = Answers(model, tokenizer, rollouts[start : start + TOGETHER])
        h = (START * answers.is_reasoning).requires_grad_()  # [B, N]
        optimizer = torch.optim.AdamW([h], **ADAMW)
        for _ in range(UPDATES):
            check()
            with torch.enable_grad():
                loss = answers.loss(FACTOR * h * answers.is_reasoning)
                (h.grad,) = torch.autograd.grad(loss, h)
            optimizer.step()
            h.data.clamp_(max=0)
        salient = (1 - h.detach() / START).clamp(min=0)
        for row, is_reasoning in zip(salient, answers.is_reasoning, strict=True):
            found.append(row[is_reasoning].cpu())
    return found


class Answers:
    """The answers of B rollouts, up to Q + 1 tokens each, and keys and values of the N columns before
    them."""

    def __init__(self, model, tokenizer, rollouts):
        self.model = model.eval()
        rows = []
        for one in rollouts:
            ids = torch.tensor(one.prompt + one.token_ids)
            place = torch.arange(len(ids))
            start = len(one.prompt)
            box = start + box_of(tokenizer, one)
            before = (ids[:box], place[:box], place[:box] >= start)
            rows.append((*before, ids[box:-1], ids[box + 1 :], place[box:-1]))
        before, columns, is_reasoning, tokens, targets, position = zip(*rows, strict=True)

        def together(rows, filler=0):
            padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)
            return padded.to(model.device)

        self.is_reasoning = together(is_reasoning)  # [B, N]
        self.tokens = together(tokens)  # [B, Q]
        self.targets = together(targets, -100)  # which cross_entropy leaves out
        self.position = together(position)
        # padding counts as behind everything, where nothing sees it
        seen = torch.cat([together(columns, FAR), together(position, FAR)], 1)  # [B, N + Q]
        self.distance = (self.position.unsqueeze(2) - seen.unsqueeze(1)).unsqueeze(1)
        with torch.no_grad():
            cache = rollout.prefill(model, [ids.tolist() for ids in before]).cache
        self.known = [(layer.keys, layer.values) for layer in cache.layers]

    def loss(self, scores: Tensor) -> Tensor:
        """-log p of the answers, their sum in nats, if `scores` [B, N] are added to the attention scores
        with which they see what stands before them."""
        scores = nn.functional.pad(scores, (0, self.tokens.shape[1])).to(self.model.dtype)
        logits = self.model(
            input_ids=self.tokens,
            attention_mask=rollout.attention_masks(
                self.model, self.distance, scores[:, None, None]
            ),
            position_ids=self.position,
            past_key_values=DynamicCache(self.known),
        ).logits
        return nn.functional.cross_entropy(
            logits.float().transpose(1, 2), self.targets, reduction="sum"
        )


def by_steps(
    model, tokenizer, rollouts: list[Rollout], check: Callable = lambda: None
) -> list[Tensor]:
    """Of every rollout what is lost without a token's step, float32 [tokens before the box]. `check` is
    called before every rollout."""
    model.eval()
    found = []
    for one in rollouts:
        check()
        box = box_of(tokenizer, one)
        steps = [range(0)]  # the first text is the whole one
        for part in segments(one, tokenizer):
            if part.start < box:
                steps.append(range(part.start, min(part.stop, box)))
        texts = [one.token_ids[: step.start] + one.token_ids[step.stop :] for step in steps]
        prompts = [one.prompt] * len(texts)
        logp = teacher.read_in_batches(model, prompts, texts, rollout.PREFILL_TOKENS).logp
        size = len(one.token_ids) - box - 1
        answer = [row[: len(x)][-size:].sum() for row, x in zip(logp, texts, strict=True)]
        lost = 1 - (torch.stack(answer) - answer[0]).clamp(max=0).exp()
        values = [x.expand(len(step)) for x, step in zip(lost, steps, strict=True)]
        found.append(torch.cat(values).cpu())
    return found


SALIENCY = {"mask": by_mask, "steps": by_steps}
