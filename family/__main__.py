"""EGRSD's neighbours: other methods on the same rollouts and the same teacher pass, and ablations
of EGRSD.

    python -m family --method opsd                                          the toy on a laptop CPU
    torchrun --standalone --nproc-per-node=8 -m family --method opsd --model Qwen/Qwen3-4B --data openthoughts.jsonl
    python -m family --method opsd --explain                                what it is, brings and costs
    python -m family --method egrsd --teacher-context answer                EGRSD with another teacher

The step is train.py's, and so are all other flags; docs/family.md has a table of the methods.
"""

import sys

import family
import train
from family.neighbour import Neighbour
from support import run, settings
from support.settings import Settings


def parse_arguments(argv: list[str]) -> tuple[Settings, bool, type[train.Trainer]]:
    """(settings, resume?, whose step it is) from the command line."""
    s, resume = settings.parse(argv, __doc__, family)
    settings.check(s)
    family.check(s)
    return s, resume, Neighbour if family.is_used(s) else train.Trainer


def main() -> None:
    with run.one_line_errors(
        "python -m family", "interrupted before training began, nothing was written"
    ):
        train.train(*parse_arguments(sys.argv[1:]))


if __name__ == "__main__":
    main()
