r"""Call the verifier with random answers; look for exceptions, asymmetry and slow inputs.

    python tests/fuzz_verifier.py --calls 1000000 --seed 0 --data gsm8k.jsonl aime24.jsonl

Answers are noise from fragments of TeX, golds of the data files, and golds with a piece changed,
doubled or cut out. A mistake is a call that raises, a pair that is equal one way only (but a small
letter may name a choice), an answer that equals another but not itself, a gold in dollars that does
not equal the gold, or a gold that can be unwrapped twice. Ends with the
slowest inputs, timed again as the best of five: a single time says more about the machine. The exit
status is 1 if there was a mistake.
"""

import argparse
import heapq
import json
import pathlib
import random
import re
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from test_verifier import FRAGMENTS, HOSTILE, SHARED, TABLES

import reward
import verifier
from support.golds import agrees, gold_answer

PIECE = re.compile(r"\\[A-Za-z]+|[0-9]+|[A-Za-z]+|\S")
CALLS_PER_ROUND = 8


def read_golds(files: list[str]) -> list[str]:
    """Golds that equal some answer: those of the tables, and of data files."""
    rows = [case for table in TABLES.values() for case in table] + [
        case[:3] for case in SHARED["equal"]
    ]
    golds = {gold for _, gold, expected in rows if expected}
    for path in files:
        golds |= {
            json.loads(line)["answer"] for line in pathlib.Path(path).read_text().splitlines()
        }
    return sorted(golds)


def mutate(draw: random.Random, text: str) -> str:
    sites = list(PIECE.finditer(text))
    for _ in range(draw.randint(1, 3)):
        if not sites:
            return text
        site = draw.choice(sites)
        text = (
            text[: site.start()]
            + draw.choice(["", site[0] * 2, draw.choice(FRAGMENTS)])
            + text[site.end() :]
        )
        sites = list(PIECE.finditer(text))
    return text


def draw_answer(draw: random.Random, golds: list[str]) -> str:
    kind = draw.random()
    if kind < 0.35:
        return "".join(draw.choices(FRAGMENTS, k=draw.randint(1, 20)))
    if kind < 0.45:  # one unit again and again: the worst cases are of this kind
        unit = draw.choice(HOSTILE + FRAGMENTS) + draw.choice(
            ["", "", "+", ",", "=", draw.choice(golds)]
        )
        return (unit * 250)[: draw.randint(1, 250)]
    return mutate(draw, draw.choice(golds)) if kind < 0.8 else draw.choice(golds)


def is_small_choice(left: str, right: str) -> bool:
    """Whether they are one choice, in a small letter and in a capital."""
    letters = {verifier.choice(text)[0] for text in (left, right)}
    return len(letters) == 2 and len({letter.lower() for letter in letters}) == 1


def fuzz(calls: int, seed: int, files: list[str]) -> tuple[list[str], list[tuple]]:
    """The mistakes, and the slowest calls: (seconds, function, left, right)."""
    draw, golds, mistakes, slowest = random.Random(seed), read_golds(files), [], []

    def tried(function, *arguments):
        try:
            return function(*arguments)
        except Exception as error:  # whatever it is, it is what this looks for
            mistakes.append(f"{function.__name__}{arguments} raised {error!r}")

    def timed(function, *arguments):
        start = time.perf_counter()
        result = tried(function, *arguments)
        entry = (time.perf_counter() - start, function.__name__, *arguments)
        (heapq.heappush if len(slowest) < 40 else heapq.heappushpop)(slowest, entry)
        return result

    for _ in range(calls // CALLS_PER_ROUND):
        gold = draw.choice(golds)
        left = draw_answer(draw, golds)
        right = mutate(draw, left) if draw.random() < 0.5 else draw_answer(draw, golds)
        equal = timed(reward.is_equal, left, right)
        back = timed(reward.is_equal, right, left)
        if equal is not back and not is_small_choice(left, right):
            mistakes.append(f"equal one way only: {left!r} {right!r}")
        if not timed(reward.is_equal, left, left) and equal:
            mistakes.append(f"equal to {right!r}, but not to itself: {left!r}")
        if not timed(reward.is_equal, f"$ {gold} $", gold):
            mistakes.append(f"not equal to itself: {gold!r}")
        unwrapped = tried(gold_answer, draw.choice(["", "$", r"\boxed{", "so "]) + left)
        if unwrapped is not None and gold_answer(unwrapped) != unwrapped:
            mistakes.append(f"unwrapped twice: {left!r}")
        if draw.random() < 0.1:  # compares several times; only data files are read with it
            tried(agrees, rf"\boxed{{{left}}} or \boxed{{{right}}}", gold)
        timed(
            reward.extract_answer,
            left + draw.choice([r"\boxed{", r"\fbox ", "</think>", ""]) + right,
        )
        timed(reward.grade, rf"so \boxed{{{left}}}", right)
        timed(reward.grade, rf"so \boxed{{{gold}}}.", gold)
    return mistakes, sorted(slowest, reverse=True)


def again(name: str, *arguments) -> float:
    """The best of five."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        getattr(reward, name)(*arguments)
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--data", nargs="*", default=[], help="JSONL files whose answers are golds too"
    )
    arguments = parser.parse_args()
    start = time.perf_counter()
    mistakes, slowest = fuzz(arguments.calls, arguments.seed, arguments.data)
    print(*mistakes[:50], sep="\n")
    seconds = time.perf_counter() - start
    print(
        f"{arguments.calls} calls, seed {arguments.seed}, {seconds:.0f} s, {len(mistakes)} mistakes"
    )
    for seconds, call in sorted(((again(*call), call) for _, *call in slowest), reverse=True)[:5]:
        print(f"{1000 * seconds:.1f} ms: {call}")
    sys.exit(bool(mistakes))


if __name__ == "__main__":
    main()
