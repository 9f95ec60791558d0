r"""How well the gradient of one step points: what magnitude, gate and baseline do to it, without training.

    python -m experiments.gradients --max-new-tokens 128             the toy: 42 configurations in about five minutes

The student answers N batches of B problems; student and teacher read each once. Of it every configuration (gamma,
window, eps) makes its gradient s_b by the adapter, plain policy gradient (gamma = eps = 0, `grpo`) p_b. Advantages are
(r - mean) / std over the rewards of all batches, which stand for those of earlier steps in eq. (9), arXiv 2605.13255;
two more rows are plain policy gradient with r and r - 0.5.

    alignment  mean over b of cos(s_b, sum of p_b' over b' != b); and its differences to grpo and to gamma = 0
    norm       sqrt(E |s|^2 / E |p|^2)
    bias       cos(E s, E p) by products of different batches, whose noise has mean 0; naive: by the two noisy means
    signal     |E s|^2 / E |s|^2, by the same products
    momentum   cos(mean of s over 19 batches, E p) = bias * sqrt(|E s|^2 / (|E s|^2 + variance / 19)): AdamW's momentum
               averages over (1 + beta1) / (1 - beta1) = 19 batches

Behind +- stands the standard error by a jackknife over batches, which pairs differences. "-": an estimate of a square
is negative, for noise outweighs signal; more batches help. A cosine may come out above 1.

Of a gradient --sketch numbers are kept, a count-sketch (Charikar, Chen, Farach-Colton 2002). It is linear and its inner
products are unbiased; a cosine has a standard error of at most about 1 / sqrt(--sketch), and none if the gradient is no
longer than that. Without --temperature 1 --top-p 1 --top-k 0 policy gradient is not unbiased itself.
"""

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import egrsd
import lora
import teacher
import toy
from experiments.diagnostics import sample_student, teacher_prompt
from family.contexts import CONTEXTS
from support.checkpoint import write_json
from support.data import add_adapter, load_adapter, load_model, load_problems
from support.errors import InputError
from support.flags import SEEDS, Parser, add_flags, check_ranges, flag
from support.run import name_lack_of_memory, one_line_errors, say
from support.sampling import Rollout, Sampling, check_window

PROGRAM = "python -m experiments.gradients"
MOMENTUM = 19  # batches
NAMES = {(0, 0, 0): "grpo", (0, 0, 0.2): "direction-aware", (0.3, 0, 0.2): "egrsd", (0.3, 3, 0.2): "cl-egrsd",
         (0.3, 3, 0): "magnitude off"}  # as in experiments.compare


@dataclass
class Settings(Sampling):
    """The command line: how to sample, and which gradients to compare."""

    model: str = flag("toy", "checkpoint directory, hub id or toy")
    adapter: str = flag(None, "LoRA adapter directory of the student (default: a fresh one: the student is the model)")
    data: str = flag("toy", "JSONL file with problem, solution and answer, or toy (its training problems)")
    out: str = flag(None, "JSON file for all figures, with the cosine of every batch (default: none)")
    skip_ungradable: bool = flag(False, "leave out rows whose gold answer the verifier cannot grade")
    teacher_context: str = flag("solution", "what the teacher is shown", choices=("solution", "answer"))
    batches: int = flag(32, "batches, N", "[3, inf)")
    batch: int = flag(64, "completions per batch, B", "[1, inf)")
    samples: int = flag(1, "completions per problem, in the same batch", "[1, inf)")
    max_new_tokens: int = flag(1024, "longest completion in tokens, also L_max of the length reward", "[1, inf)")
    top_p: float = flag(1.0, "draw from the likeliest tokens of this mass", "(0, 1]")
    slots: int = flag(128, "rows decoded together; lower it to save memory", "[1, inf)")
    thinking: bool = flag(False, "let the chat template open a thinking block")
    seed: int = flag(0, "seed of a fresh adapter, the order of the problems, sampling and sketches", SEEDS)
    gamma: list = flag([0.0, 0.3, 1.0, 3.0], "strengths of the gate; 0 is always among them")
    window: list = flag([0, 3, 5], "lookaheads of the gate in tokens")
    eps: list = flag([0.0, 0.2, 0.4, 0.8], "clips of the magnitude; 0 is always among them")
    floor: float = flag(0.1, "smallest gate", "(0, 1]")
    sketch: int = flag(2**16, "numbers kept of a gradient", "[1, inf)")
    pass_tokens: int = flag(2**14, "tokens per pass through the model; lower it to save memory", "[1, inf)")


def name_of(gamma: float, window: int, eps: float) -> str:
    gate = [f"gamma {gamma} W {window}"] if gamma else []
    return NAMES.get((gamma, window, eps)) or ", ".join(gate + [f"eps {eps}"] * (eps != 0.2))


def configurations(s: Settings) -> dict[str, tuple[float, int, float]]:
    """(gamma, window, eps) by name: the grid, in which gamma = 0 has no window, and plain ones without a mean."""
    grid = [(gamma, window * (gamma > 0), eps) for eps, gamma, window in
            itertools.product(sorted({0.0, *s.eps}), sorted({0.0, *s.gamma}), sorted(set(s.window)))]
    return {name_of(*values): values for values in grid} | dict.fromkeys(("r", "r - 0.5"), (0.0, 0, 0.0))


def make_sketch(coordinates: int, size: int, seed: int, device="cpu") -> Callable[[Tensor], Tensor]:
    """x [D] -> [m], linear: chunks of m coordinates get random signs, are rotated at random and added up."""
    size, generator = min(size, coordinates), torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (coordinates,), dtype=torch.int8, generator=generator).mul(2).sub(1).to(device)
    turns = torch.randint(size, (math.ceil(coordinates / size),), generator=generator).tolist()

    def sketch(x: Tensor) -> Tensor:
        chunks = zip((x * signs).split(size), turns, strict=True)
        return sum(torch.nn.functional.pad(chunk, (0, size - len(chunk))).roll(turn) for chunk, turn in chunks)
    return sketch


def batch_sketches(model, sketch: Callable, rows: list[Rollout], privileged: list[list[int]], s: Settings) -> Tensor:
    """The gradients [C, m] of one batch, C configurations from one reading of student and teacher."""
    prompts, completions = [row.prompt for row in rows], [row.token_ids for row in rows]
    with lora.disabled(model):
        seen = teacher.read_in_batches(model, privileged, completions, s.pass_tokens)
    A, r = (torch.tensor([getattr(row, key) for row in rows], device=model.device) for key in ("advantage", "reward"))
    grid, parameters, found = configurations(s), lora.lora_parameters(model), {}
    for some in teacher.micro_batches([len(row.prompt) + len(row.token_ids) for row in rows], s.pass_tokens):
        own = teacher.read(model, [prompts[i] for i in some], [completions[i] for i in some])
        width = own.mask.shape[1]
        for k, (name, (gamma, window, eps)) in enumerate(grid.items()):
            weights = egrsd.token_advantages(
                {"r": r, "r - 0.5": r - 0.5}.get(name, A)[some], seen.logp[some, :width], own.logp,
                seen.entropy[some, :width], own.mask, gamma=gamma, window=window, eps=eps, floor=s.floor,
                max_entropy=seen.entropy.max())
            loss = egrsd.policy_loss(own.logp, weights, own.mask, seen.mask.sum())
            gradient = torch.autograd.grad(loss, parameters, retain_graph=k < len(grid) - 1)
            found[name] = found.get(name, 0) + sketch(torch.cat([part.flatten() for part in gradient]))
    return torch.stack(list(found.values()))


def cosines(own: np.ndarray, cross: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """cos(s_b, sum of p_b' over b' != b) [N], from the products [N, N] of s_b and s_b', s_b and p_b', p_b and p_b'."""
    others = plain.sum() - 2 * plain.sum(1) + plain.diagonal()  # |sum of p_b' over b' != b|^2
    return (cross.sum(1) - cross.diagonal()) / np.sqrt(own.diagonal() * others)


def estimates(own: np.ndarray, cross: np.ndarray, plain: np.ndarray) -> dict[str, float]:
    """Values by column, from the same products; nan where the estimate of a square is negative."""
    n, power = len(own), own.diagonal().mean()
    signal, shared, plain_signal = ((x.sum() - x.trace()) / (n * (n - 1)) for x in (own, cross, plain))
    with np.errstate(invalid="ignore", divide="ignore"):
        bias, momentum = shared / np.sqrt(plain_signal) / np.sqrt([signal, signal + (power - signal) / MOMENTUM])
    return {"alignment": cosines(own, cross, plain).mean(), "norm": np.sqrt(own.trace() / plain.trace()), "bias": bias,
            "naive bias": cross.sum() / np.sqrt(own.sum() * plain.sum()), "signal": signal / power,
            "momentum": momentum}


def summarise(sketches: Tensor, grid: dict[str, tuple]) -> tuple[dict, dict]:
    """sketches [C, N, m] -> ({column: [value, standard error]}, cosines of all batches), both by name."""
    plain, n, found, aligned = sketches[list(grid).index("grpo")].double(), sketches.shape[1], {}, {}
    kept = [np.arange(n), *(np.delete(np.arange(n), b) for b in range(n))]  # all, and all but one
    for name, own in zip(grid, sketches.double(), strict=True):
        products = [x.cpu().numpy() for x in (own @ own.T, own @ plain.T, plain @ plain.T)]
        several = [estimates(*(x[np.ix_(k, k)] for x in products)) for k in kept]
        found[name] = {key: np.array([one[key] for one in several]) for key in several[0]}  # [1 + N] each
        aligned[name] = cosines(*products).tolist()
    rows = {}
    for name in sorted(grid, key=lambda name: -found[name]["alignment"][0]):
        own, ungated = found[name]["alignment"], found[name_of(0, 0, grid[name][2])]["alignment"]
        values = {"alignment": own, "- grpo": own - found["grpo"]["alignment"], "- gamma 0": own - ungated}
        rows[name] = {key: [float(x) if np.isfinite(x) else None for x in (v[0], np.sqrt((n - 1) * v[1:].var()))]
                      for key, v in (values | found[name]).items()}
    return rows, aligned


def measure(s: Settings) -> dict:
    """Everything above: what --out holds."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model, tokenizer = load_model(toy.resolve(s.model, "model"), dtype, torch.device(device))
    torch.manual_seed(s.seed)
    load_adapter(model, s.adapter) if s.adapter else add_adapter(model, 16, 32.0)
    path, context = toy.resolve(s.data, "train.jsonl"), CONTEXTS[s.teacher_context]
    problems = [replace(p, solution=context.text(p, [], [], False))
                for p in load_problems(path, context.needs_solution, s.skip_ungradable)[0]]
    privileged = partial(teacher_prompt, tokenizer, thinking=s.thinking)
    check_window(model, path, problems, s.max_new_tokens, lambda p: [privileged(p)])
    rng, total = np.random.default_rng(s.seed), s.batches * s.batch
    order = np.concatenate([rng.permutation(len(problems)) for _ in range(math.ceil(total / len(problems)))])
    rollouts = sample_student(model, tokenizer, s, [problems[i] for i in order[:total // s.samples]])
    size = sum(parameter.numel() for parameter in lora.lora_parameters(model))
    sketch, found = make_sketch(size, s.sketch, s.seed, model.device), []
    for start in tqdm(range(0, total, s.batch), desc="gradients", unit=" batches"):
        batch = rollouts[start:start + s.batch]
        found.append(batch_sketches(model, sketch, batch, [privileged(row.problem) for row in batch], s))
    rows, aligned = summarise(torch.stack(found, 1), configurations(s))
    return {"settings": asdict(s), "accuracy": np.mean([row.correct for row in rollouts]).item(),
            "length": np.mean([len(row.token_ids) for row in rollouts]).item(), "coordinates": size,
            "sketch_error": s.sketch ** -0.5 if s.sketch < size else 0.0, "rows": rows, "cosines": aligned}


def table(result: dict) -> str:
    """The rows as markdown, below what is known of rollouts and sketches."""
    def cell(key: str, value: float | None, error: float | None) -> str:
        return "-" if value is None else (f"{value:{'+' * key.startswith('-')}.3f}"
                                          + (f" +- {error:.3f}" if error is not None else ""))
    keys = list(result["rows"]["grpo"])
    lines = ["accuracy {accuracy:.3f}, length {length:.1f}; {coordinates} coordinates, standard error of a cosine by "
             "their sketch {sketch_error:.4f}\n".format(**result), f"| | {' | '.join(keys)} |"]
    rows = [f"| {name} | {' | '.join(cell(key, *row[key]) for key in keys)} |" for name, row in result["rows"].items()]
    return "\n".join([*lines, "|---" * (1 + len(keys)) + "|", *rows])


def parse_arguments(argv: list[str]) -> Settings:
    parser = Parser(__doc__, prog=PROGRAM)
    add_flags(parser, [f for f in fields(Settings) if f.type is not list])
    for f in (f for f in fields(Settings) if f.type is list):
        shown = f"{f.metadata['help']} (default: {' '.join(map(str, f.default_factory()))})"
        parser.add_argument(f"--{f.name}", nargs="+", type=int if f.name == "window" else float, help=shown)
    s = Settings(**vars(parser.parse_args(argv)))
    check_ranges(s)
    if not (all(0 <= x < math.inf for x in s.gamma + s.window) and all(0 <= x < 1 for x in s.eps)):
        raise InputError(f"--gamma and --window must be in [0, inf), --eps in [0, 1), got {s.gamma, s.window, s.eps}")
    if s.batch % s.samples:
        raise InputError(f"--batch must be a multiple of --samples, got {s.batch} and {s.samples}")
    return s


def main() -> None:
    with one_line_errors(PROGRAM, "stopped"):
        s = parse_arguments(sys.argv[1:])
        if s.out:
            open(s.out, "a").close()  # fail before the work, not after it
        with name_lack_of_memory(lambda: "for these gradients: lower --pass-tokens, --slots or --sketch"):
            result = measure(s)
        if s.out:
            write_json(Path(s.out), result)
        say(table(result))


if __name__ == "__main__":
    main()
