r"""How well the gradient of one step points: what magnitude, gate and baseline do to it, without
training.

    python -m experiments.gradients --max-new-tokens 128     the toy, its training problems: 43 rows, five minutes

Student and teacher read each of N batches once. From that every configuration (gamma, window, eps)
gets its gradient s_b with respect to the adapter, plain policy gradient (gamma = eps = 0, `grpo`)
p_b. Advantages are (r - mean) / std over all rewards, which stand for those of earlier steps in
(9), arXiv 2605.13255. Three more rows take r, r - 0.5, and mean length - length, which is
`shorter`.

    alignment  mean over b of cos(s_b, sum of p_b' over b' != b); and its differences to grpo and to gamma = 0
    sign       the same with the sign of every coordinate of s_b, AdamW's first step; only if --sketch holds them all
    shorter    the same with the gradients of the row `shorter` in the place of p: what the step does to length
    bias       cos(E s, E p) by products of different batches, whose noise has mean 0; naive: of the two noisy means
    signal     |E s|^2 / E |s|^2, by the same products; norm: sqrt(E |s|^2 / E |p|^2)
    momentum   cos(mean of s over 19 batches, E p): AdamW's momentum averages over (1 + beta1) / (1 - beta1) = 19

--also adds rows of experiments.compare, such as msd: the gradients of their own training step on
the same rollouts, its advantages the same, too, but for groups (--samples 8 --batch 8).

Behind +- is the standard error by a jackknife over batches, which pairs differences; "-": noise
made the estimate of a square negative. A gradient is kept as a count-sketch of --sketch numbers
(Charikar, Chen, Farach-Colton 2002), which is linear and has unbiased inner products; the standard
error of a cosine is at most about 1 / sqrt(--sketch), 0 if all coordinates have room. Policy
gradient itself is unbiased only with --temperature 1 --top-p 1 --top-k 0.
"""

import itertools
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import egrsd
import lora
import teacher
import toy
import train
from experiments import compare
from experiments.diagnostics import ReadingSettings, sample_student, teacher_prompt
from family import __main__ as lab
from family.contexts import CONTEXTS
from support.checkpoint import write_json
from support.data import add_adapter, load_adapter, load_model, load_problems
from support.distributed import Ranks
from support.errors import InputError
from support.flags import flag, parse
from support.run import name_lack_of_memory, one_line_errors, say
from support.sampling import Rollout, check_window

PROGRAM = "python -m experiments.gradients"
NAMES = {
    (0, 0, 0): "grpo",
    (0, 0, 0.2): "direction-aware",
    (0.3, 0, 0.2): "egrsd",
    (0.3, 3, 0.2): "cl-egrsd",
    (0.3, 3, 0): "magnitude off",
}  # as in experiments.compare
BASELINES = ("r", "r - 0.5", "shorter")


@dataclass
class Settings(ReadingSettings):
    """The command line: how to sample, and which gradients to compare."""

    out: str = flag(
        None, "JSON file for all figures, with the cosine of every batch (default: none)"
    )
    teacher_context: str = flag(
        "solution", "what the teacher is shown", choices=("solution", "answer")
    )
    batches: int = flag(
        32,
        "batches, N; behind the last problem of the file the first one follows again",
        "[3, inf)",
    )
    batch: int = flag(64, "problems per batch", "[1, inf)")
    samples: int = flag(1, "completions per problem", "[1, inf)")
    gamma: list = flag(
        [0.0, 0.3, 1.0, 3.0], "strengths of the gate; 0 is always among them", "[0, inf)"
    )
    window: list = flag([0, 3, 5], "lookaheads of the gate in tokens", "[0, inf)")
    eps: list = flag(
        [0.0, 0.2, 0.4, 0.8], "clips of the magnitude; 0 is always among them", "[0, 1)"
    )
    sketch: int = flag(2**17, "numbers kept of a gradient", "[1, inf)")
    also: list = flag([], "rows of experiments.compare, each with a step of its own")
    pass_tokens: int = flag(
        2**14, "tokens per pass through the model; lower it to save memory", "[1, inf)"
    )


def configurations(s: Settings) -> dict[str, tuple[float, int, float]]:
    """(gamma, window, eps) by name: the grid, in which gamma = 0 has no window, and plain ones
    without a mean."""
    grid = sorted(
        {
            (gamma, window * (gamma > 0), eps)
            for gamma, window, eps in itertools.product([0.0, *s.gamma], s.window, [0.0, *s.eps])
        }
    )
    other = [
        (f"gamma {gamma} W {window}" if gamma else "no gate") + f", eps {eps:g}" * (eps != 0.2)
        for gamma, window, eps in grid
    ]
    named = {NAMES.get(values, name): values for values, name in zip(grid, other, strict=True)}
    return named | dict.fromkeys(BASELINES, (0.0, 0, 0.0))


def sketch(x: torch.Tensor, size: int, seed: int) -> torch.Tensor:
    """x [D] -> [min(size, D)], linear: chunks of this length get random signs and are added up at
    random rotations."""
    generator, total = torch.Generator(x.device).manual_seed(seed), torch.zeros_like(x[:size])
    for chunk in x.split(size):
        total = total.roll(
            torch.randint(len(total), (), generator=generator, device=x.device).item()
        )
        total[: len(chunk)] += chunk * (
            2 * torch.empty_like(chunk).bernoulli_(generator=generator) - 1
        )
    return total


def batch_sketches(model, tokenizer, rows: list[Rollout], s: Settings) -> torch.Tensor:
    """The gradients [C, m] of one batch, C configurations from one reading of student and
    teacher."""
    grid, found, parameters = configurations(s), {}, lora.lora_parameters(model)
    with lora.disabled(model):
        seen = teacher.read_in_batches(
            model,
            [teacher_prompt(tokenizer, row.problem, s.thinking) for row in rows],
            [row.token_ids for row in rows],
            s.pass_tokens,
        )
    A, r = (
        torch.tensor([getattr(row, key) for row in rows], device=model.device)
        for key in ("advantage", "reward")
    )
    lengths = seen.mask.sum(1).float()
    advantages = {"r": r, "r - 0.5": r - 0.5, "shorter": lengths.mean() - lengths}
    for some in teacher.micro_batches(
        [len(row.prompt) + len(row.token_ids) for row in rows], s.pass_tokens
    ):
        own = teacher.read(model, [rows[i].prompt for i in some], [rows[i].token_ids for i in some])
        logp, entropy = (x[some, : own.mask.shape[1]] for x in (seen.logp, seen.entropy))
        for name, (gamma, window, eps) in grid.items():
            weights = egrsd.token_advantages(
                advantages.get(name, A)[some],
                logp,
                own.logp,
                entropy,
                own.mask,
                gamma=gamma,
                window=window,
                eps=eps,
                floor=s.floor,
                max_entropy=seen.entropy.max(),
            )
            loss = egrsd.policy_loss(own.logp, weights, own.mask, seen.mask.sum())
            # the graph is needed until the last one, `shorter`
            gradient = torch.autograd.grad(loss, parameters, retain_graph=name != "shorter")
            found[name] = found.get(name, 0) + sketch(
                torch.cat([g.flatten() for g in gradient]), s.sketch, s.seed
            )
    return torch.stack([found[name] for name in grid])


def step_sketches(name: str, model, batches: list[list[Rollout]], s: Settings) -> torch.Tensor:
    """The gradients [N, m] of a row of experiments.compare: those of its training step, whose
    rollouts are these."""
    with tempfile.TemporaryDirectory() as out:
        layers = {
            lora.short_name(key): m
            for key, m in model.named_modules()
            if isinstance(m, lora.LoRALinear)
        }
        adapter = next(iter(layers.values()))
        values = {
            "model": s.model,
            "data": s.data,
            "out": out,
            "seed": s.seed,
            "lr": 0,
            "max-grad-norm": 1e30,  # as it is
            "lora-rank": adapter.rank,
            "lora-alpha": adapter.alpha,
            "prompts-per-step": s.batch,
            "max-new-tokens": s.max_new_tokens,
            "rollouts-per-prompt": s.samples,
            "micro-batch": max(1, s.pass_tokens // s.max_new_tokens),
            "slots": s.slots,
            "eval-data": "",
        }
        flags = [text for key, value in values.items() for text in (f"--{key}", str(value))]
        try:
            settings, _, objective = lab.parse_arguments(
                [*compare.variants()[name], "--lora-targets", *layers, *flags]
            )
        except InputError as error:
            raise InputError(f"--also {name}: {error} (here it is --samples)") from None
        t, found = train.Trainer(settings, Ranks.alone(), objective), []
        t.log.bar = tqdm(disable=True)
        for own, parameter in zip(t.parameters, lora.lora_parameters(model), strict=True):
            own.data.copy_(parameter)

        def note_gradient() -> None:
            gradient = torch.cat([p.grad.flatten() for p in t.parameters])
            found.append(sketch(gradient, s.sketch, s.seed))

        t.optimizer.step = note_gradient
        for rows in tqdm(batches, desc=name, unit=" batches"):
            t.step = 0
            t.next_problems = lambda rows=rows: [row.problem for row in rows[:: s.samples]]
            t.sample = lambda *_, rows=rows: [replace(row) for row in rows]
            if settings.advantage == "running":
                t.baseline.advantage = lambda _, rows=rows: torch.tensor(
                    [row.advantage for row in rows]
                )
            t.train_step()
    return torch.stack(found)


def alignments(own: np.ndarray, cross: np.ndarray, target: np.ndarray) -> np.ndarray:
    """cos(s_b, sum of p_b' over b' != b) [N] from the products [N, N] of s_b and s_b', s_b and
    p_b', p_b and p_b'."""
    # |sum of p_b' over b' != b|^2, [N]
    others = target.sum() - 2 * target.sum(1) + target.diagonal()
    # 0 where s_b = 0
    return (cross.sum(1) - cross.diagonal()) / np.sqrt(own.diagonal() * others).clip(1e-300)


def estimates(
    own: np.ndarray,
    cross: np.ndarray,
    plain: np.ndarray,
    to_shorter: np.ndarray,
    shorter: np.ndarray,
    *signs: np.ndarray,
) -> dict:
    """Values by column from such products: the second two with the row `shorter` in the place of p,
    the last two, if they are known, with the signs of s in the place of s."""
    n, power, cosines = len(own), own.diagonal().mean(), alignments(own, cross, plain)
    signal, shared, plain_signal = (
        (x.sum() - x.trace()) / (n * (n - 1)) for x in (own, cross, plain)
    )
    bias, momentum = (
        shared / np.sqrt(plain_signal) / np.sqrt([signal, signal + (power - signal) / 19])
    )
    first_step = {"sign": alignments(*signs, plain).mean()} if signs else {}
    return (
        {"alignment": cosines.mean()}
        | first_step
        | {
            "shorter": alignments(own, to_shorter, shorter).mean(),
            "bias": bias,
            "naive bias": cross.sum() / np.sqrt(own.sum() * plain.sum()),
            "signal": signal / power,
            "momentum": momentum,
            "norm": np.sqrt(power / plain.diagonal().mean()),
            "cosines": cosines,
        }
    )


@np.errstate(invalid="ignore", divide="ignore")  # nan where the estimate of a square is negative
def summarise(sketches: torch.Tensor, grid: dict[str, tuple], exact: bool) -> dict[str, dict]:
    """sketches [C, N, m] -> by name, best alignment first: [value, standard error] by column, and
    all cosines. exact: they hold every coordinate, up to its sign."""
    plain, shorter = (sketches[list(grid).index(name)].double() for name in ("grpo", "shorter"))
    n, found, rows = sketches.shape[1], {}, {}
    kept = [np.arange(n), *(np.delete(np.arange(n), b) for b in range(n))]  # all, and all but one
    for name, own in zip(grid, map(torch.Tensor.double, sketches), strict=True):
        pairs = [(own, own), (own, plain), (plain, plain), (own, shorter), (shorter, shorter)]
        pairs += [(own.sign(), own.sign()), (own.sign(), plain)] if exact else []
        products = [(x @ y.T).cpu().numpy() for x, y in pairs]
        found[name] = [estimates(*(x[np.ix_(k, k)] for x in products)) for k in kept]
    for name in sorted(grid, key=lambda name: -found[name][0]["alignment"]):
        columns = {
            key: np.array([one[key] for one in found[name]])
            for key in found[name][0]
            if key != "cosines"
        }
        ungated = next(rival for rival in grid if grid[rival] == (0, 0, grid[name][2]))
        for key, rival in ("- grpo", "grpo"), ("- gamma 0", ungated):
            columns[key] = columns["alignment"] - [one["alignment"] for one in found[rival]]
        rows[name] = {
            key: [
                float(v) if np.isfinite(v) else None for v in (x[0], np.sqrt((n - 1) * x[1:].var()))
            ]
            for key, x in columns.items()
        } | {"cosines": found[name][0]["cosines"].tolist()}
    return rows


def measure(s: Settings) -> dict:
    """Everything above: what --out holds."""
    device, dtype = (
        ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    )
    model, tokenizer = load_model(toy.resolve(s.model, "model"), dtype, torch.device(device))
    torch.manual_seed(s.seed)
    load_adapter(model, s.adapter) if s.adapter else add_adapter(model, rank=16, alpha=32.0)
    if unknown := {*s.also} - (compare.variants().keys() - configurations(s).keys()):
        raise InputError(
            f"--also {min(unknown)}: no other row of experiments.compare: choose one from "
            "its --help"
        )
    path, context = toy.resolve(s.data, "train.jsonl"), CONTEXTS[s.teacher_context]
    problems = [
        replace(p, solution=context.text(Rollout([], [], False, p, []), [], [], p))
        for p in load_problems(path, "solution" in context.needs, s.skip_ungradable)[0]
    ]
    check_window(
        model,
        path,
        problems,
        s.max_new_tokens,
        lambda p: [teacher_prompt(tokenizer, p, s.thinking)],
    )
    order = np.resize(np.random.default_rng(s.seed).permutation(len(problems)), s.batches * s.batch)
    rollouts = sample_student(model, tokenizer, s, [problems[i] for i in order])
    batches = tqdm(np.split(np.array(rollouts), s.batches), desc="gradients", unit=" batches")
    # [C, N, m]
    sketches = torch.stack([batch_sketches(model, tokenizer, rows, s) for rows in batches], 1)
    also = [
        step_sketches(name, model, np.split(np.array(rollouts), s.batches), s) for name in s.also
    ]
    sketches = torch.cat([sketches, *(x.unsqueeze(0) for x in also)])
    size = sum(parameter.numel() for parameter in lora.lora_parameters(model))
    return {
        "settings": asdict(s),
        "coordinates": size,
        "sketch_error": s.sketch**-0.5 if s.sketch < size else 0.0,
        "accuracy": np.mean([r.correct for r in rollouts]),
        "length": np.mean([len(r.token_ids) for r in rollouts]),
        "rows": summarise(
            sketches,
            configurations(s) | dict.fromkeys(s.also, (0.0, 0, 0.0)),
            exact=s.sketch >= size,
        ),
    }


def table(result: dict) -> str:
    """The rows as markdown, below what is known of rollouts and sketches."""

    def cell(key: str, value: float | None, error: float | None) -> str:
        error = "" if error is None else f" +- {error:.3f}"
        return "-" if value is None else f"{value:{'+' * key.startswith('-')}.3f}{error}"

    keys = [key for key in result["rows"]["grpo"] if key != "cosines"]
    lines = [
        ["", *keys],
        ["---"] * (1 + len(keys)),
        *([name, *(cell(key, *row[key]) for key in keys)] for name, row in result["rows"].items()),
    ]
    return (
        "accuracy {accuracy:.3f}, length {length:.1f}; {coordinates} coordinates, standard error "
        "of a cosine by their sketch {sketch_error:.4f}; --help explains the columns\n\n"
    ).format(**result) + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def recommendation(rows: dict[str, dict]) -> str:
    """The gate and clip of the highest sign, or alignment if there is no sign, of those whose
    alignment is above grpo's by two standard errors; what speaks for it."""
    tried = {name: row["- grpo"] for name, row in rows.items() if name not in BASELINES}
    if rows["grpo"]["alignment"][0] <= 2 * rows["grpo"]["alignment"][1]:
        return (
            "no recommendation: the plain gradients of these batches agree no better than noise: "
            "take more and larger batches, and problems that are neither too hard nor too easy"
        )
    column = "sign" if "sign" in rows["grpo"] else "alignment"
    above = [name for name, (more, error) in tried.items() if more > 2 * error]
    if not above:
        widest = max(error for _, error in tried.values())
        return (
            "no gate or clip is above grpo by two standard errors, which are up to "
            f"{2 * widest:.3f} here: what this teacher says of tokens helps little here, or "
            "--batches and --batch are too small to tell"
        )
    best = max(above, key=lambda name: rows[name][column][0])
    (more, error), (ungated, its_error) = tried[best], rows[best]["- gamma 0"]
    return (
        f"try {best}: of the {len(above)} gates and clips, of {len(tried)}, whose alignment is "
        f"above grpo's by two standard errors it has the highest {column}, partly by luck. Its "
        f"alignment is {more:+.3f} +- {error:.3f} above grpo's, {ungated:+.3f} +- "
        f"{its_error:.3f} above that without a gate. On the toy sign went with accuracy over 40 "
        "updates, alignment with accuracy, and shorter with length, over the first 20"
    )


def main() -> None:
    with one_line_errors(PROGRAM, "stopped"):
        s = parse(Settings, sys.argv[1:], __doc__)
        if s.out and (Path(s.out).is_dir() or not os.access(Path(s.out).parent, os.W_OK)):
            raise InputError(f"{s.out}: cannot be written: correct --out")
        with name_lack_of_memory(lambda: "here: lower --pass-tokens or --slots"):
            result = measure(s)
        if s.out:
            write_json(Path(s.out), result)
        own = {name: row for name, row in result["rows"].items() if name not in s.also}
        say(f"{table(result)}\n\n{recommendation(own)}")


if __name__ == "__main__":
    main()
