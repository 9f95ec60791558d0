r"""How well the gradient of one step points: what magnitude, gate and baseline do to it, without training.

    python -m experiments.gradients --model toy --data toy --max-new-tokens 128

The student answers N batches of B completions. Each batch is read once by student and teacher, and gives one gradient
s_b of the loss with respect to the adapter for each configuration (gamma, W, eps; floor is common), p_b that of plain
policy gradient, gamma = eps = 0, in the table `grpo`. All advantages are (r - mean) / std over the rewards of all N B
completions, which stand for those of earlier steps in eq. (9), arXiv 2605.13255; two rows have r and r - 0.5 instead.

    alignment  mean over b of cos(s_b, sum of p_b' over b' != b): how a batch agrees with plain policy gradient on all
               others; "- grpo" and "- gamma 0" (at the same eps) are differences within the same batch
    bias       cos(E s, E p) from products of different batches only, in which noise has no mean; in brackets the naive
               cosine of the two mean gradients, whose noise is common to both. Below 1: it leads elsewhere in the end
    signal     |E s|^2 / E |s|^2, from the same products; norm: sqrt(E |s|^2 / E |p|^2)
    momentum   cos(mean of s over 19 batches, E p) = bias * sqrt(|E s|^2 / (|E s|^2 + var / 19)), as AdamW's momentum
               averages over (1 + beta1) / (1 - beta1) = 19 batches

Behind +- stand standard errors: over batches, for the last three columns by a jackknife over batches. An estimate of a
square may be negative while noise outweighs the signal: then "-" is shown, and more batches are needed.

Gradients are kept as count-sketches (Charikar, Chen, Farach-Colton 2002) of --sketch coordinates, one for each batch
and configuration. Inner products of sketches are unbiased, sums of sketches are sketches of sums, and a cosine has a
standard error of at most about 1 / sqrt(--sketch), common to all configurations; with room for all coordinates it is
exact. Plain policy gradient is unbiased only for rollouts at --temperature 1 --top-p 1 --top-k 0.
"""

import argparse
import math
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import egrsd
import lora
import reward
import teacher
import toy
from family.contexts import CONTEXTS
from support.checkpoint import write_json
from support.data import add_adapter, load_adapter, load_model, load_problems
from support.errors import InputError
from support.flags import SEEDS, Parser, add_flags, check_ranges, flag, flag_name, is_inside
from support.run import name_lack_of_memory, one_line_errors, say
from support.sampling import Rollout, Sampling, check_window, grade_rollouts, progress, sample

PROGRAM = "python -m experiments.gradients"
MOMENTUM = 19  # batches
GRIDS = {"gamma": (float, "[0, inf)"), "window": (int, "[0, inf)"), "eps": (float, "[0, 1)")}
NAMES = {(0, 0, 0): "grpo", (0, 0, 0.2): "direction-aware", (0.3, 0, 0.2): "egrsd", (0.3, 3, 0.2): "cl-egrsd",
         (0.3, 3, 0): "magnitude off"}  # as experiments.compare calls them


@dataclass
class Settings(Sampling):
    """The command line: how to sample, and which gradients to compare."""

    model: str = flag("toy", "checkpoint directory, hub id or toy")
    adapter: str = flag(None, "LoRA adapter directory of the student (default: a fresh one: the base model)")
    lora_rank: int = flag(16, "rank of a fresh adapter", "[1, inf)")
    data: str = flag("toy", "JSONL file with problem, solution and answer, or toy (its training problems)")
    out: str = flag(None, "JSON file for all figures, with the cosines of every batch (default: none)")
    skip_ungradable: bool = flag(False, "leave out rows whose gold answer the verifier cannot grade")
    teacher_context: str = flag("solution", "what the teacher is shown", choices=("solution", "answer"))
    batches: int = flag(32, "batches, N", "[3, inf)")
    batch: int = flag(64, "completions per batch, B", "[1, inf)")
    samples: int = flag(1, "completions per problem", "[1, inf)")
    max_new_tokens: int = flag(1024, "longest completion in tokens, also L_max of the length reward", "[1, inf)")
    top_p: float = flag(1.0, "draw from the likeliest tokens of this mass", "(0, 1]")
    slots: int = flag(128, "rows decoded together; lower it to save memory", "[1, inf)")
    thinking: bool = flag(False, "let the chat template open a thinking block")
    seed: int = flag(0, "seed of the adapter, the order of the problems, sampling and sketches", SEEDS)
    gamma: list = flag([0.0, 0.3, 1.0, 3.0], "strengths of the gate; 0 is always among them")
    window: list = flag([0, 3, 5], "lookaheads of the gate in tokens")
    eps: list = flag([0.0, 0.2, 0.4, 0.8], "clips of the magnitude; 0 is always among them")
    floor: float = flag(0.1, "smallest gate", "(0, 1]")
    sketch: int = flag(2**16, "coordinates that are kept of a gradient", "[1, inf)")
    pass_tokens: int = flag(2**14, "tokens per forward and backward pass; lower it to save memory", "[1, inf)")


class Configuration(NamedTuple):
    """One way to weigh the tokens; without arguments plain policy gradient."""

    gamma: float = 0.0
    window: int = 0
    eps: float = 0.0
    baseline: str = "mean"

    @property
    def name(self) -> str:
        if self.baseline != "mean":
            return self.baseline
        gate = [f"gamma {self.gamma} W {self.window}"] if self.gamma else []
        return NAMES.get(self[:3]) or ", ".join(gate + [f"eps {self.eps}"] * (self.eps != 0.2))


PLAIN = Configuration()


def configurations(s: Settings) -> list[Configuration]:
    """The grid without duplicates, for gamma = 0 knows no window, and the two other baselines."""
    grid = [Configuration(gamma, window * (gamma > 0), eps) for eps in sorted({0.0, *s.eps})
            for gamma in sorted({0.0, *s.gamma}) for window in sorted(set(s.window))]
    return list(dict.fromkeys(grid)) + [PLAIN._replace(baseline=name) for name in ("r", "r - 0.5")]


class Sketch:
    """x [D] -> [m], linear: coordinates with random signs, in chunks of m that are rotated at random and added up."""

    def __init__(self, coordinates: int, size: int, seed: int, device="cpu"):
        self.size, generator = min(size, coordinates), torch.Generator().manual_seed(seed)
        self.signs = torch.randint(2, (coordinates,), dtype=torch.int8, generator=generator).mul(2).sub(1).to(device)
        self.turns = torch.randint(self.size, (math.ceil(coordinates / self.size),), generator=generator).tolist()

    def __call__(self, x: Tensor) -> Tensor:
        chunks = zip((x * self.signs).split(self.size), self.turns, strict=True)
        return sum(torch.nn.functional.pad(c, (0, self.size - len(c))).roll(turn) for c, turn in chunks)


def batch_sketches(model, sketch: Sketch, rows: list[Rollout], privileged: list[list[int]], grid: list[Configuration],
                   s: Settings) -> tuple[Tensor, Tensor]:
    """(sketches [C, m] of one batch's gradient in every configuration, the teacher's H of its tokens)."""
    prompts, completions = [row.prompt for row in rows], [row.token_ids for row in rows]
    with lora.disabled(model):
        seen = teacher.read_in_batches(model, privileged, completions, s.pass_tokens)
    device, parameters = model.device, lora.lora_parameters(model)
    A, r = (torch.tensor([getattr(row, name) for row in rows], device=device) for name in ("advantage", "reward"))
    found, top, tokens = torch.zeros(len(grid), sketch.size, device=device), seen.entropy.max(), seen.mask.sum()
    lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
    for some in teacher.micro_batches(lengths, s.pass_tokens):
        own = teacher.read(model, [prompts[i] for i in some], [completions[i] for i in some])
        width = own.mask.shape[1]
        for k, c in enumerate(grid):
            advantage = {"mean": A, "r": r, "r - 0.5": r - 0.5}[c.baseline]
            weights = egrsd.token_advantages(
                advantage[some], seen.logp[some, :width], own.logp, seen.entropy[some, :width], own.mask,
                gamma=c.gamma, window=c.window, eps=c.eps, floor=s.floor, max_entropy=top)
            loss = egrsd.policy_loss(own.logp, weights, own.mask, tokens)
            gradient = torch.autograd.grad(loss, parameters, retain_graph=c is not grid[-1])
            found[k] += sketch(torch.cat([part.flatten() for part in gradient]))
    return found, seen.entropy[seen.mask]


def cosines(own: np.ndarray, cross: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """cos(s_b, sum of p_b' over b' != b) [N] from products [N, N] of s_b and s_b', s_b and p_b', p_b and p_b'."""
    others = plain.sum() - 2 * plain.sum(1) + plain.diagonal()  # |sum of p_b' over b' != b|^2
    return (cross.sum(1) - cross.diagonal()) / np.sqrt(own.diagonal() * others)


def expected(own: np.ndarray, cross: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """bias, signal and momentum, from the same products."""
    n = len(own)
    signal, shared, plain_signal = ((x.sum() - x.trace()) / (n * (n - 1)) for x in (own, cross, plain))
    power = own.trace() / n
    averaged = signal + (power - signal) / MOMENTUM  # E |mean of MOMENTUM batches|^2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.array([shared / np.sqrt(plain_signal * signal) if min(plain_signal, signal) > 0 else np.nan,
                         signal / power, shared / np.sqrt(plain_signal * averaged)])


def jackknife(products: tuple[np.ndarray, ...]) -> np.ndarray:
    """Standard errors of `expected`, leaving out one batch at a time."""
    n = len(products[0])
    left = [np.delete(np.arange(n), b) for b in range(n)]
    values = np.array([expected(*(x[np.ix_(keep, keep)] for x in products)) for keep in left])
    return np.sqrt((n - 1) * values.var(0))


def summarise(sketches: Tensor, grid: list[Configuration]) -> dict[str, dict]:
    """sketches [C, N, m] -> by name, best alignment first: [value, standard error] by column, and all cosines."""
    s, n = sketches.double().cpu(), sketches.shape[1]
    plain, rows, aligned = s[grid.index(PLAIN)], {}, {}
    for c, own in zip(grid, s, strict=True):
        products = tuple(x.numpy() for x in (own @ own.T, own @ plain.T, plain @ plain.T))
        aligned[c] = cosines(*products)
        errors, (norm, naive) = jackknife(products), (products[0].trace(), products[1].sum())
        rows[c] = dict(zip(("bias", "signal", "momentum"), np.stack([expected(*products), errors], 1).tolist(),
                           strict=True))
        rows[c] |= {"norm": math.sqrt(norm / products[2].trace()),
                    "naive_bias": naive / math.sqrt(products[0].sum() * products[2].sum())}
    for c, row in rows.items():
        ungated = aligned[c._replace(gamma=0, window=0)]
        compared = {"alignment": 0, "minus_grpo": aligned[PLAIN], "minus_gamma_0": ungated}
        for key, other in compared.items():
            row[key] = [(aligned[c] - other).mean(), (aligned[c] - other).std(ddof=1) / math.sqrt(n)]
        row |= {"cosines": aligned[c].tolist(), **c._asdict()}
    return {c.name: rows[c] for c in sorted(rows, key=lambda c: -rows[c]["alignment"][0])}


def make_rollouts(model, tokenizer, path: str, s: Settings) -> tuple[list[Rollout], list[list[int]]]:
    """N B graded rollouts with rewards and advantages, and their teacher prompts; problems come in a random order."""
    context = CONTEXTS[s.teacher_context]
    problems = load_problems(path, context.needs_solution, s.skip_ungradable)[0]

    def privileged(problem):
        shown = teacher.teacher_messages(problem.problem, context.text(problem, [], [], False))
        return teacher.encode(tokenizer, shown, s.thinking)
    check_window(model, path, problems, s.max_new_tokens, lambda p: [privileged(p)])
    rng, total = np.random.default_rng(s.seed), s.batches * s.batch
    order = np.concatenate([rng.permutation(len(problems)) for _ in range(math.ceil(total / len(problems)))])
    with tqdm(total=total, desc="sampling", unit=" completions") as bar:
        chosen = [problems[i] for i in order[:total // s.samples]]
        rollouts = grade_rollouts(tokenizer, sample(model, tokenizer, chosen, s, seed=(s.seed, 0), show=progress(bar)))
    rewards = torch.tensor([reward.shaped_reward(r.correct, len(r.token_ids), s.max_new_tokens) for r in rollouts])
    baseline = egrsd.RunningAdvantage(warmup_steps=0)
    baseline.update(rewards)
    for row, value, advantage in zip(rollouts, rewards.tolist(), baseline.advantage(rewards).tolist(), strict=True):
        row.reward, row.advantage = value, advantage
    return rollouts, [privileged(row.problem) for row in rollouts]


def measure(s: Settings) -> dict:
    """Everything above: what --out holds."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model, tokenizer = load_model(toy.resolve(s.model, "model"), dtype, torch.device(device))
    torch.manual_seed(s.seed)
    load_adapter(model, s.adapter) if s.adapter else add_adapter(model, s.lora_rank, 2.0 * s.lora_rank)
    rollouts, privileged = make_rollouts(model, tokenizer, toy.resolve(s.data, "train.jsonl"), s)
    grid, size = configurations(s), sum(p.numel() for p in lora.lora_parameters(model))
    sketch, found, entropies = Sketch(size, s.sketch, s.seed, model.device), [], []
    for start in tqdm(range(0, len(rollouts), s.batch), desc="gradients", unit=" batches"):
        part = slice(start, start + s.batch)
        vectors, entropy = batch_sketches(model, sketch, rollouts[part], privileged[part], grid, s)
        found.append(vectors)
        entropies.append(entropy)
    return {"settings": asdict(s), "coordinates": size,
            "sketch_error": 0.0 if sketch.size == size else sketch.size ** -0.5,
            "accuracy": np.mean([row.correct for row in rollouts]).item(),
            "length": np.mean([len(row.token_ids) for row in rollouts]).item(),
            "reward": np.mean([row.reward for row in rollouts]).item(),
            "entropy": torch.cat(entropies).mean().item(), "rows": summarise(torch.stack(found, 1), grid)}


def table(result: dict) -> str:
    """The rows as markdown, under a line about the rollouts and one about the sketch."""
    def cell(value, digits=3, sign=""):
        value, error = value if isinstance(value, list) else (value, None)
        if not math.isfinite(value):
            return "-"
        return f"{value:{sign}.{digits}f}" + (f" +- {error:.{digits}f}" if error is not None else "")
    s, size = result["settings"], result["coordinates"]
    lines = ["{} batches of {}: accuracy {accuracy:.3f}, length {length:.1f}, reward {reward:.3f}, teacher's H "
             "{entropy:.3f} nats".format(s["batches"], s["batch"], **result),
             f"sketches of {min(size, s['sketch'])} of {size} coordinates: standard error of a cosine "
             f"{result['sketch_error']:.4f}\n",
             "| configuration | alignment | - grpo | - gamma 0 | norm | bias (naive) | signal | momentum |",
             "|---|---|---|---|---|---|---|---|"]
    for name, row in result["rows"].items():
        lines.append(f"| {name} | {cell(row['alignment'])} | {cell(row['minus_grpo'], sign='+')} | "
                     f"{cell(row['minus_gamma_0'], sign='+')} | {cell(row['norm'])} | "
                     f"{cell(row['bias'])} ({cell(row['naive_bias'])}) | {cell(row['signal'])} | "
                     f"{cell(row['momentum'])} |")
    return "\n".join(lines)


def parse_arguments(argv: list[str]) -> Settings:
    def number(kind, interval):
        def number(text):
            if not is_inside(value := kind(text), interval):
                raise argparse.ArgumentTypeError(f"must be in {interval}, got {text}")
            return value
        return number
    parser = Parser(__doc__, prog=PROGRAM)
    add_flags(parser, [f for f in fields(Settings) if f.name not in GRIDS])
    for f in fields(Settings):
        if f.name in GRIDS:
            shown = f"{f.metadata['help']} (default: {' '.join(map(str, f.default_factory()))})"
            parser.add_argument(flag_name(f.name), nargs="+", type=number(*GRIDS[f.name]), help=shown)
    s = Settings(**vars(parser.parse_args(argv)))
    check_ranges(s)
    if s.batch % s.samples:
        raise InputError(f"--batch must be a multiple of --samples, got {s.batch} and {s.samples}")
    return s


def main() -> None:
    with one_line_errors(PROGRAM, "stopped, nothing was written"):
        s = parse_arguments(sys.argv[1:])
        if s.out and Path(s.out).is_dir():
            raise InputError(f"{s.out}: is a directory, --out needs a file")
        if s.out:
            Path(s.out).parent.mkdir(parents=True, exist_ok=True)
        with name_lack_of_memory(lambda: "for these gradients: lower --pass-tokens, --slots or --sketch"):
            result = measure(s)
        if s.out:
            write_json(Path(s.out), result)
        say(table(result))


if __name__ == "__main__":
    main()
