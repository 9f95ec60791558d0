"""Sampling completions from a transformers causal LM: many at a time, with a KV cache.

The naive way is three lines: run the model on prompt + completion so far, draw a token from the
last logits, repeat (see tests/test_rollout.py). Each step computes all earlier tokens again. This
file keeps what later tokens need of them: the keys and values of attention (the KV cache). And when
a completion ends, the next one takes its place (continuous batching). Its words:

    row       one sample of one prompt: the tokens of the prompt, then those of the completion
    slot      the room for one row in the cache. Memory grows with the number of slots, not with that of the rows
    column    the room for one token in a slot. Column t holds the keys and values of the token at position t of the row
    state     what a layer of linear attention or of convolution remembers of a row. It has a fixed size and no columns
    CPU, GPU  the CPU runs this file and tells the GPU what to do. It goes on at once, but waits if it reads a result.
              Without a GPU, the CPU does the work of both

Three classes share the work. `_Batch`, on the CPU, knows which row is in which slot. `Decoder`, on
the GPU, has the tokens and draws new ones. `SlotCache` is the memory of the model: keys, values and
states of all slots. `sample` repeats four stages:

    start     Waiting rows take the free slots. Their prompts go through the model together (prefill), each prompt only
              once: every sample of a prompt starts from a copy of its columns
    close     The rows in the last slots move into slots that are still free, so the batch gets smaller
    decode    Every row gets one token, at its own position. A row that has ended stands still: what is drawn for it is
              dropped. At most POLL_EVERY such steps follow each other. In them the CPU never waits
    poll      The CPU asks which rows have ended, and fetches their tokens. Their slots are free then

Every row has random numbers of its own. So its tokens do not depend on the rows decoded beside it:
the same generator gives the same completions for any number of slots, and for one process or many
(`generator_for_rows`). One thing still differs: matrix products are rounded differently in batches
of different sizes.

Copy this file: it needs torch, transformers and numpy. It knows token ids only: no chat template,
no reward.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer

POLL_EVERY = 2  # decode steps between two polls; a row that has ended waits for the next one
# On a GPU a poll costs more: the GPU has nothing to do until the CPU has asked and answered.
POLL_EVERY_ON_CUDA = 8
# The most prompt tokens, with padding, that go through the model together: bounds its activations.
PREFILL_TOKENS = 2**14
# Attention reads a multiple of this many columns, so that `decode` sees few different shapes.
COLUMNS = 32
# Layers of these kinds keep states; those of kind hybrid keep columns, too.
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
    unused: Sequence[int] = (),
    samples_per_prompt: int = 1,
    slots: int | None = None,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_completion: Callable[[int, Completion], None] | None = None,
    make_decoder: Callable | None = None,
) -> list[Completion]:
    """Draw `samples_per_prompt` completions of each prompt (token ids, any lengths).

    Result i * samples_per_prompt + j belongs to prompt i. Temperature 0 is greedy; top_p = 1 and
    top_k = 0 are off; nothing is taken from the model's generation_config. Ids in `unused` are never
    drawn, except for stop ids (`unused_ids` finds them). At most `slots` rows are decoded together,
    which bounds the memory; None: all of them. `seeds`, one for each result, seed the rows. Without
    them they are drawn from `generator`, or from torch's global random state if there is no
    generator either. `progress(tokens, finished)` gets the numbers of tokens and of finished rows
    since its last call. `on_completion(index, completion)` gets every result as soon as it is
    there. An exception from either ends the sampling. `make_decoder` has the arguments of `Decoder`
    and returns one. It may return the same one in several calls (support/graphs.py).

    The model runs in eval mode without gradients; the mode of every module is restored, whatever
    happens. ValueError if max_new_tokens, temperature, top_p or top_k is out of range, if a prompt
    is empty or, with its completion, longer than the model's window, or if `decode` does not know
    the model's kind of layers or attention (`check_model` finds out more). FloatingPointError if a
    log-prob is not finite, because logits were not.
    """
    columns = _longest_row(model, prompts, max_new_tokens, temperature, top_p, top_k)
    total = len(prompts) * samples_per_prompt
    if seeds is None:
        seeds = row_seeds(generator, total)
    if len(seeds) != total:
        raise ValueError(f"seeds must be {total}, one for each result")
    slots = min(slots or total, total)
    completions = {}
    with torch.inference_mode(), _sampling_mode(model):
        decoder = (make_decoder or Decoder)(
            model,
            slots,
            columns,
            max_new_tokens,
            stop_ids,
            unused=unused,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
        )
        batch = _Batch(decoder, prompts, samples_per_prompt, seeds)
        while len(completions) < total:
            before = batch.tokens
            batch.start_rows()
            batch.close_gaps()
            batch.decode_until_poll()
            finished = batch.take_finished()
            completions.update(finished)
            if on_completion:
                for index, completion in finished.items():
                    on_completion(index, completion)
            if progress:
                progress(batch.tokens - before, len(finished))
    return [completions[index] for index in range(total)]


@dataclass
class _Row:
    """What the CPU knows of a row."""

    index: int  # its place among the results
    place: int  # of its prompt in _Batch.prefilled
    prompt_length: int
    age: int = 1  # tokens drawn, as of the last poll


class _Batch:
    """The rows of one call, as the CPU sees them: which wait, and which are decoded in which
    slot."""

    def __init__(self, decoder, prompts, samples_per_prompt, seeds):
        self.decoder = decoder
        self.prompts = prompts
        self.samples_per_prompt = samples_per_prompt
        self.seeds = seeds
        self.waiting = list(range(len(prompts)))  # prompts that have not been prefilled
        self.prefilled = None
        self.ready = []  # waiting rows whose prompts are in self.prefilled
        self.running = {}  # slot -> row
        self.tokens = 0  # drawn so far, for all rows, as of the last poll

    def start_rows(self):
        """Waiting rows take the free slots and draw their first tokens."""
        free = [slot for slot in range(self.decoder.slots) if slot not in self.running]
        while free and (self.ready or self.waiting):
            if not self.ready:
                self.prefill_next(len(free))
            started = {}  # slot -> row
            while free and self.ready:
                started[free.pop(0)] = self.ready.pop(0)
            places = [row.place for row in started.values()]
            seeds = [self.seeds[row.index] for row in started.values()]
            self.decoder.start(list(started), self.prefilled, places, seeds)
            self.running.update(started)
            self.tokens += len(started)
            if not self.ready:
                self.prefilled = None  # frees its memory

    def prefill_next(self, rows):
        """Prefill the prompts of the next `rows` rows, or of slots / 4 rows if that is more: large
        batches are cheaper."""
        k = self.samples_per_prompt
        most = math.ceil(max(rows, self.decoder.slots // 4) / k)
        longest = len(self.prompts[self.waiting[0]])
        possible = self.waiting
        if has_states(self.decoder.model):  # padding would enter a state
            possible = [i for i in possible if len(self.prompts[i]) == longest]
        chosen = []
        for i in possible[:most]:
            longest = max(longest, len(self.prompts[i]))
            tokens = (len(chosen) + 1) * longest  # with padding
            if chosen and tokens > PREFILL_TOKENS:
                break
            chosen.append(i)
        self.prefilled = prefill(self.decoder.model, [self.prompts[i] for i in chosen])
        for place, i in enumerate(chosen):
            self.waiting.remove(i)
            for index in range(i * k, i * k + k):
                self.ready.append(_Row(index, place, len(self.prompts[i])))

    def close_gaps(self):
        """Move the last rows into the free slots between the others, so that the slots in use are
        the first ones."""
        count = len(self.running)
        gaps = [slot for slot in range(count) if slot not in self.running]
        last = [slot for slot in self.running if slot >= count]
        if gaps:
            self.decoder.move(last, gaps)
        for old, new in zip(last, gaps, strict=True):
            self.running[new] = self.running.pop(old)

    def decode_until_poll(self):
        """Draw some tokens for every row; fewer if a row reaches max_new_tokens before."""
        rows = self.running.values()
        oldest = max(row.age for row in rows)
        # a step writes the column of the last token, too
        longest = max(row.prompt_length + row.age for row in rows)
        steps = min(self.decoder.poll_every, self.decoder.max_new_tokens - oldest)
        for step in range(steps):
            self.decoder.run(len(rows), longest + step)

    def take_finished(self):
        """Poll: the completions of the rows that have ended, by index; their slots become free."""
        alive, ages = self.decoder.poll(len(self.running))  # here the CPU waits for the GPU
        for slot, row in self.running.items():
            self.tokens += ages[slot] - row.age
            row.age = ages[slot]
        ended = [slot for slot in self.running if not alive[slot]]
        if not ended:
            return {}
        # Here the CPU waits a second time. One copy is faster than many.
        drawn = self.decoder.drawn(ended, max(ages))
        completions = {}
        for slot, (ids, logprobs) in zip(ended, drawn, strict=True):
            row = self.running.pop(slot)
            ids = ids[: row.age].long().tolist()
            logprobs = logprobs[: row.age].tolist()
            if not math.isfinite(logprobs[-1]):
                raise FloatingPointError(
                    f"token {row.age} of completion {row.index} has the log-prob {logprobs[-1]}"
                )
            completions[row.index] = Completion(ids, logprobs, ids[-1] in self.decoder.stop_ids)
        return completions


class Decoder:
    """What the GPU knows of the row in each slot, and the step that draws the next tokens of the
    rows in the first slots.

    The CPU picks rows. Tokens and positions stay on the GPU, so the CPU need not wait. All memory
    is made here at its full size, except for the cache. A slot without a row does no harm: a token
    is drawn for it, and dropped.
    """

    def __init__(self, model, slots, columns, max_new_tokens, stop_ids, unused=(), **how):
        """columns: of the longest row, prompt and completion; unused: ids that are never drawn; how:
        the settings of `draw_tokens`."""
        self.model = model
        self.slots = slots
        self.columns = columns
        self.max_new_tokens = max_new_tokens
        self.stop_ids = list(stop_ids)
        self.draw = partial(draw_tokens, **how)
        self.poll_every = POLL_EVERY_ON_CUDA if model.device.type == "cuda" else POLL_EVERY
        self.cache = None  # a SlotCache, made with the first prompts, which show its shapes
        # Rows that have ended write what is still drawn for them behind their last token.
        places = max_new_tokens + 1
        with model.device:  # where torch makes these tensors
            self.stops = torch.tensor(self.stop_ids, dtype=torch.long)
            self.unused = torch.tensor(sorted({*unused} - {*self.stop_ids}), dtype=torch.long)
            # the last token, its column, and how many were drawn
            self.token, self.position, self.age = torch.zeros(3, slots, dtype=torch.long)
            # it has not ended, it is below max_new_tokens, and its log-probs are finite
            self.alive = torch.zeros(slots, dtype=torch.bool)
            self.token_ids = torch.zeros(slots, places, dtype=torch.long)
            self.logprobs = torch.zeros(slots, places)
            self.uniforms = torch.zeros(slots, places, dtype=torch.double)

    def start(self, free, prefilled, prompts, seeds):
        """Begin rows in these free slots. Row n has prompt number prompts[n] of `prefilled`, and its
        random numbers come from seeds[n]. All but `prefilled` are lists of integers."""
        if self.cache is None:
            self.cache = SlotCache(self.slots, prefilled.cache, self.columns)
        uniforms = []
        for seed in seeds:
            stream = torch.Generator().manual_seed(seed)
            uniforms.append(torch.rand(self.max_new_tokens, dtype=torch.double, generator=stream))
        slots, prompts = torch.tensor([free, prompts], device=self.model.device)
        self.cache.load(slots, prefilled, prompts)
        self.uniforms[slots, :-1] = torch.stack(uniforms).to(slots.device)
        self.position[slots] = prefilled.last[prompts]
        self.age[slots] = 0
        self.alive[slots] = True
        self.append(slots, prefilled.logits[prompts])

    def run(self, rows, columns):
        """A step of the first `rows` slots, whose longest row has so many columns."""
        width = -(-columns // COLUMNS) * COLUMNS  # rounded up
        self.cache.reserve(width)
        self.step(rows, width)

    def step(self, rows, width):
        """One more token for the first `rows` slots. A CUDA graph can record it: the two numbers
        alone set all shapes, the CPU waits for nothing, and all tensors that it reads and writes
        keep their place in memory until the cache grows."""
        # A slot without a row may hold a position beyond `width`. It might see no column: nan.
        position = self.position[:rows].clamp(max=width - 1)
        logits = decode(self.model, self.cache, self.token[:rows], position, width)
        self.append(torch.arange(rows, device=logits.device), logits)

    def append(self, slots, logits):
        """Draw the next token of the rows in these n slots from their logits [n, V]."""
        age = self.age[slots]
        alive = self.alive[slots]
        # not `logits[:, self.unused] = -inf`, which copies the number from the CPU
        logits.index_fill_(1, self.unused, -torch.inf)
        token, logprob = self.draw(logits, self.uniforms[slots, age])
        self.token[slots] = token
        self.token_ids[slots, age] = token
        self.logprobs[slots, age] = logprob
        # an ended row stands still: here `alive` counts as 0 or 1
        self.age[slots] = age + alive
        self.position[slots] += alive
        stopped = (token.unsqueeze(1) == self.stops).any(1)
        has_room = age + 1 < self.max_new_tokens
        self.alive[slots] = alive & ~stopped & has_room & (logprob > -torch.inf)

    def move(self, old, new):
        """Copy the rows in the slots `old` to the slots `new`, lists of integers."""
        old, new = torch.tensor([old, new], device=self.model.device)
        for tensor in self.memory():
            tensor[new] = tensor[old]

    def memory(self):
        """Everything that a step reads or writes, except for the model: [slots, ...] each."""
        own = [
            self.token,
            self.position,
            self.age,
            self.alive,
            self.token_ids,
            self.logprobs,
            self.uniforms,
        ]
        return own + self.cache.memory() if self.cache else own

    def poll(self, rows):
        """Two lists for the first `rows` slots: whether the row is alive (0 or 1), and how many tokens
        it has drawn."""
        return torch.stack((self.alive, self.age))[:, :rows].tolist()

    def drawn(self, slots, tokens):
        """Ids and log-probs of the first `tokens` tokens of each of these n slots: [n, 2, tokens], on the
        CPU, in float64, which holds both exactly."""
        ids = self.token_ids[slots, :tokens].double()
        return torch.stack((ids, self.logprobs[slots, :tokens].double()), 1).cpu()


class SlotCache(Cache):
    """What the layers remember of the rows in the slots, with the shapes and dtypes of `like`: keys
    and values [slots, heads, columns, dim], states [slots, ...], or both.

    A slot is never cleared. A row sees only the columns up to its own position, and it has written
    all of them itself. A state is loaded whole. New columns are zeros: a masked column counts 0
    times its value, and 0 times nan would be nan.
    """

    def __init__(self, slots, like, most_columns):
        super().__init__(layers=[SlotLayer(slots, layer) for layer in like.layers])
        self.columns = 0
        self.most_columns = most_columns

    def reserve(self, columns):
        """Make room for at least this many columns. The room grows by half, so that all copying
        together takes time in proportion to the last size."""
        if columns <= self.columns:
            return
        before = self.columns
        self.columns = max(columns, min(before * 3 // 2, self.most_columns))
        more = (0, 0, 0, self.columns - before)  # behind the last column; none elsewhere
        for layer in self.layers:
            if layer.keys is not None:
                layer.keys = nn.functional.pad(layer.keys, more)
                layer.values = nn.functional.pad(layer.values, more)

    def load(self, slots, prefilled, prompts):
        """Copy prompt number prompts[n] of `prefilled` into slot slots[n]."""
        for ours, theirs in zip(self.layers, prefilled.cache.layers, strict=True):
            if ours.keys is not None:
                # with padding: `decode` masks it until the row overwrites it
                width = theirs.keys.shape[2]
                self.reserve(width)
                ours.keys[slots, :, :width] = theirs.keys[prompts]
                ours.values[slots, :, :width] = theirs.values[prompts]
            for name, state in states_of(theirs).items():
                ours.states[name][slots] = state[prompts]

    def memory(self):
        """All keys, values and states: [slots, ...] each."""
        found = []
        for layer in self.layers:
            if layer.keys is not None:
                found += [layer.keys, layer.values]
            found += layer.states.values()
        return found


class SlotLayer(LinearAttentionAndFullAttentionLayer):
    """One layer of a SlotCache."""

    def __init__(self, slots, like):
        super().__init__(getattr(like, "number_of_states", 0))

        def zeros_like(tensor):
            return tensor.new_zeros(slots, *tensor.shape[1:])

        if like.keys is not None:
            self.keys = zeros_like(like.keys[:, :, :0])  # no columns yet
            self.values = zeros_like(like.values[:, :, :0])
            self.is_initialized = True
        self.states = {}
        for (kind, i), state in states_of(like).items():
            self.states[kind, i] = zeros_like(state)
            # what transformers asks before it reads a state
            self.has_previous_state[i] = True
            getattr(self, f"is_{kind}_initialized")[i] = True

    def begin_step(self, rows, position, width):
        """The model is about to run one new token for each of the first R slots: rows [R], position
        [R] < width."""
        self.place = rows, slice(None), position  # of the new keys
        self.seen = slice(len(rows)), slice(None), slice(width)
        for (kind, i), state in self.states.items():
            # a view, which the model's layer updates in place
            getattr(self, kind)[i] = state[: len(rows)]

    def update(self, keys, values, *args, **kwargs):
        """Called by the model's attention with keys and values [R, heads, 1, dim] of the new
        tokens; returns all that these rows have, [R, heads, width, dim]."""
        # under autocast `keys` may have another dtype
        self.keys[self.place] = keys.squeeze(2).to(self.keys.dtype)
        self.values[self.place] = values.squeeze(2).to(self.values.dtype)
        return self.keys[self.seen], self.values[self.seen]


def states_of(layer):
    """The states that a layer of one of transformers' caches has, by (kind, number): tensors
    [rows, ...]."""
    found = {}
    for kind in ("conv_states", "recurrent_states"):
        for i, state in getattr(layer, kind, {}).items():
            if state is not None:
                found[kind, i] = state
    return found


@dataclass
class Prefilled:
    """N prompts that the model has read."""

    cache: Cache
    logits: Tensor  # [N, V], of the next token
    last: Tensor  # [N], the column of each prompt's last token


def prefill(model, prompts: Sequence[Sequence[int]]) -> Prefilled:
    """Run N prompts in one batch.

    Padding is on the right, where no token sees it: attention is causal. So no mask is needed, and
    fast attention kernels can be used. Layers with states would see padding: for them all prompts
    must have the same length.
    """
    rows = [torch.tensor(prompt) for prompt in prompts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=model.device)
    cache = DynamicCache()
    if has_states(model):
        # the model expects to find its layers there; this kind has room for keys and values, too
        config = model.config.get_text_config()
        number = getattr(config, "number_of_conv_states", 1)
        for _ in range(config.num_hidden_layers):
            cache.layers.append(LinearAttentionAndFullAttentionLayer(number))
    output = model(
        input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=last.unsqueeze(1)
    )
    return Prefilled(output.past_key_values, output.logits[:, -1], last)


def decode(model, cache: SlotCache, token: Tensor, position: Tensor, width: int) -> Tensor:
    """One token for each of the first R slots: token [R], position [R] < width -> logits [R, V] of
    the next. A row sees the columns up to its position, whatever stands in the others."""
    columns = torch.arange(width, device=position.device)
    masks = attention_masks(model, position[:, None, None, None] - columns)
    rows = torch.arange(len(token), device=token.device)
    for layer in cache.layers:
        layer.begin_step(rows, position, width)
    return model(
        input_ids=token.unsqueeze(1),
        attention_mask=masks,
        position_ids=position.unsqueeze(1),
        past_key_values=cache,
        use_cache=True,
    ).logits[:, 0]


def attention_masks(
    model, distance: Tensor, scores: Tensor | float = 0.0
) -> Tensor | dict[str, Tensor | None]:
    """What the model wants as its mask: `scores`, and -inf where a query does not see a column. distance
    [R, 1, queries, columns]: the position of the query minus that of the column, negative in the
    future. Gradients flow through the scores."""
    masks = {}
    for kind, window in attention_windows(model).items():
        hidden = (distance < 0) | (distance >= window)
        mask = torch.zeros_like(hidden, dtype=model.dtype) + scores
        masks[kind] = mask.masked_fill(hidden, -torch.inf)
    # Models with several kinds of attention want a mask for each kind of layer, or None.
    if len(masks) > 1:
        return masks | dict.fromkeys(STATES)
    (mask,) = masks.values()  # one kind: the model wants the mask itself
    return mask


def attention_windows(model) -> dict[str, float]:
    """How far back each kind of attention in the model sees, in tokens; ValueError if `decode`
    cannot run it."""
    config = model.config.get_text_config()
    windows = {
        "full_attention": torch.inf,
        "sliding_attention": getattr(config, "sliding_window", None),
    }
    kinds = layer_kinds(model)
    by = config._attn_implementation
    if kinds - windows.keys() - STATES or by not in ("sdpa", "eager"):
        raise ValueError(
            "sampling needs full or sliding attention, run by 'sdpa' or 'eager', or layers with "
            f"states; this model has {', '.join(sorted(kinds))} by {by!r}"
        )
    found = {kind: windows[kind] for kind in kinds & windows.keys()}
    return found or {"full_attention": torch.inf}


@torch.inference_mode()
def check_model(model) -> None:
    """ValueError if `decode` cannot run the model, or finds other next tokens than the model finds
    without a cache."""
    attention_windows(model)
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if window:
        config.sliding_window = 3  # fewer than the ids: a model that ignores its window is found
    try:
        difference = _difference_by_cache(model)
    finally:
        if window:
            config.sliding_window = window
    if difference > (1e-3 if model.dtype == torch.float32 else 0.3):  # half precision rounds
        raise ValueError(
            "with a cache its next tokens have another distribution than without "
            f"({difference:.2g} nats apart): its layers remember what `decode` does not keep, or "
            "see what it does not mask"
        )


def _difference_by_cache(model):
    """The largest KL(p || q) over some positions, in nats. p is the next-token distribution without a
    cache, q the one with a cache."""
    ids = torch.arange(6, device=model.device)  # token t stands at position t
    with _sampling_mode(model):
        plain = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0, 2:]
        prefilled = prefill(model, [[0, 1, 2]])
        cache = SlotCache(1, prefilled.cache, 6)
        cache.load(ids[:1], prefilled, ids[:1])  # prompt 0 into slot 0
        cache.reserve(6)
        cached = [prefilled.logits]
        for token in ids[3:].split(1):
            cached.append(decode(model, cache, token, token, 6))
    log_p = plain.float().log_softmax(1)
    log_q = torch.cat(cached).float().log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1).max()


def has_states(model) -> bool:
    """Whether a layer keeps a state."""
    return not STATES.isdisjoint(layer_kinds(model))


def layer_kinds(model) -> set[str]:
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    if not kinds:
        sliding = getattr(config, "sliding_window", None)
        kinds = ["sliding_attention" if sliding else "full_attention"]
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
        highest, token = logits.float().max(1)
        return token, highest - highest  # 0, or nan
    logits = logits.float() / temperature
    ids = None
    if top_k > 0 or top_p < 1:
        # Likeliest first: top_p needs this order. With both settings it needs only the top_k.
        most = logits.shape[1]
        logits, ids = logits.topk(min(top_k or most, most))
    probs = logits.softmax(1)
    if top_p < 1:
        # mass of the likelier tokens: 0 for the likeliest, which stays
        likelier = probs.cumsum(1) - probs
        probs = probs.masked_fill(likelier >= top_p, 0)
        probs = probs / probs.sum(1, keepdim=True)
    chosen = _invert_cdf(probs, uniform)
    token = chosen if ids is None else ids.gather(1, chosen)
    return token.squeeze(1), probs.gather(1, chosen).log().squeeze(1)


def _invert_cdf(probs, uniform, block=256):
    """The first token at which the running sum of probs [R, V] exceeds uniform [R]; [R, 1]. Probs
    may sum to nearly 1.

    Running sums are in float64: float32 would round the rare tokens of a large vocabulary away. First
    we find the block of tokens, then the token in the block: a running sum over all of V takes
    several times as long.
    """
    vocabulary = probs.shape[1]
    padding = -vocabulary % block
    padded = nn.functional.pad(probs, (0, padding)) if padding else probs
    blocks = padded.unflatten(1, (-1, block))  # [R, V / block, block]
    ends = blocks.sum(2).cumsum(1, dtype=torch.double)  # [R, V / block]
    # Keep the target below the last sum, or rounding could pick a token of probability 0.
    last = ends[:, -1:]
    target = (uniform.double().unsqueeze(1) * last).minimum(last.nextafter(-last))
    # With nan in a row, searchsorted returns an index past the end: clamp it. Any token will do, as
    # its log-prob is nan.
    which = torch.searchsorted(ends, target, right=True).clamp_(max=ends.shape[1] - 1)
    inside = blocks.take_along_dim(which.unsqueeze(2), 1).squeeze(1)  # [R, block]
    inside = inside.cumsum(1, dtype=torch.double)
    # Measure the target from the block's end: there both running sums mean the same place.
    last = inside[:, -1:]
    target = last - (ends.gather(1, which) - target)
    target = target.clamp(min=0).minimum(last.nextafter(-last))
    place = torch.searchsorted(inside, target, right=True)
    return (which * block + place).clamp_(max=vocabulary - 1)


def stop_ids(model, tokenizer, more: Iterable[int] = ()) -> list[int]:
    """Every end-of-sequence id in tokenizer, config and generation_config: they may disagree. And
    `more`. ValueError if there is none."""
    found = set(more)
    for source in (tokenizer, model.config, model.generation_config):
        ids = getattr(source, "eos_token_id", None)
        found.update(ids if isinstance(ids, Sequence) else [ids])
    found.discard(None)
    if not found:
        raise ValueError(
            "neither tokenizer, config nor generation_config names an eos_token_id: sampling "
            "would never stop"
        )
    return sorted(found)


def unused_ids(model, tokenizer) -> list[int]:
    """Ids for which the tokenizer has no token. A vocabulary is often padded to a round number, and
    it may have holes; decoded, these ids are nothing."""
    known = set(tokenizer.get_vocab().values())
    return [i for i in range(model.get_output_embeddings().weight.shape[0]) if i not in known]


def generator_for_rows(seed: Sequence[int], first_row: int) -> torch.Generator:
    """A generator for a part of the rows. Row 0 of the `sample` call that gets it draws the same
    tokens as row `first_row` of one large call.

    `seed` is any tuple of non-negative integers, such as (seed, step). A rank that samples rows [a,
    b) of a step takes first_row = a, and all ranks together sample what one process would.
    """
    mixed = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(mixed >> 1))
    row_seeds(generator, first_row)  # skips the seeds of the rows of the ranks before this one
    return generator


def row_seeds(generator: torch.Generator | None, rows: int) -> list[int]:
    """The seeds of the next `rows` rows. Rows with the same seed and prompt become the same
    completion."""
    return torch.randint(2**63 - 1, (rows,), generator=generator).tolist()


def window(model) -> float:
    """The most tokens that prompt and completion may have together; inf if the config sets no
    bound.

    Configs differ in whether max_position_embeddings counts the scaling of rotary embeddings. For
    yarn the larger number holds. linear is counted where each kind of layer has its own entry
    (Gemma 3); elsewhere it multiplies, as in vLLM. llama3 is always counted. longrope and dynamic
    keep the window without extension: beyond it the longest row of a batch would change the
    embeddings of all others.
    """
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None) or float("inf")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "linear":
        return int(most * rope["factor"])
    for part in [rope, *rope.values()]:  # it may hold an entry for each kind of layer
        kind = part.get("rope_type") if isinstance(part, dict) else None
        if kind == "longrope":
            return part["original_max_position_embeddings"]
        if kind == "yarn" and part["factor"]:
            most = max(most, int(part["original_max_position_embeddings"] * part["factor"]))
    return most


def row_size(model) -> tuple[int, int]:
    """Bytes that the cache takes for one row: (for every column, for its states)."""
    with torch.inference_mode(), _sampling_mode(model):
        cache = SlotCache(1, prefill(model, [[0]]).cache, 1)
    states = sum(tensor.nbytes for tensor in cache.memory())  # it has no columns yet
    cache.reserve(1)
    return sum(tensor.nbytes for tensor in cache.memory()) - states, states


@contextmanager
def _sampling_mode(model):
    """Inside, all modules are in eval mode: without dropout, and without gradient checkpointing,
    which would switch the KV cache off. Modules that have a method `sampling(on)`, such as
    lora.LoRALinear, are told when it begins and ends: between the two no weight changes."""
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


def _longest_row(model, prompts, max_new_tokens, temperature, top_p, top_k):
    """Length of the longest row, in tokens. ValueError for arguments with which sampling would run
    but give wrong tokens."""
    attention_windows(model)
    if not (max_new_tokens >= 1 and temperature >= 0 and 0 < top_p <= 1 and top_k >= 0):
        raise ValueError(
            "need max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1 and top_k >= 0"
        )
    lengths = [len(prompt) for prompt in prompts]
    if 0 in lengths:
        raise ValueError(f"prompts[{lengths.index(0)}] is empty")
    longest = max(lengths, default=0) + max_new_tokens
    if longest > window(model):
        raise ValueError(
            f"the longest prompt and max_new_tokens make {longest} tokens, more than the model's "
            f"window of {window(model)}"
        )
    return longest
