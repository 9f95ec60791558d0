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
    bias       cos(E s, E p) by products of different batches, whose noise has mean 0
    momentum   cos(mean of s over 19 batches, E p): AdamW's momentum averages over (1 + beta1) / (1 - beta1) = 19
    norm       sqrt(E |s|^2 / E |p|^2)

--also adds rows of experiments.compare, such as msd. Their gradients are those of their own
training step on the same rollouts. They have the same advantages, unless they compare the
completions of a problem (--samples 8 --batch 8; python -m family calls it --rollouts-per-prompt).
A teacher that follows the student starts as --adapter.

A recommendation comes first, then all rows: highest sign first, or alignment where there is no sign.
The number after +- is the standard error by a jackknife over batches, which pairs differences. "-"
means that noise made the estimate of a square negative. A gradient is kept as a count-sketch of
--sketch numbers (Charikar, Chen, Farach-Colton 2002), which is linear and has unbiased inner
products. The standard error of a cosine by it is at most about 1 / sqrt(--sketch), and 0 if all
coordinates have room. Policy gradient itself is unbiased only with --temperature 1 --top-p 1
--top-k 0.
"""

import itertools
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
from experiments.diagnostics import ReadingSettings, sample_student
from family import __main__ as lab
from family.contexts import show_answer
from support.checkpoint import write_json
from support.data import add_adapter, load_adapter, load_model, load_problems
from support.distributed import Ranks
from support.errors import InputError
from support.flags import flag, parse
from support.run import name_lack_of_memory, one_line_errors
from support.sampling import Rollout, check_prompts, check_thinking, teacher_prompt

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

    out: str = flag(None, "JSON file for all figures (default: none)")
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
    named = {}
    for gamma, window, eps in itertools.product([0.0, *s.gamma], s.window, [0.0, *s.eps]):
        name = f"gamma {gamma} W {window}"
        if not gamma:  # without a gate there is no window
            name = "no gate"
            window = 0
        if eps != 0.2:
            name += f", eps {eps:g}"
        values = (gamma, window, eps)
        named[NAMES.get(values, name)] = values
    return named | dict.fromkeys(BASELINES, PLAIN)


def sketch(x: Tensor, size: int, seed: int) -> Tensor:
    """x [D] -> [min(size, D)], linear. Chunks of this length get random signs, and are added up at
    random rotations."""
    generator = torch.Generator(x.device).manual_seed(seed)
    total = torch.zeros_like(x[:size])
    for chunk in x.split(size):
        turn = torch.randint(len(total), (), generator=generator, device=x.device).item()
        total = total.roll(turn)
        signs = 2 * torch.empty_like(chunk).bernoulli_(generator=generator) - 1
        total[: len(chunk)] += chunk * signs
    return total


def flat(tensors):
    return torch.cat([x.flatten() for x in tensors])


def batch_sketches(model, tokenizer, rows, s):
    """The gradients [C, m] of one batch: C configurations, sketches of m numbers. Student and
    teacher read the batch once."""
    grid = configurations(s)
    parameters = lora.lora_parameters(model)
    prompts = [row.prompt for row in rows]
    completions = [row.token_ids for row in rows]
    privileged = [teacher_prompt(tokenizer, row.problem, row.problem.solution, s) for row in rows]
    with lora.disabled(model):
        seen = teacher.read_in_batches(model, privileged, completions, s.pass_tokens)

    lengths = seen.mask.sum(1).float()
    tokens = lengths.sum()
    highest = seen.entropy.max()  # of the whole batch, as in training
    r = torch.tensor([row.reward for row in rows], device=model.device)
    standard = torch.tensor([row.advantage for row in rows], device=model.device)
    advantages = {"r": r, "r - 0.5": r - 0.5, "shorter": lengths.mean() - lengths}
    found = dict.fromkeys(grid, 0)
    sizes = [len(row.prompt) + len(row.token_ids) for row in rows]
    for some in teacher.micro_batches(sizes, s.pass_tokens):
        own = teacher.read(model, [prompts[i] for i in some], [completions[i] for i in some])
        theirs = seen.select(some, own.mask.shape[1])
        for name, (gamma, window, eps) in grid.items():
            weights = egrsd.token_advantages(
                advantages.get(name, standard)[some],
                theirs.logp,
                own.logp,
                theirs.entropy,
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
            found[name] += sketch(flat(parts), s.sketch, s.seed)
    return torch.stack(list(found.values()))


class Step(train.Trainer):
    """The training step of a row of experiments.compare. It takes `rows` for its rollouts, with
    their advantages, and has a `gradient` in the place of an update."""

    def __init__(self, settings, objective, model):
        self.given = model
        super().__init__(settings, Ranks.alone(), objective)
        self.log.bar = tqdm(disable=True)
        if settings.advantage == "running":
            self.baseline.advantage = self.advantages

    def load_model(self):
        super().load_model()
        self.model = self.given
        self.parameters = lora.lora_parameters(self.model)

    def next_problems(self):
        return [row.problem for row in self.rows[:: self.s.rollouts_per_prompt]]

    def sample(self, *_):
        return [replace(row) for row in self.rows]

    def advantages(self, rewards):
        return torch.tensor([row.advantage for row in self.rows])

    def update(self):
        self.gradient = flat(parameter.grad for parameter in self.parameters)
        self.model.zero_grad()
        return 0.0, 0.0  # norm and learning rate, for the log


def step_sketches(name, model, batches, s):
    """The gradients [N, m] of a row of experiments.compare: those of its training step, with these
    rollouts in the place of its own."""
    found = []
    with tempfile.TemporaryDirectory() as out:
        flags = [
            *compare.variants()[name],
            f"--model={s.model}",
            f"--data={s.data}",
            "--lora-targets=all-linear",  # of an adapter that `Step` replaces
            f"--out={out}",
            f"--seed={s.seed}",
            f"--prompts-per-step={s.batch}",
            f"--rollouts-per-prompt={s.samples}",
            f"--max-new-tokens={s.max_new_tokens}",
            f"--slots={s.slots}",
            f"--micro-batch={max(1, s.pass_tokens // s.max_new_tokens)}",
        ]
        settings, _, objective = lab.parse_arguments(flags)
        step = Step(settings, objective, model)
        for rows in tqdm(batches, desc=name, unit=" batches"):
            step.rows = rows
            step.train_step()
            found.append(sketch(step.gradient, s.sketch, s.seed))
    return torch.stack(found)


# ---- figures


def alignments(own, cross, target):
    """cos(s_b, sum of p_b' over b' != b) [N] from the products [N, N] of s_b and s_b', s_b and
    p_b', p_b and p_b'."""
    # |sum of p_b' over b' != b|^2, [N]
    others = target.sum() - 2 * target.sum(1) + target.diagonal()
    inner = cross.sum(1) - cross.diagonal()
    return inner / np.sqrt(own.diagonal() * others).clip(1e-300)  # 0 where s_b = 0


def expected(x):
    """Mean of products [N, N] of different batches, whose noise has mean 0."""
    n = len(x)
    return (x.sum() - x.trace()) / (n * (n - 1))


def estimates(x):
    """Values by column, from the products [7, N, N] of `leave_one_out`."""
    own, cross, plain, to_shorter, shorter, signs, signs_cross = x
    power = own.diagonal().mean()
    signal = expected(own)
    averaged = signal + (power - signal) / 19  # |mean of s over 19 batches|^2
    shared = expected(cross) / np.sqrt(expected(plain))
    return {
        "alignment": alignments(own, cross, plain).mean(),
        "sign": alignments(signs, signs_cross, plain).mean(),
        "shorter": alignments(own, to_shorter, shorter).mean(),
        "bias": shared / np.sqrt(signal),
        "momentum": shared / np.sqrt(averaged),
        "norm": np.sqrt(power / plain.diagonal().mean()),
    }


def leave_one_out(own, plain, shorter):
    """The gradients s, p and those of `shorter`, each [N, m] -> the estimates by column, [1 + N]:
    of all batches, and without each of them."""
    signs = own.sign()
    pairs = [(own, own), (own, plain), (plain, plain), (own, shorter), (shorter, shorter)]
    pairs += [(signs, signs), (signs, plain)]
    x = np.stack([(a @ b.T).cpu().numpy() for a, b in pairs])  # [7, N, N]
    found = [estimates(x)]
    for b in range(len(own)):
        found.append(estimates(np.delete(np.delete(x, b, 1), b, 2)))
    return {key: np.array([one[key] for one in found]) for key in found[0]}


def with_error(x):
    """A column of `leave_one_out` -> [value, its standard error by the jackknife], None for what is
    not finite."""
    error = np.sqrt((len(x) - 2) * x[1:].var())
    return [float(value) if np.isfinite(value) else None for value in (x[0], error)]


@np.errstate(invalid="ignore", divide="ignore")  # nan where the estimate of a square is negative
def summarise(sketches, grid, exact):
    """sketches [C, N, m] -> by name, best first: [value, standard error] by column. exact: the sketches
    hold every coordinate, up to its sign; then the highest sign is best, else the highest alignment."""
    names = list(grid)
    plain = sketches[names.index("grpo")].double()
    shorter = sketches[names.index("shorter")].double()
    columns = {}
    for name, own in zip(names, sketches, strict=True):
        columns[name] = leave_one_out(own.double(), plain, shorter)
    rows = {}
    best = "sign" if exact else "alignment"
    for name in sorted(names, key=lambda name: -columns[name][best][0]):
        found = columns[name]
        eps = grid[name][2]
        ungated = next(other for other in names if grid[other] == (0, 0, eps))
        found["- grpo"] = found["alignment"] - columns["grpo"]["alignment"]
        found["- gamma 0"] = found["alignment"] - columns[ungated]["alignment"]
        if not exact:
            del found["sign"]
        rows[name] = {key: with_error(x) for key, x in found.items()}
    return rows


# ---- the command


def measure(s: GradientsSettings) -> dict:
    """Everything above: what --out holds."""
    grid = configurations(s)
    others = compare.variants().keys() - grid.keys()
    for name in s.also:
        if name not in others:
            raise InputError(f"--also {name}: no other row of experiments.compare, see its --help")
    ranks = Ranks.alone()
    s.date = s.date or ranks.today()
    device = ranks.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokenizer = load_model(toy.resolve(s.model, "model"), dtype, device)
    torch.manual_seed(s.seed)
    if s.adapter:
        load_adapter(model, s.adapter)
    else:
        add_adapter(model, rank=16, alpha=32.0)

    check_thinking(tokenizer, s)
    path = toy.resolve(s.data, "train.jsonl")
    shows_solution = s.teacher_context == "solution"
    problems, _ = load_problems(path, shows_solution, s.skip_ungradable)
    if not shows_solution:
        problems = [
            replace(p, solution=show_answer(Rollout([], [], False, p, []))) for p in problems
        ]
    check_prompts(
        model,
        tokenizer,
        path,
        problems,
        s.max_new_tokens,
        lambda p: [teacher_prompt(tokenizer, p, p.solution, s)],
    )
    order = np.random.default_rng(s.seed).permutation(len(problems))
    order = np.resize(order, s.batches * s.batch)  # from the first again after the last
    rollouts = sample_student(model, tokenizer, s, [problems[i] for i in order])
    batches = np.split(np.array(rollouts), s.batches)

    found = []
    for rows in tqdm(batches, desc="gradients", unit=" batches"):
        found.append(batch_sketches(model, tokenizer, rows, s))
    sketches = list(torch.stack(found, 1))  # [N, m] of every configuration
    for name in s.also:
        sketches.append(step_sketches(name, model, batches, s))
        grid[name] = PLAIN
    size = sum(parameter.numel() for parameter in lora.lora_parameters(model))
    exact = s.sketch >= size
    return {
        "settings": asdict(s),
        "coordinates": size,
        "sketch_error": 0.0 if exact else s.sketch**-0.5,
        "accuracy": np.mean([rollout.correct for rollout in rollouts]),
        "length": np.mean([len(rollout.token_ids) for rollout in rollouts]),
        "rows": summarise(sketches, grid, exact),
    }


def cell(key, value, error):
    """An estimate as text; with a sign, if it is a difference."""
    if value is None:
        return "-"
    sign = "+" if key.startswith("-") else ""
    text = f"{value:{sign}.3f}"
    return text if error is None else f"{text} +- {error:.3f}"


def gradients_table(result: dict) -> str:
    """The rows as markdown, below what is known of rollouts and sketches."""
    keys = list(result["rows"]["grpo"])
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
    above = [name for name, (more, error) in tried.items() if more > 2 * error]
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
    return (
        f"try {best}: of the {len(above)} gates and clips, of {len(tried)}, whose alignment is "
        f"above grpo's by two standard errors it has the highest {column}, partly by luck. Its "
        f"alignment is {more} above grpo's. On the toy sign went with accuracy over 40 updates, "
        "alignment with accuracy, and shorter with length, over the first 20"
    )


def main() -> None:
    with one_line_errors(PROGRAM, "stopped"):
        s = parse(GradientsSettings, sys.argv[1:], __doc__)
        if s.out:
            open(s.out, "a").close()  # if it cannot be written, say so before the work
        with name_lack_of_memory(lambda: "here: lower --pass-tokens or --slots"):
            result = measure(s)
        if s.out:
            write_json(Path(s.out), result)
        rows = {name: result["rows"][name] for name in configurations(s)}
        print(f"{recommendation(rows)}\n\n{gradients_table(result)}", flush=True)


if __name__ == "__main__":
    main()
