"""What a student and its privileged teacher do token by token, without training: the metrics of the
family's papers.

    python -m experiments.diagnostics --max-new-tokens 128          the toy, its held-out problems

    markers       epistemic words (wait, perhaps, check ...) per response and per 1,000 tokens            2603.24472
    repetition    share of completions whose tail compresses more than 10 times with zlib                 2604.08527
    overlap       mean share of tokens that the top 16 of student and teacher have in common              2604.13016
    kinds         locks (H < --high), pivots (H >= --high, and < --low within --window tokens), forks (the rest): their
                  shares, mean H, |d| and gates of EGRSD and CL-EGRSD, d = log p_T - log p_S              2605.13255
    deciles       the same for tokens in ten parts by H                                                   2605.13255
    branches      force every token that the teacher proposes on correct solutions, let the student go on, count correct
                  ends; AUROC of position, H, lookahead H and |d| for places where all branches fail      2605.21606

Into --out go diagnostics.json and tokens.jsonl, a line per solution with all values of its tokens,
of which experiments.report makes a page. The student is the model with --adapter, the teacher
the model without it.
"""

import re
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import egrsd
import lora
import reward
import rollout
import teacher
import toy
from family.divergences import per_token_divergence
from support.checkpoint import append_jsonl, write_json
from support.data import Problem, load_adapter, load_model, load_problems
from support.distributed import Ranks
from support.errors import InputError
from support.flags import SEEDS, flag, parse
from support.report import COLUMNS
from support.run import hold, one_line_errors, say
from support.sampling import Rollout, check_window, grade_rollouts, progress, sample
from support.settings import Sampling

PROGRAM = "python -m experiments.diagnostics"
MARKERS = (
    "wait",
    "hmm",
    "perhaps",
    "maybe",
    "actually",
    "alternatively",
    "seems",
    "might",
    "likely",
    "check",
)
PREDICTORS = ("position", "entropy", "lookahead", "|d|")  # of unreliable positions
AVERAGED = ("entropy", "|d|", "gate", "cl_gate")  # per kind and per decile
BATCH_TOKENS = 2**14  # per forward pass when reading


@dataclass
class ReadingSettings(Sampling):
    """Flags of commands that sample solutions, which student and teacher then read."""

    model: str = flag("toy", "checkpoint directory, hub id or toy")
    adapter: str = flag(
        None, "LoRA adapter directory of the student (default: none, so that it is the base model)"
    )
    data: str = flag("toy", "JSONL file with problem, solution and answer, or toy")
    skip_ungradable: bool = flag(
        False, "leave out rows whose gold answer the verifier cannot grade"
    )
    max_new_tokens: int = flag(
        1024, "longest completion in tokens, also L_max of the length reward", "[1, inf)"
    )
    top_p: float = flag(1.0, "draw from the likeliest tokens of this mass", "(0, 1]")
    slots: int = flag(128, "rows decoded together; lower it to save memory", "[1, inf)")
    thinking: bool = flag(False, "let the chat template open a thinking block")
    seed: int = flag(0, "seed of sampling and of everything else that is random", SEEDS)
    floor: float = flag(0.1, "smallest gate", "(0, 1]")


@dataclass
class Settings(ReadingSettings):
    """The command line: how to sample, and what to look at."""

    out: str = flag(None, "directory for the results (default: runs/diagnostics-<time>)")
    problems: int = flag(64, "how many of the file's problems, from its start", "[1, inf)")
    gamma: float = flag(0.3, "strength of the gate", "[0, inf)")
    window: int = flag(
        egrsd.SOON,
        "lookahead of CL-EGRSD's gate, of pivots and of the lookahead entropy",
        "[0, inf)",
    )
    eps: float = flag(0.2, "clip of the magnitude, for the token advantages", "[0, 1)")
    high: float = flag(egrsd.HIGH, "H in nats from which a token is a pivot or a fork", "[0, inf)")
    low: float = flag(
        egrsd.LOW, "H in nats below which a pivot's continuation is certain", "[0, inf)"
    )
    branches: int = flag(
        100, "positions for branch viability, drawn at random, 0: none", "[0, inf)"
    )
    branch_probability: float = flag(
        0.05, "least probability of a token that the teacher proposes", "(0, 1)"
    )
    most_branches: int = flag(4, "most tokens forced at a position", "[2, inf)")
    continuations: int = flag(6, "times the student goes on from each branch", "[1, inf)")
    unreliable: float = flag(0.40, "unreliable: every branch is below this viability", "[0, 1]")
    benign: float = flag(0.75, "benign: two branches reach this viability", "[0, 1]")


def markers(texts: list[str], tokens: int) -> dict[str, float]:
    """Lower-cased substrings per response, as the authors count, and words per 1,000 of all
    `tokens`; 2603.24472.

    >>> markers(["Wait, wait: unlikely.", "Yes."], tokens=8)
    {'markers_per_response': 1.5, 'markers_per_1000_tokens': 250.0}
    """
    substrings = sum(text.lower().count(marker) for text in texts for marker in MARKERS)
    words = sum(word in MARKERS for text in texts for word in re.findall(r"\w+", text.lower()))
    return {
        "markers_per_response": substrings / len(texts),
        "markers_per_1000_tokens": 1000 * words / tokens,
    }


def repetition_rate(texts: list[str], tail: int = 2000, ratio: float = 10.0) -> float:
    """Share of texts whose last `tail` characters zlib makes more than `ratio` times smaller.
    2604.08527.

    >>> repetition_rate(["again " * 300, "7+5=12. 12+9=21."])
    0.5
    """
    tails = [text[-tail:].encode() for text in texts]
    return sum(len(end) > ratio * len(zlib.compress(end)) for end in tails) / len(texts)


def top_overlap(log_p_teacher: Tensor, log_p_student: Tensor, k: int = 16) -> Tensor:
    """log p_T, log p_S [n, V] -> share of the k likeliest tokens they have in common [n].
    2604.13016."""
    k = min(k, log_p_teacher.shape[-1])
    top_teacher, top_student = log_p_teacher.topk(k).indices, log_p_student.topk(k).indices
    return (top_teacher.unsqueeze(-1) == top_student.unsqueeze(-2)).sum((-1, -2)) / k


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Chance that a positive scores higher than a negative, ties count half; nan if one of the two
    is missing.

    >>> auroc(np.array([1.0, 2.0, 2.0, 3.0]), np.array([False, False, True, True]))
    0.875
    """
    positive, negative = scores[labels], scores[~labels]
    wins = np.sign(positive[:, None] - negative) / 2 + 0.5
    return float(wins.mean()) if wins.size else float("nan")


def auroc_interval(
    scores: np.ndarray, labels: np.ndarray, resamples: int = 2000, seed: int = 0
) -> list[float] | None:
    """[AUROC, low, high] with a 95 % bootstrap over positions, resamples with both labels; None
    without both."""
    if not labels.any() or labels.all():
        return None
    rng, n = np.random.default_rng(seed), len(labels)
    draws = [
        auroc(scores[chosen], labels[chosen]) for chosen in rng.integers(n, size=(resamples, n))
    ]
    return [auroc(scores, labels), *np.nanquantile(draws, [0.025, 0.975]).tolist()]


def teacher_prompt(tokenizer, problem: Problem, thinking: bool) -> list[int]:
    return teacher.encode(
        tokenizer, teacher.teacher_messages(problem.problem, problem.solution), thinking
    )


def sample_student(model, tokenizer, s: Settings, problems: Sequence[Problem]) -> list[Rollout]:
    """The student's solutions, with rewards and advantages."""
    with tqdm(total=len(problems) * s.samples, desc="sampling", unit=" completions") as bar:
        sampled = sample(model, tokenizer, problems, s, seed=(s.seed, 0), show=progress(bar))
    rollouts = grade_rollouts(tokenizer, sampled)
    rewards = torch.tensor(
        [reward.shaped_reward(r.correct, len(r.token_ids), s.max_new_tokens) for r in rollouts]
    )
    baseline = egrsd.RunningAdvantage(warmup_steps=0)
    baseline.update(rewards)  # these very rewards stand for those of earlier steps in eq. (9)
    for r, value, advantage in zip(
        rollouts, rewards.tolist(), baseline.advantage(rewards).tolist(), strict=True
    ):
        r.reward, r.advantage = value, advantage
    return rollouts


def read_both(
    model, tokenizer, s: Settings, rollouts: list[Rollout]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Student and teacher read the rollouts: (values [B, T] by name, on the CPU; the teacher's
    states [T_i, D])."""
    read = partial(
        teacher.read_in_batches,
        model,
        completions=[r.token_ids for r in rollouts],
        most_tokens=BATCH_TOKENS,
        hidden=True,
    )
    by_student = read([r.prompt for r in rollouts])
    with lora.disabled(model):
        by_teacher = read([teacher_prompt(tokenizer, r.problem, s.thinking) for r in rollouts])
    mask, hidden = by_student.mask, (by_student.hidden, by_teacher.hidden)
    overlap = per_token_divergence(teacher.output_head(model), *hidden, mask, top_overlap)
    log_p_teacher, log_p_student = by_teacher.logp, by_student.logp
    delta, H = log_p_teacher - log_p_student, by_teacher.entropy
    signals = egrsd.token_signals(
        torch.tensor([r.advantage for r in rollouts], device=model.device),
        log_p_teacher,
        log_p_student,
        H,
        mask,
        gamma=s.gamma,
        window=s.window,
        eps=s.eps,
        floor=s.floor,
        high=s.high,
        low=s.low,
        soon=s.window,
    )
    column = torch.arange(mask.shape[1], device=model.device)
    values = {
        "mask": mask,
        "entropy": H,
        "delta": delta,
        "|d|": delta.abs(),
        "overlap": overlap,
        "lookahead": signals.least_entropy,
        "kind": signals.kind,
        "gate": egrsd.confidence_gate(H, mask, s.gamma, 0, s.floor),
        "cl_gate": signals.gate,
        "advantage": signals.advantage,
        "position": (column + 0.5) / mask.sum(1, keepdim=True),
    }
    values = {name: value.cpu() for name, value in values.items()}
    return values, by_teacher.hidden


def summarise(rollouts: list[Rollout], values: dict[str, Tensor]) -> dict:
    """What diagnostics.json says, but for settings and branches."""
    texts, mask = [r.text for r in rollouts], values["mask"]
    flat = {name: value[mask] for name, value in values.items()}  # [N], N tokens
    kinds = {name: flat["kind"] == k for k, name in enumerate(egrsd.KINDS)}
    deciles = np.array_split(flat["entropy"].numpy().argsort(kind="stable"), 10)
    return {
        "completions": len(rollouts),
        "tokens": int(mask.sum()),
        "accuracy": np.mean([r.correct for r in rollouts]).item(),
        "length": mask.sum(1).float().mean().item(),
        **markers(texts, int(mask.sum())),
        "repetition": repetition_rate(texts),
        "overlap": flat["overlap"].mean().item(),
        "kinds": {
            name: {"share": found.float().mean().item()}
            | {key: flat[key][found].mean().item() if found.any() else None for key in AVERAGED}
            for name, found in kinds.items()
        },
        "deciles": [
            {"tokens": len(part)} | {key: float(flat[key].numpy()[part].mean()) for key in AVERAGED}
            for part in deciles
            if len(part)
        ],
    }


def branch_places(
    model, tokenizer, s: Settings, rollouts: list[Rollout], hidden: list[Tensor]
) -> list[tuple]:
    """(rollout i, position t, [tokens]) wherever the teacher proposes several next tokens on a
    correct solution."""
    places = []
    for i in np.flatnonzero([r.correct for r in rollouts]):
        p = teacher.output_head(model)(hidden[i]).softmax(-1)  # [T_i, V]: one completion at a time
        p[:, rollout.stop_ids(model, tokenizer)] = 0  # an end is not a branch
        likeliest = p.topk(min(s.most_branches, p.shape[-1]))
        proposed = likeliest.values >= s.branch_probability
        places += [
            (i, t, likeliest.indices[t][proposed[t]].tolist())
            for t in (proposed.sum(-1) >= 2).nonzero().flatten().tolist()
        ]
    return places


def branch_viability(
    model, tokenizer, s: Settings, rollouts: list[Rollout], values: dict, hidden: list
) -> dict:
    """Force the teacher's alternatives on correct solutions, and see what the student makes of
    each; 2605.21606."""
    places = branch_places(model, tokenizer, s, rollouts, hidden)
    order = np.random.default_rng(s.seed).permutation(len(places))
    chosen = [places[k] for k in sorted(order[: s.branches])]
    forced = [
        (rollouts[i], rollouts[i].token_ids[:t] + [token])
        for i, t, proposed in chosen
        for token in proposed
    ]
    with tqdm(total=len(forced) * s.continuations, desc="branches", unit=" completions") as bar:
        ends = (
            rollout.sample(
                model,
                [r.prompt + first for r, first in forced],
                max_new_tokens=s.max_new_tokens,
                top_p=s.top_p,
                stop_ids=rollout.stop_ids(model, tokenizer),
                temperature=s.temperature,
                top_k=s.top_k,
                slots=s.slots,
                samples_per_prompt=s.continuations,
                generator=rollout.generator_for_rows((s.seed, 1), 0),
                progress=progress(bar),
            )
            if forced
            else []
        )
    starts = [branch for branch in forced for _ in range(s.continuations)]
    whole = grade_rollouts(
        tokenizer,
        [
            Rollout(first + end.token_ids, [], end.finished, r.problem, r.prompt)
            for (r, first), end in zip(starts, ends, strict=True)
        ],
    )
    # share of correct ends, of every branch
    shares = np.reshape([r.correct for r in whole], (len(forced), s.continuations)).mean(1)
    following = iter(shares)
    # those of each position's branches
    viability = [sorted(next(following) for _ in proposed) for _, _, proposed in chosen]
    unreliable = np.array([v[-1] < s.unreliable for v in viability], dtype=bool)
    scores = {
        name: np.array([values[name][i, t].item() for i, t, _ in chosen]) for name in PREDICTORS
    }
    return {
        "candidates": len(places),
        "positions": len(chosen),
        "branches": len(forced),
        "unreliable": int(unreliable.sum()),
        "benign": sum(bool(v[-2] >= s.benign) for v in viability),
        "mean_viability": float(shares.mean()) if forced else None,
        "auroc": {name: auroc_interval(scores[name], unreliable) for name in PREDICTORS},
    }


def token_rows(tokenizer, rollouts: list[Rollout], values: dict[str, Tensor]) -> list[dict]:
    """The lines of tokens.jsonl; the gate there is CL-EGRSD's."""
    columns = {name: values["cl_gate" if name == "gate" else name] for name in COLUMNS}
    return [
        {
            "problem": r.problem.problem,
            "prompt": tokenizer.decode(r.prompt),
            "solution": r.problem.solution,
            "answer": r.problem.answer,
            "correct": r.correct,
            "reward": r.reward,
            "A": r.advantage,
            "tokens": [tokenizer.decode([token]) for token in r.token_ids],
            **{
                name: [round(x, 4) for x in value[i, : len(r.token_ids)].tolist()]
                for name, value in columns.items()
            },
        }
        for i, r in enumerate(rollouts)
    ]


def table(result: dict) -> str:
    """What diagnostics.json says, for people."""
    lines = [
        (
            "{completions} completions, {tokens} tokens, accuracy {accuracy:.3f}, length "
            "{length:.1f}\nmarkers {markers_per_response:.2f} per response, "
            "{markers_per_1000_tokens:.1f} per 1,000 tokens; repetition {repetition:.3f}; top-16 "
            "overlap {overlap:.3f}\n"
        ).format(**result),
        ("{:12}" + "{:>9}" * 5).format("", "tokens", "H nats", "|d|", "gate", "CL gate"),
    ]
    groups = result["kinds"] | {
        f"decile {n}": means for n, means in enumerate(result["deciles"], 1)
    }
    for name, means in groups.items():
        tokens = means.get("tokens") or round(means["share"] * result["tokens"])
        shown = ["-" if means[key] is None else f"{means[key]:.3f}" for key in AVERAGED]
        lines.append(("{:12}" + "{:>9}" * 5).format(name, tokens, *shown))
    if "branches" in result:
        lines += [
            "\nbranches: {positions} of {candidates} positions, {unreliable} unreliable, "
            "{benign} benign; AUROC for unreliable, 95 % interval".format(**result["branches"])
        ]
        lines += [
            f"{name:12}" + ("{:9.3f}  [{:.3f}, {:.3f}]".format(*found) if found else "        -")
            for name, found in result["branches"]["auroc"].items()
        ]
    return "\n".join(lines)


@torch.no_grad()
def diagnose(s: Settings) -> dict:
    """Everything above; writes --out and returns what diagnostics.json holds."""
    out = Path(s.out or "runs/diagnostics-" + time.strftime("%Y%m%d-%H%M%S"))
    with hold(out, Ranks.alone()):
        path = toy.resolve(s.data, "test.jsonl")
        problems = load_problems(path, True, s.skip_ungradable)[0][: s.problems]
        device, dtype = (
            ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        )
        model, tokenizer = load_model(toy.resolve(s.model, "model"), dtype, torch.device(device))
        if s.adapter:
            load_adapter(model, s.adapter)
        # a branch goes on behind a part of a completion
        new_tokens = s.max_new_tokens * (2 if s.branches else 1)
        check_window(
            model, path, problems, new_tokens, lambda p: [teacher_prompt(tokenizer, p, s.thinking)]
        )
        rollouts = sample_student(model, tokenizer, s, problems)
        values, hidden = read_both(model, tokenizer, s, rollouts)
        result = {"settings": asdict(s)} | summarise(rollouts, values)
        if s.branches:
            result["branches"] = branch_viability(model, tokenizer, s, rollouts, values, hidden)
        write_json(out / "diagnostics.json", result)
        append_jsonl(out / "tokens.jsonl", token_rows(tokenizer, rollouts, values))
        say(
            f"{table(result)}\n\nvalues  {out / 'diagnostics.json'}\ntokens  {out / 'tokens.jsonl'}"
        )
    return result


def parse_arguments(argv: list[str]) -> Settings:
    s = parse(Settings, argv, __doc__)
    if s.low > s.high:
        raise InputError(f"--low must be at most --high, got {s.low} and {s.high}")
    return s


def main() -> None:
    with one_line_errors(PROGRAM, "stopped, nothing was written"):
        diagnose(parse_arguments(sys.argv[1:]))


if __name__ == "__main__":
    main()
