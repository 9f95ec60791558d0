"""What an evaluation leaves on disk: samples.jsonl, written as samples come, and results.json,
written around them; and completions that another engine left there."""

import json
from collections import defaultdict
from pathlib import Path

from support.checkpoint import append_jsonl, read_jsonl, write_json, write_text
from support.data import Problem, read_utf8
from support.distributed import Ranks
from support.errors import DAMAGED, InputError, reason
from support.flags import flag_name
from support.sampling import Rollout

ROW = {
    "checkpoint": [str],
    "data": [str],
    "line": [int],
    "sample": [int],
    "gold": [str],
    "answer": [str, type(None)],
    "correct": [bool],
    "finished": [bool],
    "tokens": [int],
}  # types of what figures are made of
MAY_CHANGE_ON_RESUME = {"out", "resume", "slots", "cuda_graphs"}


class SampleLog:
    """The rows of an evaluation. Under torchrun every rank appends to a file of its own, until
    `close` joins them."""

    def __init__(self, out: Path, settings: dict, ranks: Ranks):
        """Nothing is written yet, but with `resume` among the settings the files of an earlier
        start are joined."""
        self.out = out
        self.settings = settings
        self.ranks = ranks
        self.fingerprint = {}
        self.found = []
        self.samples, self.results = out / "samples.jsonl", out / "results.json"
        self.files = f"samples  {self.samples}\nresults  {self.results}"
        self.own = out / f"samples.rank{ranks.rank}.jsonl" if ranks.distributed else self.samples
        # rows of an earlier start, by checkpoint and data, then by line and sample
        self.graded = defaultdict(dict)
        if settings.get("resume"):
            self._read_settings()
            ranks.together(lambda: self._write([]) if ranks.rank == 0 else None)
            read_jsonl(self.samples, self._take)

    def begin(self, fingerprint: dict[str, str]) -> None:
        """To be called before what these files are for is sampled; InputError if an earlier start
        had other ones."""
        for name, found in fingerprint.items():
            if self.fingerprint.setdefault(name, found) != found:
                raise InputError(
                    f"{name}: not what it was when the evaluation began: put that back, or "
                    "choose another --out"
                )
        self._write_results(self.found)

    def append(self, row: dict) -> None:
        append_jsonl(self.own, [row])

    def close(self, rows: list[dict], results: list[dict]) -> None:
        """`rows`: all of all ranks, in their final order."""
        if self.ranks.rank == 0:
            self._write(rows)
        self._write_results(results)
        self.ranks.barrier()

    def _read_settings(self) -> None:
        try:
            earlier = json.loads(self.results.read_text())
            before, self.fingerprint = dict(earlier["settings"]), dict(earlier["fingerprint"])
            self.found = list(earlier["results"])
        except (OSError, *DAMAGED) as error:
            raise InputError(
                f"{self.results}: no evaluation that can be resumed here ({reason(error)}): "
                "check --out, or leave --resume out"
            ) from None
        changed = [
            f"{flag_name(key)} was {before.get(key)}"
            for key, value in self.settings.items()
            if key not in MAY_CHANGE_ON_RESUME and before.get(key) != value
        ]
        if changed:
            raise InputError(
                f"{self.out}: --resume with changed settings ({', '.join(changed)}): repeat the "
                "flags of the first start, or choose another --out"
            )

    def _take(self, row: dict) -> None:
        if wrong := [name for name, kinds in ROW.items() if type(row[name]) not in kinds]:
            raise ValueError(f"{wrong[0]} is {row[wrong[0]]!r}")
        self.graded[row["checkpoint"], row["data"]][row["line"], row["sample"]] = row

    def _write(self, rows: list[dict]) -> None:
        """samples.jsonl anew, from `rows` or, without them, from what all processes have written so
        far."""
        parts = sorted(self.out.glob("samples.rank*.jsonl"))
        for path in [self.samples, *parts] if not rows else []:
            if path.exists():
                read_jsonl(path, rows.append)
        write_text(self.samples, "".join(json.dumps(row) + "\n" for row in rows))
        for path in parts:
            path.unlink()

    def _write_results(self, results: list[dict]) -> None:
        if self.ranks.rank == 0:
            write_json(
                self.results,
                {"settings": self.settings, "fingerprint": self.fingerprint, "results": results},
            )


def read_completions(path: str, data: str, problems: list[Problem], pass_over: bool) -> list[dict]:
    """The rows of samples.jsonl for the completions in a file, as many for each of the problems,
    which are from `data`.

    A line has `completion` or `text`; `line`, a line of `data`, or the same `problem`; perhaps
    `finished` and `tokens`. Those of other problems are an error, or passed over.
    """
    read_utf8(Path(path))  # names what is wrong with the file as a whole
    problem_of = {problem.line: problem for problem in problems} | {
        p.problem.strip(): p for p in problems
    }
    rows_of, sources = defaultdict(list), set()

    def take(row: dict) -> None:
        text = row.get("completion", row.get("text"))
        finished = row.get("finished", True)
        tokens = row.get("tokens")
        asked = str(row.get("problem")).strip()
        problem = problem_of.get(row.get("line", asked))
        if problem is None and pass_over:
            return
        if (
            problem is None
            or "line" in row
            and "problem" in row
            and problem.problem.strip() != asked
        ):
            raise ValueError(
                f"{data} has no such line, counted from 1, or no such problem, or they disagree"
            )
        if (
            not isinstance(text, str)
            or type(finished) is not bool
            or (tokens is not None and not (type(tokens) is int and 0 < tokens < 2**53))
        ):
            raise ValueError(
                "completion must be text, finished true or false, tokens a whole number above 0"
            )
        sources.add((row.get("checkpoint"), row.get("data")))
        if len(sources) > 1:
            raise ValueError(
                "another checkpoint or data file than before: put them into files of their own"
            )
        place = {"checkpoint": path, "data": data, "sample": len(rows_of[problem.line])}
        graded = Rollout([], [], finished, problem, [], text).grade()
        rows_of[problem.line].append(place | graded.as_json() | {"tokens": tokens})

    read_jsonl(Path(path), take, may_be_cut=False)
    if not rows_of:
        raise InputError(f"{path}: no completion in this file: it needs one JSON object per line")
    most = max(map(len, rows_of.values()))
    for line, count in ((problem.line, len(rows_of[problem.line])) for problem in problems):
        if count < most:
            raise InputError(
                f"{path}: {count} completions of the problem in line {line} of {data}, {most} of "
                "another: all problems need the same number"
            )
    return [row for problem in problems for row in rows_of[problem.line]]
