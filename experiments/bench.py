"""Sampling, scoring and a training step, measured beside what one would otherwise use and beside
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
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

import rollout
import teacher
from support.distributed import Ranks
from support.errors import InputError
from support.flags import flag, parse
from support.run import one_line_errors

PROGRAM = "python -m experiments.bench"
SMALL = dict(  # the proportions of Qwen3-0.6B
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=4096,
)
QWEN3_4B = dict(
    vocab_size=151_936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40_960,
    tie_word_embeddings=True,
)
VOCABULARY = 151_936  # Qwen3's
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
    shape = QWEN3_4B if device == "cuda" else SMALL
    with torch.device(device):
        model = Qwen3ForCausalLM(Qwen3Config(**shape, eos_token_id=0, pad_token_id=0))
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


def resident(field: str) -> int:
    """Bytes that this process has in memory, by its field of /proc/self/status."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(field + ":")[1].split()[0]) * 2**10


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
    before = resident("VmRSS")
    work()
    return (resident("VmHWM") - before) / 2**30


def take_turns(row: str, unit: str, repeats: int, **works: Callable) -> dict:
    """A row of the report: what each work(turn) returns when they take turns, a number."""
    found = {"row": row, "unit": unit, "ours": [], "peer": [], "limit": []}
    for turn in range(repeats):
        for name, work in works.items():
            found[name].append(work(turn))
    return found


def line(row: dict) -> str:
    """A row as markdown: medians over the turns, and the ratios of ours turn by turn, with smallest
    and largest."""
    ours = row["ours"]
    cells = [row["row"], row["unit"], f"{statistics.median(ours):,.4g}"]
    for other in (row["peer"], row["limit"]):
        if other:
            ratios = [a / b for a, b in zip(ours, other, strict=True)]
            middle = statistics.median(ratios)
            cells.append(f"{statistics.median(other):,.4g}")
            cells.append(f"{middle:.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
        else:
            cells += ["", ""]
    return f"| {' | '.join(cells)} |"


def random_prompts(count: int, length: int, vocabulary: int) -> list:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(vocabulary, (count, length), generator=generator).tolist()


def our_tokens(model, prompts, seed: int, **settings) -> int:
    """Useful tokens that rollout.sample made."""
    generator = torch.Generator().manual_seed(seed)
    completions = rollout.sample(model, prompts, generator=generator, **settings)
    return sum(len(completion.token_ids) for completion in completions)


@torch.inference_mode()
def peer_tokens(
    model, prompts, seed: int, *, max_new_tokens, stop_ids, slots, samples_per_prompt=1
) -> int:
    """Useful tokens that transformers' generate made: up to the stop token of each row, in batches
    of `slots` rows."""
    torch.manual_seed(seed)
    config = GenerationConfig(
        **DRAW,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids or None,
        num_return_sequences=samples_per_prompt,
    )
    useful = 0
    stop = set(stop_ids)
    batch = slots // samples_per_prompt
    for start in range(0, len(prompts), batch):
        ids = torch.tensor(prompts[start : start + batch], device=model.device)
        rows = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        for row in rows[:, ids.shape[1] :].tolist():
            for token in row:
                useful += 1
                if token in stop:
                    break
    return useful


@torch.inference_mode()
def bare_step(model, rows: int, columns: int, steps: int = 60) -> float:
    """Seconds of one decode step of `rows` rows that attend to `columns` columns: the model alone,
    nothing is drawn."""
    prefilled = rollout.prefill(model, random_prompts(1, 8, model.config.vocab_size))
    cache = rollout.SlotCache(rows, prefilled.cache, columns)
    cache.reserve(columns)
    token = torch.zeros(rows, dtype=torch.long, device=model.device)
    step = partial(rollout.decode, model, cache, token, token + columns - 1, columns)
    step()  # the first one also allocates

    def steps_in_a_row():
        for _ in range(steps):
            step()

    return seconds(steps_in_a_row) / steps


def compare_samplers(row: str, model, prompts, repeats: int, limit: Callable, **settings) -> dict:
    """Tokens/s of ours and the peer; both are seeded with the turn's number."""

    def rate(sampler, turn):
        start = now()
        tokens = sampler(model, prompts, turn, **settings)
        return tokens / (now() - start)

    ours = partial(rate, our_tokens)
    peer = partial(rate, peer_tokens)
    return take_turns(row, "tokens/s", repeats, ours=ours, peer=peer, limit=limit)


def mixed_lengths(device: str, repeats: int) -> Iterator[dict]:
    model = random_model(device)
    vocabulary = model.config.vocab_size
    stop_ids = list(range(0, vocabulary, 64))  # random weights stop after 64 tokens on average
    # a row that is decoded has 48 tokens of prompt and on average 64 of completion
    columns = 128

    def limit(_):
        return 32 / bare_step(model, 32, columns)

    yield compare_samplers(
        "1 mixed lengths",
        model,
        random_prompts(128, 48, vocabulary),
        repeats,
        limit,
        slots=32,
        max_new_tokens=512,
        stop_ids=stop_ids,
    )


def shared_prompts(device: str, repeats: int) -> Iterator[dict]:
    model = random_model(device)
    prompts = random_prompts(8, 512, model.config.vocab_size)

    @torch.inference_mode()
    def limit(_):
        prefill = seconds(partial(rollout.prefill, model, prompts))
        return 8 * 8 * 32 / (prefill + 31 * bare_step(model, 64, 544))

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


def whole_logits(head, hidden: Tensor, targets: Tensor, temperature: float, entropy: bool):
    """As teacher.score, at temperature 1, by all logits at once."""
    logprobs = head(hidden).float().log_softmax(-1)
    logp = logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    if not entropy:
        return logp, None
    return logp, torch.special.entr(logprobs.exp()).sum(-1)


def scoring(device: str, repeats: int) -> Iterator[dict]:
    torch.manual_seed(0)
    kind = {"device": device, "dtype": DTYPE[device]}
    width = 2560 if device == "cuda" else 256
    head = nn.Linear(width, VOCABULARY, bias=False, **kind).requires_grad_(False)
    hidden = torch.randn(4 * 1024, width, **kind)
    targets = torch.randint(VOCABULARY, (len(hidden),), device=device)

    @torch.no_grad()
    def forward(score):
        score(head, hidden, targets, 1.0, True)

    def backward(score):
        score(head, hidden.clone().requires_grad_(), targets, 1.0, False)[0].sum().backward()

    def products(count):
        """The matrix products that cannot be avoided: logits, and for the gradient probabilities
        times weights."""
        for chunk in hidden.split(teacher.CHUNK_LOGITS // VOCABULARY):
            logits = head(chunk)
            if count == 2:
                logits @ head.weight

    def rows(row, work, count):
        yield take_turns(
            row,
            "s",
            repeats,
            ours=lambda _: seconds(partial(work, teacher.score)),
            peer=lambda _: seconds(partial(work, whole_logits)),
            limit=lambda _: seconds(partial(products, count)),
        )
        yield take_turns(
            row,
            "peak GiB",
            1,
            ours=lambda _: peak_gib(partial(work, teacher.score)),
            peer=lambda _: peak_gib(partial(work, whole_logits)),
        )

    yield from rows("3 log-prob + entropy, forward", forward, 1)
    yield from rows("3 log-prob, forward + backward", backward, 2)


ROWS = {1: mixed_lengths, 2: shared_prompts, 3: scoring}


def measure(s: BenchSettings) -> None:
    """All rows, printed as they come, and into --out."""
    Ranks.alone()  # on CUDA: the attention kernels that training takes
    if s.device == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        cpu = re.search(r"model name\s*:\s*(.+)|$", Path("/proc/cpuinfo").read_text())[1]
        machine = f"{cpu}, {os.cpu_count()} cores"
    about = {
        "command": shlex.join([*PROGRAM.split(), *sys.argv[1:]]),
        "machine": machine,
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(DTYPE[s.device]).removeprefix("torch."),
        "turns": s.repeats,
    }
    for key, value in about.items():
        print(f"{key}: {value}")
    print("\n| row | unit | ours | peer | ours / peer | limit | ours / limit |")
    print("|---" * 7 + "|", flush=True)
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
        s = parse(BenchSettings, sys.argv[1:], __doc__)
        if s.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda needs a CUDA GPU, and torch sees none: leave it out")
        measure(s)


if __name__ == "__main__":
    main()
