"""Word problems of two steps, with worked solutions in ever new words.

    python -m experiments.stories --out runs/stories       sft.jsonl, train.jsonl, validation.jsonl, test.jsonl

A story begins with a number of things, and two events change it. The words of problem and solution
are drawn from a small grammar, in which [one|or the other] is a choice. So a model that has learned
to write such solutions still chooses words at many places, and numbers at a few. No problem is in
two files.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import teacher
from support.checkpoint import write_text
from support.flags import SEEDS, flag, parse
from support.run import one_line_errors

PROGRAM = "python -m experiments.stories"
PEOPLE = {
    "she": "Anna Clara Dora Elif Grace Hana Ines Lucy Maria Zoe",
    "he": "Ali Ben Chen David Emil Felix Igor Jonas Omar Tom",
}
THINGS = (
    "apples beads books buttons cards coins cookies crayons marbles pencils photos plums shells "
    "stamps stickers stones"
)
BEGINNINGS = (
    "{who} [has|owns|keeps] {a} {things}[ in a box| on a shelf| at home|].",
    "[This morning|Yesterday|On Monday|In spring] {who} had {a} {things}.",
    "There are {a} {things} [in {who}'s bag|on {who}'s desk|in {who}'s room].",
    "{who} [collects|likes] {things} and has {a} of them[ so far| by now|].",
)
PACKS = (
    "{who} [buys|has|opens] {k} [bags|boxes|packs] with {n} {things} [in each|each].",
    "There are {k} [rows|groups|bowls] of {n} {things} [on {who}'s table|in {who}'s kitchen].",
)
MORE = (
    "[Then|Later|After that|In the afternoon] {he} [finds|buys|wins|gets] {b} more[ at the market| at school|].",
    "{friend} [gives|sends|brings] {him} {b} more[ as a gift| the next day|].",
    "{b} more [come in a parcel|are under the bed] and [are {his} too|{he} keeps them].",
)
LESS = (
    "[Then|Later|After that|In the evening] {he} [gives {b} of them to {friend}|loses {b} of them|sells {b} of them].",
    "{friend} [takes|borrows|gets] {b} of them[ for a game| the next day|].",
    "{b} of them [break|get lost|are given away][ on the way home|].",
)
REMARKING = 0.6  # how often a sentence of a solution has a remark before it
FILES = {"sft": 1000, "train": 1000, "validation": 200, "test": 200}  # problems in each
QUESTION = "How many {things} does {who} have [now|in the end|after all this|at last]?"

# the solution
REMARKS = (  # thoughts that any word may go on
    "[This|That|Our|Such a] [story|tale|puzzle|question|problem|riddle] [looks|seems|sounds|feels] "
    "[quite|rather|really|very|fairly] [short|simple|easy|plain|nice|clear][ here| today| to me|]. ",
    "[We|You|I|They] [can|should|must|may] [now|just|simply|calmly|quickly|safely] "
    "[count|track|follow|note|check|watch] [all|these|those|the] [little|nice|fine|small|old|new] "
    "{things}[ again| here| once more|]. ",
    "[Such|These|Those|All|Some] [nice|fine|small|old|new|pretty] {things} "
    "[come|go|move|change|arrive|vanish] [often|quickly|slowly|now|daily|soon][ here| again|]. ",
    "[Good|Fine|Nice|Okay|Right|Yes|Great], [next|now|then|so|here] [comes|follows|is] "
    "[another|one|the|a new] [step|part|change|event|line][ here| again| too|]. ",
)
START = (
    "[{who} [starts|begins] with {a} {things}|"
    "[At first|In the beginning|At the start] [there are|{who} has|we have] {a} {things}|"
    "The [first|starting] [number|count] is {a}|"
    "We [know|read|are told] that {who} [has|had] {a} {things}]. "
)
PACKED = (
    "[{k} times {n} [is|makes|gives]|"
    "[With|Since there are] {k} of them and {n} in each, [we have|that makes|there are]|"
    "[Multiply|We multiply] {k} by {n}[ first|], which [is|gives]] {k} * {n} = {a}[ {things}|]. "
)
ADDED = (
    "[[Then|Next|After that|Now] {he} [gets|gains|receives] {b}[ more|]|"
    "[Another|Then another] {b} [come in|are added|join]|"
    "[We add|Adding|Add] the {b} [new ones|more|extra {things}]|"
    "With {b} more [on top|coming in|to count]]"
    "[, so [we have|that is|it is]|[, which| and that] [makes|gives]|:] {a} + {b} = {c}"
    "[ {things}| now| in total|]. "
)
TAKEN = (
    "[[Then|Next|After that|Now] {b} [are gone|go away|leave|are lost]|"
    "[Taking|Take|We take] [away|off] [the|those] {b}|"
    "{he} [no longer has|parts with|gives up] {b}[ of them|]|"
    "[Minus|Without|Less] the {b} [that went|gone ones|lost {things}]]"
    "[, so [we have|that is|it is]|[, which| and that] [leaves|gives]|:] {a} - {b} = {c}"
    "[ {things}| now| left|]. "
)
CLOSE = (
    "[So|Therefore|Thus|In the end|Finally|Hence|That means], "
    "[{who}|{he}] [has|is left with|ends up with|now has|must have] \\boxed{{{total}}}"
    "[ {things}|][ now| in the end|]."
)


@dataclass
class StoriesSettings:
    """The command line."""

    out: str = flag("runs/stories", "directory for the files")
    seed: int = flag(0, "seed of all that is drawn", **SEEDS)
    largest: int = flag(20, "largest number of things at the start or added", least=5)


def say(rng: np.random.Generator, text: str, **known) -> str:
    """The text with every [choice|of words] made and every {name} filled in.

    >>> say(np.random.default_rng(0), "{who} [has|owns] {a}[ things| [old|new] things]", who="Ben", a=3)
    'Ben owns 3 new things'
    """
    while "[" in text:
        text = re.sub(r"\[([^][]*)]", lambda found: rng.choice(found[1].split("|")), text)
    return text.format(**known)


def draw_story(rng: np.random.Generator, largest: int) -> tuple[str, list, str]:
    """(problem, what its solutions say, answer), with numbers up to about `largest`."""
    he, friend_is = rng.choice(list(PEOPLE), 2)
    who, friend = rng.choice(PEOPLE[he].split()), rng.choice(PEOPLE[friend_is].split())
    while friend == who:
        friend = rng.choice(PEOPLE[friend_is].split())
    him, his = {"she": ("her", "hers"), "he": ("him", "his")}[he]
    known = dict(who=who, friend=friend, he=he, him=him, his=his, things=rng.choice(THINGS.split()))

    if rng.random() < 1 / 3:
        k, n = rng.integers(2, 10, 2).tolist()
        total = k * n
        told = [(PACKS, known | dict(k=k, n=n))]
        solved = [(PACKED, known | dict(k=k, n=n, a=total))]
    else:
        total = int(rng.integers(5, largest + 1))
        told = [(BEGINNINGS, known | dict(a=total))]
        solved = [(START, known | dict(a=total))]
    while len(told) < (2 if told[0][0] is PACKS else 3):
        is_more = rng.random() < 0.5 or total < 4
        b = int(rng.integers(2, largest if is_more else total))
        then = total + b if is_more else total - b
        numbers = known | dict(a=total, b=b, c=then)
        told.append((MORE if is_more else LESS, numbers))
        solved.append((ADDED if is_more else TAKEN, numbers))
        total = then
    solved.append((CLOSE, known | dict(total=total)))
    sentences = [say(rng, rng.choice(texts), **numbers) for texts, numbers in told]
    problem = " ".join([*sentences, say(rng, QUESTION, **known)])
    return capitals(problem), solved, str(total)


def solve(rng: np.random.Generator, solved: list) -> str:
    """A worked solution. Called again, it finds other words."""
    found = []
    for text, numbers in solved:
        if rng.random() < REMARKING:
            found.append(say(rng, rng.choice(REMARKS), **numbers))
        found.append(say(rng, text, **numbers))
    return capitals("".join(found))


def capitals(text: str) -> str:
    """The text with a capital letter at the start of every sentence."""
    return re.sub(r"(^|[.?!] )([a-z])", lambda found: found[1] + found[2].upper(), text)


def write_files(s: StoriesSettings) -> None:
    """The FILES in --out. A problem is in one of them only."""
    rng = np.random.default_rng(s.seed)
    seen = set()
    out = Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, count in FILES.items():
        lines = []
        while len(lines) < count:
            problem, solved, answer = draw_story(rng, s.largest)
            if problem in seen:
                continue
            seen.add(problem)
            if name == "sft" and len(lines) % 2:
                problem = shown(problem, solve(rng, solved))
            record = {"problem": problem, "solution": solve(rng, solved), "answer": answer}
            lines.append(json.dumps(record) + "\n")
        write_text(out / f"{name}.jsonl", "".join(lines))


def shown(problem: str, solution: str) -> str:
    """The teacher's prompt, as far as the instruction that the student's prompt has, too."""
    content = teacher.teacher_messages(problem, solution)[0]["content"]
    return content.removesuffix(f" {teacher.INSTRUCTION}")


def main() -> None:
    with one_line_errors(PROGRAM, "stopped"):
        write_files(parse(StoriesSettings, sys.argv[1:], __doc__))


if __name__ == "__main__":
    main()
