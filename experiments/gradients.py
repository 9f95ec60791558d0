r"""How well the gradient of one step points: what magnitude, gate and baseline do to it, without training.

    python -m experiments.gradients --max-new-tokens 128             the toy: 42 configurations in about five minutes

The student answers N batches of B problems. Student and teacher read each batch once, and every configuration (gamma,
window, eps) makes its gradient s_b of it, with respect to the adapter; p_b is that of plain policy gradient, gamma =
eps = 0, in the table `grpo`. Advantages are (r - mean) / std over the rewards of all batches, which stand for those of
earlier steps in eq. (9) of arXiv 2605.13255; two more rows are plain policy gradient with r and with r - 0.5.

    alignment  mean over b of cos(s_b, sum of p_b' over b' != b); and its differences to grpo and to gamma = 0
    norm       sqrt(E |s|^2 / E |p|^2)
    bias       cos(E s, E p), from products of different batches, in which noise has mean 0: below 1, the mean leads
               elsewhere. naive bias: the cosine of the two means, which have noise in common
    signal     |E s|^2 / E |s|^2, from the same products
    momentum   cos(mean of s over 19 batches, E p) = bias * sqrt(|E s|^2 / (|E s|^2 + variance / 19)): AdamW's momentum
               averages over (1 + beta1) / (1 - beta1) = 19 batches

Behind +- is the standard error by a jackknife over batches, which pairs differences. "-": noise outweighs the signal,
so that the estimate of a square is negative; more batches help. A cosine may come out above 1.

Of a gradient only a count-sketch of --sketch numbers is kept (Charikar, Chen, Farach-Colton 2002). Inner products of
sketches are unbiased, sums of sketches are sketches of sums; a cosine has a standard error of at most about 1 /
sqrt(--sketch), mostly common to all rows, and is exact if the gradient is no longer than that. Policy gradient itself
is unbiased only for rollouts of the whole distribution: --temperature 1 --top-p 1 --top-k 0.
"""

import itertools
import math
import sys
from dataclasses import asdict, dataclass, fields, replace
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
from support.flags import SEEDS, Parser, add_flags, check_ranges, flag, flag_name
from support.run import name_lack_of_memory, one_line_errors, say
from support.sampling import Rollout, Sampling, check_window

PROGRAM = "python -m experiments.gradients"
MOMENTUM = 19  # batches
COLUMNS = ("alignment", "norm", "bias", "naive bias", "signal", "momentum")
SHOWN = ("alignment", "- grpo", "- gamma 0", *COLUMNS[1:])
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


class Sketch:
    """x [D] -> [m], linear: chunks of m coordinates get random signs, are rotated at random and added up."""

    def __init__(self, coordinates: int, size: int, seed: int, device="cpu"):
        self.size, generator = min(size, coordinates), torch.Generator().manual_seed(seed)
        self.signs = torch.randint(2, (coordinates,), dtype=torch.int8, generator=generator).mul(2).sub(1).to(device)
        self.turns = torch.randint(self.size, (math.ceil(coordinates / self.size),), generator=generator).tolist()

    def __call__(self, x: Tensor) -> Tensor:
        chunks = zip((x * self.signs).split(self.size), self.turns, strict=True)
        return sum(torch.nn.functional.pad(c, (0, self.size - len(c))).roll(turn) for c, turn in chunks)


def batch_sketches(model, sketch: Sketch, rows: list[Rollout], privileged: list[list[int]], s: Settings) -> Tensor:
    """The gradients [C, m] of one batch, C configurations from one reading of student and teacher."""
    prompts, completions = [row.prompt for row in rows], [row.token_ids for row in rows]
    with lora.disabled(model):
        seen = teacher.read_in_batches(model, privileged, completions, s.pass_tokens)
    A, r = (torch.tensor([getattr(row, key) for row in rows], device=model.device) for key in ("advantage", "reward"))
    grid, parameters, num_tokens = configurations(s), lora.lora_parameters(model), seen.mask.sum()
    found = torch.zeros(len(grid), sketch.size, device=model.device)
    for some in teacher.micro_batches([len(row.prompt) + len(row.token_ids) for row in rows], s.pass_tokens):
        own = teacher.read(model, [prompts[i] for i in some], [completions[i] for i in some])
        width = own.mask.shape[1]
        for k, (name, (gamma, window, eps)) in enumerate(grid.items()):
            weights = egrsd.token_advantages(
                {"r": r, "r - 0.5": r - 0.5}.get(name, A)[some], seen.logp[some, :width], own.logp,
                seen.entropy[some, :width], own.mask, gamma=gamma, window=window, eps=eps, floor=s.floor,
                max_entropy=seen.entropy.max())
            loss = egrsd.policy_loss(own.logp, weights, own.mask, num_tokens)
            gradient = torch.autograd.grad(loss, parameters, retain_graph=k < len(grid) - 1)
            found[k] += sketch(torch.cat([part.flatten() for part in gradient]))
    return found


def cosines(own: np.ndarray, cross: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """cos(s_b, sum of p_b' over b' != b) [N], from the products [N, N] of s_b and s_b', s_b and p_b', p_b and p_b'."""
    others = plain.sum() - 2 * plain.sum(1) + plain.diagonal()  # |sum of p_b' over b' != b|^2
    return (cross.sum(1) - cross.diagonal()) / np.sqrt(own.diagonal() * others)


def estimates(own: np.ndarray, cross: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """The values of COLUMNS, from the same products; nan where the estimate of a square is negative."""
    n, power = len(own), own.diagonal().mean()
    signal, shared, plain_signal = ((x.sum() - x.trace()) / (n * (n - 1)) for x in (own, cross, plain))
    squares = [signal, signal + (power - signal) / MOMENTUM]  # |E s|^2, E |mean of MOMENTUM batches|^2
    with np.errstate(invalid="ignore", divide="ignore"):
        bias, momentum = shared / (np.sqrt(plain_signal) * np.sqrt(squares))
    return np.array([cosines(own, cross, plain).mean(), np.sqrt(own.trace() / plain.trace()), bias,
                     cross.sum() / np.sqrt(own.sum() * plain.sum()), signal / power, momentum])


def summarise(sketches: Tensor, s: Settings) -> dict[str, dict]:
    """sketches [C, N, m] -> by name, best alignment first: [value, standard error] by column, and all cosines."""
    grid, n, found, aligned = configurations(s), sketches.shape[1], {}, {}
    plain = sketches[list(grid).index("grpo")].double()
    kept = [np.arange(n), *(np.delete(np.arange(n), b) for b in range(n))]
    for name, own in zip(grid, sketches, strict=True):
        own = own.double()
        products = [x.cpu().numpy() for x in (own @ own.T, own @ plain.T, plain @ plain.T)]
        found[name] = np.array([estimates(*(x[np.ix_(k, k)] for x in products)) for k in kept])  # [1 + N, columns]
        aligned[name] = cosines(*products).tolist()

    def column(values: np.ndarray) -> list[float | None]:
        pair = values[0], np.sqrt((n - 1) * values[1:].var())
        return [float(x) if np.isfinite(x) else None for x in pair]
    rows = {}
    for name in sorted(grid, key=lambda name: -found[name][0, 0]):
        rivals = {"- grpo": found["grpo"], "- gamma 0": found[name_of(0, 0, grid[name][2])]}
        rows[name] = {key: column(values) for key, values in zip(COLUMNS, found[name].T, strict=True)}
        rows[name] |= {key: column(found[name][:, 0] - rival[:, 0]) for key, rival in rivals.items()}
        rows[name] |= {"cosines": aligned[name]} | dict(zip(("gamma", "window", "eps"), grid[name], strict=True))
    return rows


def measure(s: Settings) -> dict:
    """Everything above: what --out holds."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model, tokenizer = load_model(toy.resolve(s.model, "model"), dtype, torch.device(device))
    torch.manual_seed(s.seed)
    load_adapter(model, s.adapter) if s.adapter else add_adapter(model, 16, 32.0)
    path, context = toy.resolve(s.data, "train.jsonl"), CONTEXTS[s.teacher_context]
    problems = [replace(p, solution=context.text(p, [], [], False))
                for p in load_problems(path, context.needs_solution, s.skip_ungradable)[0]]
    check_window(model, path, problems, s.max_new_tokens, lambda p: [teacher_prompt(tokenizer, p, s.thinking)])
    rng, count = np.random.default_rng(s.seed), s.batches * s.batch // s.samples
    order = np.concatenate([rng.permutation(len(problems)) for _ in range(math.ceil(count / len(problems)))])[:count]
    rollouts = sample_student(model, tokenizer, s, [problems[i] for i in order])
    size = sum(parameter.numel() for parameter in lora.lora_parameters(model))
    sketch, found = Sketch(size, s.sketch, s.seed, model.device), []
    for start in tqdm(range(0, len(rollouts), s.batch), desc="gradients", unit=" batches"):
        rows = rollouts[start:start + s.batch]
        privileged = [teacher_prompt(tokenizer, row.problem, s.thinking) for row in rows]
        found.append(batch_sketches(model, sketch, rows, privileged, s))
    return {"settings": asdict(s), "coordinates": size,
            "sketch_error": 0.0 if sketch.size == size else sketch.size ** -0.5,
            "accuracy": np.mean([row.correct for row in rollouts]).item(),
            "length": np.mean([len(row.token_ids) for row in rollouts]).item(),
            "reward": np.mean([row.reward for row in rollouts]).item(), "rows": summarise(torch.stack(found, 1), s)}


def table(result: dict) -> str:
    """The rows as markdown, below what is known of rollouts and sketches."""
    def cell(key: str, value: float | None, error: float | None) -> str:
        error = "" if error is None else f" +- {error:.3f}"
        return "-" if value is None else f"{value:{'+' * key.startswith('-')}.3f}{error}"
    lines = ["accuracy {accuracy:.3f}, length {length:.1f}, reward {reward:.3f}; {coordinates} coordinates, standard "
             "error of a cosine by their sketch {sketch_error:.4f}\n".format(**result),
             f"| | {' | '.join(SHOWN)} |", "|---" * (1 + len(SHOWN)) + "|"]
    lines += [f"| {name} | {' | '.join(cell(key, *row[key]) for key in SHOWN)} |"
              for name, row in result["rows"].items()]
    return "\n".join(lines)


def parse_arguments(argv: list[str]) -> Settings:
    parser = Parser(__doc__, prog=PROGRAM)
    add_flags(parser, [f for f in fields(Settings) if f.type is not list])
    for f in (f for f in fields(Settings) if f.type is list):
        shown = " ".join(map(str, f.default_factory()))
        parser.add_argument(flag_name(f.name), nargs="+", type=int if f.name == "window" else float,
                            help=f"{f.metadata['help']} (default: {shown})")
    s = Settings(**vars(parser.parse_args(argv)))
    check_ranges(s)
    if not (all(0 <= x < math.inf for x in s.gamma + s.window) and all(0 <= x < 1 for x in s.eps)):
        raise InputError(f"--gamma and --window must be in [0, inf), --eps in [0, 1), got {s.gamma, s.window, s.eps}")
    if s.batch % s.samples:
        raise InputError(f"--batch must be a multiple of --samples, got {s.batch} and {s.samples}")
    if s.out and Path(s.out).is_dir():
        raise InputError(f"{s.out}: is a directory, --out needs a file")
    return s


def main() -> None:
    with one_line_errors(PROGRAM, "stopped, nothing was written"):
        s = parse_arguments(sys.argv[1:])
        if s.out:
            Path(s.out).parent.mkdir(parents=True, exist_ok=True)
        with name_lack_of_memory(lambda: "for these gradients: lower --pass-tokens, --slots or --sketch"):
            result = measure(s)
        if s.out:
            write_json(Path(s.out), result)
        say(table(result))


if __name__ == "__main__":
    main()
