"""Sampling and scoring, measured beside what one would otherwise use and beside
the limit.

    python -m experiments.bench                    rows 1 to 3 on the CPU, ten minutes on two cores
    python -m experiments.bench --device cuda --rows 1 2 3 4 5 6 --repeats 1    at the shape of Qwen3-4B, in bfloat16

    1  mixed lengths    128 prompts of 48 tokens, 32 slots, at most 512 new tokens
                        peer: transformers' generate on batches of 32; limit: 32 tokens per bare decode step of 32 rows
    2  shared prompts   8 prompts of 512 tokens x 8 samples x 32 new tokens
                        peer: generate with num_return_sequences; limit: prefill and bare decode steps of 64 rows
    3  scoring          4 x 1,024 tokens of hidden states, vocabulary 151,936
                        peer: the whole float32 logits; limit: the matrix products alone
    4  decode step      4 and 32 rows of 1,024 columns
                        limit: the bytes that it must read, divided by the measured speed of copying
    5  training step    `Trainer.train_step` with the paper's settings, 4 completions of 1,024 tokens: each phase
                        limit of seconds: operations divided by the measured speed of a matrix product; of memory: the
                        formulas of docs/gpu.md for Qwen3-4B
    6  kernels          launches, attention and the longest kernels of reading 4 x 1,024 tokens and of a decode step

On CUDA rows that decode come again with CUDA graphs; then the peer of row 4 is the step without.

Weights are random: speed and memory do not depend on them. Ours and the peer take turns, so that a
slow moment of the machine meets both. The table gives medians over the turns. A ratio is the median
of the ratios of each turn.
"""

import ctypes
import gc
import json
import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

import rollout
import teacher
import toy
import train
from support.checkpoint import write_json
from support.data import Problem
from support.distributed import Ranks
from support.flags import flag, parse
from support.graphs import Graphs
from support.run import one_line_errors
from support.settings import Settings

PROGRAM = "python -m experiments.bench"
VOCABULARY = 151_936  # Qwen3's
SMALL = dict(  # the proportions of Qwen3-0.6B
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
)
QWEN3_4B = dict(
    vocab_size=VOCABULARY,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)
SHAPES = {
    "tiny": SMALL | dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, head_dim=8),
    "small": SMALL,
    "qwen3-0.6b": QWEN3_4B
    | dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16),
    "qwen3-4b": QWEN3_4B,
}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
# By phase of the paper's step with Qwen3-4B: peak GiB without DDP (docs/gpu.md), and operations: 2 P in
# a forward pass of a token, 6 P with a second one and the backward pass
FORMULA = {
    "rollout": (10.5, None),
    "teacher": (9.8, 2 * 4.02e9 * 8192),
    "student": (12.4, 6 * 4.02e9 * 6144),
}
# generate must be told what rollout.sample does by itself
DRAW = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0)


@dataclass
class BenchSettings:
    """The command line."""

    device: str = flag(
        "cuda" if torch.cuda.is_available() else "cpu",
        "where to measure, by default on a GPU if there is one",
        choices=("cpu", "cuda"),
    )
    shape: str = flag(
        None,
        "shape of the model; tiny, with fewer tokens, is for trying the script (default: small on "
        "the CPU, qwen3-4b on CUDA)",
        choices=tuple(SHAPES),
    )
    rows: list = flag([1, 2, 3], "rows to measure, in this order", least=1, most=6)
    repeats: int = flag(5, "turns of ours and the peer per row", least=1)
    out: Path = flag(None, "JSON file for the figures of every turn (default: none)")

    def fewer(self, count: int) -> int:
        """`count` tokens or rows, or what is enough to try the script."""
        return max(1, count // 32) if self.shape == "tiny" else count


def random_model(s: BenchSettings) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(**SHAPES[s.shape], eos_token_id=0, pad_token_id=0)
    with torch.device(s.device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE[s.device])
    return model.eval().requires_grad_(False)


def now() -> float:
    """The clock, in seconds, when the GPU has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work: Callable) -> float:
    """How long work() takes."""
    start = now()
    work()
    return now() - start


@torch.inference_mode()
def tokens_per_second(work: Callable) -> float:
    """How fast work() is, which returns the number of tokens that it made."""
    start = now()
    tokens = work()
    return tokens / (now() - start)


def peak_resident() -> int:
    """The most bytes that this process had in memory since its peak was forgotten."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 2**10


def peak_gib(work: Callable) -> float:
    """How much more memory is in use at the peak of work() than before; without a GPU, that of the
    process."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    ctypes.CDLL(None).malloc_trim(0)  # Linux with glibc: give back what is free
    Path("/proc/self/clear_refs").write_text("5")  # and forget the peak so far
    before = peak_resident()  # what is in memory at the moment
    work()
    return (peak_resident() - before) / 2**30


def row_of(row: str, unit: str, ours=(), peer=(), limit=()) -> dict:
    """A row of the report: a figure of ours, and what stands beside it, turn by turn."""
    return {"row": row, "unit": unit, "ours": [*ours], "peer": [*peer], "limit": [*limit]}


def take_turns(row: str, unit: str, repeats: int, measure: Callable, **works: Callable) -> dict:
    """A row of measure(work) of each work, when they take turns. In a turn all are seeded with its
    number."""
    found = row_of(row, unit)
    for turn in range(repeats):
        for name, work in works.items():
            torch.manual_seed(turn)
            found[name].append(measure(work))
    return found


HEADER = "\n| row | unit | ours | peer | ours / peer | limit | ours / limit |\n" + "|---" * 7 + "|"


def line(row: dict) -> str:
    """A row as markdown: medians over the turns, and the ratios of ours turn by turn, with smallest
    and largest."""
    cells = [row["row"], row["unit"], f"{np.median(row['ours']):,.4g}"]
    for other in (row["peer"], row["limit"]):
        if not other:
            cells += ["", ""]
        else:
            ratios = np.divide(row["ours"], other)
            spread = f"({ratios.min():.2f}-{ratios.max():.2f})"
            cells += [f"{np.median(other):,.4g}", f"{np.median(ratios):.2f} {spread}"]
    return f"| {' | '.join(cells)} |"


def random_prompts(count: int, length: int, vocabulary: int) -> list:
    torch.manual_seed(count)
    return torch.randint(vocabulary, (count, length)).tolist()


def our_tokens(model, prompts, **settings) -> int:
    """Useful tokens that rollout.sample made."""
    completions = rollout.sample(model, prompts, **settings)
    return sum(len(completion.token_ids) for completion in completions)


def peer_tokens(model, prompts, *, max_new_tokens, stop_ids, slots, samples_per_prompt=1) -> int:
    """Useful tokens that transformers' generate made: up to the stop token of each row, in batches
    of `slots` rows."""
    config = GenerationConfig(
        **DRAW,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids) or None,
        num_return_sequences=samples_per_prompt,
    )
    useful = 0
    for ids in torch.tensor(prompts, device=model.device).split(slots // samples_per_prompt):
        rows = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        for row in rows[:, ids.shape[1] :].tolist():
            for token in row:
                useful += 1
                if token in stop_ids:
                    break
    return useful


@torch.inference_mode()
def bare_steps(model, rows: int, columns: int, steps: int) -> Callable:
    """A function that makes decode steps of `rows` rows that attend to `columns` columns, and
    returns the number of tokens. It is the model alone, nothing is drawn."""
    prefilled = rollout.prefill(model, [[0]])  # shows the kind of cache
    cache = rollout.SlotCache(rows, prefilled.cache, columns)
    cache.reserve(columns)
    token = torch.zeros(rows, dtype=torch.long, device=model.device)
    position = token + columns - 1

    def decode():
        for _ in range(steps):
            rollout.decode(model, cache, token, position, columns)
        return rows * steps

    decode()  # the first time also allocates
    return decode


def decoders(s):
    """What `make_decoder` may be on this device, with the end of a row's name."""
    yield "", None
    if s.device == "cuda":
        yield ", CUDA graphs", Graphs()


def compare_samplers(row, s, model, prompts, limit, **settings):
    """Useful tokens per second. limit() does the work of the bare model, and returns the number of
    its tokens."""
    peer = partial(peer_tokens, model, prompts, **settings)
    for name, make_decoder in decoders(s):
        works = {"ours": partial(our_tokens, model, prompts, make_decoder=make_decoder, **settings)}
        turns = partial(take_turns, row + name, "tokens/s", s.repeats, tokens_per_second)
        if make_decoder:
            turns(**works)  # records what the same turns need again
        else:
            works |= {"peer": peer, "limit": limit}
        yield turns(**works)


def mixed_lengths(s):
    model = random_model(s)
    vocabulary = model.config.vocab_size
    yield from compare_samplers(
        "1 mixed lengths",
        s,
        model,
        random_prompts(s.fewer(128), 48, vocabulary),
        # a row that is decoded has 48 tokens of prompt and on average 64 of completion
        bare_steps(model, 32, columns=128, steps=60),
        slots=32,
        max_new_tokens=s.fewer(512),
        # random weights stop after 64 tokens on average
        stop_ids=range(0, vocabulary, s.fewer(64)),
    )


def shared_prompts(s):
    model = random_model(s)
    prompts = random_prompts(8, 512, model.config.vocab_size)
    decode = bare_steps(model, 64, columns=544, steps=31)

    def limit():
        rollout.prefill(model, prompts)
        return 64 + decode()  # each row's first token comes from the prefill

    yield from compare_samplers(
        "2 shared prompts",
        s,
        model,
        prompts,
        limit,
        slots=64,
        samples_per_prompt=8,
        max_new_tokens=32,
        stop_ids=[],
    )


def whole_logits(head, hidden, targets, temperature):
    """As teacher.score, at temperature 1, by all logits at once."""
    logprobs = head(hidden).float().log_softmax(-1)
    logp = -nn.functional.nll_loss(logprobs, targets, reduction="none")
    return logp, torch.special.entr(logprobs.detach().exp()).sum(-1)


def scoring(s):
    kind = {"device": s.device, "dtype": DTYPE[s.device]}
    width = SHAPES[s.shape]["hidden_size"]
    head = nn.Linear(width, VOCABULARY, bias=False, **kind).requires_grad_(False)
    hidden = torch.randn(s.fewer(4 * 1024), width, **kind)
    targets = torch.randint(VOCABULARY, (len(hidden),), device=s.device)

    @torch.no_grad()
    def forward(score):
        score(head, hidden, targets, 1.0)

    def backward(score):
        score(head, hidden.clone().requires_grad_(), targets, 1.0)[0].sum().backward()

    def products(with_gradient):
        """The matrix products that cannot be avoided: logits, and for the gradient probabilities
        times weights."""
        for chunk in hidden.split(teacher.CHUNK_LOGITS // VOCABULARY):
            logits = head(chunk)
            if with_gradient:
                logits @ head.weight

    for row, work, with_gradient in (
        ("3 log-prob + entropy, forward", forward, False),
        ("3 log-prob, forward + backward", backward, True),
    ):
        works = {"ours": partial(work, teacher.score), "peer": partial(work, whole_logits)}
        yield take_turns(
            row, "s", s.repeats, seconds, **works, limit=partial(products, with_gradient)
        )
        yield take_turns(row, "peak GiB", 1, peak_gib, **works)


def fastest(work: Callable) -> float:
    """Seconds of work() at best. The first time warms up, the second one may record a graph."""
    return min([seconds(work) for _ in range(7)][2:])


@torch.inference_mode()
def decode_steps(s):
    model = random_model(s)
    source = torch.empty(s.fewer(2**31), dtype=torch.uint8, device=s.device)
    # bytes a second, read and written
    speed = 2 * len(source) / fastest(partial(torch.empty_like(source).copy_, source))
    yield row_of("4 copying", "TB/s", [speed / 1e12])
    weights = sum(parameter.nbytes for parameter in model.parameters())
    column, _ = rollout.row_size(model)
    before = {}  # seconds of eager steps, by rows
    for name, make_decoder in decoders(s):
        for rows in (4, 32):
            limit = (weights + rows * 1024 * column) / speed
            took = [fastest(decode_step(model, rows, make_decoder))]
            row = f"4 decode step, {rows} x 1,024{name}"
            yield row_of(row, "s", took, before.get(rows, []), [limit])
            before[rows] = took


def decode_step(model, rows: int, make_decoder: Callable | None) -> Callable:
    """A step of so many rows, all of the same prompt, over 1,024 columns."""
    decoder = (make_decoder or rollout.Decoder)(model, rows, 1024, max_new_tokens=100, stop_ids=[])
    decoder.start(range(rows), rollout.prefill(model, [[0]]), [0] * rows, range(rows))
    return partial(decoder.run, rows, 1024)


@torch.inference_mode()
def kernels(s):
    """What torch's profiler sees of a work. The profiler may slow down what comes after it."""
    model = random_model(s)
    ids = random_prompts(4, s.fewer(512), model.config.vocab_size)
    works = {"reading": partial(teacher.read, model, ids, ids)}
    for name, make_decoder in decoders(s):
        works[f"decode step{name}"] = decode_step(model, 4, make_decoder)
    for what, work in works.items():
        fastest(work)
        with torch.profiler.profile() as profile:
            work()
            now()
        events = profile.key_averages()
        print(events.table("self_device_time_total", 6, max_name_column_width=50))
        attention = {event.key for event in events if re.match("aten::_.*attention", event.key)}
        launches = sum(event.count for event in events if "LaunchKernel" in event.key)
        yield row_of(f"6 {what}, {', '.join(sorted(attention))}", "launches", [launches])


def random_trainer(s: BenchSettings, out: str) -> train.Trainer:
    """A Trainer with the paper's settings, whose model has random weights and words, and hardly ever
    stops. Prompts have about 512 and 1,024 tokens."""
    model = random_model(s)
    vocabulary = {f"w{i}": i for i in range(model.config.vocab_size)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="w1"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="w0", chat_template=toy.CHAT_TEMPLATE
    )
    settings = Settings(
        data="toy", out=out, prompts_per_step=4, max_new_tokens=s.fewer(1024), lora_rank=s.fewer(64)
    )
    # no 8 GB are written and read
    with patch.object(train, "load_model", lambda *_: (model, tokenizer)):
        t = train.Trainer(settings, Ranks.alone())
    t.problems = [Problem("w2 " * 490, "w2 " * 470, "7", 1)]
    t.log.bar = tqdm(disable=True)
    return t


def training_step(s):
    matrix = torch.randn(s.fewer(8192), s.fewer(8192), device=s.device, dtype=DTYPE[s.device])
    # operations a second
    speed = 2 * len(matrix) ** 3 / fastest(partial(torch.mm, matrix, matrix))
    yield row_of("5 matrix product", "TFLOP/s", [speed / 1e12])
    with TemporaryDirectory() as out:
        t = random_trainer(s, out)
        for name, make_decoder in decoders(s):
            t.make_decoder = make_decoder
            # warms up; only graphs need all tokens for that
            t.s.max_new_tokens = s.fewer(1024) if make_decoder else s.fewer(64)
            t.train_step()
            t.s.max_new_tokens = s.fewer(1024)
            steps = [t.train_step() for _ in range(s.repeats)]
            for phase, (memory, operations) in FORMULA.items():
                took = [metrics[f"{phase}_s"] for metrics in steps]
                limit = [operations / speed] if operations else []
                yield row_of(f"5 {phase}{name}", "s", took, limit=limit)
                peaks = [metrics[f"{phase}_gib"] for metrics in steps]
                yield row_of(f"5 {phase}{name}", "peak GiB", peaks, limit=[memory])


ROWS = {
    1: mixed_lengths,
    2: shared_prompts,
    3: scoring,
    4: decode_steps,
    5: training_step,
    6: kernels,
}


def measure(s: BenchSettings) -> None:
    """All rows, printed and written into --out as they come. If a row fails, the next number
    follows."""
    Ranks.alone()  # on CUDA: the attention kernels that training takes
    s.shape = s.shape or {"cpu": "small", "cuda": "qwen3-4b"}[s.device]
    machine = re.search(r"model name\s*:\s*(.+)|$", Path("/proc/cpuinfo").read_text())[1]
    if torch.version.cuda and s.device == "cuda":
        machine = torch.cuda.get_device_name()
    about = {
        "command": shlex.join([*PROGRAM.split(), *sys.argv[1:]]),
        "machine": f"{machine}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(f"{json.dumps(about, indent=1)}\n{HEADER}")
    if s.out:
        s.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    failed = False
    for number in s.rows:
        try:
            for row in ROWS[number](s):
                rows.append(row)
                print(line(row), flush=True)
                if s.out:
                    write_json(s.out, about | {"rows": rows})
        except Exception:
            traceback.print_exc()
            failed = True
    raise SystemExit(failed)


def main() -> None:
    with one_line_errors(PROGRAM, "stopped"):
        measure(parse(BenchSettings, sys.argv[1:], __doc__))


if __name__ == "__main__":
    main()
