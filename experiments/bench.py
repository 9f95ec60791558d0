"""Sampling and scoring, measured beside what one would otherwise use and beside the limit.

    python experiments/bench.py                    all rows on the CPU, about 15 minutes on two cores
    python experiments/bench.py --device cuda      the same rows at the shape of Qwen3-4B, in bfloat16
    python experiments/bench.py --rows 1 3         some rows

Weights are random: speed and memory do not depend on them. Stop ids that are 1/64 of the vocabulary make the lengths
geometric with mean 64. Ours and the peer take turns, so that a change in the machine's mood meets both; the table gives
medians over the turns, and of the ratios the median of the ratios of each turn with the smallest and the largest.

    1  mixed lengths    128 prompts of 48 tokens, 32 slots, at most 512 new tokens
                        peer: transformers' generate on batches of 32; limit: 32 tokens per bare decode step of 32 rows
    2  shared prompts   8 prompts of 512 tokens x 8 samples x 32 new tokens
                        peer: generate with num_return_sequences; limit: prefill and bare decode steps of 64 rows
    3  scoring          4 x 1,024 tokens of hidden states, vocabulary 151,936
                        peer: the whole float32 logits; limit: the matrix products alone
    4  one step         shares of rollouts, teacher, student and the rest in a training step on the toy
    5  growth           16 to 1,024 completions, and a length cap of 256 to 2,048, with 16 slots
    6  padding, drawing padding of micro-batches on geometric lengths; drawing a token from 151,936, peer: multinomial
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import rollout  # noqa: E402
import teacher  # noqa: E402

SMALL = dict(vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4,
             num_key_value_heads=2, head_dim=64, max_position_embeddings=4096)  # proportions of Qwen3-0.6B
QWEN3_4B = dict(vocab_size=151_936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
                num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960, tie_word_embeddings=True)
VOCABULARY = 151_936  # Qwen3's


class Machine:
    """The device, how to wait for it, and how to measure memory on it."""

    def __init__(self, device: str):
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32

    def model(self) -> Qwen3ForCausalLM:
        torch.manual_seed(0)
        with self.device:
            model = Qwen3ForCausalLM(Qwen3Config(**(QWEN3_4B if self.cuda else SMALL), eos_token_id=0, pad_token_id=0))
        return model.to(self.dtype).eval().requires_grad_(False)

    def seconds(self, work) -> float:
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def peak_gib(self, work) -> float:
        """How much more memory `work` has in use at its peak than was in use before. Without a GPU: of the process."""
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            work()
            return (torch.cuda.max_memory_allocated() - before) / 2**30
        ctypes.CDLL(None).malloc_trim(0)  # Linux with glibc: give back what is free
        Path("/proc/self/clear_refs").write_text("5")  # and forget the peak so far
        before = self.resident_gib("VmRSS")
        work()
        return self.resident_gib("VmHWM") - before

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

    def __init__(self):
        self.rows = []

    def add(self, what: str, ours: list[float], peer: list[float] = (), limit: list[float] = (), unit: str = "",
            note: str = "") -> None:
        """Values per turn; the ratios are ours / peer and ours / limit, turn by turn."""
        row = {"row": what, "unit": unit, "ours": ours, "peer": list(peer), "limit": list(limit), "note": note}
        self.rows.append(row)
        print(self.line(row), flush=True)

    @staticmethod
    def line(row: dict) -> str:
        def ratio(other):
            turns = sorted(a / b for a, b in zip(row["ours"], row[other]))
            return f"{statistics.median(turns):.2f} ({turns[0]:.2f}-{turns[-1]:.2f})" if turns else ""
        value = lambda values: f"{statistics.median(values):,.4g}" if values else ""  # noqa: E731
        return (f"| {row['row']} | {row['unit']} | {value(row['ours'])} | {value(row['peer'])} | {ratio('peer')} | "
                f"{value(row['limit'])} | {ratio('limit')} | {row['note']} |")

    HEAD = "| row | unit | ours | peer | ours / peer | limit | ours / limit | |\n|---|---|---|---|---|---|---|---|"


def geometric_stop_ids(vocabulary: int) -> list[int]:
    """1/64 of the vocabulary: random weights stop after 64 tokens on average."""
    return list(range(0, vocabulary, 64))


def random_prompts(count: int, length: int, vocabulary: int) -> list[list[int]]:
    return torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(count)).tolist()


def ours(model, prompts, seed: int, **settings) -> int:
    """Useful tokens that rollout.sample made."""
    completions = rollout.sample(model, prompts, generator=torch.Generator().manual_seed(seed), **settings)
    return sum(len(completion.token_ids) for completion in completions)


@torch.inference_mode()
def generate(model, prompts, seed: int, *, max_new_tokens: int, stop_ids: list[int], slots: int,
             samples_per_prompt: int = 1) -> int:
    """Useful tokens that transformers' generate made: up to the stop token of each row, in batches of `slots` rows."""
    torch.manual_seed(seed)
    config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
                              eos_token_id=stop_ids or None, pad_token_id=0, num_return_sequences=samples_per_prompt)
    useful, stop, batch = 0, set(stop_ids), slots // samples_per_prompt
    for start in range(0, len(prompts), batch):
        ids = torch.tensor(prompts[start:start + batch], device=model.device)
        rows = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[:, ids.shape[1]:].tolist()
        useful += sum(next((i + 1 for i, token in enumerate(row) if token in stop), len(row)) for row in rows)
    return useful


@torch.inference_mode()
def bare_step(machine: Machine, model, rows: int, columns: int, steps: int = 60) -> float:
    """Seconds of one decode step of `rows` rows that attend to `columns` columns: the model alone, nothing is drawn."""
    shelf = rollout.prefill(model, random_prompts(1, 8, model.config.vocab_size))
    cache = rollout.SlotCache(rows, shelf.cache, columns)
    cache.reserve(columns)
    token = torch.zeros(rows, dtype=torch.long, device=model.device)
    step = partial(rollout.decode, model, cache, token, token + columns - 1, columns)
    step()
    return machine.seconds(lambda: [step() for _ in range(steps)]) / steps


def turns(repeats: int, **works) -> dict[str, list[float]]:
    """Each work in turn, `repeats` times over; a work gets the number of the turn and returns a figure."""
    figures = {name: [] for name in works}
    for turn in range(repeats):
        for name, work in works.items():
            figures[name].append(work(turn))
    return figures


def mixed_lengths(machine: Machine, table: Table, repeats: int) -> None:
    model = machine.model()
    vocabulary, slots = model.config.vocab_size, 32
    prompts = random_prompts(128, 48, vocabulary)
    settings = dict(slots=slots, max_new_tokens=512, stop_ids=geometric_stop_ids(vocabulary))

    def tokens_per_second(sampler, turn):
        made = []
        seconds = machine.seconds(lambda: made.append(sampler(model, prompts, turn, **settings)))
        return made[0] / seconds
    sizes = [1, 2, 4, 8, 16, 24, 32]
    running: list[list[int]] = []  # rows in each decode step of ours, per turn
    spent = {"decode": 0.0, "prefill": 0.0}

    def watched(turn):
        """Ours, with a note of the rows of each step and of the time that the model takes."""
        running.append([])
        originals = {name: getattr(rollout, name) for name in spent}

        def timed(name, *arguments):
            made = []
            spent[name] += machine.seconds(lambda: made.append(originals[name](*arguments)))
            if name == "decode":
                running[-1].append(len(arguments[2]))
            return made[0]
        for name in spent:
            setattr(rollout, name, partial(timed, name))
        start = time.perf_counter()
        ours(model, prompts, turn, **settings)
        total = time.perf_counter() - start
        for name, original in originals.items():
            setattr(rollout, name, original)
        return total
    columns = 128  # a row has 48 tokens of prompt and, by the lengths' lack of memory, 64 tokens on average
    prices = {f"step {n}": lambda turn, n=n: bare_step(machine, model, n, columns) for n in sizes}
    made = turns(repeats, **prices, ours=partial(tokens_per_second, ours), watched=watched,
                 peer=partial(tokens_per_second, generate))
    table.add("1 mixed lengths", made["ours"], made["peer"], [slots / s for s in made[f"step {slots}"]], "tokens/s",
              "limit: all slots full all the time")
    drained = []  # what the same steps cost if nothing but the model ran: as the last rows end, steps stay dear
    for turn, counts in enumerate(running):
        price = {n: made[f"step {n}"][turn] for n in sizes}
        seconds = sum(interpolate(n, price) for n in counts)
        drained.append((sum(counts) + len(prompts)) / seconds)
    table.add("1 mixed lengths, drain counted", made["ours"], [], drained, "tokens/s",
              "limit: the same steps with a bare model, small batches at the end included; no prefill")
    full = [sum(n == slots for n in counts) / len(counts) for counts in running]
    table.add("1 steps with all slots full", full, unit="share")
    for name, seconds in spent.items():
        table.add(f"1 time in {name}", [seconds / sum(made["watched"])], unit="share")


def interpolate(n: int, price: dict[int, float]) -> float:
    """Price of n rows between the prices known."""
    low, high = max(size for size in price if size <= n), min(size for size in price if size >= n)
    return price[low] if low == high else price[low] + (price[high] - price[low]) * (n - low) / (high - low)


def shared_prompts(machine: Machine, table: Table, repeats: int) -> None:
    model = machine.model()
    prompts = random_prompts(8, 512, model.config.vocab_size)
    settings = dict(slots=64, samples_per_prompt=8, max_new_tokens=32, stop_ids=[])

    def tokens_per_second(sampler, turn):
        return 8 * 8 * 32 / machine.seconds(lambda: sampler(model, prompts, turn, **settings))

    def limit(turn):
        with torch.inference_mode():
            prefill = machine.seconds(lambda: rollout.prefill(model, prompts))
        return 8 * 8 * 32 / (prefill + 31 * bare_step(machine, model, 64, 544))
    made = turns(repeats, ours=partial(tokens_per_second, ours), peer=partial(tokens_per_second, generate), limit=limit)
    table.add("2 shared prompts", made["ours"], made["peer"], made["limit"], "tokens/s")


def scoring(machine: Machine, table: Table, repeats: int) -> None:
    tokens, width = 4 * 1024, 2560 if machine.cuda else 256
    torch.manual_seed(0)
    new = partial(torch.randn, device=machine.device, dtype=machine.dtype)
    head = nn.Linear(width, VOCABULARY, bias=False, device=machine.device, dtype=machine.dtype).requires_grad_(False)
    hidden, targets = new(tokens, width), torch.randint(VOCABULARY, (tokens,), device=machine.device)

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
    for name, work, count in (("log-prob + entropy, forward", forward, 1), ("log-prob, forward + backward", backward, 2)):
        seconds = turns(repeats, ours=lambda turn: machine.seconds(lambda: work(chunked)),
                        peer=lambda turn: machine.seconds(lambda: work(whole_logits)),
                        limit=lambda turn: machine.seconds(lambda: products(count)))
        memory = turns(1, ours=lambda turn: machine.peak_gib(lambda: work(chunked)),
                       peer=lambda turn: machine.peak_gib(lambda: work(whole_logits)))
        table.add(f"3 {name}", seconds["ours"], seconds["peer"], seconds["limit"], "s")
        table.add(f"3 {name}", memory["ours"], memory["peer"], [], "peak GiB")


def one_step(machine: Machine, table: Table, repeats: int) -> None:
    """Shares of the seconds of training steps on the toy, as train.py logs them; the first step is left out."""
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        command = [sys.executable, str(ROOT / "train.py"), "--steps", str(4 * repeats + 1), "--checkpoint-every", "1000",
                   "--data", "toy", "--out", str(run)]
        environment = os.environ if machine.cuda else os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
    shares = {name: [step[f"{name}_s"] / step["step_s"] for step in steps] for name in ("rollout", "teacher", "student")}
    for name, share in shares.items():
        table.add(f"4 one step of the toy: {name}", share, unit="share")
    rest = [1 - sum(parts) for parts in zip(*shares.values())]
    table.add("4 one step of the toy: rest", rest, unit="share", note="verifier, optimizer, metrics")


def growth(machine: Machine, table: Table, repeats: int) -> None:
    model = machine.model()
    vocabulary = model.config.vocab_size
    made = {}

    def tokens_per_second(count, cap):
        useful = []
        seconds = machine.seconds(lambda: useful.append(ours(
            model, random_prompts(count, 48, vocabulary), 0, slots=16, max_new_tokens=cap,
            stop_ids=geometric_stop_ids(vocabulary))))
        return useful[0] / seconds
    tokens_per_second(16, 256)  # what is allocated once and for all does not count
    for count, cap in [(count, 256) for count in (16, 64, 256, 1024)] + [(64, cap) for cap in (512, 1024, 2048)]:
        memory = machine.peak_gib(lambda: made.update({(count, cap): tokens_per_second(count, cap)}))
        table.add(f"5 growth: {count} completions, cap {cap}", [made[count, cap]], unit="tokens/s",
                  note=f"peak {1024 * memory:.0f} MiB")


def padding_and_drawing(machine: Machine, table: Table, repeats: int) -> None:
    for rows, mean in ((32, 64), (128, 64), (512, 512)):
        lengths = (torch.empty(rows).geometric_(1 / mean, generator=torch.Generator().manual_seed(0)) + 48).long().tolist()
        batches = teacher.micro_batches(lengths, 16_384)
        padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
        table.add(f"6 padding: {rows} rows of mean length {mean} behind 48 tokens", [1 - sum(lengths) / padded],
                  unit="share", note=f"{len(batches)} micro-batches; "
                  f"one batch would have {1 - sum(lengths) / rows / max(lengths):.2f}")
    logits, uniform = torch.randn(32, VOCABULARY, device=machine.device), torch.rand(32, device=machine.device)

    def race():
        probs = logits.softmax(-1)
        token = torch.multinomial(probs, 1)  # the exponential race
        return token, probs.gather(-1, token).log()
    made = turns(10 * repeats, ours=lambda turn: 1000 * machine.seconds(lambda: rollout.draw_tokens(logits, uniform)),
                 peer=lambda turn: 1000 * machine.seconds(race))
    table.add("6 drawing 32 tokens of 151,936", made["ours"], made["peer"], unit="ms")


ROWS = {1: mixed_lengths, 2: shared_prompts, 3: scoring, 4: one_step, 5: growth, 6: padding_and_drawing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to measure (default: cpu)")
    parser.add_argument("--rows", type=int, nargs="+", choices=ROWS, default=list(ROWS),
                        help="rows to measure (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of ours and the peer per row (default: 5)")
    parser.add_argument("--out", type=Path, help="write the figures of every turn to this JSON file as well")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA GPU, and torch sees none: leave it out to measure on the CPU")
    if arguments.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {arguments.repeats}")
    transformers.utils.logging.set_verbosity_error()
    machine, table = Machine(arguments.device), Table()
    about = {"command": "python experiments/bench.py " + " ".join(sys.argv[1:]), "machine": machine.name(),
             "date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "torch": torch.__version__,
             "transformers": transformers.__version__, "dtype": str(machine.dtype).removeprefix("torch."),
             "turns": arguments.repeats}
    print("  ".join(f"{key}: {value}" for key, value in about.items()), "", table.HEAD, sep="\n", flush=True)
    for number in arguments.rows:
        ROWS[number](machine, table, arguments.repeats)
        gc.collect()
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(about | {"rows": table.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
