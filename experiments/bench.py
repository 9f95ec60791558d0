"""Sampling and scoring, measured beside what one would otherwise use and beside the limit.

    python -m experiments.bench                    all rows on the CPU, about ten minutes on two cores
    python -m experiments.bench --device cuda      the same rows at the shape of Qwen3-4B, in bfloat16
    python -m experiments.bench --rows 1 3         some rows

Weights are random: speed and memory do not depend on them. Stop ids that are 1/64 of the vocabulary make the lengths
geometric with mean 64. Ours and the peer take turns, so that a change in the machine's mood meets both; the table gives
medians over the turns, and of the ratios the median of the ratios of each turn with the smallest and the largest.

    1  mixed lengths    128 prompts of 48 tokens, 32 slots, at most 512 new tokens
                        peer: transformers' generate on batches of 32; limit: 32 tokens per bare decode step of 32 rows
    2  shared prompts   8 prompts of 512 tokens x 8 samples x 32 new tokens
                        peer: generate with num_return_sequences; limit: prefill and bare decode steps of 64 rows
    3  scoring          4 x 1,024 tokens of hidden states, vocabulary 151,936
                        peer: the whole float32 logits; limit: the matrix products alone
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

import rollout
import teacher

PROGRAM = "python -m experiments.bench"
SMALL = dict(vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4,
             num_key_value_heads=2, head_dim=64, max_position_embeddings=4096)  # proportions of Qwen3-0.6B
QWEN3_4B = dict(vocab_size=151_936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
                num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960,
                tie_word_embeddings=True)
VOCABULARY = 151_936  # Qwen3's


class Machine:
    """The device, how to wait for it, and how to measure memory on it."""

    def __init__(self, device: str):
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.wait = torch.cuda.synchronize if self.cuda else lambda: None

    def model(self) -> Qwen3ForCausalLM:
        torch.manual_seed(0)
        with self.device:
            model = Qwen3ForCausalLM(Qwen3Config(**(QWEN3_4B if self.cuda else SMALL), eos_token_id=0, pad_token_id=0))
        return model.to(self.dtype).eval().requires_grad_(False)

    def timed(self, work: Callable) -> tuple:
        """(what work() returns, its seconds)."""
        self.wait()
        start = time.perf_counter()
        result = work()
        self.wait()
        return result, time.perf_counter() - start

    def seconds(self, work: Callable) -> float:
        return self.timed(work)[1]

    def rate(self, work: Callable[[], int]) -> float:
        """What work() returns per second, such as tokens."""
        amount, seconds = self.timed(work)
        return amount / seconds

    def peak_gib(self, work: Callable) -> tuple:
        """(what work() returns, how much more memory it has in use at its peak than was in use before). Without a GPU
        the memory is that of the process."""
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            return work(), (torch.cuda.max_memory_allocated() - before) / 2**30
        ctypes.CDLL(None).malloc_trim(0)  # Linux with glibc: give back what is free
        Path("/proc/self/clear_refs").write_text("5")  # and forget the peak so far
        before = self.resident_gib("VmRSS")
        return work(), self.resident_gib("VmHWM") - before

    @staticmethod
    def resident_gib(field: str) -> float:
        return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) / 2**20

    def name(self) -> str:
        if self.cuda:
            return torch.cuda.get_device_name(self.device)
        model = Path("/proc/cpuinfo").read_text().split("model name")[1].split("\n")[0].strip(" \t:")
        return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


class Table:
    """Rows of the report; each is printed as soon as it is known."""

    HEAD = "| row | unit | ours | peer | ours / peer | limit | ours / limit |\n|---|---|---|---|---|---|---|"

    def __init__(self):
        self.rows = []

    def add(self, what: str, ours: list[float], peer: list[float], limit: list[float], unit: str) -> None:
        """Values per turn; the ratios are ours / peer and ours / limit, turn by turn."""
        self.rows.append({"row": what, "unit": unit, "ours": ours, "peer": peer, "limit": limit})

        def value(values: list[float]) -> str:
            return f"{statistics.median(values):,.4g}" if values else ""

        def ratio(others: list[float]) -> str:
            ratios = sorted(a / b for a, b in zip(ours, others, strict=True)) if others else []
            return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})" if ratios else ""
        print(f"| {what} | {unit} | {value(ours)} | {value(peer)} | {ratio(peer)} | {value(limit)} | {ratio(limit)} |",
              flush=True)


def random_prompts(count: int, length: int, vocabulary: int) -> list[list[int]]:
    return torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(count)).tolist()


def our_tokens(model, prompts, seed: int, **settings) -> int:
    """Useful tokens that rollout.sample made."""
    completions = rollout.sample(model, prompts, generator=torch.Generator().manual_seed(seed), **settings)
    return sum(len(completion.token_ids) for completion in completions)


@torch.inference_mode()
def peer_tokens(model, prompts, seed: int, *, max_new_tokens: int, stop_ids: list[int], slots: int,
                samples_per_prompt: int = 1) -> int:
    """Useful tokens that transformers' generate made: up to the stop token of each row, in batches of `slots` rows."""
    torch.manual_seed(seed)
    config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
                              eos_token_id=stop_ids or None, pad_token_id=0, num_return_sequences=samples_per_prompt)
    useful, stop, batch = 0, set(stop_ids), slots // samples_per_prompt
    for start in range(0, len(prompts), batch):
        ids = torch.tensor(prompts[start:start + batch], device=model.device)
        rows = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        for row in rows[:, ids.shape[1]:].tolist():
            useful += next((i + 1 for i, token in enumerate(row) if token in stop), len(row))
    return useful


@torch.inference_mode()
def bare_step(machine: Machine, model, rows: int, columns: int, steps: int = 60) -> float:
    """Seconds of one decode step of `rows` rows that attend to `columns` columns: the model alone, nothing is drawn."""
    prefilled = rollout.prefill(model, random_prompts(1, 8, model.config.vocab_size))
    cache = rollout.SlotCache(rows, prefilled.cache, columns)
    cache.reserve(columns)
    token = torch.zeros(rows, dtype=torch.long, device=model.device)
    step = partial(rollout.decode, model, cache, token, token + columns - 1, columns)
    step()
    return machine.seconds(lambda: [step() for _ in range(steps)]) / steps


def take_turns(repeats: int, **works: Callable[[int], float]) -> dict[str, list[float]]:
    """Each work in turn, `repeats` times over; a work gets the number of the turn and returns a figure."""
    figures = {name: [] for name in works}
    for turn in range(repeats):
        for name, work in works.items():
            figures[name].append(work(turn))
    return figures


def sampling(machine: Machine, table: Table, repeats: int, name: str, model, prompts, limit, **settings) -> None:
    """A row for our sampler beside generate; limit(turn) is in tokens per second."""
    made = take_turns(
        repeats, ours=lambda turn: machine.rate(lambda: our_tokens(model, prompts, turn, **settings)),
        peer=lambda turn: machine.rate(lambda: peer_tokens(model, prompts, turn, **settings)), limit=limit)
    table.add(name, made["ours"], made["peer"], made["limit"], "tokens/s")


def mixed_lengths(machine: Machine, table: Table, repeats: int) -> None:
    model, slots = machine.model(), 32
    columns = 128  # a row has 48 tokens of prompt and, by the lengths' lack of memory, 64 tokens on average
    sampling(machine, table, repeats, "1 mixed lengths", model, random_prompts(128, 48, model.config.vocab_size),
             lambda turn: slots / bare_step(machine, model, slots, columns), slots=slots, max_new_tokens=512,
             stop_ids=list(range(0, model.config.vocab_size, 64)))  # random weights stop after 64 tokens on average


def shared_prompts(machine: Machine, table: Table, repeats: int) -> None:
    model = machine.model()
    prompts = random_prompts(8, 512, model.config.vocab_size)

    def limit(turn: int) -> float:
        with torch.inference_mode():
            prefill = machine.seconds(lambda: rollout.prefill(model, prompts))
        return 8 * 8 * 32 / (prefill + 31 * bare_step(machine, model, 64, 544))
    sampling(machine, table, repeats, "2 shared prompts", model, prompts, limit, slots=64, samples_per_prompt=8,
             max_new_tokens=32, stop_ids=[])


def scoring(machine: Machine, table: Table, repeats: int) -> None:
    tokens, width = 4 * 1024, 2560 if machine.cuda else 256
    torch.manual_seed(0)
    head = nn.Linear(width, VOCABULARY, bias=False, device=machine.device, dtype=machine.dtype).requires_grad_(False)
    hidden = torch.randn(tokens, width, device=machine.device, dtype=machine.dtype)
    targets = torch.randint(VOCABULARY, (tokens,), device=machine.device)

    def whole_logits(h, entropy):
        logprobs = head(h).float().log_softmax(-1)
        logp = logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        return logp, torch.special.entr(logprobs.exp()).sum(-1) if entropy else None

    def chunked(h, entropy):
        return teacher.score(head, h, targets, 1.0, entropy)

    def forward(score):
        with torch.no_grad():
            score(hidden, True)

    def backward(score):
        h = hidden.clone().requires_grad_()
        score(h, False)[0].sum().backward()

    def products(count):
        """The matrix products that cannot be avoided: logits, and for the gradient probabilities times weights."""
        size = teacher.CHUNK_LOGITS // VOCABULARY
        for chunk in hidden.split(size):
            logits = head(chunk)
            if count == 2:
                logits @ head.weight

    def measure(name: str, work: Callable, count: int) -> None:
        seconds = take_turns(repeats, ours=lambda turn: machine.seconds(partial(work, chunked)),
                             peer=lambda turn: machine.seconds(partial(work, whole_logits)),
                             limit=lambda turn: machine.seconds(partial(products, count)))
        table.add(name, seconds["ours"], seconds["peer"], seconds["limit"], "s")
        memory = [machine.peak_gib(partial(work, score))[1] for score in (chunked, whole_logits)]
        table.add(name, memory[:1], memory[1:], [], "peak GiB")
    measure("3 log-prob + entropy, forward", forward, 1)
    measure("3 log-prob, forward + backward", backward, 2)


ROWS = {1: mixed_lengths, 2: shared_prompts, 3: scoring}


def main() -> None:
    parser = argparse.ArgumentParser(PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"), help="where to measure (default: cpu)")
    add("--rows", type=int, nargs="+", choices=ROWS, default=list(ROWS), help="rows to measure (default: all)")
    add("--repeats", type=int, default=5, help="turns of ours and the peer per row (default: 5)")
    add("--out", type=Path, help="write the figures of every turn to this JSON file as well")
    a = parser.parse_args()
    if a.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA GPU, and torch sees none: leave it out to measure on the CPU")
    if a.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {a.repeats}")
    transformers.utils.logging.set_verbosity_error()
    machine, table = Machine(a.device), Table()
    about = {"command": shlex.join([*PROGRAM.split(), *sys.argv[1:]]), "machine": machine.name(),
             "date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "torch": torch.__version__,
             "transformers": transformers.__version__, "dtype": str(machine.dtype).removeprefix("torch."),
             "turns": a.repeats}
    print("  ".join(f"{key}: {value}" for key, value in about.items()), "", table.HEAD, sep="\n", flush=True)
    for number in a.rows:
        ROWS[number](machine, table, a.repeats)
        gc.collect()
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps(about | {"rows": table.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
