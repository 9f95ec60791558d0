"""Sampling completions from a transformers causal LM: continuous batching over a KV cache with a
fixed number of slots.

The naive way is three lines: run the model on prompt + completion so far, draw a token from the
last logits, repeat (see tests/test_rollout.py). Each step recomputes all earlier tokens. Here,
where a row is one sample of one prompt:

    slots     the cache has room for the keys and values of `slots` rows. Column t of a slot belongs to the token at
              position t of its row. Memory is slots x columns, however many prompts there are. Layers of linear
              attention and of convolution have states of fixed size instead, one per slot
    prefill   the next prompts go through the model together, each once. Their keys and values are kept, in memory of
              their own, until all their samples have started: every sample starts from a copy of its prompt's columns
    decode    one token per row and step, each row at its own position, which is also the column it writes. A row that
              has ended stands still, whatever is drawn for it
    poll      every POLL_EVERY steps the host asks which rows have ended; between two polls it never waits for the
              device. Finished rows leave and waiting rows take their slots; when no row is left to wait, the last rows
              move into the free slots, and the batch gets smaller

Every row has a random stream of its own, so that its tokens do not depend on the rows decoded
beside it: the same generator gives the same completions for any `slots`, and for one process or
many (`generator_for_rows`), up to the rounding of matrix products, which depends on the size of the
batch.

Copy this file: it needs torch, transformers and numpy. It knows token ids only: no chat template,
no reward.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionAndFullAttentionLayer

POLL_EVERY = 2  # decode steps between two polls; a row that has ended waits for the next one
# on CUDA a poll costs more: the device has nothing to do until the host has asked and answered
POLL_EVERY_ON_CUDA = 8
# most prompt tokens, with padding, that go through the model together; bounds its activations
PREFILL_TOKENS = 2**14
# attention reads a multiple of this many columns, so that `decode` sees few different shapes
COLUMNS = 32
# kinds of layers that keep states of fixed size; hybrid: columns, too
STATES = {"linear_attention", "conv", "hybrid"}


@dataclass
class Completion:
    """One sampled completion: what the model said after the prompt.

    token_ids: the stop token included, where there is one. logprobs: natural log of each token's
    probability under the distribution it was drawn from (after temperature, top-k and top-p; 0.0
    when greedy). finished: it ended with a stop token; False means it was cut off at
    max_new_tokens.
    """

    token_ids: list[int]
    logprobs: list[float]
    finished: bool


def sample(
    model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Iterable[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    samples_per_prompt: int = 1,
    slots: int | None = None,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_completion: Callable[[int, Completion], None] | None = None,
    make_decoder: Callable[..., "Decoder"] | None = None,
) -> list[Completion]:
    """Draw `samples_per_prompt` completions of each prompt (token ids, any lengths).

    Result i * samples_per_prompt + j belongs to prompt i. Temperature 0 is greedy; top_p = 1 and
    top_k = 0 are off; nothing is taken from the model's generation_config. At most `slots` rows are
    decoded together, which bounds the memory; None: all of them. `seeds`, one for each result, seed
    the rows; without them they are drawn from `generator`, and without that from torch's global
    random state. `progress(tokens, finished)` gets the tokens and the finished rows since its last
    call, `on_completion(index, completion)` every result as soon as it is there; an exception from
    either ends the sampling. `make_decoder` has the arguments of `Decoder` and returns one, which
    may be that of an earlier call (support/graphs.py).

    The model runs in eval mode without gradients; the mode of every module is restored, whatever
    happens. ValueError if an argument is out of range, if a prompt is empty or, with its
    completion, longer than the model's window, or if the model has layers of a kind that is not
    known here, or an attention implementation other than sdpa and eager; `check_model` finds out
    more. FloatingPointError if a log-prob is not finite, as it is behind logits that are not.
    """
    _check(model, prompts, max_new_tokens, temperature, top_p, top_k, samples_per_prompt, slots)
    total = len(prompts) * samples_per_prompt
    seeds = row_seeds(generator, total) if seeds is None else seeds
    if len(seeds) != total:
        raise ValueError(f"seeds must be {total}, one for each result, got {len(seeds)}")
    slots = max(1, min(slots or total, total))
    completions, done, shown = {}, 0, 0
    with torch.inference_mode(), _sampling_mode(model):
        decoder = (make_decoder or Decoder)(
            model,
            slots,
            max(map(len, prompts), default=0) + max_new_tokens,
            max_new_tokens,
            stop_ids,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
        )
        batch = _Batch(decoder, prompts, samples_per_prompt, seeds)
        while len(completions) < total:
            batch.start_rows()
            batch.close_gaps()
            batch.decode_until_poll()
            finished = batch.take_finished()
            completions |= finished
            done += sum(len(c.token_ids) for c in finished.values())
            for index, completion in finished.items() if on_completion else ():
                on_completion(index, completion)
            if progress:
                before, shown = shown, done + sum(row.age for row in batch.running.values())
                progress(shown - before, len(finished))
    return [completions[row] for row in range(total)]


@dataclass
class _Row:
    """What the host knows of a row."""

    index: int  # its place among the results
    prompt: int  # its prompt's place in _Batch.prefilled
    prompt_length: int
    age: int = 1  # tokens drawn, as of the last poll


class _Batch:
    """The rows of one call, as the host sees them: those that wait, and those that are being
    decoded."""

    def __init__(self, decoder: "Decoder", prompts, samples_per_prompt: int, seeds: Sequence[int]):
        self.decoder, self.seeds, self.slots = decoder, seeds, decoder.slots
        self.prompts, self.samples_per_prompt = prompts, samples_per_prompt
        self.waiting = list(range(len(prompts)))  # prompts that have not been prefilled
        self.prefilled: Prefilled | None = None
        self.ready: list[_Row] = []  # waiting rows whose prompts are in self.prefilled
        self.running: dict[int, _Row] = {}  # slot -> row

    def start_rows(self) -> None:
        """Waiting rows take the free slots and draw their first tokens."""
        free = [slot for slot in range(self.slots) if slot not in self.running]
        while free and (self.ready or self.waiting):
            if not self.ready:
                self.prefill_next(len(free))
            rows, self.ready = self.ready[: len(free)], self.ready[len(free) :]
            self.decoder.start(
                free[: len(rows)],
                self.prefilled,
                [row.prompt for row in rows],
                [self.seeds[row.index] for row in rows],
            )
            self.running |= zip(free, rows, strict=False)
            free = free[len(rows) :]
        if not self.ready:
            self.prefilled = None

    def prefill_next(self, rows: int) -> None:
        """Prefill the prompts of the next `rows` rows, or slots / 4 rows if that is more: large
        batches are cheaper."""
        k, prompts = self.samples_per_prompt, self.waiting
        if has_states(self.decoder.model):  # padding must not enter a state
            prompts = [i for i in prompts if len(self.prompts[i]) == len(self.prompts[prompts[0]])]
        prompts = prompts[: -(-max(rows, self.slots // 4) // k)]  # rounded up
        widths = accumulate((len(self.prompts[i]) for i in prompts), max)
        # the first n, with padding
        fitting = sum(n * width <= PREFILL_TOKENS for n, width in enumerate(widths, 1))
        prompts = prompts[: max(1, fitting)]
        self.prefilled = None  # the old ones are freed before the new ones take memory
        self.prefilled = prefill(self.decoder.model, [self.prompts[i] for i in prompts])
        self.ready += [
            _Row(prompt * k + j, place, len(self.prompts[prompt]))
            for place, prompt in enumerate(prompts)
            for j in range(k)
        ]
        chosen = set(prompts)
        self.waiting = [i for i in self.waiting if i not in chosen]

    def close_gaps(self) -> None:
        """Move the last rows into the free slots between the others, so that the slots in use are
        the first ones."""
        count = len(self.running)
        gaps = [s for s in range(count) if s not in self.running]
        last = [s for s in self.running if s >= count]
        if gaps:
            rows = [self.running.pop(slot) for slot in last]
            self.decoder.move(last, gaps, max(row.prompt_length + row.age for row in rows))
            self.running |= zip(gaps, rows, strict=True)

    def decode_until_poll(self) -> None:
        """Draw some tokens for every row; fewer if a row reaches max_new_tokens before."""
        rows = self.running.values()
        every = POLL_EVERY_ON_CUDA if self.decoder.on_cuda else POLL_EVERY
        # the step writes the last token's column, too
        longest = max(row.prompt_length + row.age for row in rows)
        for more in range(min(every, self.decoder.max_new_tokens - max(row.age for row in rows))):
            self.decoder.run(len(rows), longest + more)

    def take_finished(self) -> dict[int, Completion]:
        """Poll: the completions of the rows that have ended, by index; their slots become free."""
        alive, age = self.decoder.poll(len(self.running))  # here the host waits for the device
        for slot, row in self.running.items():
            row.age = age[slot]
        done = [slot for slot in self.running if not alive[slot]]
        # here the host waits a second time
        drawn = self.decoder.drawn(done, max(age[slot] for slot in done)) if done else {}
        completions = {}
        for slot in done:
            row = self.running.pop(slot)
            ids, logprobs = (values[: row.age].tolist() for values in drawn[slot])
            if not math.isfinite(logprobs[-1]):
                raise FloatingPointError(
                    f"token {row.age} of completion {row.index} has the log-prob {logprobs[-1]}"
                )
            completions[row.index] = Completion(ids, logprobs, ids[-1] in self.decoder.stop_ids)
        return completions


class Decoder:
    """What the device holds for each slot, and the step that draws the next tokens of the rows in
    the first slots.

    All memory but the cache's is made here, at its full size. The host decides which rows run and
    in which slots; what depends on the tokens drawn stays on the device. A slot without a row is
    harmless: its token is drawn, and dropped.
    """

    def __init__(
        self, model, slots: int, columns: int, max_new_tokens: int, stop_ids: Iterable[int], **how
    ):
        """columns: of the longest row, prompt and completion; how: the settings of
        `draw_tokens`."""
        self.model = model
        self.slots = slots
        self.columns = columns
        self.max_new_tokens = max_new_tokens
        self.draw = partial(draw_tokens, **how)
        self.stop_ids = set(stop_ids)
        self.on_cuda = model.device.type == "cuda"
        self.cache: SlotCache | None = None  # comes with the first prompts, and is like theirs
        vocabulary = model.config.get_text_config().vocab_size
        zeros = partial(torch.zeros, slots, device=model.device)
        # bool [V]
        self.stops = torch.tensor(
            [t in self.stop_ids for t in range(vocabulary)], device=model.device
        )
        self.every_slot = torch.arange(slots, device=model.device)
        # the last token, its position, and how many were drawn
        self.token, self.position, self.age = (zeros(dtype=torch.long) for _ in range(3))
        # neither ended nor at max_new_tokens, and its log-probs are finite
        self.alive = zeros(dtype=torch.bool)
        # a row that has ended writes what is still drawn behind its last token
        places = max_new_tokens + 1
        self.token_ids, self.logprobs = zeros(places, dtype=torch.long), zeros(places)
        self.uniforms = zeros(places, dtype=torch.double)

    def start(
        self, free: list[int], prefilled: "Prefilled", prompts: list[int], seeds: list[int]
    ) -> None:
        """Begin rows in these free slots: with prompts[n] of `prefilled` and random numbers from
        seeds[n]."""
        if self.cache is None:
            self.cache = SlotCache(self.slots, prefilled.cache, self.columns)
        slots, prompts = torch.tensor([free, prompts], device=self.model.device)
        self.cache.load(slots, prefilled, prompts)
        uniforms = [
            torch.rand(
                self.max_new_tokens,
                dtype=torch.double,
                generator=torch.Generator().manual_seed(seed),
            )
            for seed in seeds
        ]
        self.uniforms[slots, :-1] = torch.stack(uniforms).to(slots.device)
        self.position[slots] = prefilled.last[prompts]
        self.age[slots], self.alive[slots] = 0, True
        self.append(slots, prefilled.logits[prompts])

    def run(self, rows: int, columns: int) -> None:
        """A step of the first `rows` slots, whose longest row has so many columns."""
        width = -(-columns // COLUMNS) * COLUMNS  # rounded up
        self.cache.reserve(width)
        self.step(rows, width)

    def step(self, rows: int, width: int) -> None:
        """One more token for the first `rows` slots. Shapes come from the two numbers alone,
        nothing waits for the device, and all it reads and writes stays in place while the cache
        does: it can be captured in a CUDA graph."""
        # an idle row farther on might see no column
        position = self.position[:rows].clamp(max=width - 1)
        logits = decode(self.model, self.cache, self.token[:rows], position, width)
        self.append(self.every_slot[:rows], logits)

    def append(self, slots: Tensor, logits: Tensor) -> None:
        """Draw the next token of the rows in these n slots from their logits [n, V]."""
        age, alive = self.age[slots], self.alive[slots]
        token, logprob = self.draw(logits, self.uniforms[slots, age])
        self.token_ids[slots, age] = token
        self.logprobs[slots, age] = logprob
        self.token[slots] = token
        self.age[slots], self.position[slots] = age + alive, self.position[slots] + alive
        self.alive[slots] = (
            alive & ~self.stops[token] & (age + 1 < self.max_new_tokens) & (logprob > -torch.inf)
        )

    def move(self, old: list[int], new: list[int], columns: int) -> None:
        """Copy the rows in the slots `old`, of at most so many columns, to the slots `new`."""
        old, new = torch.tensor([old, new], device=self.model.device)
        for state in self.memory(columns):
            state[new] = state[old]

    def memory(self, columns: int | None = None) -> list[Tensor]:
        """Everything that a step reads or writes, but for the model: [slots, ...] each; of the keys
        and values all columns, or so many."""
        layers = self.cache.layers if self.cache else []
        cached = [
            t[:, :, :columns]
            for layer in layers
            for t in (layer.keys, layer.values)
            if t is not None
        ]
        cached += [state for layer in layers for state in layer.states.values()]
        return [
            self.token,
            self.position,
            self.age,
            self.alive,
            self.token_ids,
            self.logprobs,
            self.uniforms,
            *cached,
        ]

    def poll(self, rows: int) -> tuple[list[int], list[int]]:
        """(still alive?, tokens drawn) of the first `rows` slots."""
        return torch.stack((self.alive.long(), self.age))[:, :rows].tolist()

    def drawn(self, slots: list[int], tokens: int) -> dict[int, tuple[Tensor, Tensor]]:
        """The first so many token ids and log-probs of each of these slots: copied at once, with
        all slots between."""
        first, last = min(slots), max(slots) + 1
        ids, logprobs = torch.stack(
            [t[first:last, :tokens].double() for t in (self.token_ids, self.logprobs)]
        ).cpu()
        return {slot: (ids[slot - first].long(), logprobs[slot - first]) for slot in slots}


class SlotCache(Cache):
    """What the layers remember of the rows in the slots, with the shapes and dtypes of `like`: keys
    and values [slots, heads, columns, dim], states of fixed size [slots, ...], or both.

    A slot is never cleared: a row sees only the columns up to its own position, all of which it has
    written itself, and a state is loaded whole. New columns are zeros, because a masked column
    counts 0 times its value, and 0 times nan is nan.
    """

    def __init__(self, slots: int, like: Cache, most_columns: int):
        super().__init__(layers=[SlotLayer(slots, layer) for layer in like.layers])
        self.columns, self.most_columns = 0, most_columns

    def reserve(self, columns: int) -> None:
        """Have at least this many columns. Grows by half, so that the copying of all growth
        together is linear."""
        if columns > self.columns:
            before = self.columns
            self.columns = max(columns, min(self.columns * 3 // 2, self.most_columns))
            more = (0, 0, 0, self.columns - before)
            for layer in self.layers:
                if layer.keys is not None:
                    layer.keys, layer.values = (
                        nn.functional.pad(t, more) for t in (layer.keys, layer.values)
                    )

    def load(self, slots: Tensor, prefilled: "Prefilled", prompts: Tensor) -> None:
        """Copy prompts[n] of `prefilled` into slots[n]."""
        width = prefilled.width  # padding included: `decode` masks it until the row overwrites it
        self.reserve(width)
        for ours, theirs in zip(self.layers, prefilled.cache.layers, strict=True):
            if ours.keys is not None:
                ours.keys[slots, :, :width] = theirs.keys[prompts]
                ours.values[slots, :, :width] = theirs.values[prompts]
            for name, state in states_of(theirs).items():
                ours.states[name][slots] = state[prompts]


class SlotLayer(LinearAttentionAndFullAttentionLayer):
    """One layer of a SlotCache."""

    def __init__(self, slots: int, like: CacheLayerMixin):
        super().__init__(getattr(like, "number_of_states", 0))
        if like.keys is not None:
            self.keys, self.values = (
                t.new_zeros(slots, t.shape[1], 0, t.shape[3]) for t in (like.keys, like.values)
            )
            self.is_initialized = True
        self.states = {
            name: t.new_zeros(slots, *t.shape[1:]) for name, t in states_of(like).items()
        }
        for kind, i in self.states:  # what transformers asks before it reads a state
            self.has_previous_state[i] = getattr(self, f"is_{kind}_initialized")[i] = True
        self.rows = self.position = self.width = None

    def begin_step(self, rows: Tensor, position: Tensor, width: int) -> None:
        """The model is about to run one new token for each of the first R slots: rows [R], position
        [R] < width."""
        self.rows, self.position, self.width = rows, position, width
        for (kind, i), state in self.states.items():
            # a view, which the model's layer updates in place
            getattr(self, kind)[i] = state[: len(rows)]

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Called by the model's attention with keys and values [R, heads, 1, dim] of the new
        tokens; returns all that these rows have, [R, heads, width, dim]."""
        place = self.rows, slice(None), self.position
        # under autocast `keys` may have another dtype
        self.keys[place] = keys.squeeze(2).to(self.keys.dtype)
        self.values[place] = values.squeeze(2).to(self.values.dtype)
        return self.keys[: len(keys), :, : self.width], self.values[: len(keys), :, : self.width]


def states_of(layer: CacheLayerMixin) -> dict[tuple[str, int], Tensor]:
    """The states of fixed size that a layer of one of transformers' caches has, [rows, ...]
    each."""
    return {
        (kind, i): state
        for kind in ("conv_states", "recurrent_states")
        for i, state in getattr(layer, kind, {}).items()
        if state is not None
    }


@dataclass
class Prefilled:
    """N prompts that the model has read."""

    cache: Cache
    logits: Tensor  # [N, V], of the next token
    last: Tensor  # [N], the column of each prompt's last token
    width: int  # columns of the cache


def prefill(model, prompts: Sequence[Sequence[int]]) -> Prefilled:
    """Run N prompts in one batch. Padding, by any id, goes on the right, where causal attention
    lets no token see it: so there is no mask, which keeps fast attention kernels possible, and no
    row of attention without a token to see. Layers with a state would see it: for those the prompts
    must have the same length."""
    width = max(map(len, prompts))
    ids = torch.tensor(
        [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=model.device
    )
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=model.device)
    cache = DynamicCache()
    # the model expects to find a layer for them; this kind has room for keys and values, too
    if has_states(model):
        config = model.config.get_text_config()
        number = getattr(config, "number_of_conv_states", 1)
        cache.layers = [
            LinearAttentionAndFullAttentionLayer(number) for _ in range(config.num_hidden_layers)
        ]
    output = model(
        input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=last.unsqueeze(1)
    )
    return Prefilled(output.past_key_values, output.logits[:, -1], last, width)


def decode(model, cache: SlotCache, token: Tensor, position: Tensor, width: int) -> Tensor:
    """One token for each of the first R slots: token [R], position [R] < width -> logits [R, V] of
    the next. A row sees the columns up to its position, whatever stands in the others."""
    # [R, width], negative: the future
    distance = position.unsqueeze(1) - torch.arange(width, device=position.device)
    masks = {}
    for kind, window in attention_windows(model).items():
        hidden = (distance < 0) | (distance >= window)
        masks[kind] = torch.zeros_like(hidden, dtype=model.dtype).masked_fill_(hidden, -torch.inf)[
            :, None, None
        ]
    # Models with several kinds of layers want a mask for each, None where none is needed.
    masks = (masks | dict.fromkeys(STATES)) if len(masks) > 1 else masks.popitem()[1]
    rows = torch.arange(len(token), device=token.device)
    for layer in cache.layers:
        layer.begin_step(rows, position, width)
    output = model(
        input_ids=token.unsqueeze(1),
        attention_mask=masks,
        position_ids=position.unsqueeze(1),
        past_key_values=cache,
        use_cache=True,
    )
    return output.logits[:, -1]


def attention_windows(model) -> dict[str, float]:
    """How far back each kind of attention in the model sees, in tokens; ValueError if `decode`
    cannot run it."""
    kinds, config = layer_kinds(model), model.config.get_text_config()
    windows = {
        "full_attention": torch.inf,
        "sliding_attention": getattr(config, "sliding_window", None),
    }
    if kinds - windows.keys() - STATES or config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"sampling needs layers of {', '.join([*windows, *sorted(STATES)])}, and attention "
            f"run by 'sdpa' or 'eager'; this model has {', '.join(sorted(kinds))} by "
            f"{config._attn_implementation!r}"
        )
    return {kind: windows[kind] for kind in kinds & windows.keys()} or {"full_attention": torch.inf}


@torch.inference_mode()
def check_model(model) -> None:
    """ValueError if `decode` cannot run the model, or finds other next tokens than the model finds
    without a cache."""
    config, ids = model.config.get_text_config(), torch.arange(6, device=model.device)
    window = getattr(config, "sliding_window", None)
    try:
        if window:
            # shorter than the ids: a model that knows no windows is found out
            config.sliding_window = 3
        attention_windows(model)
        with _sampling_mode(model):
            whole = (
                model(input_ids=ids.unsqueeze(0), use_cache=False)
                .logits[0, 2:]
                .float()
                .log_softmax(-1)
            )
            prefilled = prefill(model, [[0, 1, 2]])
            cache = SlotCache(1, prefilled.cache, len(ids))
            cache.load(ids[:1], prefilled, ids[:1])
            cache.reserve(len(ids))
            logits = [
                prefilled.logits,
                *(decode(model, cache, t, t, len(ids)) for t in ids[3:].split(1)),
            ]
    finally:
        if window:
            config.sliding_window = window
    divergence = (whole.exp() * (whole - torch.cat(logits).float().log_softmax(-1))).sum(-1).max()
    if divergence > (1e-3 if model.dtype == torch.float32 else 0.3):  # half precision rounds
        raise ValueError(
            "with a cache its next tokens have another distribution than without "
            f"({divergence:.2g} nats apart): its layers remember what `decode` does not keep, or "
            "see what it does not mask"
        )


def has_states(model) -> bool:
    """Whether a layer keeps a state of fixed size, of the whole row so far."""
    return not STATES.isdisjoint(layer_kinds(model))


def layer_kinds(model) -> set[str]:
    config = model.config.get_text_config()
    sliding = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    kinds = kinds or ["sliding_attention" if sliding else "full_attention"]
    return set(kinds) - {"mlp", "moe"}  # these remember nothing


def draw_tokens(
    logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor]:
    """Draw a token per row by inverting the cumulative distribution at `uniform`.

    logits [R, V], uniform [R] in [0, 1) -> token ids [R] and their log-probs [R] (float32, nats)
    under the distribution drawn from: softmax(logits / temperature) in float32, cut to the top_k
    likeliest tokens, then to the fewest of those whose mass reaches top_p, renormalised.

    >>> logits = torch.tensor([[0.5, 0.2, 0.3]]).log()
    >>> draw_tokens(logits, torch.tensor([0.6]))[0].item()                # 0.6 falls into [0.5, 0.7)
    1
    >>> token, logprob = draw_tokens(logits, torch.tensor([0.6]), top_k=2)   # tokens 0 and 2 with 0.625 and 0.375
    >>> token.item(), round(logprob.exp().item(), 3)
    (0, 0.625)
    """
    if temperature < 1e-6:  # also where a division would give inf - inf
        highest, token = logits.float().max(-1)
        return token, highest - highest  # 0, or nan
    logits = logits.float() / temperature
    ids = None
    # sorted: likeliest first; top_p needs the order, and only inside top_k if both are set
    if top_k > 0 or top_p < 1:
        logits, ids = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]), dim=-1)
    probs = logits.softmax(-1)
    if top_p < 1:
        # mass of the likelier tokens: 0 for the likeliest, which stays
        likelier = probs.cumsum(-1) - probs
        probs = probs.masked_fill(likelier >= top_p, 0)
        probs = probs / probs.sum(-1, keepdim=True)
    chosen = _invert_cdf(probs, uniform)
    token = chosen if ids is None else ids.gather(-1, chosen)
    return token.squeeze(-1), probs.gather(-1, chosen).log().squeeze(-1)


def _invert_cdf(probs: Tensor, uniform: Tensor, block: int = 256) -> Tensor:
    """The first token at which the running sum of probs [R, V] exceeds uniform [R]; [R, 1]. Probs
    may sum to nearly 1.

    In float64, because in float32 the rare tokens of a large vocabulary would be lost to rounding.
    First the block of tokens is found, then the token in the block: a running sum over all of V
    takes several times as long.
    """
    blocks = (
        nn.functional.pad(probs, (0, -probs.shape[-1] % block))
        if probs.shape[-1] % block
        else probs
    )
    blocks = blocks.unflatten(-1, (-1, block))  # [R, V / block, block]
    ends = blocks.sum(-1).cumsum(-1, dtype=torch.double)
    # Rounding must not carry the target to an end, behind which there are only tokens of
    # probability 0. The integers are clamped for nan, which exceeds nothing: any token will do
    # then, its log-prob is nan.
    zero = ends.new_zeros(())
    target = (uniform.double().unsqueeze(-1) * ends[:, -1:]).minimum(ends[:, -1:].nextafter(zero))
    which = torch.searchsorted(ends, target, right=True).clamp_(max=ends.shape[-1] - 1)
    inside = blocks[torch.arange(len(probs), device=probs.device), which.squeeze(-1)].cumsum(
        -1, dtype=torch.double
    )
    # measured from the end, where both sums agree
    target = inside[:, -1:] - (ends.gather(-1, which) - target)
    target = target.clamp(min=0).minimum(inside[:, -1:].nextafter(zero))
    return (which * block + torch.searchsorted(inside, target, right=True)).clamp_(
        max=probs.shape[-1] - 1
    )


def stop_ids(model, tokenizer) -> list[int]:
    """Every end-of-sequence id in tokenizer, config and generation_config: they may disagree.
    ValueError if none is."""
    found = set()
    for source in (tokenizer, model.config, getattr(model, "generation_config", None)):
        ids = getattr(source, "eos_token_id", None)
        found |= set(ids) if isinstance(ids, (list, tuple)) else {ids} - {None}
    if not found:
        raise ValueError(
            "neither tokenizer, config nor generation_config names an eos_token_id: sampling "
            "would never stop"
        )
    return sorted(found)


def generator_for_rows(seed: Sequence[int], first_row: int) -> torch.Generator:
    """A generator with which `sample` draws what rows first_row, first_row + 1, ... of one large
    call would draw.

    `seed` is any tuple of non-negative integers, such as (seed, step). A rank that samples rows [a,
    b) of a step takes first_row = a, and all ranks together sample what one process would.
    """
    generator = torch.Generator().manual_seed(
        int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
    )
    row_seeds(generator, first_row)  # those of the rows of the ranks before this one
    return generator


def row_seeds(generator: torch.Generator | None, rows: int) -> list[int]:
    """The seeds of the next `rows` rows. Rows with the same seed and prompt become the same
    completion."""
    return torch.randint(2**63 - 1, (rows,), generator=generator).tolist()


def window(model) -> float:
    """The most tokens that prompt and completion may have together; inf if the config sets no
    bound.

    For rotary embeddings of type longrope that is the window without extension: beyond it the
    longest row of a batch would change the embeddings of all others.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return (
            rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
        )
    return getattr(config, "max_position_embeddings", None) or float("inf")


def row_size(model) -> tuple[int, int]:
    """Bytes that the cache takes for one row: (for every column, for states of fixed size)."""
    with torch.inference_mode(), _sampling_mode(model):
        layers = prefill(model, [[0]]).cache.layers
    return (
        sum(t.nbytes for layer in layers for t in (layer.keys, layer.values) if t is not None),
        sum(state.nbytes for layer in layers for state in states_of(layer).values()),
    )


@contextmanager
def _sampling_mode(model):
    """eval() inside: dropout off, and gradient checkpointing, which would switch the KV cache off,
    asleep. Modules that have a method `sampling(on)`, such as lora.LoRALinear, are told: until it
    ends no weight changes."""
    training = [module for module in model.modules() if module.training]
    told = [module.sampling for module in model.modules() if hasattr(module, "sampling")]
    model.eval()
    try:
        for tell in told:
            tell(True)
        yield
    finally:
        for tell in told:
            tell(False)
        for module in training:
            module.training = True


def _check(model, prompts, max_new_tokens, temperature, top_p, top_k, samples_per_prompt, slots):
    attention_windows(model)
    for name, value, least in (
        ("max_new_tokens", max_new_tokens, 1),
        ("samples_per_prompt", samples_per_prompt, 1),
        ("slots", slots, 1),
        ("top_k", top_k, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be in [0, inf), got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompts[{i}] is empty")
        if len(prompt) + max_new_tokens > window(model):
            raise ValueError(
                f"prompts[{i}] has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} "
                f"that is more than the model's window of {window(model)}"
            )
