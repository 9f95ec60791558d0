r"""How well the gradient of one step points, and what magnitude, gate and baseline do to it. Nothing is
trained.

    python -m experiments.gradients --max-new-tokens 128     the toy, its training problems: 43 rows, five minutes

Student and teacher read each of N batches once. From that every configuration (gamma, window, eps)
gets its gradient s_b with respect to the adapter. p_b is the plain policy gradient (gamma = eps =
0, row `grpo`). Advantages are (r - mean) / std over all rewards. They stand for the rewards of
earlier steps in (9), arXiv 2605.13255. Three more rows take r, r - 0.5, and mean length - length:
the row `shorter`.

    alignment  mean over b of cos(s_b, sum of p_b' over b' != b); and its differences to grpo and to gamma = 0
    sign       the same with the sign of every coordinate of s_b, AdamW's first step; only if --sketch holds them all
    shorter    the same with the gradients of the row `shorter` in the place of p: what the step does to length
    bias       cos(E s, E p) by products of different batches, whose noise has mean 0; naive: of the two noisy means
    signal     |E s|^2 / E |s|^2, by the same products; norm: sqrt(E |s|^2 / E |p|^2)
    momentum   cos(mean of s over 19 batches, E p): AdamW's momentum averages over (1 + beta1) / (1 - beta1) = 19

--also adds rows of experiments.compare, such as msd. Their gradients are those of their own
training step on the same rollouts. They have the same advantages, unless they compare the
completions of a problem (--samples 8 --batch 8).

The number after +- is the standard error by a jackknife over batches, which pairs differences. "-"
means that noise made the estimate of a square negative. A gradient is kept as a count-sketch of
--sketch numbers (Charikar, Chen, Farach-Colton 2002), which is linear and has unbiased inner
products. The standard error of a cosine by it is at most about 1 / sqrt(--sketch), and 0 if all
coordinates have room. Policy gradient itself is unbiased only with --temperature 1 --top-p 1
--top-k 0.
"""

import itertools
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
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
from support.run import name_lack_of_memory, one_line_errors
from support.sampling import Rollout, check_window

PROGRAM = "python -m experiments.gradients"
NAMES = {  # of (gamma, window, eps), as in experiments.compare
    (0, 0, 0): "grpo",
    (0, 0, 0.2): "direction-aware",
    (0.3, 0, 0.2): "egrsd",
    (0.3, 3, 0.2): "cl-egrsd",
    (0.3, 3, 0): "magnitude off",
}
BASELINES = ("r", "r - 0.5", "shorter")
PLAIN = (0.0, 0, 0.0)  # gamma, window and eps of policy gradient


@dataclass
class GradientsSettings(ReadingSettings):
    """The command line: how to sample, and which gradients to compare."""

    out: str = flag(
        None, "JSON file for all figures, with the cosine of every batch (default: none)"
    )
    teacher_context: str = flag(
        "solution", "what the teacher is shown", choices=("solution", "answer")
    )
    batches: int = flag(
        32, "batches, N; after the last problem of the file comes the first one again", least=3
    )
    batch: int = flag(64, "problems per batch", least=1)
    samples: int = flag(1, "completions per problem", least=1)
    gamma: list = flag(
        [0.0, 0.3, 1.0, 3.0], "strengths of the gate; 0 is always among them", least=0
    )
    window: list = flag([0, 3, 5], "lookaheads of the gate in tokens", least=0)
    eps: list = flag(
        [0.0, 0.2, 0.4, 0.8], "clips of the magnitude; 0 is always among them", least=0, below=1
    )
    sketch: int = flag(2**17, "numbers kept of a gradient", least=1)
    also: list = flag([], "rows of experiments.compare, each with a step of its own")
    pass_tokens: int = flag(
        2**14, "tokens per pass through the model; lower it to save memory", least=1
    )


# ---- gradients


def configurations(s: GradientsSettings) -> dict:
    """(gamma, window, eps) by name: the grid, and policy gradient with other advantages."""
    grid = set()
    for gamma, window, eps in itertools.product([0.0, *s.gamma], s.window, [0.0, *s.eps]):
        grid.add((gamma, window if gamma else 0, eps))  # without a gate there is no window
    named = {}
    for values in sorted(grid):
        gamma, window, eps = values
        name = f"gamma {gamma} W {window}" if gamma else "no gate"
        if eps != 0.2:
            name += f", eps {eps:g}"
        named[NAMES.get(values, name)] = values
    return named | dict.fromkeys(BASELINES, PLAIN)


def sketch(x: Tensor, size: int, seed: int) -> Tensor:
    """x [D] -> [min(size, D)], linear. Chunks of this length get random signs, and are added up at
    random rotations."""
    generator = torch.Generator(x.device).manual_seed(seed)
    total = torch.zeros_like(x[:size])
    for chunk in x.split(size):
        turn = torch.randint(len(total), (), generator=generator, device=x.device)
        total = total.roll(turn.item())
        signs = 2 * torch.empty_like(chunk).bernoulli_(generator=generator) - 1
        total[: len(chunk)] += chunk * signs
    return total


def batch_sketches(model, tokenizer, rows: list[Rollout], s) -> Tensor:
    """The gradients [C, m] of one batch: C configurations, sketches of m numbers. Student and
    teacher read the batch once."""
    grid = configurations(s)
    parameters = lora.lora_parameters(model)
    completions = [row.token_ids for row in rows]
    privileged = [teacher_prompt(tokenizer, row.problem, s.thinking) for row in rows]
    with lora.disabled(model):
        seen = teacher.read_in_batches(model, privileged, completions, s.pass_tokens)

    tokens = seen.mask.sum()
    highest = seen.entropy.max()  # of the whole batch, as in training
    lengths = seen.mask.sum(1).float()
    standard = torch.tensor([row.advantage for row in rows], device=model.device)
    r = torch.tensor([row.reward for row in rows], device=model.device)
    advantages = {"r": r, "r - 0.5": r - 0.5, "shorter": lengths.mean() - lengths}
    found = dict.fromkeys(grid, 0)
    sizes = [len(row.prompt) + len(row.token_ids) for row in rows]
    for some in teacher.micro_batches(sizes, s.pass_tokens):
        part = [rows[i] for i in some]
        own = teacher.read(model, [row.prompt for row in part], [row.token_ids for row in part])
        columns = own.mask.shape[1]
        logp = seen.logp[some, :columns]
        entropy = seen.entropy[some, :columns]
        for name, (gamma, window, eps) in grid.items():
            weights = egrsd.token_advantages(
                advantages.get(name, standard)[some],
                logp,
                own.logp,
                entropy,
                own.mask,
                gamma=gamma,
                window=window,
                eps=eps,
                floor=s.floor,
                max_entropy=highest,
            )
            loss = egrsd.policy_loss(own.logp, weights, own.mask, tokens)
            # the graph is needed until the last one, `shorter`
            parts = torch.autograd.grad(loss, parameters, retain_graph=name != "shorter")
            gradient = torch.cat([x.flatten() for x in parts])
            found[name] = found[name] + sketch(gradient, s.sketch, s.seed)
    return torch.stack(list(found.values()))


def step_sketches(name: str, model, batches: list, s) -> Tensor:
    """The gradients [N, m] of a row of experiments.compare: those of its training step, with these
    rollouts in the place of its own."""
    found = []
    with tempfile.TemporaryDirectory() as out:
        t = make_trainer(name, model, s, out)

        def note_gradient():
            gradient = torch.cat([parameter.grad.flatten() for parameter in t.parameters])
            found.append(sketch(gradient, s.sketch, s.seed))

        t.optimizer.step = note_gradient
        for rows in tqdm(batches, desc=name, unit=" batches"):
            feed(t, rows, s)
            t.train_step()
    return torch.stack(found)


def make_trainer(name: str, model, s, out: str) -> train.Trainer:
    """A trainer of this row, with the adapter of `model`."""
    layers = {}
    for key, layer in model.named_modules():
        if isinstance(layer, lora.LoRALinear):
            layers[lora.short_name(key)] = layer
    adapter = next(iter(layers.values()))
    flags = [*compare.variants()[name], "--lora-targets", *layers]
    flags += [f"--lora-rank={adapter.rank}", f"--lora-alpha={adapter.alpha}"]
    flags += [f"--model={s.model}", f"--data={s.data}", "--eval-data=", f"--out={out}"]
    flags += [f"--seed={s.seed}", "--lr=0", "--max-grad-norm=1e30"]  # gradients as they are
    flags += [f"--prompts-per-step={s.batch}", f"--rollouts-per-prompt={s.samples}"]
    flags += [f"--max-new-tokens={s.max_new_tokens}", f"--slots={s.slots}"]
    flags += [f"--micro-batch={max(1, s.pass_tokens // s.max_new_tokens)}"]
    try:
        settings, _, objective = lab.parse_arguments(flags)
    except InputError as error:  # it names a flag that this command does not have
        raise InputError(f"--also {name}: {error} (here it is --samples)") from None
    t = train.Trainer(settings, Ranks.alone(), objective)
    t.log.bar = tqdm(disable=True)
    for own, parameter in zip(t.parameters, lora.lora_parameters(model), strict=True):
        own.data.copy_(parameter)
    return t


def feed(t: train.Trainer, rows: list[Rollout], s) -> None:
    """Give the next step these rollouts, with their advantages, in the place of its own."""
    problems = [row.problem for row in rows[:: s.samples]]
    advantages = torch.tensor([row.advantage for row in rows])
    t.step = 0
    t.next_problems = lambda: problems
    t.sample = lambda *_: [replace(row) for row in rows]
    if t.s.advantage == "running":
        t.baseline.advantage = lambda _: advantages


# ---- figures


def products(own: Tensor, plain: Tensor, shorter: Tensor, exact: bool) -> np.ndarray:
    """Inner products [5, N, N] of the batches' gradients s, p and those of `shorter`, each [N, m];
    if the sketches are exact [7, N, N], the last two with the signs of s."""
    pairs = [(own, own), (own, plain), (plain, plain), (own, shorter), (shorter, shorter)]
    if exact:
        signs = own.sign()
        pairs += [(signs, signs), (signs, plain)]
    return np.stack([(x @ y.T).cpu().numpy() for x, y in pairs])


def alignments(own: np.ndarray, cross: np.ndarray, target: np.ndarray) -> np.ndarray:
    """cos(s_b, sum of p_b' over b' != b) [N] from the products [N, N] of s_b and s_b', s_b and
    p_b', p_b and p_b'."""
    # |sum of p_b' over b' != b|^2, [N]
    others = target.sum() - 2 * target.sum(1) + target.diagonal()
    inner = cross.sum(1) - cross.diagonal()
    return inner / np.sqrt(own.diagonal() * others).clip(1e-300)  # 0 where s_b = 0


def expected(x: np.ndarray) -> float:
    """Mean product of different batches, whose noise has mean 0."""
    n = len(x)
    return (x.sum() - x.trace()) / (n * (n - 1))


def estimates(x: np.ndarray) -> dict:
    """Values by column, from `products`."""
    own, cross, plain, to_shorter, shorter, *signs = x
    power = own.diagonal().mean()
    signal = expected(own)
    averaged = signal + (power - signal) / 19  # |mean of s over 19 batches|^2
    shared = expected(cross) / np.sqrt(expected(plain))
    found = {"alignment": alignments(own, cross, plain).mean()}
    if signs:
        found["sign"] = alignments(*signs, plain).mean()
    found["shorter"] = alignments(own, to_shorter, shorter).mean()
    found["bias"] = shared / np.sqrt(signal)
    found["naive bias"] = cross.sum() / np.sqrt(own.sum() * plain.sum())
    found["signal"] = signal / power
    found["momentum"] = shared / np.sqrt(averaged)
    found["norm"] = np.sqrt(power / plain.diagonal().mean())
    return found


def leave_one_out(x: np.ndarray) -> dict:
    """The estimates by column, [1 + N]: of all batches, and without each of them."""
    found = [estimates(x)]
    for b in range(x.shape[1]):
        found.append(estimates(np.delete(np.delete(x, b, 1), b, 2)))
    columns = {}
    for key in found[0]:
        columns[key] = np.array([one[key] for one in found])
    return columns


def with_error(x: np.ndarray) -> list:
    """x [1 + N] as above -> [value, its standard error by the jackknife], None for what is not
    finite."""
    error = np.sqrt((len(x) - 2) * x[1:].var())
    return [float(value) if np.isfinite(value) else None for value in (x[0], error)]


@np.errstate(invalid="ignore", divide="ignore")  # nan where the estimate of a square is negative
def summarise(sketches: Tensor, grid: dict, exact: bool) -> dict:
    """sketches [C, N, m] -> by name, best alignment first: [value, standard error] by column, and
    all cosines. exact: the sketches hold every coordinate, up to its sign."""
    names = list(grid)
    plain = sketches[names.index("grpo")].double()
    shorter = sketches[names.index("shorter")].double()
    columns = {}
    cosines = {}
    for name, own in zip(names, sketches, strict=True):
        x = products(own.double(), plain, shorter, exact)
        columns[name] = leave_one_out(x)
        cosines[name] = alignments(*x[:3]).tolist()

    def alignment(name):
        return columns[name]["alignment"]

    rows = {}
    for name in sorted(names, key=lambda name: -alignment(name)[0]):
        ungated = (0, 0, grid[name][2])
        rival = next(other for other in names if grid[other] == ungated)
        columns[name]["- grpo"] = alignment(name) - alignment("grpo")
        columns[name]["- gamma 0"] = alignment(name) - alignment(rival)
        rows[name] = {key: with_error(x) for key, x in columns[name].items()}
        rows[name]["cosines"] = cosines[name]
    return rows


# ---- the command


def read_problems(s, path: str) -> list:
    """The problems; their solution is what the teacher is shown."""
    context = CONTEXTS[s.teacher_context]
    needs_solution = "solution" in context.needs
    problems = []
    for p in load_problems(path, needs_solution, s.skip_ungradable)[0]:
        nothing = Rollout([], [], False, p, [])
        problems.append(replace(p, solution=context.text(nothing, [], [], p)))
    return problems


def measure(s: GradientsSettings) -> dict:
    """Everything above: what --out holds."""
    grid = configurations(s)
    others = compare.variants().keys() - grid.keys()
    for name in s.also:
        if name not in others:
            raise InputError(f"--also {name}: no other row of experiments.compare, see its --help")
    device = Ranks.alone().device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokenizer = load_model(toy.resolve(s.model, "model"), dtype, device)
    torch.manual_seed(s.seed)
    if s.adapter:
        load_adapter(model, s.adapter)
    else:
        add_adapter(model, rank=16, alpha=32.0)

    path = toy.resolve(s.data, "train.jsonl")
    problems = read_problems(s, path)

    def prompts(problem):
        return [teacher_prompt(tokenizer, problem, s.thinking)]

    check_window(model, path, problems, s.max_new_tokens, prompts)
    order = np.random.default_rng(s.seed).permutation(len(problems))
    order = np.resize(order, s.batches * s.batch)  # from the first again after the last
    rollouts = sample_student(model, tokenizer, s, [problems[i] for i in order])
    batches = np.split(np.array(rollouts), s.batches)

    found = []
    for rows in tqdm(batches, desc="gradients", unit=" batches"):
        found.append(batch_sketches(model, tokenizer, rows, s))
    sketches = torch.stack(found, 1)  # [C, N, m]
    for name in s.also:
        own = step_sketches(name, model, batches, s)
        sketches = torch.cat([sketches, own.unsqueeze(0)])
        grid[name] = PLAIN
    size = sum(parameter.numel() for parameter in lora.lora_parameters(model))
    exact = s.sketch >= size
    accuracy = np.mean([rollout.correct for rollout in rollouts])
    length = np.mean([len(rollout.token_ids) for rollout in rollouts])
    return {
        "settings": asdict(s),
        "coordinates": size,
        "sketch_error": 0.0 if exact else s.sketch**-0.5,
        "accuracy": accuracy,
        "length": length,
        "rows": summarise(sketches, grid, exact),
    }


def cell(key: str, value, error) -> str:
    """An estimate as text; with a sign, if it is a difference."""
    if value is None:
        return "-"
    text = f"{value:+.3f}" if key.startswith("-") else f"{value:.3f}"
    return text if error is None else f"{text} +- {error:.3f}"


def gradients_table(result: dict) -> str:
    """The rows as markdown, below what is known of rollouts and sketches."""
    keys = [key for key in result["rows"]["grpo"] if key != "cosines"]
    lines = []
    for name, row in result["rows"].items():
        lines.append([name, *(cell(key, *row[key]) for key in keys)])
    about = (
        "accuracy {accuracy:.3f}, length {length:.1f}; {coordinates} coordinates, standard error "
        "of a cosine by their sketch {sketch_error:.4f}; --help explains the columns"
    )
    table = compare.markdown(f"|  | {' | '.join(keys)} |", lines)
    return f"{about.format(**result)}\n\n{table}"


def recommendation(rows: dict) -> str:
    """Which gate and clip to try, and why: of those whose alignment is above grpo's by two standard
    errors, the one with the highest sign (without signs: alignment)."""
    alignment, error = rows["grpo"]["alignment"]
    if alignment <= 2 * error:
        return (
            "no recommendation: the plain gradients of these batches agree no better than noise: "
            "take more and larger batches, and problems that are neither too hard nor too easy"
        )
    tried = {name: row["- grpo"] for name, row in rows.items() if name not in BASELINES}
    above = []
    for name, (more, error) in tried.items():
        if more > 2 * error:
            above.append(name)
    if not above:
        widest = max(error for _, error in tried.values())
        return (
            "no gate or clip is above grpo by two standard errors, which are up to "
            f"{2 * widest:.3f} here: what this teacher says of tokens helps little here, or "
            "--batches and --batch are too small to tell"
        )
    column = "sign" if "sign" in rows["grpo"] else "alignment"
    best = max(above, key=lambda name: rows[name][column][0])
    more = "{:+.3f} +- {:.3f}".format(*tried[best])
    more_than_ungated = "{:+.3f} +- {:.3f}".format(*rows[best]["- gamma 0"])
    return (
        f"try {best}: of the {len(above)} gates and clips, of {len(tried)}, whose alignment is "
        f"above grpo's by two standard errors it has the highest {column}, partly by luck. Its "
        f"alignment is {more} above grpo's, {more_than_ungated} above that without a gate. On the "
        "toy sign went with accuracy over 40 updates, alignment with accuracy, and shorter with "
        "length, over the first 20"
    )


def main() -> None:
    with one_line_errors(PROGRAM, "stopped"):
        s = parse(GradientsSettings, sys.argv[1:], __doc__)
        if s.out and (Path(s.out).is_dir() or not os.access(Path(s.out).parent, os.W_OK)):
            raise InputError(f"{s.out}: cannot be written: correct --out")
        with name_lack_of_memory(lambda: "here: lower --pass-tokens or --slots"):
            result = measure(s)
        if s.out:
            write_json(Path(s.out), result)
        print(gradients_table(result) + "\n", flush=True)
        for name in s.also:
            del result["rows"][name]  # it is no gate or clip
        print(recommendation(result["rows"]), flush=True)


if __name__ == "__main__":
    main()
