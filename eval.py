"""Evaluation: K sampled solutions per problem, for any number of checkpoints and data files, in one
table.

    python eval.py --model runs/train/model --data toy --max-new-tokens 128 --no-thinking
    python eval.py --model Qwen/Qwen3-4B --model Qwen/Qwen3-4B --adapter runs/q/checkpoints/step-000100/adapter \\
                   --data aime24.jsonl --data math500.jsonl
    torchrun --standalone --nproc-per-node=8 eval.py ...        the problems are shared by the processes
    python eval.py --from vllm.jsonl --data math500.jsonl       completions that another engine wrote are graded

`evaluate` and `summarise` are also what train.py runs before and after training. The defaults are
the evaluation of arXiv 2605.13255: K = 4, temperature 1.0, top-p 0.95, 32,768 tokens, thinking on.

    avg@K       mean accuracy over samples, then over problems, with a 95 % bootstrap interval over problems
    pass@k      chance that at least one of k samples is correct, the unbiased estimate of arXiv 2107.03374
    maj@K       accuracy of the most frequent answer; answers are the same if the verifier says so
    length      mean completion length in tokens, the stop token included; Eff: accuracy in % per 1,000 tokens of it
    truncated   share of completions cut off at --max-new-tokens; they count as wrong, as they do in training
    no answer   share of completions without a box to grade

Every sample goes into samples.jsonl with its text and gold answer as soon as it is there, so that
anybody can grade again, and that --resume can go on. With --from each line needs `completion`, or
`text`, and says whose it is by `line`, a line of the data file, or by the same `problem`;
`finished` (default: true) and `tokens`, a number, may be there.
"""

import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from math import comb
from pathlib import Path

from support import settings
from support.errors import InputError, parse_early

if __name__ == "__main__":
    parse_early("eval.py", lambda: settings.parse_evaluation(sys.argv[1:], __doc__))

import numpy as np
import torch
from tqdm import tqdm

import reward
import toy
from support.data import (
    Problem,
    check_files,
    digest,
    load_adapter,
    load_model,
    load_problems,
    model_digest,
)
from support.distributed import Ranks
from support.graphs import choose
from support.memory import slots_that_fit
from support.run import hold, name_lack_of_memory, one_line_errors, say, thinking_line
from support.samples import SampleLog, read_completions
from support.sampling import Rollout, check_window, grade_rollouts, progress, sample, student_prompt
from support.settings import EvaluationSettings

BOOTSTRAP_RESAMPLES = 10_000


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased chance that one of k samples is correct, from n samples; arXiv 2107.03374, eq. (1).

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.25, 0.5, 1.0)
    """
    return 1 - comb(n - correct, k) / comb(n, k)


def majority_accuracy(answers: list[str | None], gold: str) -> float:
    r"""1 if the most frequent answer is right; with a tie, the share of right ones among the most
    frequent.

    Answers vote together if the verifier calls them equal; None (no answer) votes for a class of
    its own, a wrong one.

    >>> majority_accuracy([r"\frac12", "0.5", "3", "3", "1/2"], "1/2")
    1.0
    >>> majority_accuracy([None, None, "7"], "7")
    0.0
    """

    def same(a: str | None, b: str | None) -> bool:
        return a == b if None in (a, b) else reward.is_equal(a, b)

    votes = Counter()  # for the first answer of each class
    for answer in answers:
        votes[next((known for known in votes if same(answer, known)), answer)] += 1
    winners = [answer for answer, count in votes.items() if count == max(votes.values())]
    return sum(answer is not None and reward.is_equal(answer, gold) for answer in winners) / len(
        winners
    )


def bootstrap_interval(per_problem: list[float], seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean, problems drawn with replacement."""
    rng = np.random.default_rng(seed)
    means = [
        rng.choice(per_problem, size=len(per_problem)).mean() for _ in range(BOOTSTRAP_RESAMPLES)
    ]
    return tuple(np.quantile(means, [0.025, 0.975]).tolist())


def summarise(rows: list[dict], samples: int) -> dict:
    """All figures of one checkpoint on one data file; `rows` are its samples, as in
    samples.jsonl."""
    problems = defaultdict(list)  # by line
    for row in rows:
        problems[row["line"]].append(row)
    correct = [sum(row["correct"] for row in group) for group in problems.values()]
    accuracy, tokens = np.mean(correct) / samples, [row["tokens"] for row in rows]
    length = None if None in tokens else np.mean(tokens)
    low, high = bootstrap_interval([c / samples for c in correct])
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < samples] + [samples]
    result = {
        "problems": len(problems),
        "avg": accuracy,
        "low": low,
        "high": high,
        "pass": {k: np.mean([pass_at_k(samples, c, k) for c in correct]) for k in ks},
        "maj": np.mean(
            [
                majority_accuracy(
                    [row["answer"] if row["finished"] else None for row in group], group[0]["gold"]
                )
                for group in problems.values()
            ]
        ),
        "length": length,
        "truncated": np.mean([not row["finished"] for row in rows]),
        "no_answer": np.mean([row["answer"] is None for row in rows]),
        "eff": length and 100 * accuracy / (length / 1000),
    }
    return json.loads(json.dumps(result, default=float))


def macro_average(results: list[dict]) -> dict:
    """The mean over data files, each counting once; no interval."""
    names = ("avg", "maj", "length", "truncated", "no_answer")
    mean = {name: float(np.mean([r[name] for r in results])) for name in names}
    shared = set.intersection(*(set(r["pass"]) for r in results))
    mean["pass"] = {
        k: float(np.mean([r["pass"][k] for r in results])) for k in sorted(shared, key=int)
    }
    return mean | {
        "problems": sum(r["problems"] for r in results),
        "eff": 100 * mean["avg"] / (mean["length"] / 1000),
    }


def table(results: list[dict], samples: int) -> str:
    """One line per data file and checkpoint, checkpoints of a file under each other."""
    data_width, width = (
        max(len(name), *(len(r[name]) for r in results)) for name in ("data", "checkpoint")
    )
    lines = [
        f"{'data':{data_width}}  {'checkpoint':{width}}  problems  avg@{samples:<3} 95 % interval  "
        f"pass@{samples:<3} maj@{samples:<3}   length  truncated  no answer    Eff"
    ]
    for r in sorted(results, key=lambda r: (r["data"] == "macro average", r["place"])):
        interval = f"[{100 * r['low']:5.1f}, {100 * r['high']:5.1f}]" if "low" in r else ""
        length, eff = (f"{r['length']:.0f}", f"{r['eff']:.2f}") if r["length"] else ("-", "-")
        lines.append(
            f"{r['data']:{data_width}}  {r['checkpoint']:{width}}  {r['problems']:8d}  "
            f"{100 * r['avg']:7.2f} {interval:14}  {100 * r['pass'][str(samples)]:8.2f} "
            f"{100 * r['maj']:7.2f}  {length:>7}  {r['truncated']:9.3f}  {r['no_answer']:9.3f}  "
            f"{eff:>5}"
        )
    return "\n".join(lines)


def evaluate(
    problems: list[Problem],
    samples: int,
    solve: Callable,
    ranks: Ranks,
    title: str,
    label: dict | None = None,
    log: SampleLog | None = None,
) -> list[dict]:
    """The rows of samples.jsonl for all problems, in their order, on every rank; each rank samples
    its share.

    solve(problems, first_row, graded, keep, bar) makes `samples` graded rollouts of each of some
    problems, whose first one is row `first_row` of all, and calls keep(number, rollout) for each;
    it leaves out the numbers in `graded`. With a `log` these are the rows of an earlier start, and
    new ones, with `label`, go there at once.
    """
    share = ranks.share(len(problems))
    own = [problems[i] for i in share]
    places = [(problem.line, sample) for problem in own for sample in range(samples)]
    earlier = log.graded[label["checkpoint"], label["data"]] if log else {}
    rows = {i: earlier[place] for i, place in enumerate(places) if place in earlier}

    def keep(number: int, rollout: Rollout) -> None:
        rows[number] = (label or {}) | {"sample": number % samples} | rollout.as_json()
        if log:
            log.append(rows[number])

    with tqdm(
        total=len(places),
        initial=len(rows),
        desc=title,
        disable=ranks.rank > 0,
        unit=" completions",
    ) as bar:
        solve(own, share.start * samples, set(rows), keep, bar)
    return ranks.gather_lists([rows[i] for i in range(len(places))])


def load(name: str, adapter: str | None, device: torch.device):
    """(model, tokenizer), the adapter merged in."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokenizer = load_model(toy.resolve(name, "model"), dtype, device, scored=False)
    if adapter:
        load_adapter(model, adapter, merge=True)
    return model, tokenizer


def run(s: EvaluationSettings, ranks: Ranks, out: Path) -> None:
    """Every checkpoint on every data file, into `out`. Nothing is written before data and first
    model were checked."""
    choose(s.cuda_graphs, ranks.device)  # refuses where there is no GPU
    every_row, results = [], []
    files = [(name, toy.resolve(name, "test.jsonl")) for name in s.data]
    files = [
        (name, path, ranks.together(load_problems, path, False, s.skip_ungradable)[0])
        for name, path in files
    ]
    used = {str(path): digest(Path(path)) for _, path, _ in files} | check_files(s.model, s.adapter)
    log = SampleLog(out, asdict(s), ranks)
    adapters = [None] * (len(s.model) - len(s.adapter)) + s.adapter
    for number, (name, adapter) in enumerate(zip(s.model, adapters, strict=True)):
        model, tokenizer = ranks.once_per_node(
            lambda name=name, adapter=adapter: load(name, adapter, ranks.device)
        )
        for _, path, problems in files:
            check_window(
                model,
                path,
                problems,
                s.max_new_tokens,
                lambda problem, tokenizer=tokenizer: [
                    student_prompt(tokenizer, problem, s.thinking)
                ],
            )
        if ranks.rank == 0:
            print(thinking_line(tokenizer, s.thinking), file=sys.stderr)
        log.begin(used | {name: model_digest(toy.resolve(name, "model"))})
        checkpoint = name + (f" + {adapter}" if adapter else "")
        for place, (data, path, problems) in enumerate(files):
            rows = evaluate(
                problems,
                s.samples,
                partial(solve, model, tokenizer, s),
                ranks,
                f"{checkpoint} on {data}",
                {"checkpoint": checkpoint, "data": str(path)},
                log,
            )
            every_row += rows
            results.append(
                summarise(rows, s.samples)
                | {"checkpoint": checkpoint, "data": data, "place": (place, number)}
            )
        if len(files) > 1:
            results.append(
                macro_average(results[-len(files) :])
                | {"checkpoint": checkpoint, "data": "macro average", "place": (len(files), number)}
            )
        del model
    log.close(every_row, results)
    if ranks.rank == 0:
        say(f"\n{table(results, s.samples)}\n\n{log.files}")


def solve(
    model,
    tokenizer,
    s: EvaluationSettings,
    problems: list[Problem],
    first_row: int,
    graded: set[int],
    keep: Callable[[int, Rollout], None],
    bar: tqdm,
) -> None:
    """Sample and grade, with the settings of the command line."""
    slots, why = slots_that_fit(model, tokenizer, problems, s)
    if not bar.disable:
        bar.write(why, file=sys.stderr)
    sample(
        model,
        tokenizer,
        problems,
        replace(s, slots=slots),
        seed=(s.seed,),
        first_row=first_row,
        show=progress(bar),
        make_decoder=choose(s.cuda_graphs, model.device),
        leave_out=graded,
        on_rollout=lambda number, row: keep(number, grade_rollouts(tokenizer, [row])[0]),
    )


def grade_files(s: EvaluationSettings, ranks: Ranks, out: Path) -> None:
    """The same figures for completions that another engine wrote."""
    path, results = toy.resolve(s.data[0], "test.jsonl"), []
    problems, _ = load_problems(path, False, s.skip_ungradable)
    rows_of = {
        name: read_completions(name, str(path), problems, s.skip_ungradable) for name in s.from_
    }
    samples = {len(rows) // len(problems) for rows in rows_of.values()}
    if len(samples) > 1:
        raise InputError(
            "--from: the files have different numbers of completions per problem: grade them "
            "one by one"
        )
    for number, (name, rows) in enumerate(rows_of.items()):
        results.append(
            summarise(rows, *samples)
            | {"checkpoint": name, "data": s.data[0], "place": (0, number)}
        )
    settings = {name: getattr(s, name) for name in ("from_", "data", "skip_ungradable", "out")}
    log = SampleLog(out, settings | {"samples": max(samples)}, ranks)
    log.close([row for rows in rows_of.values() for row in rows], results)
    say(f"\n{table(results, *samples)}\n\n{log.files}")


def main() -> None:
    with (
        one_line_errors(
            "eval.py", "stopped: go on with --resume, if there are samples in the output directory"
        ),
        name_lack_of_memory(lambda: "while sampling: lower --slots or --max-new-tokens"),
    ):
        s = settings.parse_evaluation(sys.argv[1:], __doc__)
        ranks = Ranks.alone() if s.from_ else Ranks()
        out = Path(
            s.out
            or time.strftime("runs/eval-%Y%m%d-%H%M%S", time.localtime(ranks.max(time.time())))
        )
        remedy = "choose another --out" if s.from_ else settings.REMEDY
        with hold(out, ranks, None if s.resume else remedy):
            (grade_files if s.from_ else run)(s, ranks, out)


if __name__ == "__main__":
    main()
