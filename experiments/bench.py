"""Sampling and scoring, measured beside what one would otherwise use and beside
the limit.

    python -m experiments.bench                    all rows on the CPU, ten minutes on two cores
    python -m experiments.bench --device cuda      the same rows at the shape of Qwen3-4B, in bfloat16

    1  mixed lengths    128 prompts of 48 tokens, 32 slots, at most 512 new tokens
                        peer: transformers' generate on batches of 32; limit: 32 tokens per bare decode step of 32 rows
    2  shared prompts   8 prompts of 512 tokens x 8 samples x 32 new tokens
                        peer: generate with num_return_sequences; limit: prefill and bare decode steps of 64 rows
    3  scoring          4 x 1,024 tokens of hidden states, vocabulary 151,936
                        peer: the whole float32 logits; limit: the matrix products alone

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
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

import rollout
import teacher
from support.distributed import Ranks
from support.flags import flag, parse
from support.run import one_line_errors

PROGRAM = "python -m experiments.bench"
VOCABULARY = 151_936  # Qwen3's
SHAPE = {
    "cpu": dict(  # the proportions of Qwen3-0.6B
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    ),
    "cuda": dict(  # Qwen3-4B
        vocab_size=VOCABULARY,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
# generate must be told what rollout.sample does by itself
DRAW = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0)


@dataclass
class BenchSettings:
    """The command line."""

    device: str = flag("cpu", "where to measure", choices=("cpu", "cuda"))
    rows: list = flag([1, 2, 3], "rows to measure", least=1, most=3)
    repeats: int = flag(5, "turns of ours and the peer per row", least=1)
    out: Path = flag(None, "JSON file for the figures of every turn (default: none)")


def random_model(device: str) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(**SHAPE[device], eos_token_id=0, pad_token_id=0)
    with torch.device(device):
        model = Qwen3ForCausalLM(config)
    return model.to(DTYPE[device]).eval().requires_grad_(False)


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


def take_turns(row: str, unit: str, repeats: int, measure: Callable, **works: Callable) -> dict:
    """A row of the report: measure(work) of each work, when they take turns. In a turn all are
    seeded with its number."""
    found = {"row": row, "unit": unit, "ours": [], "peer": [], "limit": []}
    for turn in range(repeats):
        for name, work in works.items():
            torch.manual_seed(turn)
            found[name].append(measure(work))
    return found


def line(row: dict) -> str:
    """A row as markdown: medians over the turns, and the ratios of ours turn by turn, with smallest
    and largest."""
    cells = [row["row"], row["unit"], f"{np.median(row['ours']):,.4g}"]
    for other in (row["peer"], row["limit"]):
        if other:
            ratios = np.divide(row["ours"], other)
            spread = f"({ratios.min():.2f}-{ratios.max():.2f})"
            cells += [f"{np.median(other):,.4g}", f"{np.median(ratios):.2f} {spread}"]
    return f"| {' | '.join(cells)} |"


def random_prompts(count: int, length: int, vocabulary: int) -> list:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(vocabulary, (count, length), generator=generator).tolist()


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


def compare_samplers(row, model, prompts, repeats, limit, **settings):
    """Useful tokens per second. limit() does the work of the bare model, and returns the number of
    its tokens."""
    ours = partial(our_tokens, model, prompts, **settings)
    peer = partial(peer_tokens, model, prompts, **settings)
    return take_turns(
        row, "tokens/s", repeats, tokens_per_second, ours=ours, peer=peer, limit=limit
    )


def mixed_lengths(device, repeats):
    model = random_model(device)
    vocabulary = model.config.vocab_size
    yield compare_samplers(
        "1 mixed lengths",
        model,
        random_prompts(128, 48, vocabulary),
        repeats,
        # a row that is decoded has 48 tokens of prompt and on average 64 of completion
        bare_steps(model, 32, columns=128, steps=60),
        slots=32,
        max_new_tokens=512,
        stop_ids=range(0, vocabulary, 64),  # random weights stop after 64 tokens on average
    )


def shared_prompts(device, repeats):
    model = random_model(device)
    prompts = random_prompts(8, 512, model.config.vocab_size)
    decode = bare_steps(model, 64, columns=544, steps=31)

    def limit():
        rollout.prefill(model, prompts)
        return 64 + decode()  # each row's first token comes from the prefill

    yield compare_samplers(
        "2 shared prompts",
        model,
        prompts,
        repeats,
        limit,
        slots=64,
        samples_per_prompt=8,
        max_new_tokens=32,
        stop_ids=[],
    )


def whole_logits(head, hidden, targets, temperature, entropy):
    """As teacher.score, at temperature 1, by all logits at once."""
    logprobs = head(hidden).float().log_softmax(-1)
    logp = -nn.functional.nll_loss(logprobs, targets, reduction="none")
    if not entropy:
        return logp, None
    return logp, torch.special.entr(logprobs.exp()).sum(-1)


def scoring(device, repeats):
    kind = {"device": device, "dtype": DTYPE[device]}
    width = SHAPE[device]["hidden_size"]
    head = nn.Linear(width, VOCABULARY, bias=False, **kind).requires_grad_(False)
    hidden = torch.randn(4 * 1024, width, **kind)
    targets = torch.randint(VOCABULARY, (len(hidden),), device=device)

    @torch.no_grad()
    def forward(score):
        score(head, hidden, targets, 1.0, True)

    def backward(score):
        score(head, hidden.clone().requires_grad_(), targets, 1.0, False)[0].sum().backward()

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
            row, "s", repeats, seconds, **works, limit=partial(products, with_gradient)
        )
        yield take_turns(row, "peak GiB", 1, peak_gib, **works)


ROWS = {1: mixed_lengths, 2: shared_prompts, 3: scoring}


def measure(s: BenchSettings) -> None:
    """All rows, printed as they come, and into --out."""
    Ranks.alone()  # on CUDA: the attention kernels that training takes
    machine = re.search(r"model name\s*:\s*(.+)|$", Path("/proc/cpuinfo").read_text())[1]
    if s.device == "cuda":
        machine = torch.cuda.get_device_name()
    about = {
        "command": shlex.join([*PROGRAM.split(), *sys.argv[1:]]),
        "machine": f"{machine}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(about, indent=1))
    print(
        "\n| row | unit | ours | peer | ours / peer | limit | ours / limit |\n" + "|---" * 7 + "|"
    )
    rows = []
    for number in s.rows:
        for row in ROWS[number](s.device, s.repeats):
            print(line(row), flush=True)
            rows.append(row)
    if s.out:
        s.out.parent.mkdir(parents=True, exist_ok=True)
        s.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


def main() -> None:
    with one_line_errors(PROGRAM, "stopped"):
        measure(parse(BenchSettings, sys.argv[1:], __doc__))


if __name__ == "__main__":
    main()
