"""The files of an evaluation: samples.jsonl, written sample by sample, and results.json. Also reads
the completions that another engine wrote."""

import json
from collections import defaultdict
from pathlib import Path

from support.checkpoint import append_jsonl, read_jsonl, write_json, write_text
from support.distributed import Ranks
from support.errors import DAMAGED, InputError, reason
from support.flags import flag_name
from support.sampling import Rollout

MAY_CHANGE_ON_RESUME = {"out", "resume", "slots", "cuda_graphs"}


class SampleLog:
    """The records of an evaluation. Under torchrun every rank appends to a file of its own, until
    `close` joins them."""

    def __init__(self, out: Path, settings: dict, ranks: Ranks):
        """With `resume` among the settings, read and join the files of an earlier start. Nothing
        else is written yet."""
        self.out = out
        self.settings = settings
        self.ranks = ranks
        self.fingerprint = {}
        self.found = []  # results of an earlier start
        self.samples = out / "samples.jsonl"
        self.results = out / "results.json"
        self.own = out / f"samples.rank{ranks.rank}.jsonl" if ranks.distributed else self.samples
        # records of an earlier start, by checkpoint, data, line and sample
        self.graded = {}
        if settings.get("resume"):
            self._read_settings()
            ranks.together(self._read_samples)
            self._write_samples(self.graded.values())
            ranks.barrier()

    def begin(self, fingerprint):
        """Call it before sampling from a model, with the digests of the files it needs. InputError
        if an earlier start had other files."""
        for name, found in fingerprint.items():
            if self.fingerprint.setdefault(name, found) != found:
                raise InputError(
                    f"{name}: not what it was when the evaluation began: put that back, or "
                    "choose another --out"
                )
        self._write_results(self.found)

    def append(self, record):
        append_jsonl(self.own, [record])

    def close(self, records, results):
        """`records`: those of all ranks, in their final order."""
        self._write_samples(records)
        self._write_results(results)
        self.ranks.barrier()

    def _read_settings(self):
        try:
            earlier = json.loads(self.results.read_text())
            before = earlier["settings"]
            self.fingerprint = earlier["fingerprint"]
            self.found = earlier["results"]
        except (OSError, *DAMAGED) as error:
            raise InputError(
                f"{self.results}: no evaluation that can be resumed here ({reason(error)}): "
                "check --out, or leave --resume out"
            ) from None
        for key in ("date", "max_new_tokens"):  # found out at the first start
            self.settings[key] = self.settings[key] or before.get(key)
        changed = [
            f"{flag_name(key)} was {before.get(key)}"
            for key, value in self.settings.items()
            if key not in MAY_CHANGE_ON_RESUME and before.get(key) != value
        ]
        if changed:
            raise InputError(
                f"--resume with changed settings ({', '.join(changed)}): repeat the flags of the "
                "first start, or choose another --out"
            )

    def _read_samples(self):
        for path in [self.samples, *self.out.glob("samples.rank*.jsonl")]:
            if path.exists():
                read_jsonl(path, self._take)

    def _take(self, record):
        if not isinstance(record["finished"], bool):  # the text "false" would count as true
            raise ValueError("finished must be true or false")
        self.graded[record["checkpoint"], record["data"], record["line"], record["sample"]] = record

    def _write_samples(self, records):
        if self.ranks.rank == 0:
            write_text(self.samples, "".join(json.dumps(record) + "\n" for record in records))
            for path in self.out.glob("samples.rank*.jsonl"):
                path.unlink()

    def _write_results(self, results):
        if self.ranks.rank == 0:
            write_json(
                self.results,
                {"settings": self.settings, "fingerprint": self.fingerprint, "results": results},
            )


def read_completions(path, data, problems, pass_over) -> list[dict]:
    """The completions in the file `path`, as records of samples.jsonl, in the order of `problems`,
    which are from the file `data`.

    A line has `completion` or `text`, and `line`, a line of `data`, or the same `problem`. It may
    have `finished`, `tokens` and `prompt_end`. InputError for completions of other problems, unless
    `pass_over`; if the problems do not all have the same number of completions; if the lines are from
    several checkpoints.
    """
    known = {}
    for problem in problems:
        known[problem.line] = problem
        known[problem.problem.strip()] = problem
    found = defaultdict(list)  # records by line
    sources = set()

    def take(record):
        asked = str(record.get("problem")).strip()
        problem = known.get(record.get("line", asked))
        if problem is None and pass_over:
            return
        if problem is None or "problem" in record and asked != problem.problem.strip():
            raise ValueError(
                f"{data} has no such line, counted from 1, or no such problem, or they disagree"
            )
        text = record.get("completion", record.get("text"))
        prompt_end = record.get("prompt_end", "")
        finished = record.get("finished", True)
        tokens = record.get("tokens")
        is_count = tokens is None or type(tokens) is int and tokens > 0
        are_texts = isinstance(text, str) and isinstance(prompt_end, str)
        if not are_texts or not isinstance(finished, bool) or not is_count:
            raise ValueError(
                "completion must be text, prompt_end as well, finished true or false, tokens a "
                "whole number above 0"
            )
        sources.add((record.get("checkpoint"), record.get("data")))
        if len(sources) > 1:
            raise ValueError(
                "another checkpoint or data file than before: put them into files of their own"
            )
        own = found[problem.line]
        one = Rollout([], [], finished, problem, [], prompt_end=prompt_end)
        graded = one.grade(text).as_json()
        own.append(
            {"checkpoint": path, "data": data, "sample": len(own), **graded, "tokens": tokens}
        )

    read_jsonl(Path(path), take, may_be_cut=False)
    if not found:
        raise InputError(f"{path}: no completion in this file: it needs one JSON object per line")
    most = max(map(len, found.values()))
    records = []
    for problem in problems:
        own = found[problem.line]
        if len(own) < most:
            raise InputError(
                f"{path}: {len(own)} completions of the problem in line {problem.line}, {most} of "
                "another: all problems need the same number"
            )
        records += own
    return records
