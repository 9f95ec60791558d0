"""Sampling completions from a transformers causal LM with a KV cache.

The naive way is three lines: run the model on prompt + completion so far, draw a token from the last logits, repeat
(tests/test_rollout.py keeps it as the reference). It recomputes every earlier token at each step. What is done here:

    prefill   each prompt goes through the model once, all prompts of a wave in one batch, padded on the left so that
              every row's last prompt token stands in the last column; the samples of a prompt share its prefill
    decode    one token per row and step; the keys and values of everything before come from the cache
    leave     rows that drew a stop token leave the batch, so that nobody waits and pays for them
    waves     at most `slots` rows are decoded together; the memory needed is that of one wave

`decode` is the only place that runs the model on a single column: whoever captures it in a CUDA graph or refills the
rows that left starts there.

The token that a row draws depends on its own random stream and on the logits, not on which rows are decoded beside it:
up to the rounding of a matrix product, the same generator gives the same completions for any `slots`, and for one process
or many (`generator_for_rows`).

Copy this file: it needs torch, transformers and numpy. It knows token ids only: no chat template, no reward.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache

LOOK_EVERY = 4  # decode steps between two looks for finished rows; a look synchronises the host with the device


@dataclass
class Completion:
    """One sampled completion: what the model said after the prompt.

    token_ids: the stop token included, where there is one. logprobs: natural log of each token's probability under the
    distribution it was drawn from (after temperature, top-k and top-p; 0.0 when greedy). finished: it ended with a
    stop token; False means it was cut off at max_new_tokens.
    """

    token_ids: list[int]
    logprobs: list[float]
    finished: bool


def sample(model, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: Iterable[int],
           temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, samples_per_prompt: int = 1,
           slots: int | None = None, generator: torch.Generator | None = None,
           progress: Callable[[int, int], None] | None = None) -> list[Completion]:
    """Draw `samples_per_prompt` completions of each prompt (token ids, any lengths).

    Result i * samples_per_prompt + j belongs to prompt i. Temperature 0 is greedy; top_p = 1 and top_k = 0 are off;
    nothing is taken from the model's generation_config. `slots` bounds the rows decoded together, None: all of them.
    `progress(tokens, finished)` is called as completions grow; an exception from it ends the sampling.
    The model runs in eval mode without gradients; the mode of every module is restored, whatever happens.
    ValueError if an argument is out of range or a prompt is empty or, with its completion, longer than the model's window.
    """
    _check(model, prompts, max_new_tokens, temperature, top_p, top_k, samples_per_prompt, slots)
    rows = [i for i in range(len(prompts)) for _ in range(samples_per_prompt)]  # the prompt of each row
    seeds = torch.randint(2**63 - 1, (len(rows),), generator=generator).tolist()
    stop = torch.tensor(sorted(set(stop_ids)), device=model.device, dtype=torch.long)
    draw = partial(draw_tokens, temperature=temperature, top_p=top_p, top_k=top_k)
    completions = []
    slots = slots or max(1, len(rows))
    with torch.no_grad(), _eval_mode(model):
        for start in range(0, len(rows), slots):
            wave = slice(start, start + slots)
            completions += _sample_wave(model, prompts, rows[wave], seeds[wave], max_new_tokens, stop, draw, progress)
    return completions


def _sample_wave(model, prompts, rows, seeds, max_new_tokens, stop, draw, progress) -> list[Completion]:
    """The completions of these rows (indices into prompts), all decoded together."""
    device = model.device
    uniforms = torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    uniforms = uniforms.to(device)  # [R, max_new_tokens]
    owner = torch.tensor(rows, device=device) - rows[0]  # row -> its prompt among those of the wave, which are in order
    cache, logits, mask, positions = prefill(model, prompts[rows[0]:rows[-1] + 1])
    if len(rows) > len(logits):
        cache.batch_select_indices(owner)
        logits, mask, positions = logits[owner], mask[owner], positions[owner]

    tokens = torch.zeros(len(rows), max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(len(rows), max_new_tokens, device=device)
    lengths = torch.full((len(rows),), max_new_tokens, device=device)
    finished = torch.zeros(len(rows), dtype=torch.bool, device=device)
    active = torch.arange(len(rows), device=device)  # the rows still in the batch, in cache order
    for step in range(max_new_tokens):
        token, logprob = draw(logits, uniforms[active, step])
        tokens[active, step], logprobs[active, step] = token, logprob
        stopped = torch.isin(token, stop) & ~finished[active]
        lengths[active] = torch.where(stopped, step + 1, lengths[active])
        finished[active] |= stopped
        last = step + 1 == max_new_tokens
        if last or (step + 1) % LOOK_EVERY == 0:
            keep = (~finished[active]).nonzero().squeeze(-1)
            if progress:
                new = lengths[active].clamp(max=step + 1) - step // LOOK_EVERY * LOOK_EVERY
                progress(new.sum().item(), len(active) - (0 if last else len(keep)))
            if last or len(keep) == 0:
                break
            if len(keep) < len(active):
                cache.batch_select_indices(keep)
                active, token, mask, positions = active[keep], token[keep], mask[keep], positions[keep]
        mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
        logits = decode(model, token, positions, mask, cache)
        positions = positions + 1
    return [Completion(ids[:length], logps[:length], done) for ids, logps, length, done in
            zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), finished.tolist())]


def prefill(model, prompts: Sequence[Sequence[int]]) -> tuple[Cache, Tensor, Tensor, Tensor]:
    """Run N prompts, padded on the left to P columns, and keep their keys and values.

    Returns the cache, the logits [N, V] after each prompt, the attention mask [N, P] (1 on tokens, 0 on padding) and
    the positions [N] of the first token to come. The padding id is never looked at: the mask comes from lengths.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    column = torch.arange(width, device=model.device)
    position_ids = column - (width - lengths).unsqueeze(1)  # [N, P], negative on padding
    mask = (position_ids >= 0).long()
    cache = DynamicCache(config=model.config)
    output = model(input_ids=ids, attention_mask=mask, position_ids=position_ids.clamp(min=0), past_key_values=cache,
                   use_cache=True, logits_to_keep=1)
    return cache, output.logits[:, -1], mask, lengths


def decode(model, token: Tensor, position: Tensor, mask: Tensor, cache: Cache) -> Tensor:
    """One token per row: token [R], its position [R], mask [R, P + step + 1] that counts it in -> logits [R, V]."""
    output = model(input_ids=token.unsqueeze(1), attention_mask=mask, position_ids=position.unsqueeze(1),
                   past_key_values=cache, use_cache=True)
    return output.logits[:, -1]


def draw_tokens(logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_p: float = 1.0,
                top_k: int = 0) -> tuple[Tensor, Tensor]:
    """Draw a token per row by inverting the cumulative distribution at `uniform`.

    logits [R, V], uniform [R] in [0, 1) -> token ids [R] and their log-probs [R] (float32, nats) under the distribution
    drawn from: softmax(logits / temperature) in float32, cut to the top_k likeliest tokens, then to the fewest of those
    whose mass reaches top_p, renormalised.

    >>> logits = torch.tensor([[0.5, 0.2, 0.3]]).log()
    >>> draw_tokens(logits, torch.tensor([0.6]))[0].item()                # 0.6 falls into [0.5, 0.7)
    1
    >>> token, logprob = draw_tokens(logits, torch.tensor([0.6]), top_k=2)   # tokens 0 and 2 with 0.625 and 0.375
    >>> token.item(), round(logprob.exp().item(), 3)
    (0, 0.625)
    """
    if temperature == 0:
        token = logits.argmax(-1)
        return token, torch.zeros(len(token), device=logits.device)
    logits = logits.float() / temperature
    ids = None
    if top_k > 0 or top_p < 1:  # sorted: likeliest first; top_p needs the order, and only inside top_k if both are set
        logits, ids = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]), dim=-1)
    if top_p < 1:
        probs = logits.softmax(-1)
        before = probs.cumsum(-1) - probs  # mass of the likelier tokens
        logits = logits.masked_fill(before >= top_p, -torch.inf)  # the likeliest token has none before it and stays
    logprobs = logits.log_softmax(-1)
    cumulative = logprobs.double().exp().cumsum(-1)  # float64: in float32 a large vocabulary's rare tokens would round off
    chosen = torch.searchsorted(cumulative, uniform.double().unsqueeze(-1) * cumulative[:, -1:], right=True)  # [R, 1]
    chosen = chosen.clamp(max=logprobs.shape[-1] - 1)  # of a model that gives nan any token will do: its log-prob is nan
    token = chosen if ids is None else ids.gather(-1, chosen)
    return token.squeeze(-1), logprobs.gather(-1, chosen).squeeze(-1)


def stop_ids(model, tokenizer) -> list[int]:
    """Every end-of-sequence id known to the tokenizer, the config or the generation_config, which do not always agree."""
    found = set()
    for source in (tokenizer, model.config, getattr(model, "generation_config", None)):
        ids = getattr(source, "eos_token_id", None)
        found |= set(ids) if isinstance(ids, (list, tuple)) else {ids} - {None}
    if not found:
        raise ValueError("neither tokenizer, config nor generation_config names an eos_token_id: sampling would never stop")
    return sorted(found)


def generator_for_rows(seed: Sequence[int], first_row: int) -> torch.Generator:
    """A generator with which `sample` draws what rows first_row, first_row + 1, ... of one large call would draw.

    `seed` is any tuple of non-negative integers, such as (seed, step). A rank that samples rows [a, b) of a step takes
    first_row = a, and all ranks together sample what one process would.
    """
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
    torch.randint(2**63 - 1, (first_row,), generator=generator)  # the rows of the ranks before this one
    return generator


@contextmanager
def _eval_mode(model):
    """eval() inside: dropout off, and gradient checkpointing, which would switch the KV cache off, asleep."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check(model, prompts, max_new_tokens, temperature, top_p, top_k, samples_per_prompt, slots):
    for name, value in dict(max_new_tokens=max_new_tokens, samples_per_prompt=samples_per_prompt, slots=slots).items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be in [0, inf), got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if top_k < 0:
        raise ValueError(f"top_k must be >= 0, got {top_k}")
    window = getattr(model.config, "max_position_embeddings", None)
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompts[{i}] is empty")
        if window and len(prompt) + max_new_tokens > window:
            raise ValueError(f"prompts[{i}] has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} "
                             f"that is more than the model's window of {window}")
