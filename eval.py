"""Evaluation: K sampled solutions per problem, for any number of checkpoints and data files, in one
table.

    python eval.py --model toy --model runs/train/model --data toy
    python eval.py --model Qwen/Qwen3-4B --model Qwen/Qwen3-4B --adapter runs/q/checkpoints/step-000100/adapter \\
                   --data aime24.jsonl --data math500.jsonl
    torchrun --standalone --nproc-per-node=8 eval.py ...        the processes share the problems
    python eval.py --from vllm.jsonl --data math500.jsonl       grades completions that another engine wrote

train.py calls `evaluate` and `summarise` before and after training. How to sample is what flags say,
else what the run did that a model or an adapter comes from: the same seed gives the accuracy that the
run reported. For other models it is the evaluation of arXiv 2605.13255: K = 4, temperature 1.0, top-p
0.95, thinking on, 32,768 tokens or what the model's window leaves.

    avg@K       mean accuracy over samples, then over problems, with a 95 % bootstrap interval over problems
    pass@k      chance that at least one of k samples is correct, the unbiased estimate of arXiv 2107.03374
    maj@K       accuracy of the most frequent answer; answers are the same if the verifier says so
    length      mean completion length in tokens, the stop token included
    Eff         accuracy in % per 1,000 tokens of the mean length
    truncated   share of completions cut off at --max-new-tokens; they count as wrong, as they do in training
    no answer   share of completions without a box to grade

Every sample goes into samples.jsonl, with its text and gold answer, as soon as it is graded. So
anybody can grade it again, and --resume can go on after a stop. A line of a --from file has
`completion` or `text`. It names its problem by `line`, a line of the data file, or by the same
`problem`. It may have `finished` (default: true), `tokens`, a number, and `prompt_end`, what the
prompt ended in, if that opened a thought.
"""

import signal
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
import rollout
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
from support.run import (
    hold,
    name_lack_of_memory,
    one_line_errors,
    stop_line,
    thinking_line,
)
from support.samples import SampleLog, read_completions
from support.sampling import check_prompts, grade_rollouts, progress, sample, student_prompt
from support.settings import EvaluationSettings, Sampling

BOOTSTRAP_RESAMPLES = 10_000
SEED = 2**32 - 1  # beside --seed, of all sampling; in train.py the step stands there


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased chance that one of k samples is correct, from n samples; arXiv 2107.03374, eq. (1).

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.25, 0.5, 1.0)
    """
    return 1 - comb(n - correct, k) / comb(n, k)


def majority_accuracy(answers: list[str | None], gold: str) -> float:
    r"""1 if the most frequent answer is right; with a tie, the share of right ones among the most
    frequent.

    Answers vote together if the verifier calls them equal. None (no answer) has a class of its own,
    which is wrong.

    >>> majority_accuracy([r"\frac12", "0.5", "3", "3", "1/2"], "1/2")
    1.0
    >>> majority_accuracy([None, None, "7"], "7")
    0.0
    """
    votes = Counter()  # by the first answer of each class
    for answer in answers:
        first = next((other for other in votes if reward.is_equal(answer, other)), answer)
        votes[first] += 1
    winners = [answer for answer, count in votes.items() if count == max(votes.values())]
    return sum(reward.is_equal(answer, gold) for answer in winners) / len(winners)


def bootstrap_interval(per_problem: list[float], seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean, problems drawn with replacement."""
    rng = np.random.default_rng(seed)
    size = len(per_problem)
    means = [rng.choice(per_problem, size).mean() for _ in range(BOOTSTRAP_RESAMPLES)]
    return tuple(np.quantile(means, [0.025, 0.975]).tolist())


def summarise(records: list[dict], samples: int) -> dict:
    """All figures of one checkpoint on one data file; `records` are its lines of samples.jsonl."""
    groups = defaultdict(list)  # the samples of a problem, by its line
    for record in records:
        groups[record["line"]].append(record)
    correct = []
    majority = []
    for group in groups.values():
        correct.append(sum(record["correct"] for record in group))
        answers = [record["answer"] if record["finished"] else None for record in group]
        majority.append(majority_accuracy(answers, group[0]["gold"]))
    accuracy = _mean(correct) / samples
    low, high = bootstrap_interval([count / samples for count in correct])
    pass_at = {}
    for k in (1, 2, 4, 8, 16, 32, 64, 128, samples):
        if k <= samples:
            pass_at[str(k)] = _mean([pass_at_k(samples, count, k) for count in correct])
    found = {
        "problems": len(groups),
        "avg": accuracy,
        "low": low,
        "high": high,
        "pass": pass_at,
        "maj": _mean(majority),
        "length": None,
        "truncated": _mean([not record["finished"] for record in records]),
        "no_answer": _mean([record["answer"] is None for record in records]),
        "eff": None,
    }
    tokens = [record["tokens"] for record in records]
    if None not in tokens:
        found["length"] = _mean(tokens)
        found["eff"] = 100 * accuracy / (found["length"] / 1000)
    return found


def _mean(values):
    return float(np.mean(values))


def results_table(results: list[dict], samples: int) -> str:
    """One line per checkpoint and data file. The checkpoints of a file stand together."""
    columns = {
        "data": "{data}",
        "checkpoint": "{checkpoint}",
        "problems": "{problems}",
        f"avg@{samples}": "{avg:.2%}",
        "95 % interval": "[{low:6.1%}, {high:6.1%}]",
        f"pass@{samples}": "{pass_at_k:.2%}",
        f"maj@{samples}": "{maj:.2%}",
        "length": "{length:.0f}",
        "truncated": "{truncated:.3f}",
        "no answer": "{no_answer:.3f}",
        "Eff": "{eff:.2f}",
    }
    table = [columns.keys()]
    order = [result["data"] for result in results]
    for result in sorted(results, key=lambda result: order.index(result["data"])):
        forms = columns
        if result["length"] is None:
            forms = columns | {"length": "-", "Eff": "-"}
        pass_at_k = result["pass"][str(samples)]
        table.append([form.format(**result, pass_at_k=pass_at_k) for form in forms.values()])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.rjust, cells, widths)) for cells in table)


def evaluate(
    problems: list[Problem],
    samples: int,
    solve: Callable,
    ranks: Ranks,
    title: str,
    label: dict | None = None,
    log: SampleLog | None = None,
) -> list[dict]:
    """The records of samples.jsonl for all problems, in their order, on every rank; each rank
    samples its share.

    solve(problems, first_row, graded, keep, bar) makes `samples` graded rollouts of each of some
    problems. Their first one is row `first_row` of all. It leaves out the numbers in `graded`, and
    calls keep(number, rollout) for each other one. A `log` has the records of an earlier start, and
    gets each new one, with `label`, at once.
    """
    share = ranks.share(len(problems))
    own = problems[share.start : share.stop]
    total = samples * len(own)
    records = {}
    if log:
        for number in range(total):
            place = (*label.values(), own[number // samples].line, number % samples)
            if place in log.graded:
                records[number] = log.graded[place]

    def keep(number, rollout):
        records[number] = {**(label or {}), "sample": number % samples, **rollout.as_json()}
        if log:
            log.append(records[number])

    with tqdm(
        total=total,
        initial=len(records),
        desc=title,
        disable=ranks.rank > 0,
        unit=" completions",
    ) as bar:
        solve(own, share.start * samples, set(records), keep, bar)
    return ranks.gather_lists([records[number] for number in range(total)])


def load(s, name, adapter, files, device):
    """(model, tokenizer), with the adapter, if there is one. InputError if a prompt leaves no room for
    the completion."""
    # On a GPU the dtype of the files. model/ of a run is in float32: bfloat16 would lose what it
    # learned. So would an adapter merged in bfloat16.
    dtype = "auto" if device.type == "cuda" else torch.float32
    model, tokenizer = load_model(toy.resolve(name, "model"), dtype, device, scored=False)
    if adapter:
        load_adapter(model, adapter)

    def prompts(problem):
        return [student_prompt(tokenizer, problem, s)]

    if not s.max_new_tokens:
        longest = max(len(prompts(problem)[0]) for *_, problems in files for problem in problems)
        room = int(min(Sampling.max_new_tokens, rollout.window(model) - longest))
        s.max_new_tokens = max(1, room)  # no room: refused below
    for _, path, problems in files:
        check_prompts(model, tokenizer, path, problems, s.max_new_tokens, prompts)
    return model, tokenizer


def run(s, ranks, out):
    """Every checkpoint on every data file, into `out`. A new evaluation writes nothing before the data
    and the first model were checked. A resumed one first joins its samples files."""
    files = []
    digests = check_files(s.model, s.adapter)
    for data in s.data:
        path = toy.resolve(data, "test.jsonl")
        problems, _ = ranks.together(load_problems, path, False, s.skip_ungradable)
        files.append((data, path, problems))
        digests[path] = digest(Path(path))
    log = SampleLog(out, asdict(s), ranks)
    s.date = log.settings["date"] = log.settings["date"] or ranks.today()
    s.max_new_tokens = log.settings["max_new_tokens"]
    found = []
    adapters = [None] * (len(s.model) - len(s.adapter)) + s.adapter
    for name, adapter in zip(s.model, adapters, strict=True):
        model, tokenizer = ranks.once_per_node(partial(load, s, name, adapter, files, ranks.device))
        log.settings["max_new_tokens"] = s.max_new_tokens
        if ranks.rank == 0:
            print(
                f"{s.samples} completions per problem, of at most {s.max_new_tokens:,} tokens, at "
                f"temperature {s.temperature:g} and top-p {s.top_p:g}",
                file=sys.stderr,
            )
            print(thinking_line(tokenizer, s.thinking, s.date), file=sys.stderr)
            print(stop_line(model, tokenizer), file=sys.stderr)
        log.begin(digests | {name: model_digest(toy.resolve(name, "model"))})
        checkpoint = f"{name} + {adapter}" if adapter else name
        solve_here = partial(solve, model, tokenizer, s, choose(s.cuda_graphs, ranks.device))
        for data, path, problems in files:
            label = {"checkpoint": checkpoint, "data": path}
            records = evaluate(
                problems, s.samples, solve_here, ranks, f"{checkpoint} on {data}", label, log
            )
            found.append((checkpoint, data, records))
        del model, solve_here  # before the next model is loaded
    finish(log, found, s.samples)


def finish(log, found, samples):
    """Write all records and figures, and print the table; `found` has (checkpoint, data, records)."""
    every_record = []
    results = []
    for checkpoint, data, records in found:
        every_record += records
        results.append(summarise(records, samples) | {"checkpoint": checkpoint, "data": data})
    log.close(every_record, results)
    if log.ranks.rank == 0:
        print(f"\n{results_table(results, samples)}\n")
        print(f"samples  {log.samples}\nresults  {log.results}", flush=True)


def solve(
    model,
    tokenizer,
    s: EvaluationSettings,
    make_decoder,
    problems: list[Problem],
    first_row: int,
    graded: set[int],
    keep: Callable,
    bar: tqdm,
) -> None:
    """Sample and grade, with the settings of the command line."""
    slots, why = slots_that_fit(model, tokenizer, problems, s)
    if not bar.disable:
        bar.write(why, file=sys.stderr)

    def on_rollout(number, rollout):
        grade_rollouts(tokenizer, [rollout])
        keep(number, rollout)

    sample(
        model,
        tokenizer,
        problems,
        replace(s, slots=slots),
        seed=(s.seed, SEED),
        first_row=first_row,
        show=progress(bar),
        make_decoder=make_decoder,
        leave_out=graded,
        on_rollout=on_rollout,
    )


def grade_files(s, ranks, out):
    """The same figures for completions that another engine wrote."""
    data = s.data[0]
    path = toy.resolve(data, "test.jsonl")
    problems, _ = load_problems(path, False, s.skip_ungradable)
    found = []
    for name in s.from_:
        found.append((name, data, read_completions(name, path, problems, s.skip_ungradable)))
    counts = {len(records) for *_, records in found}
    if len(counts) > 1:
        raise InputError(
            "--from: the files have different numbers of completions per problem: grade them "
            "one by one"
        )
    samples = counts.pop() // len(problems)
    used = {name: getattr(s, name) for name in ("from_", "data", "skip_ungradable", "out")}
    log = SampleLog(out, used | {"samples": samples}, ranks)
    finish(log, found, samples)


def main() -> None:
    """The command line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt
    with (
        one_line_errors("eval.py", "stopped, nothing was written"),
        name_lack_of_memory(lambda: "while sampling: lower --slots or --max-new-tokens"),
    ):
        s = settings.parse_evaluation(sys.argv[1:], __doc__)
        ranks = Ranks.alone() if s.from_ else Ranks()
        start = time.localtime(ranks.max(time.time()))
        out = Path(s.out or time.strftime("runs/eval-%Y%m%d-%H%M%S", start))
        if s.from_:
            with hold(out, ranks):
                return grade_files(s, ranks, out)
        stopped = f"stopped: repeat the command with --out {out} --resume, if {out} is there"
        remedy = None if s.resume else settings.REMEDY
        with hold(out, ranks, remedy), one_line_errors("eval.py", stopped):
            run(s, ranks, out)


if __name__ == "__main__":
    main()
