"""What a student and its privileged teacher do token by token, without training: the metrics of the
family's papers.

    python -m experiments.diagnostics --max-new-tokens 128          the toy, its held-out problems

    markers       epistemic words (wait, perhaps, check ...) per response and per 1,000 tokens            2603.24472
    repetition    share of completions whose tail compresses more than 10 times with zlib                 2604.08527
    overlap       mean share of tokens that the top 16 of student and teacher have in common              2604.13016
    kinds         locks (H < --high), pivots (H >= --high, and < --low within --window tokens), forks (the rest): their
                  shares, mean H, |d| and gates of EGRSD and CL-EGRSD, d = log p_T - log p_S              2605.13255
    deciles       the same for tokens in ten parts by H                                                   2605.13255
    regimes       the same for tokens by two questions: is H, divided as in (5), at least --split? Is the least one of
                  the next --window tokens? What the lookahead adds is `change`, CL-EGRSD's gate minus EGRSD's
    branches      force every token that the teacher proposes on correct solutions, let the student go on, count correct
                  ends; AUROC of position, H, lookahead H and |d| for places where all branches fail      2605.21606
    saliency      --saliency N: on which tokens the answers of N correct solutions rest, found with a mask and by
                  leaving out steps (family/saliency.py); by kind, and AUROC of H, |d|, gates for them       2604.16158

--out gets diagnostics.json and tokens.jsonl, with a record of all values by token for each
solution. experiments.report makes a page of tokens.jsonl. The student is the model with --adapter,
the teacher is the model without it.
"""

import json
import re
import sys
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pprint import pprint

import numpy as np
import torch
from tqdm import tqdm

import egrsd
import lora
import reward
import rollout
import teacher
import toy
from family.divergences import per_token_divergence
from family.saliency import SALIENCY
from support.checkpoint import append_jsonl, write_json
from support.data import Problem, load_adapter, load_model, load_problems
from support.distributed import Ranks
from support.flags import SEEDS, flag, parse
from support.report import COLUMNS
from support.run import hold, one_line_errors
from support.sampling import (
    Rollout,
    check_prompts,
    check_thinking,
    grade_rollouts,
    progress,
    said,
    sample,
    teacher_prompt,
)
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
MEASURES = tuple(f"by_{name}" for name in SALIENCY)  # of saliency
KNOWING = (*PREDICTORS, "gate", "cl_gate", *MEASURES)  # of tokens on which an answer rests
AVERAGED = ("entropy", "normalised", "|d|", "gate", "cl_gate", "change")  # of groups of tokens
REGIMES = (
    "certain, then certain",
    "certain, then uncertain",
    "uncertain, then certain",
    "uncertain, then uncertain",
)
BATCH_TOKENS = 2**14  # per forward pass when reading

# How branches are made and judged (2605.21606)
LEAST_PROBABILITY = 0.05  # of a token that the teacher proposes
MOST_BRANCHES = 4  # tokens forced at a position
CONTINUATIONS = 6  # of the student from each branch
UNRELIABLE = 0.40  # unreliable position: the viability of every branch is below this
BENIGN = 0.75  # benign position: two branches reach this viability


@dataclass
class ReadingSettings(Sampling):
    """Flags of commands that sample solutions, which student and teacher then read."""

    model: str = flag("toy", "checkpoint directory, hub id or toy")
    adapter: str = flag(
        None, "LoRA adapter directory of the student (default: none, the base model)"
    )
    data: str = flag("toy", "JSONL file with problem, solution and answer, or toy")
    skip_ungradable: bool = flag(
        False, "leave out problems whose gold answer the verifier cannot grade"
    )
    max_new_tokens: int = flag(
        1024, "longest completion in tokens, also L_max of the length reward", least=1
    )
    top_p: float = flag(1.0, "draw from the likeliest tokens of this mass", above=0, most=1)
    slots: int = flag(128, "completions sampled at the same time; fewer save memory", least=1)
    thinking: bool = flag(False, "let the chat template open a thinking block")
    teacher_thinking: bool = flag(
        None, "the same for the teacher's prompt (default: as --thinking says)"
    )
    seed: int = flag(0, "seed of sampling and of everything else that is random", **SEEDS)
    floor: float = flag(0.1, "smallest gate", above=0, most=1)


@dataclass
class DiagnosticsSettings(ReadingSettings):
    """The command line: how to sample, and what to look at."""

    out: str = flag("runs/diagnostics", "directory for the results")
    problems: int = flag(64, "how many of the file's problems, from its start", least=1)
    gamma: float = flag(0.3, "strength of the gate", least=0)
    window: int = flag(
        egrsd.SOON,
        "lookahead of CL-EGRSD's gate, of pivots and of the lookahead entropy",
        least=0,
    )
    eps: float = flag(0.2, "clip of the magnitude, for the token advantages", least=0, below=1)
    high: float = flag(egrsd.HIGH, "H in nats from which a token is a pivot or a fork", least=0)
    low: float = flag(egrsd.LOW, "H in nats below which a pivot's continuation is certain", least=0)
    split: float = flag(
        0.2, "share of the largest H from which a token is uncertain, for the regimes", least=0
    )
    branches: int = flag(100, "positions for branch viability, drawn at random, 0: none", least=0)
    saliency: int = flag(
        0, "correct solutions for which to find the tokens that the answer rests on", least=0
    )
    teacher_samples: int = flag(
        0, "solutions per problem that the teacher writes, for its own accuracy, 0: none", least=0
    )


# ---- measures of texts, tokens and scores


def markers(texts: list[str], tokens: int) -> dict[str, float]:
    """Lower-cased substrings per response, as the authors count, and words per 1,000 of all
    `tokens`; 2603.24472.

    >>> markers(["Wait, wait: unlikely.", "Yes."], tokens=8)
    {'markers_per_response': 1.5, 'markers_per_1000_tokens': 250.0}
    """
    lower = "\n".join(texts).lower()
    substrings = sum(lower.count(marker) for marker in MARKERS)
    words = sum(word in MARKERS for word in re.findall(r"\w+", lower))
    return {
        "markers_per_response": substrings / len(texts),
        "markers_per_1000_tokens": 1000 * words / tokens,
    }


def repetition_rate(texts: list[str]) -> float:
    """Share of texts whose last 2,000 characters zlib makes more than 10 times smaller;
    2604.08527.

    >>> repetition_rate(["again " * 300, "7+5=12. 12+9=21."])
    0.5
    """
    tails = [text[-2000:].encode() for text in texts]
    return sum(len(tail) > 10 * len(zlib.compress(tail)) for tail in tails) / len(texts)


def top_overlap(log_p_teacher, log_p_student, k=16):
    """log p_T, log p_S [n, V] -> share of the k likeliest tokens they have in common [n].
    2604.13016."""
    k = min(k, log_p_teacher.shape[1])
    top_teacher = log_p_teacher.topk(k).indices
    top_student = log_p_student.topk(k).indices
    same = top_teacher.unsqueeze(2) == top_student.unsqueeze(1)  # [n, k, k]
    return same.sum((1, 2)) / k


def auroc(scores, labels):
    """Chance that a positive scores higher than a negative, where ties count half; nan if one of
    the two is missing.

    >>> auroc(np.array([1.0, 2.0, 2.0, 3.0]), np.array([False, False, True, True]))
    0.875
    """
    positive = scores[labels]
    negative = scores[~labels]
    wins = np.sign(positive[:, None] - negative) / 2 + 0.5
    return float(wins.mean()) if wins.size else float("nan")


def auroc_interval(scores, labels, resamples=2000):
    """[AUROC, low, high] with the 95 % interval of a bootstrap over positions. Resamples with one
    label only do not count. None if all labels are the same."""
    if not labels.any() or labels.all():
        return None
    n = len(labels)
    resampled = np.random.default_rng(0).integers(n, size=(resamples, n))
    draws = [auroc(scores[chosen], labels[chosen]) for chosen in resampled]
    return [auroc(scores, labels), *np.nanquantile(draws, [0.025, 0.975]).tolist()]


# ---- sample and read


def sample_with_bar(model, tokenizer, s, problems, **which):
    """Graded rollouts of the problems, and a bar that shows how they come."""
    with tqdm(total=len(problems) * s.samples, desc="sampling", unit=" completions") as bar:
        sampled = sample(model, tokenizer, problems, s, show=progress(bar), **which)
    return grade_rollouts(tokenizer, sampled)


def sample_student(model, tokenizer, s: ReadingSettings, problems: list[Problem]) -> list[Rollout]:
    """The student's solutions, with rewards and advantages. These very rewards stand for those of
    earlier steps in eq. (9)."""
    rollouts = sample_with_bar(model, tokenizer, s, problems, seed=(s.seed, 0))
    for r in rollouts:
        r.reward = reward.shaped_reward(r.correct, len(r.token_ids), s.max_new_tokens)
    rewards = torch.tensor([r.reward for r in rollouts])
    baseline = egrsd.RunningAdvantage(warmup_steps=0)
    baseline.update(rewards)
    for r, advantage in zip(rollouts, baseline.advantage(rewards).tolist(), strict=True):
        r.advantage = advantage
    return rollouts


def teacher_accuracy(model, tokenizer, s: DiagnosticsSettings, problems: list[Problem]) -> float:
    """Share of correct solutions when the teacher writes them itself, at the student's settings."""
    prompts = [teacher_prompt(tokenizer, problem, problem.solution, s) for problem in problems]
    s = replace(s, samples=s.teacher_samples)
    with lora.disabled(model):
        rollouts = sample_with_bar(model, tokenizer, s, problems, seed=(s.seed, 2), prompts=prompts)
    return sum(r.correct for r in rollouts) / len(rollouts)


def read_both(model, tokenizer, s, rollouts):
    """Student and teacher read the rollouts: (values [B, T] by name, on the CPU; the teacher's
    states [T_i, D])."""
    token_ids = [r.token_ids for r in rollouts]
    prompts = [r.prompt for r in rollouts]
    shown = [teacher_prompt(tokenizer, r.problem, r.problem.solution, s) for r in rollouts]
    print(f"student and teacher read {sum(map(len, token_ids)):,} tokens", file=sys.stderr)
    by_student = teacher.read_in_batches(model, prompts, token_ids, BATCH_TOKENS, hidden=True)
    with lora.disabled(model):
        by_teacher = teacher.read_in_batches(model, shown, token_ids, BATCH_TOKENS, hidden=True)
    mask = by_student.mask
    H = by_teacher.entropy
    delta = by_teacher.logp - by_student.logp
    overlap = per_token_divergence(
        teacher.output_head(model), by_student.hidden, by_teacher.hidden, mask, top_overlap
    )
    signals = egrsd.token_signals(
        torch.tensor([r.advantage for r in rollouts], device=model.device),
        by_teacher.logp,
        by_student.logp,
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
    scale = max(1.0, H.max().item())
    has_next = mask.roll(-1, 1)
    has_next[:, -1] = False
    # of the tokens after this one; 0 at the end of the text
    least_next = egrsd.lookahead_min(H.roll(-1, 1), mask & has_next, max(1, s.window) - 1)
    gate = egrsd.confidence_gate(H, mask, s.gamma, 0, s.floor)
    values = {
        "mask": mask,
        "entropy": H,
        "normalised": H / scale,
        "regime": 2 * (H >= s.split * scale) + (least_next >= s.split * scale),
        "delta": delta,
        "|d|": delta.abs(),
        "overlap": overlap,
        "lookahead": signals.least_entropy,
        "kind": signals.kind,
        "gate": gate,
        "cl_gate": signals.gate,
        "change": signals.gate - gate,
        "advantage": signals.advantage,
        "position": (mask.cumsum(1) - 0.5) / mask.sum(1, keepdim=True),
    }
    return {name: value.cpu() for name, value in values.items()}, by_teacher.hidden


def summarise(rollouts, values):
    """The content of diagnostics.json, except settings and branches."""
    texts = [r.text for r in rollouts]
    mask = values["mask"]
    flat = {name: value[mask] for name, value in values.items()}  # [N], N tokens
    deciles = []
    order = flat["entropy"].numpy().argsort(kind="stable")
    for part in np.array_split(order, 10):
        means = {key: float(flat[key].numpy()[part].mean()) for key in AVERAGED}
        deciles.append({"tokens": len(part), **means})
    return {
        "completions": len(rollouts),
        "tokens": len(order),
        "accuracy": sum(r.correct for r in rollouts) / len(rollouts),
        "length": mask.sum(1).float().mean().item(),
        **markers(texts, len(order)),
        "repetition": repetition_rate(texts),
        "entropy": flat["entropy"].mean().item(),
        "overlap": flat["overlap"].mean().item(),
        "kinds": averages(flat, "kind", egrsd.KINDS),
        "regimes": averages(flat, "regime", REGIMES),
        "deciles": deciles,
    }


def averages(flat, key, names, averaged=AVERAGED):
    """By name of a group: its share of the tokens, and what is averaged over it. flat[key] has the
    numbers of the groups."""
    groups = {}
    for k, name in enumerate(names):
        found = flat[key] == k
        groups[name] = {"share": found.float().mean().item()}
        for value in averaged:
            groups[name][value] = flat[value][found].mean().item() if found.any() else None
    return groups


# ---- branches


def branch_places(model, tokenizer, rollouts, hidden):
    """(rollout i, position t, [tokens]) wherever the teacher proposes several next tokens on a
    correct solution."""
    no_branch = rollout.stop_ids(model, tokenizer) + rollout.unused_ids(model, tokenizer)
    for i, r in enumerate(rollouts):
        if r.correct:
            p = teacher.output_head(model)(hidden[i]).softmax(-1)  # [T_i, V]
            p[:, no_branch] = 0
            likeliest = p.topk(MOST_BRANCHES)
            counts = (likeliest.values >= LEAST_PROBABILITY).sum(1)
            for t, count in enumerate(counts.tolist()):
                if count >= 2:  # topk sorts, so the proposed tokens come first
                    yield i, t, likeliest.indices[t, :count].tolist()


def correct_shares(model, tokenizer, s, branches):
    """Let the student go on from each branch (rollout, the first tokens of a completion), and
    return the shares of correct ends."""
    with tqdm(total=len(branches) * CONTINUATIONS, desc="branches", unit=" completions") as bar:
        ends = rollout.sample(
            model,
            [r.prompt + first for r, first in branches],
            max_new_tokens=s.max_new_tokens,
            top_p=s.top_p,
            stop_ids=rollout.stop_ids(model, tokenizer),
            temperature=s.temperature,
            top_k=s.top_k,
            unused=rollout.unused_ids(model, tokenizer),
            slots=s.slots,
            samples_per_prompt=CONTINUATIONS,
            generator=rollout.generator_for_rows((s.seed, 1), 0),
            progress=progress(bar),
        )
    correct = []
    for k, end in enumerate(ends):
        r, first = branches[k // CONTINUATIONS]
        end.token_ids = first + end.token_ids
        text = said(tokenizer, end)
        correct.append(end.finished and reward.grade(text, r.problem.answer, r.prompt_end))
    return np.reshape(correct, (-1, CONTINUATIONS)).mean(1).tolist()


def branch_viability(model, tokenizer, s, rollouts, values, hidden):
    """Force the teacher's alternatives on correct solutions, and see how often the student goes on
    from each to a correct end; 2605.21606."""
    places = list(branch_places(model, tokenizer, rollouts, hidden))
    order = np.random.default_rng(s.seed).permutation(len(places))
    chosen = [places[k] for k in sorted(order[: s.branches])]
    branches = []
    for i, t, proposed in chosen:
        r = rollouts[i]
        branches += [(r, r.token_ids[:t] + [token]) for token in proposed]
    shares = correct_shares(model, tokenizer, s, branches) if branches else []
    following = iter(shares)
    unreliable = []
    benign = 0
    for _, _, proposed in chosen:
        viability = sorted(next(following) for _ in proposed)
        unreliable.append(viability[-1] < UNRELIABLE)
        benign += viability[-2] >= BENIGN
    intervals = {}
    for name in PREDICTORS:
        scores = np.array([values[name][i, t].item() for i, t, _ in chosen])
        intervals[name] = auroc_interval(scores, np.array(unreliable, dtype=bool))
    return {
        "candidates": len(places),
        "positions": len(chosen),
        "branches": len(branches),
        "unreliable": sum(unreliable),
        "benign": benign,
        "mean_viability": float(np.mean(shares)) if branches else None,
        "auroc": intervals,
    }


# ---- saliency


def measure_saliency(model, tokenizer, s, rollouts, values):
    """Put `by_mask` and `by_steps` [B, T] into values, nan where nothing was measured, and summarise
    them."""
    chosen = [i for i, r in enumerate(rollouts) if r.correct][: s.saliency]
    print(f"saliency of {len(chosen)} correct solutions", file=sys.stderr)
    for name, measure in SALIENCY.items():
        numbers = torch.full_like(values["entropy"], torch.nan)
        found = measure(model, tokenizer, [rollouts[i] for i in chosen])
        for i, own in zip(chosen, found, strict=True):
            numbers[i, : len(own)] = own
        values[f"by_{name}"] = numbers
    measured = numbers.isfinite()
    result = {"solutions": len(chosen), "tokens": measured.sum().item()}
    for name in MEASURES if measured.any() else ():
        flat = {key: value[measured] for key, value in values.items()}
        by_solution = [{k: v[i][measured[i]].numpy() for k, v in values.items()} for i in chosen]
        result[name] = {
            "kinds": averages(flat, "kind", egrsd.KINDS, (name, "gate", "cl_gate")),
            "auroc": {key: knows(by_solution, key, name) for key in KNOWING if key != name},
        }
    return result


def knows(solutions, key, name):
    """AUROC of `key` for the tokens of a solution whose saliency `name` is above its median: [mean over
    solutions, low, high], with the 95 % interval of the mean. Solutions with tokens of one kind only
    do not count; None if fewer than two are left."""
    found = [
        auroc(one[key], one[name] > np.median(one[name])) for one in solutions if one[name].size
    ]
    found = np.array(found)[np.isfinite(found)]
    if len(found) < 2:
        return None
    mean = found.mean()
    half = 1.96 * found.std(ddof=1) / len(found) ** 0.5
    return [mean, max(0.0, mean - half), min(1.0, mean + half)]


# ---- results


def token_records(tokenizer, rollouts, values):
    """The records of tokens.jsonl; the gate there is that of CL-EGRSD."""
    records = []
    for i, r in enumerate(rollouts):
        record = {
            "problem": r.problem.problem,
            "prompt": tokenizer.decode(r.prompt),
            "solution": r.problem.solution,
            "answer": r.problem.answer,
            "correct": r.correct,
            "reward": r.reward,
            "A": r.advantage,
            "tokens": [tokenizer.decode([token]) for token in r.token_ids],
        }
        for name in COLUMNS:
            column = values["cl_gate" if name == "gate" else name][i, : len(r.token_ids)]
            record[name] = [round(x, 4) for x in column.tolist()]
        for name in values.keys() & MEASURES:
            column = values[name][i]
            record[name] = [round(x, 4) for x in column[column.isfinite()].tolist()]
        records.append(record)
    return records


@torch.no_grad()
def diagnose(s: DiagnosticsSettings) -> dict:
    """Sample, read and measure. Writes --out and returns the content of diagnostics.json, without
    the settings."""
    out = Path(s.out)
    ranks = Ranks.alone()
    with hold(out, ranks):
        path = toy.resolve(s.data, "test.jsonl")
        problems = load_problems(path, True, s.skip_ungradable)[0][: s.problems]
        dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
        model, tokenizer = load_model(toy.resolve(s.model, "model"), dtype, ranks.device)
        if s.adapter:
            load_adapter(model, s.adapter)

        s.date = s.date or ranks.today()
        check_thinking(tokenizer, s)

        def prompts(problem):
            return [teacher_prompt(tokenizer, problem, problem.solution, s)]

        # twice, as a branch goes on behind a part of a completion
        check_prompts(model, tokenizer, path, problems, 2 * s.max_new_tokens, prompts)
        rollouts = sample_student(model, tokenizer, s, problems)
        values, hidden = read_both(model, tokenizer, s, rollouts)
        result = summarise(rollouts, values)
        if s.teacher_samples:
            result["teacher_accuracy"] = teacher_accuracy(model, tokenizer, s, problems)
        if s.branches:
            result["branches"] = branch_viability(model, tokenizer, s, rollouts, values, hidden)
        if s.saliency:
            result["saliency"] = measure_saliency(model, tokenizer, s, rollouts, values)
        write_json(out / "diagnostics.json", {"settings": asdict(s), **result})
        append_jsonl(out / "tokens.jsonl", token_records(tokenizer, rollouts, values))
    # for people, with three decimals
    short = json.loads(json.dumps(result), parse_float=lambda number: round(float(number), 3))
    pprint(short, width=120, sort_dicts=False)
    print(f"in {out}: diagnostics.json, tokens.jsonl", flush=True)
    return result


def main() -> None:
    with one_line_errors(PROGRAM, "stopped, nothing was written"):
        diagnose(parse(DiagnosticsSettings, sys.argv[1:], __doc__))


if __name__ == "__main__":
    main()
