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
change in the machine's mood meets both. The table gives medians over the turns; a ratio is the
median of the ratios of each turn.
"""

import argparse
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
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

import rollout
import teacher
from support.distributed import Ranks
from support.flags import nonempty_path
from support.run import one_line_errors, say

PROGRAM = "python -m experiments.bench"
SMALL = dict(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=4,
    # proportions of Qwen3-0.6B
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


def random_model(device: str) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    shape = {"cpu": SMALL, "cuda": QWEN3_4B}[device]
    with torch.device(device):
        model = Qwen3ForCausalLM(Qwen3Config(**shape, eos_token_id=0, pad_token_id=0))
    return model.to(DTYPE[device]).eval().requires_grad_(False)


def now() -> float:
    """The clock, in seconds, when the GPU has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work: Callable) -> tuple:
    """(what work() returns, its seconds)."""
    start = now()
    return work(), now() - start


def peak_gib(work: Callable) -> float:
    """How much more memory is in use at the peak of work() than before; without a GPU, that of the
    process."""

    def resident(field: str) -> int:
        return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) * 2**10

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


def take_turns(row: str, unit: str, repeats: int, **works: Callable[[int], float]) -> dict:
    """A row of the report: what each work returns when they take turns; they get the number of the
    turn."""
    turns = [{name: work(turn) for name, work in works.items()} for turn in range(repeats)]
    return {"row": row, "unit": unit, "peer": [], "limit": []} | {
        name: [t[name] for t in turns] for name in works
    }


def line(row: dict) -> str:
    """A row as markdown: medians over the turns, and the ratios of ours turn by turn, with smallest
    and largest."""
    cells = [row["row"], row["unit"], f"{statistics.median(row['ours']):,.4g}"]
    for name in ("peer", "limit"):
        ratios = sorted(ours / other for ours, other in zip(row["ours"], row[name], strict=False))
        cells += (
            [
                f"{statistics.median(row[name]):,.4g}",
                f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})",
            ]
            if ratios
            else ["", ""]
        )
    return f"| {' | '.join(cells)} |"


def random_prompts(count: int, length: int, vocabulary: int) -> list[list[int]]:
    return torch.randint(
        vocabulary, (count, length), generator=torch.Generator().manual_seed(count)
    ).tolist()


def our_tokens(model, prompts, seed: int, **settings) -> int:
    """Useful tokens that rollout.sample made."""
    completions = rollout.sample(
        model, prompts, generator=torch.Generator().manual_seed(seed), **settings
    )
    return sum(len(completion.token_ids) for completion in completions)


@torch.inference_mode()
def peer_tokens(
    model,
    prompts,
    seed: int,
    *,
    max_new_tokens: int,
    stop_ids: list[int],
    slots: int,
    samples_per_prompt: int = 1,
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
    useful, stop, batch = 0, set(stop_ids), slots // samples_per_prompt
    for start in range(0, len(prompts), batch):
        ids = torch.tensor(prompts[start : start + batch], device=model.device)
        rows = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        for row in rows[:, ids.shape[1] :].tolist():
            useful += next((i + 1 for i, token in enumerate(row) if token in stop), len(row))
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
    step()
    return timed(lambda: [step() for _ in range(steps)])[1] / steps


def compare_samplers(row: str, model, prompts, repeats: int, limit: Callable, **settings) -> dict:
    """Tokens/s of ours and the peer; both are seeded with the turn's number."""

    def rate(sampler: Callable, turn: int) -> float:
        tokens, seconds = timed(partial(sampler, model, prompts, turn, **settings))
        return tokens / seconds

    return take_turns(
        row,
        "tokens/s",
        repeats,
        ours=partial(rate, our_tokens),
        peer=partial(rate, peer_tokens),
        limit=limit,
    )


def mixed_lengths(device: str, repeats: int) -> Iterator[dict]:
    model = random_model(device)
    # random weights stop after 64 tokens on average
    stop_ids = list(range(0, model.config.vocab_size, 64))
    # a row has 48 tokens of prompt and, by the lengths' lack of memory, 64 tokens on average
    columns = 128
    prompts = random_prompts(128, 48, model.config.vocab_size)
    yield compare_samplers(
        "1 mixed lengths",
        model,
        prompts,
        repeats,
        lambda _: 32 / bare_step(model, 32, columns),
        slots=32,
        max_new_tokens=512,
        stop_ids=stop_ids,
    )


def shared_prompts(device: str, repeats: int) -> Iterator[dict]:
    model = random_model(device)
    prompts = random_prompts(8, 512, model.config.vocab_size)

    @torch.inference_mode()
    def limit(_) -> float:
        prefill = timed(lambda: rollout.prefill(model, prompts))[1]
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
    logprobs = head(hidden).float().log_softmax(-1)  # the temperature is 1
    logp = logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return logp, torch.special.entr(logprobs.exp()).sum(-1) if entropy else None


def scoring(device: str, repeats: int) -> Iterator[dict]:
    torch.manual_seed(0)
    kind = {"device": device, "dtype": DTYPE[device]}
    head = nn.Linear(
        {"cpu": 256, "cuda": 2560}[device], VOCABULARY, bias=False, **kind
    ).requires_grad_(False)
    hidden = torch.randn(4 * 1024, head.in_features, **kind)
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
            ours=lambda _: timed(partial(work, teacher.score))[1],
            peer=lambda _: timed(partial(work, whole_logits))[1],
            limit=lambda _: timed(partial(products, count))[1],
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


def main() -> None:
    parser = argparse.ArgumentParser(
        PROGRAM,
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"), help="where to measure (default: cpu)")
    add(
        "--rows",
        type=int,
        nargs="+",
        choices=ROWS,
        default=list(ROWS),
        help="rows to measure (default: all)",
    )
    add("--repeats", type=int, default=5, help="turns of ours and the peer per row (default: 5)")
    add(
        "--out",
        type=nonempty_path,
        help="write the figures of every turn to this JSON file as well",
    )
    a = parser.parse_args()
    if a.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "--device cuda needs a CUDA GPU, and torch sees none: leave it out to measure on "
            "the CPU"
        )
    if a.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {a.repeats}")
    with one_line_errors(PROGRAM, "stopped"):
        measure(a)


def measure(a) -> None:
    """All rows, printed as they come, and into --out."""
    Ranks.alone()  # on CUDA: the attention kernels that training takes
    rows, cpu = [], re.search(r"model name\s*:\s*(.+)|$", Path("/proc/cpuinfo").read_text())[1]
    about = {
        "command": shlex.join([*PROGRAM.split(), *sys.argv[1:]]),
        "machine": torch.cuda.get_device_name()
        if a.device == "cuda"
        else f"{cpu}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(DTYPE[a.device]).removeprefix("torch."),
        "turns": a.repeats,
    }
    say(
        "  ".join(f"{key}: {value}" for key, value in about.items()) + "\n\n"
        "| row | unit | ours | peer | ours / peer | limit | ours / limit |\n" + "|---" * 7 + "|"
    )
    for number in a.rows:
        for row in ROWS[number](a.device, a.repeats):
            say(line(row))
            rows.append(row)
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
